"""The costs of the real training loop of every ImageNet-1K recipe are those of the budget.

The loop runs on one of eight fake GPUs with 256 images each.
"""

from __future__ import annotations

import json

import pytest

from rsa_fast.methods import METHODS
from tests.fake_gpu import on_fake_gpu
from tests.gpuless.budget import hold, rewrite


@pytest.fixture(scope="module")
def costs(folder, tmp_path_factory):
    """Return `Watch.found` of the third step, by case."""
    place = tmp_path_factory.mktemp("imagenet_steps")
    (place / "train").symlink_to(folder / "train")
    costs = json.loads(on_fake_gpu("-m", "tests.gpuless.programs", "imagenet_steps", place))
    rewrite("imagenet_step_per_gpu", costs)
    return costs


@pytest.mark.slow
@pytest.mark.parametrize("case", [*METHODS, "rsa recomputed"])
def test_a_step_waits_for_nothing_and_costs_what_the_budget_says(costs, case):
    assert costs[case]["faults"] == {}
    hold("imagenet_step_per_gpu", case, costs[case])
