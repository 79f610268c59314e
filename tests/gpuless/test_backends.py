"""The host's side of every backend on a GPU: nothing waits, and the right bytes arrive."""

from __future__ import annotations

import json

import pytest

from tests.fake_gpu import on_fake_gpu
from tests.gpuless.backend_cases import CASES
from tests.helpers import DALI

PROGRAM = ("-m", "tests.gpuless.backends")
LEVELS = 1e-3  # This allows for float32's rounding; the pixels are equal.


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backends")
    return json.loads(on_fake_gpu(*PROGRAM, "training", folder))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_with_a_bad_image_and_a_resume_sends_the_crops_and_never_waits(results, case):
    found = results[case]
    assert found["faults"] == {} and found["dali_waits"] == 0
    assert found["skipped"] == [True, True]
    in_memory = case in ("resident, device", "resident, turned")
    assert len(found["gaps"]) == (2 if in_memory else 4)
    # The device turns DALI's crops, but here it computes nothing.
    assert max(found["gaps"]) < LEVELS or case == "dali, turned"
    # DALI starts once for each run, and again after the bad image.
    assert found["dali_pipelines"] == (3 if case.startswith("dali") else 0)


@DALI
def test_the_stand_in_for_dali_finds_memory_given_back_early_waits_and_unknown_keywords(tmp_path):
    found = json.loads(on_fake_gpu(*PROGRAM, "planted", tmp_path))
    assert found["DaliViews"] == {"gap": pytest.approx(0, abs=LEVELS), "waits": 0}
    assert found["ReleasedEarly"]["gap"] > 50
    assert found["HostWaits"]["waits"] == 1
    assert "unexpected keyword argument 'non_blocking'" in found["UnknownKeyword"]["error"]
