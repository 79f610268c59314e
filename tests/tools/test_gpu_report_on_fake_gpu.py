"""`make gpu-report` from its first call to its last, on a fake GPU."""

from __future__ import annotations

import json
import re

import pytest

from rsa_fast.methods import METHODS
from tests.fake_gpu import on_fake_gpu
from tests.helpers import write_folder
from tests.tiny_runs import set_options

# The keys of each part's rows, and reasons why a row may be skipped on a fake V100.
KEYS = {
    "values": {"images", "weak_mean", "weak_max", "aggressive_mean", "aggressive_max"},
    "sync": {"batch_size", "precision", "steps"},
    "memory": {"recipe", "allocated_gib", "reserved_gib", "predicted_gib", "error_pct"},
    "step": {"recipe", "batch_size", "precision", "step_ms", "low_ms", "high_ms", "images_per_s"},
    "loop": {"recipe", "images_per_s", "wait_pct", "views_per_s", "views_per_core_s"},
    "resident": {"recipe", "step_ms", "loop_ms", "loop_efficiency", "predicted_per_s"},
    "resume": {"steps", "resumed_gap", "again_gap"},
    "learn": {"minutes", "knn_top1"},
}
REASONS = r"No module named '(nvidia|ffcv).*|the card does not support bf16"
# W-MSE and SwAV do not take a batch of 8 images.
REASONS += r"|the recipe has faults:\n  batch_size = 8 is not a multiple of 256: .*"
REASONS += r"|the recipe has faults:\n  warmup_start_lr = 0.3 is above the peak learning rate .*"


@pytest.mark.slow
def test_every_part_runs_on_a_fake_gpu(tmp_path, monkeypatch):
    """Values and times are garbage there. What counts is that no call fails.

    DALI has its own CUDA runtime, so the stand-in of tests/gpuless replaces it.
    """
    tests, out = tmp_path / "test_planted.py", tmp_path / "gpu.json"
    tests.write_text("def test_good():\n    pass\n\n\ndef test_bad():\n    assert not 'good'\n")
    monkeypatch.setenv("REPORT_TESTS", str(tests))
    # Compiling takes minutes and needs a real driver.
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    data = write_folder(tmp_path / "small", {"train": 20, "test": 10})
    program = ("-m", "tests.tools.report_on_fake_gpu")
    small = ["--batch-sizes", 2, "--images", 8, "--repeats", 2, "--minutes", 30]
    fields = {"arch": "resnet18", "width": 8, "views.size_px": 32, "batch_size": 8, "epochs": 2}
    sets = set_options(fields)
    table = on_fake_gpu(*program, "--out", out, "--data", data, *small, *sets)

    parts = json.loads(out.read_text())["parts"]
    assert {name: record["state"] for name, record in parts.items()} == dict.fromkeys(
        ("machine", *KEYS), "ran"
    )
    for name, keys in KEYS.items():
        tests_row = parts[name]["rows"].pop(str(tests), None)
        assert (name == "values") == (tests_row is not None and tests_row["passed"] == 1)
        rows = parts[name]["rows"].values()
        skipped = [row["skipped"] for row in rows if "skipped" in row]
        assert all(re.fullmatch(REASONS, reason, re.S) for reason in skipped), name
        measured = [row for row in rows if "skipped" not in row]
        assert measured and all(keys <= row.keys() for row in measured), name
        assert all(f"| {row['case']} |" in table for row in measured), name
        assert "left_out" not in parts[name]
    assert {f"{method}, native" for method in METHODS} <= parts["sync"]["rows"].keys()
    assert {"resident", "native", "native, all on the host"} <= parts["values"]["rows"].keys()
    modes = ("rsa, eager", "byol, eager", "supervised, eager", "rsa, compiled", "byol, compiled")
    assert {*modes, "supervised, compiled"} == parts["step"]["rows"].keys()
    # Memory is real there, and every tensor's size is that of its recipe.
    memory = [row for row in parts["memory"]["rows"].values() if "error_pct" in row]
    assert len(memory) == 6 and all(abs(row["error_pct"]) < 2 for row in memory)
    assert "predicted_ms" in parts["step"]["rows"]["rsa, eager"]
    assert "predicted_per_s" in parts["loop"]["rows"]["native"]
    assert len(parts["resume"]["rows"]) == 2 and len(parts["learn"]["rows"]) == 3
    assert table.startswith("### Fake V100") and "`plan`: v100-32g" in table
