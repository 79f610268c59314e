"""BatchNorm over more or fewer images than a rank holds.

The global batch is normalised in `groups` equal parts: one (`sync`, over all ranks), one per rank (`local`, plain
BatchNorm), or N (`split:N`, which gives one GPU the statistics of N, as MoCo's CIFAR demo does).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from rsa_fast.distributed import gather, world_size

Network = TypeVar("Network", bound=nn.Module)


def bn_groups(bn: str) -> int:
    """The number of groups of a recipe's `bn`. Raises ValueError when they do not divide among the ranks."""
    if bn == "sync":
        return 1
    groups = world_size() if bn == "local" else int(bn.removeprefix("split:"))
    if groups % world_size():
        raise ValueError(
            f"bn: {bn} does not divide among {world_size()} ranks: use sync, local, or a multiple of the ranks"
        )
    return groups


def convert_batchnorm(network: Network, groups: int) -> Network:
    """Make every BatchNorm in `network` normalise `groups` parts of the global batch.

    The keys of the state dict stay the same. Returns the same network.
    """
    if groups == world_size():
        return network
    for child in network.modules():
        if isinstance(child, _BatchNorm):
            child.__class__ = SyncBatchNorm if groups == 1 else SplitBatchNorm
            if isinstance(child, SplitBatchNorm):
                child.groups_here = groups // world_size()
    return network


class GroupedBatchNorm(_BatchNorm):
    """A BatchNorm with running statistics and a fixed momentum, as in every network here."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def _check_input_dim(self, x: Tensor) -> None: ...


class SplitBatchNorm(GroupedBatchNorm):
    """Normalises `groups_here` consecutive parts of the batch apart; the running statistics move by the parts' mean."""

    groups_here: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        means, variances = (
            buffer.repeat(self.groups_here, 1) for buffer in (self.running_mean, self.running_var)
        )
        parts = zip(x.chunk(self.groups_here), means, variances, strict=True)
        options = (self.weight, self.bias, True, self.momentum, self.eps)
        normalised = torch.cat(
            [F.batch_norm(part, mean, variance, *options) for part, mean, variance in parts]
        )
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return normalised


class SyncBatchNorm(GroupedBatchNorm):
    """Normalises the batch of all ranks together: one collective forward, one backward.

    Unlike torch's it runs on CPUs, and it never waits for the device: every rank holds as many images.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        arguments = x, self.weight, self.bias, self.eps
        outputs: tuple[Tensor, Tensor, Tensor]
        outputs = Normalise.apply(*arguments)  # type: ignore[no-untyped-call]  # torch gives no types
        normalised, mean, variance = outputs
        count = world_size() * x.numel() // x.shape[1]
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(
            variance.to(self.running_var.dtype) * (count / (count - 1)), self.momentum
        )
        return normalised


class Normalise(torch.autograd.Function):
    """On CUDA torch's own SyncBatchNorm kernels; the same formulas in plain operations on the CPU, which lacks them, and where
    they are compiled, which fuses what surrounds them."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if has_kernels(x):
            mean, inverse_std = torch.batch_norm_stats(x, eps)
            variance = inverse_std**-2 - eps
        else:
            variance, mean = torch.var_mean(wide(x), spatial(x), correction=0)
        means, variances = gather(torch.stack([mean, variance])[None]).unbind(1)  # (ranks, C)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(
            0
        )  # not mean(x^2) - mean(x)^2: that cancels
        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        if has_kernels(x):
            grad = (
                grad.contiguous(memory_format=torch.channels_last)
                if x.ndim == 4
                else grad.contiguous()
            )
            reduced = torch.batch_norm_backward_reduce(
                grad, x, mean, inverse_std, weight, True, True, True
            )
            sums, grad_weight, grad_bias = torch.stack(reduced[:2]), *reduced[2:]
            dist.all_reduce(sums)
            count = torch.full(
                (1,), world_size() * x.numel() // x.shape[1], dtype=torch.int32, device=x.device
            )
            saved = (mean, inverse_std, weight)
            grad_x = torch.batch_norm_backward_elemt(grad, x, *saved, sums[0], sums[1], count)
        else:
            shape = (-1, *[1] * (x.ndim - 2))
            grad, hat = wide(grad), (wide(x) - mean.view(shape)) * inverse_std.view(shape)
            grad_bias, grad_weight = grad.sum(spatial(x)), (grad * hat).sum(spatial(x))
            sums = torch.stack([grad_bias, grad_weight])
            dist.all_reduce(sums)
            sums = (sums / (world_size() * x.numel() // x.shape[1])).view(2, *shape)
            scale = inverse_std if weight is None else inverse_std * weight
            grad_x = ((grad - sums[0] - hat * sums[1]) * scale.view(shape)).to(x.dtype)
        return (
            (grad_x, None, None, None) if weight is None else (grad_x, grad_weight, grad_bias, None)
        )


def has_kernels(x: Tensor) -> bool:
    return x.is_cuda and not torch.compiler.is_compiling()


def spatial(x: Tensor) -> list[int]:
    """All dimensions but the channels'."""
    return [0, *range(2, x.ndim)]


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
