"""The processes that train together: who this one is, and rows gathered from all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def gather(x: Tensor) -> Tensor:
    """Every rank's rows `(b, ...)` as `(world_size b, ...)`, in rank order; equal shapes on all ranks.

    The gradient flows back to the rank each row came from, summed over the ranks that used it.
    """
    return x if world_size() == 1 else Gather.apply(x)


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        everyone = x.new_empty((world_size() * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(everyone, x.contiguous())
        return everyone

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        total = grad.contiguous()
        dist.all_reduce(total)  # not reduce-scatter: gloo has none
        return total.chunk(world_size())[rank()]
