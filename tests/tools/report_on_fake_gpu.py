"""`tools.gpu_report` as a program for the fake CUDA runtime, on which values are garbage.

Functions that depend on values are replaced. Processes that the report starts replace them too,
because multiprocessing imports this file there. The environment names the file of tests to run.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from rsa_fast.evaluation import evaluate, linear
from rsa_fast.insight import planning
from rsa_fast.tools.gpu_report import checks, loops
from rsa_fast.tools.gpu_report.__main__ import main
from rsa_fast.training import engine

in_process = loops.in_process

engine.Loop.stop_at_fault = lambda *_: None  # Losses and weights may not be finite.
# These count rows on the GPU.
evaluate.gather_rows = lambda rows: rows
evaluate.gather_features = lambda part, device: (part[0].to(device).float(), part[1].to(device))
linear.fast = lambda *_: {"linear_top1": 0.0}  # It divides its features by their values.
torch.equal = lambda *_: True  # It asks whether an evaluation changed the encoder.
checks.gpu_row = lambda *_: "v100-32g"  # The fake card pretends to be one.
checks.TESTS = Path(os.environ["REPORT_TESTS"])
planning.decode_images_per_s = lambda *_: 500.0  # It is a measurement.
planning.efficiency = lambda *_: (0.5, "given")  # It traces a large network.
os.fsync = lambda _: None  # No disk is tested here.
if find_spec("nvidia.dali"):
    from tests.gpuless import dali_stand_in

    dali_stand_in.install()
    checks.check_dali = loops.check_dali = lambda: None
# Processes take time to start, so only one of the two modes starts them.
loops.in_process = lambda *run: (in_process if run[0] else loops.train_runs)(*run)

if __name__ == "__main__":
    sys.exit(main())
