"""Functions of tests on several ranks.

`run_ranks` starts `python -m tests.rsa_fast.ranks MODULE NAME RANK WORLD_SIZE FOLDER` for each
rank. This calls the function NAME of MODULE and leaves its result in FOLDER.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist

from rsa_fast.distributed import rank, world_size
from tests.helpers import ROOT


def run_ranks(work: Callable, ranks: int, folder: Path) -> list:
    """Return the results of `work` on all ranks. A function with a parameter gets `folder`."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", __name__, work.__module__, work.__name__]
    processes = []
    for me in range(ranks):
        arguments = [*command, str(me), str(ranks), str(folder)]
        process = subprocess.Popen(arguments, env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT)
        processes.append(process)
    errors = [process.communicate(timeout=240)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(errors)
    return [
        torch.load(folder / f"{work.__name__}_{me}.pt", weights_only=False) for me in range(ranks)
    ]


def mine(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(world_size())[rank()]


def mean(x: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def main(module: str, name: str, me: int, ranks: int, folder: Path) -> None:
    work = getattr(import_module(module), name)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / name}.rendezvous", rank=me, world_size=ranks
    )
    result = work(folder) if signature(work).parameters else work()
    torch.save(result, folder / f"{name}_{me}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]))
