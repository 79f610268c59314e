"""Functions of tests on several ranks, which `run_ranks` starts as processes."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist

from rsa_fast.distributed import rank, world_size
from tests.forks import fork

PATIENCE_S = 240


def run_ranks(work: Callable, ranks: int, folder: Path) -> list:
    """Return the results of `work` on all ranks. A function with a parameter gets `folder`."""
    logs = [folder / f"{work.__name__}_{me}.log" for me in range(ranks)]
    processes = [fork(run_rank, work, me, ranks, folder, log=log) for me, log in enumerate(logs)]
    try:
        for process, log in zip(processes, logs, strict=True):
            process.join(PATIENCE_S)
            assert process.exitcode == 0, log.read_text()
    finally:
        for process in processes:  # After a failure, the other ranks would wait for this one.
            process.kill()
    return [
        torch.load(folder / f"{work.__name__}_{me}.pt", weights_only=False) for me in range(ranks)
    ]


def mine(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(world_size())[rank()]


def mean(x: torch.Tensor) -> torch.Tensor:
    if world_size() > 1:
        dist.all_reduce(x)
    return x / world_size()


def run_rank(work: Callable, me: int, ranks: int, folder: Path) -> None:
    name = work.__name__
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / name}.rendezvous", rank=me, world_size=ranks
    )
    result = work(folder) if signature(work).parameters else work()
    torch.save(result, folder / f"{name}_{me}.pt")
    dist.destroy_process_group()
