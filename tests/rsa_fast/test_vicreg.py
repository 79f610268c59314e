"""VICReg, compared with loops, lightly and closed forms.

Finite differences and two ranks are tested in test_barlow_twins.py.
"""

from __future__ import annotations

import pytest
import torch

from tests.rsa_fast.small_methods import noise, of_embeddings


def test_the_loss_is_that_of_the_three_terms_one_by_one():
    z = 0.5 * noise(2, 6, 5)  # the standard deviations are below 1
    invariance = variance = covariance = 0.0
    for one, other in zip(z[0].flatten().tolist(), z[1].flatten().tolist(), strict=True):
        invariance += (one - other) ** 2 / 30
    for view in z:
        columns = [(column - column.mean()).tolist() for column in view.T]
        for i in range(5):
            for j in range(5):
                entry = sum(a * b for a, b in zip(columns[i], columns[j], strict=True)) / 5
                if i == j:
                    variance += max(0.0, 1 - (entry + 1e-4) ** 0.5) / 5 / 2
                else:
                    covariance += entry**2 / 5
    loss = of_embeddings("vicreg", z)
    expected = 25 * invariance + 25 * variance + covariance
    assert loss.total.item() == pytest.approx(expected, rel=1e-12)
    parts = {"invariance": invariance, "variance": variance, "covariance": covariance}
    assert {key: part.item() for key, part in loss.parts.items()} == pytest.approx(parts, rel=1e-12)
    weights = {"invariance_weight": 2, "variance_weight": 3, "covariance_weight": 5}
    other = of_embeddings("vicreg", z, **weights).total.item()
    assert other == pytest.approx(2 * invariance + 3 * variance + 5 * covariance, rel=1e-12)


def test_value_and_gradient_equal_lightly_s():
    reason = "lightly is not installed: pip install lightly"
    losses = pytest.importorskip("lightly.loss", reason=reason)
    ours, theirs = (noise(2, 16, 12).requires_grad_() for _ in range(2))
    loss, expected = of_embeddings("vicreg", ours).total, losses.VICRegLoss(25, 25, 1)(*theirs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-12)


def test_a_constant_output_costs_the_variance_and_nothing_else():
    constant = torch.ones(2, 8, 4, dtype=torch.float64)
    loss = of_embeddings("vicreg", constant)
    assert loss.total.item() == pytest.approx(25 * 0.99, rel=1e-12)
    assert loss.parts["invariance"] == loss.parts["covariance"] == 0


def test_equal_views_of_wide_independent_outputs_cost_the_covariance_of_chance():
    dim, images = 200, 128
    view = noise(images, dim)
    parts = of_embeddings("vicreg", torch.stack([view, view])).parts
    assert parts["invariance"] == 0
    chance = 2 * (dim - 1) / (images - 1)
    assert parts["covariance"].item() == pytest.approx(chance, rel=0.05)
    assert of_embeddings("vicreg", 2 * torch.stack([view, view])).parts["variance"] == 0


def test_a_shift_of_both_views_changes_nothing():
    z = noise(2, 8, 4)
    torch.testing.assert_close(
        of_embeddings("vicreg", z + 5).total, of_embeddings("vicreg", z).total
    )
