"""One rank of a test job: `python ranks.py WORK RANK WORLD_SIZE FOLDER` calls `WORK` of this file, which leaves its result
in FOLDER. `run_ranks` starts all of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist


def run_ranks(work: str, world_size: int, folder: Path) -> list:
    """What `work` returned on every rank."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, work]
    started = [
        subprocess.Popen([*command, str(rank), str(world_size), str(folder)], env=env, stderr=subprocess.PIPE, text=True)
        for rank in range(world_size)
    ]
    errors = [process.communicate(timeout=240)[1] for process in started]
    assert not any(process.returncode for process in started), "\n".join(errors)
    return [torch.load(folder / f"{work}_{rank}.pt", weights_only=False) for rank in range(world_size)]


def mine(x: torch.Tensor) -> torch.Tensor:
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def one_step_of_every_method() -> dict[str, tuple]:
    """By method and `bn`: the loss, the gradients and the queue after one step through DDP on this rank's part."""
    from test_other_methods import some_batch
    from torch.nn.parallel import DistributedDataParallel

    from pipelines.views import Batch

    results = {}
    for name, bn, method in cases():
        method.train()
        wrapped = DistributedDataParallel(method, broadcast_buffers=False)
        batch = Batch(**{key: mine(value) for key, value in vars(some_batch()).items()})
        loss = wrapped(batch, 0.3)
        loss.total.backward()
        total = loss.total.detach().clone()
        dist.all_reduce(total)
        results[name, bn] = (total / dist.get_world_size(), gradients(method), getattr(method, "queue", None))
    return results


def cases():
    from test_other_methods import small

    from rsa_fast.recipes import METHODS

    for name in METHODS:
        yield name, "sync", small(name, bn="sync")
    for name in ("moco", "ressl", "rsa"):
        yield name, "split:2", small(name, bn="split:2")


def gradients(method) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in method.named_parameters() if p.grad is not None}


def sync_batchnorm() -> list[tuple]:
    """Outputs, input gradients and running statistics of this rank's part, for 2-D and 4-D inputs, affine or not."""
    from rsa_fast.syncbn import convert_batchnorm

    results = []
    for layer, x, weight in batchnorm_cases():
        layer = convert_batchnorm(layer, 1)
        x, weight = mine(x).clone().requires_grad_(), mine(weight)
        out = layer(x)
        (out * weight).sum().backward()
        grads = [p.grad for p in layer.parameters()]
        for grad in grads:
            dist.all_reduce(grad)
        results.append((out.detach(), x.grad, grads, layer.running_mean, layer.running_var))
    return results


def batchnorm_cases():
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 5), (4, 5, 3, 2)):
        for affine in (True, False):
            layer = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(5, affine=affine).double()
            if affine:
                torch.nn.init.uniform_(layer.weight, generator=generator)
            x = 100 + torch.randn(shape, generator=generator, dtype=torch.float64)  # far from zero: cancellation would show
            yield layer, x, torch.randn(shape, generator=generator, dtype=torch.float64)


if __name__ == "__main__":
    work, rank, world_size, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    dist.init_process_group("gloo", init_method=f"file://{folder / work}.rendezvous", rank=rank, world_size=world_size)
    torch.save(globals()[work](), folder / f"{work}_{rank}.pt")
    dist.destroy_process_group()
