"""What GPU code costs, as counts that no change may move unnoticed; smaller ones too: room would hide the next growth.

After a change that is meant to: RSA_FAST_REWRITE_BUDGET=1 pytest tests/gpuless, and look at the difference in budget.json.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

PLACE = Path(__file__).with_name("budget.json")
MEMORY_TOLERANCE_GIB = 0.2  # all else is exact; a batch of 224 px views is .07, and Python may free it a step later


def rewrite(part: str, found: dict[str, dict]) -> None:
    """Where that is asked for, make `found` the budget's part of that name."""
    if os.environ.get("RSA_FAST_REWRITE_BUDGET"):
        budget = json.loads(PLACE.read_text()) if PLACE.is_file() else {}
        PLACE.write_text(json.dumps(budget | {"torch": torch.__version__, part: found}, indent=1) + "\n")


def hold(part: str, name: str, found: dict) -> None:
    """Fail where `found` is not what the budget's part says under `name`; skip with another torch than the budget's."""
    budget = json.loads(PLACE.read_text())
    if budget["torch"] != torch.__version__:
        pytest.skip(f"the budget is of torch {budget['torch']}, this is {torch.__version__}")
    changed = differences(found, budget[part][name])
    assert not changed, f"budget and now: {changed}; if that is meant, rewrite the budget (tests/gpuless/budget.py)"


def differences(found: dict, budget: dict) -> dict[str, tuple]:
    """The numbers that are not the budget's."""
    return {
        name: (budget[name], found[name])
        for name in budget
        if found[name] != (pytest.approx(budget[name], abs=MEMORY_TOLERANCE_GIB) if name == "peak_gib" else budget[name])
    }
