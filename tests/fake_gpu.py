"""Run a program on fake GPUs: torch's real CUDA code on a CUDA runtime that computes nothing.

This checks code paths, devices, dtypes, memory and counts, and that the host never waits. It cannot
check values or times. tests/gpuless/README.md describes the runtime and its settings. To run it by
hand:

    .venv/bin/python -m tests.fake_gpu -m MODULE ARGUMENTS...
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpuless.ghost import build
from tests.helpers import ROOT


def missing() -> str | None:
    """Return what the fake runtime needs and this machine lacks, or None."""
    if (system := (platform.system(), platform.machine())) != ("Linux", "x86_64"):
        return f"the fake CUDA runtime is for Linux on x86_64, not for {' on '.join(system)}"
    if not torch.version.cuda:
        return f"torch {torch.__version__} is built without CUDA"
    for tool in ("g++", "nm"):
        if not shutil.which(tool):
            return f"no {tool} to build the fake CUDA runtime with"
    if not build.include_folders():
        return "no headers to build the fake CUDA runtime with: nvidia-cuda-runtime has them"
    return None


def environment() -> dict[str, str]:
    """Return the environment variables of a process that runs on the fake runtime."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "LD_PRELOAD": str(build.build())}
    if folder := os.environ.get("RSA_FAST_GPU_COVERAGE"):  # see gpuless/gpu_lines.py
        own["COVERAGE_FILE"] = str(Path(folder).absolute() / "data")
        own["COVERAGE_PROCESS_START"] = str(ROOT / "tests" / "gpuless" / "coverage.ini")
    return os.environ | own


def on_fake_gpu(*program: object) -> str:
    """Return what `python PROGRAM...` prints on a fake GPU. Skip the test if that cannot work."""
    if reason := missing():
        pytest.skip(reason)
    command = [sys.executable, *map(str, program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment())
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


if __name__ == "__main__":
    if reason := missing():
        sys.exit(reason)
    os.execve(sys.executable, [sys.executable, *sys.argv[1:]], environment())
