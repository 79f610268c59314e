"""W-MSE, compared with loops, lightly and closed forms.

Finite differences of the whole loss and two ranks are tested in test_barlow_twins.py.
"""

from __future__ import annotations

import copy
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from scipy.linalg import cholesky, solve_triangular

from rsa_fast.methods.method import build_method
from rsa_fast.methods.w_mse import division, w_mse, whiten
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import build_recipe, resolve
from rsa_fast.training.step import build_run, train_step
from tests.rsa_fast.small_methods import noise, of_embeddings
from tests.tiny_runs import NARROW

TINY = NARROW | {"batch_size": 6, "hidden_dim": 12, "out_dim": 3}
FOUR = {"views.groups": [{"name": "crops", "count": 4}]}


@pytest.mark.parametrize("views", [2, 4])
@pytest.mark.parametrize("w_iter", [1, 3])
def test_the_loss_is_that_of_every_group_and_pair_one_by_one(views, w_iter):
    h = noise(views, 12, 3) + noise(12, 3, seed=1)
    total, count = 0.0, 0
    for i in range(w_iter):
        order = division(0, 7, i, 12).tolist()
        z = np.empty(h.shape)
        for group in (order[:6], order[6:]):
            for view in range(views):
                rows = h[view, group].numpy()
                centred = rows - rows.mean(0)
                factor = cholesky(np.cov(rows.T), lower=True)
                z[view, group] = solve_triangular(factor, centred.T, lower=True).T
        for one, other in combinations(range(views), 2):
            for a, b in zip(z[one], z[other], strict=True):
                a, b = a / np.sqrt(a @ a), b / np.sqrt(b @ b)
                total, count = total + (a - b) @ (a - b), count + 1
    loss = of_embeddings("w-mse", h, step=7, w_iter=w_iter)
    assert loss.total.item() == pytest.approx(total / count, rel=1e-10)
    assert 0 < loss.total < 4


@pytest.mark.parametrize("views", [2, 4])
def test_value_and_gradient_equal_lightly_s(views):
    """With one group there is nothing to divide: lightly's divisions are random."""
    reason = "lightly is not installed: pip install lightly"
    losses = pytest.importorskip("lightly.loss.wmse_loss", reason=reason)
    ours, theirs = (noise(views, 8, 4).requires_grad_() for _ in range(2))
    loss = of_embeddings("w-mse", ours).total
    criterion = losses.WMSELoss(4, w_size=8, num_samples=views, track_running_stats=False)
    expected = criterion(theirs.flatten(0, 1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-9)


def test_whitened_embeddings_have_the_identity_as_covariance():
    h = noise(3, 2, 10, 5) @ noise(5, 5, seed=1) + 4
    z, condition = whiten(h)
    for group in z.flatten(0, 1):
        torch.testing.assert_close(torch.cov(group.T), torch.eye(5, dtype=torch.float64))
        torch.testing.assert_close(group.mean(0), torch.zeros(5, dtype=torch.float64))
        assert group.square().sum().item() == pytest.approx(9 * 5)
    true = [np.linalg.cond(np.cov(group.T)) for group in h.flatten(0, 1).numpy()]
    assert 1 <= condition <= np.mean(true)


def test_affine_maps_of_the_embeddings_do_not_matter():
    h = noise(10, 5)
    (z, _), any_map = whiten(h), noise(5, 5, seed=1)
    lower = any_map.tril()
    lower.diagonal().abs_()
    torch.testing.assert_close(whiten(h @ lower.T + 3)[0], z)
    other = whiten(h @ any_map.T - 2)[0]
    torch.testing.assert_close(other @ other.T, z @ z.T)
    assert not torch.allclose(other, z)


def test_equal_views_cost_nothing_and_opposite_ones_the_most():
    z = noise(1, 1, 8, 4)
    for second, expected in ((3 * z, 0.0), (-z, 4.0)):
        assert w_mse(torch.cat([z, second], 1)).item() == pytest.approx(expected, abs=1e-12)


def test_a_singular_covariance_gives_nan_and_no_error():
    h = noise(2, 12, 3)
    h[0, :, 2] = h[0, :, 1]  # both groups of one view
    assert of_embeddings("w-mse", h).total.isnan()
    z, _ = whiten(torch.stack([noise(6, 3), torch.zeros(6, 3)]))
    assert z[0].isfinite().all() and z[1].isnan().all()


def test_divisions_are_permutations_that_depend_on_seed_step_and_iteration_only():
    found = [division(*numbers, 64) for numbers in sorted(set(permutations((0, 0, 0, 1, 2), 3)))]
    for order in found:
        assert sorted(order) == list(range(64))
    assert len({tuple(order) for order in found}) == len(found)
    assert np.array_equal(division(3, 4, 5, 64), division(3, 4, 5, 64))
    # An image meets every other one: of 63, 31 at a time.
    met = {i for step in range(20) for i in group_of(0, division(0, step, 0, 64))}
    assert met == set(range(64))


def group_of(image: int, order: np.ndarray) -> np.ndarray:
    return next(half for half in np.split(order, 2) if image in half)


@pytest.mark.parametrize("views", [2, 4])
def test_all_crops_are_read_and_the_head_normalises_them_together(views):
    torch.manual_seed(0)
    groups = {"views.groups": [{"name": "crops", "count": views}]}
    method = build_method(build_recipe("cifar10", "w-mse", overrides=TINY | groups)).double()
    names = [f"aggressive_{i + 1}" for i in range(views)]
    assert method.reads == set(names)
    batch = Batch(torch.zeros(6), {name: noise(6, 3, 8, 8, seed=i) for i, name in enumerate(names)})
    probe = copy.deepcopy(method)
    features = [probe.online.encoder(batch.views[name]) for name in names]
    h = probe.online.projector(torch.cat(features)).view(views, 6, 3)
    loss = method(batch, {"step": 0})
    expected = of_embeddings("w-mse", h.detach())
    torch.testing.assert_close(loss.total, expected.total)
    torch.testing.assert_close(loss.embeddings, expected.embeddings)


def test_the_step_is_in_the_schedule_and_changes_the_groups():
    recipe = build_recipe("cifar10", "w-mse")
    derived = resolve(recipe, 50_000)
    assert [recipe.schedule(step, derived)["step"] for step in (0, 1, 1000)] == [0, 1, 1000]
    h = noise(2, 12, 3)
    assert of_embeddings("w-mse", h, step=0).total != of_embeddings("w-mse", h, step=1).total


def test_four_positives_train():
    fields = TINY | FOUR | {"precision": "fp32", "device": "cpu", "peak_lr": 0.01}
    fields |= {"warmup_epochs": 0, "lr_drop_epochs": []}
    run = build_run(build_recipe("cifar10", "w-mse", overrides=fields), 6)
    names = [f"aggressive_{i + 1}" for i in range(4)]
    batch = Batch(
        torch.zeros(6), {name: noise(6, 3, 8, 8, seed=i).float() for i, name in enumerate(names)}
    )
    losses = [train_step(run, batch).total.item() for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"batch_size": 64},
            "batch_size = 64 is not a multiple of 128: .* 2 for each of out_dim = 64",
        ),
        ({"batch_size": 192}, "batch_size = 192 is not a multiple of 128"),
        ({"views.groups": [{"name": "one", "count": 1}]}, "views.groups has 1 crop"),
        ({"w_iter": 0}, "w_iter = 0: Input should be greater than or equal to 1"),
    ],
)
def test_what_cannot_be_whitened_or_paired_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", "w-mse", overrides=fields)


def test_two_positives_are_the_default_and_four_are_a_setting():
    for dataset in ("cifar10", "tinyimagenet", "imagenet100", "imagenet1k", "demo"):
        assert len(build_recipe(dataset, "w-mse").views.crops) == 2
    assert len(build_recipe("cifar10", "w-mse", overrides=FOUR).views.crops) == 4
