"""PIRL, and the jigsaw that InfoMin has too. They are compared with loops.

What PIRL has in common with InstDis is tested in test_inst_dis.py.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from rsa_fast.methods import method as module
from rsa_fast.methods.method import JigsawHead, negative_ids, patch_orders, unit
from rsa_fast.recipes import build_recipe
from tests.rsa_fast.small_methods import (
    BANK_IMAGES,
    IDS,
    NOW,
    bank_batch,
    bank_by_loops,
    embed_by_loops,
    loss_by_loops,
    rows,
    with_bank,
)


def test_the_image_and_its_jigsaw_find_the_same_old_row_and_the_image_moves_it():
    method, batch = with_bank("pirl"), bank_batch(IDS)
    before, probe = method.bank.clone(), copy.deepcopy(method)
    v = unit(probe.online(batch.aggressive_1)).detach()
    orders = patch_orders(method.seed, NOW, len(IDS))
    w = embed_by_loops(probe.encoder, probe.jigsaw, batch.view("patches_2"), orders).detach()
    others = negative_ids(method.seed, NOW, 4, BANK_IMAGES).tolist()
    image, jigsaw = (
        loss_by_loops(x.tolist(), before.tolist(), IDS.tolist(), 0.1, others) for x in (v, w)
    )
    loss = method(batch, NOW)
    assert loss.total.item() == pytest.approx((image + jigsaw) / 2, abs=1e-12)
    assert loss.parts["image"].item() == pytest.approx(image, abs=1e-12)
    assert loss.parts["jigsaw"].item() == pytest.approx(jigsaw, abs=1e-12)
    torch.testing.assert_close(method.bank, bank_by_loops(before, v, IDS), rtol=0, atol=1e-12)
    loss.total.backward()
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


def test_the_terms_do_not_reach_each_other_s_heads():
    """The embeddings are compared with the bank only, so the encoder is all they share."""
    method, batch = with_bank("pirl"), bank_batch(IDS)
    v = unit(method.online(batch.aggressive_1))
    patches = batch.view("patches_2").flatten(0, 1)
    w = unit(method.jigsaw(method.encoder(patches), patch_orders(0, NOW, len(IDS))))
    heads = [*method.online.projector.parameters()], [*method.jigsaw.parameters()]
    for i, loss in enumerate(method.bank_losses(batch, [v, w], NOW)):
        options = {"retain_graph": True, "allow_unused": True}
        own, other = (torch.autograd.grad(loss, head, **options) for head in (heads[i], heads[~i]))
        assert all(gradient.abs().sum() > 0 for gradient in own)
        assert all(gradient is None for gradient in other)


def test_a_change_of_order_is_one_of_the_joint_layer_s_columns():
    torch.manual_seed(0)
    head = JigsawHead(torch.nn.Linear(7, 5), out_dim=5).double()
    features, order = rows(18, 7, 0), np.array([3, 1, 8, 0, 2, 7, 6, 5, 4])
    expected = head(features, np.tile(order, (2, 1)))
    columns = torch.arange(45).view(9, 5)[torch.from_numpy(order).argsort()].flatten()
    changed = copy.deepcopy(head)
    changed.join.weight.data = head.join.weight[:, columns]
    torch.testing.assert_close(changed(features, np.tile(np.arange(9), (2, 1))), expected)
    permuted = features.view(2, 9, 7)[:, order].flatten(0, 1)
    torch.testing.assert_close(head(permuted, np.tile(np.arange(9), (2, 1))), expected)


def test_changing_the_order_of_features_equals_changing_that_of_patches():
    method, patches = with_bank("pirl"), bank_batch(IDS).view("patches_2")
    orders = patch_orders(0, NOW, len(IDS))
    in_order = np.tile(np.arange(9), (len(IDS), 1))
    permuted = torch.stack([image[order] for image, order in zip(patches, orders, strict=True)])
    found, expected = (
        copy.deepcopy(method).jigsaw(copy.deepcopy(method).encoder(x.flatten(0, 1)), order)
        for x, order in ((patches, orders), (permuted, in_order))
    )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_orders_are_permutations_of_equal_chances_for_each_image_and_step(monkeypatch):
    orders = np.concatenate([patch_orders(0, {"step": step}, 300) for step in range(3)])  # (900, 9)
    assert (np.sort(orders, 1) == np.arange(9)).all()
    assert len({tuple(order) for order in orders.tolist()}) > 890
    chances = [np.bincount(orders[:, place], minlength=9) / 900 for place in range(9)]
    assert np.abs(np.array(chances) - 1 / 9).max() < 0.05
    assert (patch_orders(1, {"step": 0}, 300) != orders[:300]).any(1).mean() > 0.99
    # Each rank draws the orders that its images would get on one rank.
    monkeypatch.setattr(module, "rank", lambda: 2)
    assert np.array_equal(patch_orders(0, {"step": 0}, 100), orders[200:300])


@pytest.mark.parametrize(("name", "crops"), [("pirl", 1), ("infomin", 2)])
def test_recipes_have_a_jigsaw_of_the_size_of_their_images(name, crops):
    for dataset, size_px in (("cifar10", 36), ("stl10", 72), ("imagenet100", 255)):
        image, jigsaw = build_recipe(dataset, name).views.groups
        assert (image.name, image.count, jigsaw.name, jigsaw.count) == ("image", crops, "jigsaw", 1)
        assert jigsaw.jigsaw and jigsaw.size_px == size_px and jigsaw.crop_area == (0.6, 1)
    groups = [
        [{"name": "crops", "count": 2}],
        [{"name": "image", "count": crops}, {"name": "jigsaw", "count": 1}],
        [{"name": "image", "count": 3}, {"name": "jigsaw", "count": 1, "jigsaw": True}],
    ]
    for bad in groups:
        fields = {"views.groups": bad, "views.size_px": 36}
        with pytest.raises(ValueError, match=rf"{name} takes {crops} of 'image' and then 1 of"):
            build_recipe("cifar10", name, overrides=fields)
