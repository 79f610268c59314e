"""The tensor operations of a view as machine code for a V100 and an H100.

Kernels and registers are counted, and nothing spills.
"""

from __future__ import annotations

import json

import pytest

from tests.fake_gpu import on_fake_gpu
from tests.gpuless.budget import hold, rewrite


@pytest.mark.slow
def test_fused_operations_take_the_budget_s_kernels_and_registers_and_never_spill(tmp_path):
    found = json.loads(on_fake_gpu("-m", "tests.gpuless.lowering", tmp_path))
    planted = found.pop("planted")
    assert planted["kernels"] == 2 and planted["registers"] == 24 and planted["spilled_bytes"] > 0
    rewrite("lowered", found)
    for name, costs in found.items():
        assert costs["sm_70_spilled_bytes"] == costs["sm_90_spilled_bytes"] == 0
        hold("lowered", name, costs)
