"""The costs of GPU code, as counts that must not change unnoticed.

A smaller count fails as well: the room that it leaves would hide the next growth. After a change
that is meant to change a count, rewrite the budget and check the difference in budget.json:

    RSA_FAST_REWRITE_BUDGET=1 .venv/bin/python -m pytest -m "" tests/gpuless

Each part of budget.json names the version of torch that it was counted with. With that version,
every count must be equal, and the memory must be equal within `MEMORY_TOLERANCE_GIB`.

With any other version, the counts in `OF_THE_MODEL`, which follow from the model and not from
torch, must still be equal, and the memory within `OTHER_TORCH_MEMORY_TOLERANCE`. Counts that depend
on torch, such as the kernels that it launches for an operation, may differ. The test then passes
with a warning that lists them.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest
import torch

PLACE = Path(__file__).with_name("budget.json")
# A batch of views of 224 px is .07 GiB, and Python may free it a step later.
MEMORY_TOLERANCE_GIB = 0.2
OTHER_TORCH_MEMORY_TOLERANCE = 0.1  # relative
OF_THE_MODEL = ("collectives", "all_reduce_bytes", "products", "peak_gib", "faults")
REWRITE = "rewrite the budget (tests/gpuless/budget.py says how)"


def rewrite(part: str, found: dict[str, dict]) -> None:
    """Make `found` the part of the budget with this name if a rewrite is requested."""
    if os.environ.get("RSA_FAST_REWRITE_BUDGET"):
        budget = json.loads(PLACE.read_text())
        budget[part] = {"torch": torch.__version__} | found
        PLACE.write_text(json.dumps(budget, indent=1) + "\n")


def hold(part: str, name: str, found: dict) -> None:
    """Fail if `found` differs from what the part of the budget has under `name`.

    Warns about the differences that another torch than the budget's may make.
    """
    budget = json.loads(PLACE.read_text())[part]
    changed, torchs_own = differences(found, budget[name]), {}
    if torch.__version__ != budget["torch"]:
        changed = differences(found, budget[name], OTHER_TORCH_MEMORY_TOLERANCE)
        torchs_own = {count: changed.pop(count) for count in changed.keys() - OF_THE_MODEL}
    assert not changed, f"budget and now: {changed}; if that is meant, {REWRITE}"
    if torchs_own:
        warnings.warn(
            f"not held, because the budget is of torch {budget['torch']} and this is "
            f"{torch.__version__}: {part}, {name}, budget and now: {torchs_own}; "
            f"to hold them with this torch, {REWRITE}",
            stacklevel=2,
        )


def differences(found: dict, budget: dict, memory_tolerance: float = 0) -> dict[str, tuple]:
    """Return the counts that differ, as pairs of the budget's and the one found.

    The memory may differ by `MEMORY_TOLERANCE_GIB` or by this share of it, whichever is more.
    """
    wanted = dict(budget)
    if peak_gib := wanted.get("peak_gib"):
        tolerance = {"abs": MEMORY_TOLERANCE_GIB, "rel": memory_tolerance}
        wanted["peak_gib"] = pytest.approx(peak_gib, **tolerance)
    return {
        name: (budget.get(name), found.get(name))
        for name in budget | found
        if found.get(name) != wanted.get(name)
    }
