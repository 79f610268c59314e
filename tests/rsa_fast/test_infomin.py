"""InfoMin Aug. It is compared with MoCo's loss. Its jigsaw is tested in test_pirl.py."""

from __future__ import annotations

import copy

import pytest
import torch

from rsa_fast.methods.method import info_nce, patch_orders, unit
from rsa_fast.recipes import build_recipe
from tests.rsa_fast.small_methods import BATCH, NOW, embed_by_loops, rows, small, some_batch

VIEWS = ("aggressive_1", "aggressive_2", "patches_3")


def test_both_queries_find_one_key_in_one_snapshot_of_the_queue_which_then_gets_the_keys():
    method, batch = small("infomin"), some_batch(names=VIEWS)
    probe = copy.deepcopy(method)
    q = unit(probe.online(batch.aggressive_1))
    orders = patch_orders(method.seed, NOW, BATCH)
    w = embed_by_loops(probe.encoder, probe.jigsaw, batch.view("patches_3"), orders)
    k = unit(probe.target(batch.aggressive_2)).detach()
    image, jigsaw = (info_nce(x, k, probe.queue, 0.15) for x in (q, w))
    expected = (image + jigsaw) / 2
    expected.backward()
    loss = method(batch, NOW)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss.parts["image"].item() == pytest.approx(image.item(), abs=1e-12)
    assert loss.parts["jigsaw"].item() == pytest.approx(jigsaw.item(), abs=1e-12)
    torch.testing.assert_close(method.queue[:, :BATCH].T, k, rtol=0, atol=1e-12)
    assert torch.equal(method.queue[:, BATCH:], probe.queue[:, BATCH:])
    assert method.pointer == BATCH
    for (name, p), other in zip(method.named_parameters(), probe.parameters(), strict=True):
        if name.startswith("target"):
            assert p.grad is None
        else:
            assert p.grad.abs().sum() > 0
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_the_target_has_no_jigsaw_and_follows_the_rest():
    method = small("infomin")
    names = {name.split(".")[0] for name, _ in method.named_parameters()}
    assert names == {"online", "target", "jigsaw"}
    before = [p.clone() for p in method.target.parameters()]
    with torch.no_grad():
        for p in method.online.parameters():
            p.add_(1)
    method.after_step({"tau": 0.75})
    for old, p in zip(before, method.target.parameters(), strict=True):
        torch.testing.assert_close(p, old + 0.25, rtol=0, atol=1e-12)


def test_gradients_by_queries_equal_finite_differences_and_keys_have_none():
    q, k, queue = rows(4, 3, 0).requires_grad_(), rows(4, 3, 1), rows(7, 3, 2).T
    assert torch.autograd.gradcheck(lambda q: info_nce(q, k, queue, 0.15), (q,))
    keys, every = small("infomin").keys(some_batch(names=VIEWS).aggressive_2)
    assert not keys.requires_grad and not every.requires_grad


def test_recipes_have_rand_augment_on_images_and_not_on_the_jigsaw():
    for dataset in ("cifar10", "imagenet1k"):
        recipe = build_recipe(dataset, "infomin")
        assert [crop.rand_augment for crop in recipe.views.crops] == [True, True, False]
        assert recipe.temperature == 0.15 and recipe.views.hue == 0.2
