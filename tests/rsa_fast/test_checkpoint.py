from __future__ import annotations

import signal
import subprocess
import sys
import time

import pytest
import torch

from rsa_fast import checkpoint


def state(step: int) -> dict:
    return {"step": step, "recipe": {"seed": 0}, "method": {"w": torch.full((3,), float(step))}}


def test_a_checkpoint_comes_back_and_only_the_newest_stay(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, state(step), keep_last=2)
    assert [path.name for path in checkpoint.listed(tmp_path)] == ["step_00000010.pt", "step_00000100.pt"]
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded["step"] == 100 and torch.equal(loaded["method"]["w"], torch.full((3,), 100.0))
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("kept_bytes", [0, 100, -1])
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path, kept_bytes):
    for step in (5, 10):
        newest = checkpoint.save(tmp_path, state(step), keep_last=3)
    newest.write_bytes(newest.read_bytes()[:kept_bytes])
    with pytest.warns(UserWarning, match=r"step_00000010\.pt is damaged"):
        assert checkpoint.load_latest(tmp_path)["step"] == 5


def test_no_checkpoint_and_foreign_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no whole checkpoint"):
        checkpoint.load_latest(tmp_path)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "step_1.pt")
    with pytest.raises(ValueError, match="lacks method, recipe, step"):
        checkpoint.load(tmp_path / "step_1.pt")


WRITER = """
import sys
from pathlib import Path
import torch
from rsa_fast import checkpoint
for step in range(1, 10_000):
    weights = torch.full((4_000_000,), float(step))
    checkpoint.save(Path(sys.argv[1]), {"step": step, "recipe": {}, "method": {"w": weights}}, keep_last=2)
"""


@pytest.mark.parametrize("attempt", range(3))
def test_kill_during_a_write_leaves_a_whole_checkpoint(tmp_path, attempt):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        while not (checkpoint.listed(tmp_path) and list(tmp_path.glob("*.tmp"))):  # inside the write of a later one
            assert writer.poll() is None and time.monotonic() < deadline
            time.sleep(0.001 * attempt)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded["step"] >= 1 and (loaded["method"]["w"] == loaded["step"]).all()
