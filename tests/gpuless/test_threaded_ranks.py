"""BatchNorm over the ranks of a whole node, which are threads here.

test_distributed.py has two ranks, as processes.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from rsa_fast.syncbn import convert_batchnorm

RANKS = 8


def on_ranks(work: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
    """Return the results of `work(rank)` on all ranks."""
    store = dist.HashStore()

    def rank(number: int) -> list[Tensor]:
        try:
            dist.init_process_group("threaded", rank=number, world_size=RANKS, store=store)
            return work(number)
        except BaseException as error:
            threaded.ProcessLocalGroup.exception_handle(error)  # Otherwise the others wait.
            raise

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        with ThreadPoolExecutor(RANKS) as threads:
            return list(threads.map(rank, range(RANKS)))
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("images", "size_px"), [(RANKS, 2), (4 * RANKS, 3)])
def test_batchnorm_of_eight_ranks_is_that_of_the_whole_batch(images, size_px, affine):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 1),
        nn.BatchNorm2d(6, affine=affine),
        nn.ReLU(),
        nn.Conv2d(6, 4, size_px),
        nn.Flatten(),
    ]
    network = nn.Sequential(*layers, nn.BatchNorm1d(4, affine=affine), nn.Linear(4, 2)).double()
    x, weight = (
        100 + torch.randn(images, 3, size_px, size_px).double(),
        torch.randn(images, 2).double(),
    )
    replicas = [copy.deepcopy(network) for _ in range(RANKS)]

    def step(network: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
        x = x.clone().requires_grad_()
        out = network(x)
        (out * weight).sum().backward()
        return [out.detach(), x.grad]

    def part(rank: int) -> list[Tensor]:
        return step(
            convert_batchnorm(replicas[rank], 1), x.chunk(RANKS)[rank], weight.chunk(RANKS)[rank]
        )

    found = [torch.cat(parts) for parts in zip(*on_ranks(part), strict=True)]
    torch.testing.assert_close(found, step(network, x, weight), rtol=1e-9, atol=1e-9)
    for p, parts in zip(
        network.parameters(), zip(*(r.parameters() for r in replicas), strict=True), strict=True
    ):
        torch.testing.assert_close(sum(q.grad for q in parts), p.grad, rtol=1e-9, atol=1e-9)
    for replica in replicas:
        torch.testing.assert_close(replica.state_dict(), network.state_dict(), rtol=1e-9, atol=1e-9)
