from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from rsa_fast.evaluation.feature_stats import COSINE_BINS, effective_rank, feature_stats
from rsa_fast.pipelines import VIEWS, Batch


def some_batch(*views: str) -> Batch:
    generator = torch.Generator().manual_seed(0)
    made = {view: torch.randn(9, 3, 8, 8, generator=generator) for view in views}
    return Batch(torch.zeros(9), made)


@pytest.fixture
def encoder() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 12), nn.BatchNorm1d(12), nn.ReLU())


@pytest.mark.parametrize(
    ("rows", "rank"),
    [
        (torch.eye(7), 7),
        (5 * torch.eye(7)[:, :4], 4),
        (torch.ones(6, 1) * torch.tensor([0.3, -2.0, 1.0]), 1),
        (torch.zeros(4, 3), 1),
        (
            torch.diag(torch.tensor([3.0, 1.0])),
            math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
        ),
    ],
)
def test_the_effective_rank_at_closed_forms(rows, rank):
    assert effective_rank(rows) == pytest.approx(rank, rel=1e-5)


@pytest.mark.parametrize(
    ("views", "aggressive", "weak"),
    [
        (VIEWS, "aggressive_1", "weak_1"),
        (("weak_2", "aggressive_2", "aggressive_1"), "aggressive_2", "weak_2"),
        (("aggressive_1", "aggressive_2"), "aggressive_1", None),
        (("aggressive_1", "weak_2"), "aggressive_1", None),  # The crops differ: no pair.
        (("weak_1",), "weak_1", None),
    ],
)
def test_the_statistics_are_those_of_the_views_that_the_batch_holds(
    encoder, views, aggressive, weak
):
    batch = some_batch(*views)
    stats = feature_stats(encoder, batch)
    encoder.eval()
    with torch.no_grad():
        one = encoder(batch.views[aggressive]).double()
        assert stats["effective_rank"] == pytest.approx(
            effective_rank(one / one.norm(dim=1, keepdim=True)), rel=1e-4
        )
        if not weak:
            assert stats.keys() == {"effective_rank"}
            return
        other = encoder(batch.views[weak]).double()
    counts, cosines, chance = [0] * COSINE_BINS, [], []
    for i in range(9):
        cosines.append(float(one[i] @ other[i]) / float(one[i].norm() * other[i].norm()))
        chance.append(float(one[i] @ other[i - 1]) / float(one[i].norm() * other[i - 1].norm()))
        counts[min(COSINE_BINS - 1, int(COSINE_BINS * cosines[i]))] += 1
    assert stats["weak_aggressive_counts"] == counts and max(counts) < 9
    assert stats["weak_aggressive_cosine"] == pytest.approx(sum(cosines) / 9, abs=1e-6)
    assert stats["other_image_cosine"] == pytest.approx(sum(chance) / 9, abs=1e-6)


def test_equal_views_fill_the_last_bin_and_are_more_alike_than_other_images(encoder):
    batch = some_batch("weak_1")
    batch.views["aggressive_1"] = batch.weak_1
    stats = feature_stats(encoder, batch)
    assert stats["weak_aggressive_counts"] == [0] * (COSINE_BINS - 1) + [9]
    assert (
        stats["weak_aggressive_cosine"] == pytest.approx(1) and stats["other_image_cosine"] < 0.999
    )


def test_the_encoder_comes_back_as_it_was(encoder):
    before = {key: value.clone() for key, value in encoder.train().state_dict().items()}
    feature_stats(encoder, some_batch(*VIEWS))
    assert all(module.training for module in encoder.modules())
    assert all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert all(p.grad is None for p in encoder.parameters())


def test_features_that_are_not_finite_have_no_statistics(encoder):
    batch = some_batch("aggressive_1")
    batch.aggressive_1[3] = torch.nan
    assert feature_stats(encoder, batch) == {}
