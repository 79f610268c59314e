"""Training steps of small networks on a fake GPU.

No path through the code waits, and every check finds the fault that is planted for it.
"""

from __future__ import annotations

import json
import re
from importlib.util import find_spec

import pytest

from rsa_fast.methods import METHODS
from tests.fake_gpu import on_fake_gpu
from tests.gpuless.budget import differences

PROGRAMS = ("-m", "tests.gpuless.programs")
WAITS = (
    "item",
    "boolean mask",
    "waiting copy",
    "waiting copy of pinned memory",
    "copy to the host",
    "index on the host",
)
LINT = (
    "pageable-copy",
    "convolution-of-wrong-type",
    "conv-not-channels_last",
    "foreach-mixed-device",
)
BUDGET = ("products", "kernels", "copies", "all_reduce_bytes", "peak_gib")


@pytest.mark.slow
def test_no_precision_optimiser_backend_or_batchnorm_makes_the_host_wait(folder, request):
    beton = [request.getfixturevalue("beton")] if find_spec("ffcv") else []
    costs = json.loads(on_fake_gpu(*PROGRAMS, "small_steps", folder, *beton))
    assert len(costs) == 7 + len(METHODS) + len(beton)
    assert {case: found["faults"] for case, found in costs.items() if found["faults"]} == {}


def test_every_check_finds_the_fault_that_is_planted_for_it():
    costs = json.loads(on_fake_gpu(*PROGRAMS, "planted_faults"))
    sound = costs.pop("none")
    assert sound["faults"] == {} and costs.keys() == {*WAITS, *LINT, *BUDGET}
    for name in WAITS:
        assert costs[name] == {"error": "called a synchronizing CUDA operation"}, name
    for name in LINT:
        (fault,) = costs[name]["faults"]
        assert fault.startswith(name) and re.search(r"step\.py: loss.* = run\.forward\(", fault)
    for name in BUDGET:
        assert costs[name]["faults"] == {} and name in differences(costs[name], sound), name


def test_a_process_of_torchrun_takes_its_own_gpu_and_meets_the_others_by_nccl(monkeypatch):
    monkeypatch.setenv("GHOST_N", "2")
    found = json.loads(on_fake_gpu(*PROGRAMS, "process_group_of_torchrun"))
    assert found == {"backend": "nccl", "device": 1, "highest": 3}
