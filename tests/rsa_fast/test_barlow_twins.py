"""Barlow Twins, compared with loops, lightly and closed forms; gathered losses on two ranks.

`of_embeddings` gives a method the embeddings themselves in place of the images.
"""

from __future__ import annotations

import pytest
import torch

from rsa_fast.distributed import rank, world_size
from rsa_fast.methods.barlow_twins import products
from tests.rsa_fast.ranks import mean, run_ranks
from tests.rsa_fast.small_methods import noise, of_embeddings

GATHERED = {"barlow-twins": 2, "vicreg": 2, "w-mse": 3}  # and how many views each gets here


def test_the_loss_is_that_of_the_correlations_one_by_one():
    z = noise(2, 6, 5) + noise(6, 5, seed=1)
    normal = [[column - column.mean() for column in view.T] for view in z]
    normal = [[c / ((c * c).mean() + 1e-5).sqrt() for c in columns] for columns in normal]
    diagonal = off_diagonal = 0.0
    for i in range(5):
        for j in range(5):
            pairs = zip(normal[0][i].tolist(), normal[1][j].tolist(), strict=True)
            correlation = sum(a * b for a, b in pairs) / 6
            if i == j:
                diagonal += (1 - correlation) ** 2
            else:
                off_diagonal += correlation**2
    loss = of_embeddings("barlow-twins", z)
    assert loss.total.item() == pytest.approx(diagonal + 0.0051 * off_diagonal, rel=1e-12)
    assert loss.parts["diagonal"].item() == pytest.approx(diagonal, rel=1e-12)
    assert loss.parts["off_diagonal"].item() == pytest.approx(off_diagonal, rel=1e-12)


def test_value_and_gradient_equal_lightly_s():
    reason = "lightly is not installed: pip install lightly"
    losses = pytest.importorskip("lightly.loss", reason=reason)
    ours, theirs = (noise(2, 16, 12).requires_grad_() for _ in range(2))
    loss, expected = (
        of_embeddings("barlow-twins", ours).total,
        losses.BarlowTwinsLoss(0.0051)(*theirs),
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


def test_equal_views_have_no_first_term_and_scale_and_shift_do_not_matter():
    view = 10 * noise(32, 6)
    assert of_embeddings("barlow-twins", torch.stack([view, view])).parts["diagonal"] < 1e-10
    z = 10 * noise(2, 32, 6)
    moved = torch.stack([z[0] * torch.linspace(1, 3, 6) + 7, z[1] * 2 - torch.arange(6)])
    torch.testing.assert_close(
        of_embeddings("barlow-twins", moved).total,
        of_embeddings("barlow-twins", z).total,
        rtol=1e-6,
        atol=0,
    )  # but for the eps of BatchNorm


def test_independent_views_have_the_correlations_of_chance():
    dim, images = 200, 128
    parts = of_embeddings("barlow-twins", noise(2, images, dim)).parts
    assert parts["diagonal"].item() == pytest.approx(dim * (1 + 1 / images), rel=0.05)
    assert parts["off_diagonal"].item() == pytest.approx(dim * (dim - 1) / (images - 1), rel=0.05)


def test_the_diagonal_is_left_out_of_the_matrix_of_products():
    a, b = noise(7, 4), noise(7, 4, seed=1)
    matrix = a.T @ b / 3
    diagonal, others = products(a, b, 3)
    torch.testing.assert_close(diagonal, matrix.diagonal())
    matrix.fill_diagonal_(0)
    torch.testing.assert_close(others, matrix.square().sum())


# --- the losses of embeddings of the global batch


@pytest.mark.parametrize("name", GATHERED)
def test_gradients_equal_finite_differences_of_every_embedding(name):
    z = noise(GATHERED[name], 6, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: of_embeddings(name, z).total, (z,), fast_mode=True)


@pytest.mark.parametrize("name", GATHERED)
def test_the_loss_is_computed_in_float32_under_autocast(name):
    z = noise(GATHERED[name], 6, 3).bfloat16()
    expected = of_embeddings(name, z.float()).total
    with torch.autocast("cpu", torch.bfloat16):
        loss = of_embeddings(name, z)
    assert loss.total.dtype == loss.embeddings.dtype == torch.float32
    torch.testing.assert_close(loss.total, expected)


def losses_and_gradients() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The mean over the ranks of each loss, and its gradient by this rank's embeddings."""
    results = {}
    for name, views in GATHERED.items():
        whole = noise(views, 12, 3)
        z = whole.chunk(world_size(), dim=1)[rank()].clone().requires_grad_()
        total = of_embeddings(name, z).total
        total.backward()
        results[name] = mean(total.detach()), z.grad / world_size()
    return results


def test_two_ranks_have_the_losses_and_the_gradients_of_one(tmp_path):
    """The 3 dimensions do not divide equally, and W-MSE's groups have images of both ranks."""
    ranks = run_ranks(losses_and_gradients, 2, tmp_path)
    for name, (loss, gradient) in losses_and_gradients().items():
        assert gradient.abs().sum() > 0
        for result in ranks:
            torch.testing.assert_close(result[name][0], loss, rtol=1e-12, atol=0)
        both = torch.cat([result[name][1] for result in ranks], dim=1)
        torch.testing.assert_close(both, gradient, rtol=1e-10, atol=1e-14)
