"""`tools.gpu_report` as a program for the fake CUDA runtime, on which values are garbage.

What depends on values is replaced, here and in the processes that the report starts, as
multiprocessing has them import this file as well. The environment names the file of tests to run.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from rsa_fast.evaluation import evaluate, linear
from rsa_fast.insight import planning
from rsa_fast.training import engine
from tools.gpu_report import checks, loops
from tools.gpu_report.__main__ import main

in_process = loops.in_process

engine.Loop.stop_at_fault = lambda *_: None  # losses and weights that are not finite
evaluate.gather_rows = lambda rows: rows  # counts rows on the GPU
linear.fast = lambda *_: {"linear_top1": 0.0}  # parts its features by values
torch.equal = lambda *_: True  # has an evaluation changed the encoder?
checks.gpu_row = lambda *_: "v100-32g"  # what the fake card pretends to be
checks.TESTS = Path(os.environ["REPORT_TESTS"])
planning.decode_rate = lambda *_: 500.0  # a measurement
planning.efficiency = lambda *_: (0.5, "given")  # a trace of a large network
os.fsync = lambda _: None  # no disk is tested here
if find_spec("nvidia.dali"):
    from gpuless import dali_stand_in

    dali_stand_in.install()
    checks.check_dali = loops.check_dali = lambda: None
# Processes take their time to start: one of the two modes shows that they do.
loops.in_process = lambda *run: (in_process if run[0] else loops.legs)(*run)

if __name__ == "__main__":
    sys.exit(main())
