"""The budget compares all counts with its own torch, and those of the model with any torch."""

from __future__ import annotations

import json
import warnings

import pytest
import torch

from tests.gpuless import budget

COSTS = {
    "kernels": 785,
    "all_reduce_bytes": 94_048_520,
    "products": {"mm float16": 2},
    "peak_gib": 11.07,
    "faults": {},
}


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """Compare COSTS with changes to a budget of COSTS that a version of torch counted."""
    monkeypatch.setattr(budget, "PLACE", tmp_path / "budget.json")

    def hold(changes: dict, version: str) -> None:
        parts = {"step": {"torch": version, "rsa": COSTS}}
        budget.PLACE.write_text(json.dumps(parts))
        budget.hold("step", "rsa", COSTS | changes)

    return hold


@pytest.mark.parametrize("version", [torch.__version__, "0.0"])
@pytest.mark.parametrize(
    "changes",
    [
        {"all_reduce_bytes": 94_048_516},
        {"products": {"mm float16": 2, "mm float32": 1}},
        {"peak_gib": 13.1},
        {"peak_gib": 9.1},
        {"faults": {"pageable-copy: aten.copy_.default": 1}},
    ],
)
def test_with_any_torch_the_counts_of_the_model_are_held(hold, changes, version):
    with pytest.raises(AssertionError, match=f"budget and now: .*{next(iter(changes))}"):
        hold(changes, version)


@pytest.mark.parametrize("changes", [{"kernels": 784}, {"peak_gib": 11.5}, {"one more": 1}])
def test_with_the_torch_of_the_budget_every_count_is_held(hold, changes):
    with pytest.raises(AssertionError, match=f"budget and now: .*{next(iter(changes))}"):
        hold(changes, torch.__version__)


def test_with_another_torch_a_warning_lists_the_counts_that_are_not_held(hold):
    with pytest.warns(UserWarning, match=r"not held.* 0\.0 .*'kernels': \(785, 784\)"):
        hold({"kernels": 784, "peak_gib": 11.5}, "0.0")


@pytest.mark.parametrize(
    ("changes", "version"), [({"peak_gib": 11.2}, torch.__version__), ({"peak_gib": 11.5}, "0.0")]
)
def test_what_is_within_its_tolerance_passes_in_silence(hold, changes, version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hold(changes, version)


def test_a_rewritten_part_names_the_torch_it_was_counted_with(hold, monkeypatch):
    hold({}, "0.0")
    budget.rewrite("other", {"rsa": COSTS})
    assert budget.PLACE.read_text().count("torch") == 1
    monkeypatch.setenv("RSA_FAST_REWRITE_BUDGET", "1")
    budget.rewrite("other", {"rsa": COSTS})
    written = json.loads(budget.PLACE.read_text())
    assert written["step"]["torch"] == "0.0" and written["step"]["rsa"] == COSTS
    assert written["other"] == {"torch": torch.__version__, "rsa": COSTS}
