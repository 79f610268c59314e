"""Runs a program on fake GPUs: torch's real CUDA code over a CUDA runtime whose kernels compute nothing.

The launcher, `ghost PYTHON PROGRAM...`, is named by RSA_FAST_GHOST; `gpulint.py` lies in the folder above its own. It proves
code paths, devices, dtypes, memory, counts, and that the host never waits; never a value or a time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT

LAUNCHER = Path(os.environ.get("RSA_FAST_GHOST", ROOT.parent / "shared" / "tools" / "gpuless" / "ghost" / "ghost"))


def on_fake_gpu(*program: object) -> str:
    """What `python PROGRAM...` prints there; it has to end well."""
    if not LAUNCHER.is_file():
        pytest.skip("no fake CUDA runtime: set RSA_FAST_GHOST to its launcher")
    # Each worker builds the runtime for itself: two that build at once would read each other's halves
    built = Path(tempfile.gettempdir()) / f"ghost-{torch.__version__}-{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(LAUNCHER.parents[1])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "GHOST_DIR": str(built), "PYTHONPATH": paths}
    command = [str(LAUNCHER), sys.executable, *map(str, program)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
