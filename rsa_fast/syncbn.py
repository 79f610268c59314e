"""BatchNorm over more or fewer images than the batch of one rank.

The global batch is normalised in `groups` equal parts. With bn = `sync` there is one part (over all
ranks). With `local` there is one part per rank (ordinary BatchNorm). With `split:N` there are N
parts, which gives one GPU the statistics of N GPUs, as in MoCo's CIFAR demo.
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


def bn_groups(bn: str, accumulate: int = 1) -> int:
    """The number of parts in one pass, for a recipe's `bn` and `accumulate`.

    Raises ValueError if they cannot be divided equally among the ranks and passes.
    """
    if bn == "sync":
        return 1
    if bn == "local":
        return world_size()
    groups = int(bn.removeprefix("split:"))
    if groups % (world_size() * accumulate):
        passes = f" times {accumulate} passes" if accumulate > 1 else ""
        raise ValueError(
            f"bn: {bn} does not divide among {world_size()} ranks{passes}: "
            f"use sync, local, or a multiple of the ranks{passes}"
        )
    return groups // accumulate


def convert_batchnorm(network: Network, groups: int) -> Network:
    """Make every BatchNorm in `network` normalise `groups` parts of the global batch.

    Returns the same network. The keys of its state dict do not change. Raises ValueError for a
    BatchNorm whose replacement would compute something else.
    """
    if groups == world_size():
        return network
    for child in network.modules():
        if isinstance(child, _BatchNorm):
            keep_activation(child)
            child.__class__ = SyncBatchNorm if groups == 1 else SplitBatchNorm
            if isinstance(child, SplitBatchNorm):
                child.groups_here = groups // world_size()
    return network


def keep_activation(norm: _BatchNorm) -> None:
    """Preserve the activation of a timm BatchNorm when its class is replaced.

    Raises ValueError if the replacement would lose anything else.
    """
    own_forward = type(norm).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    if own_forward and hasattr(norm, "drop") and hasattr(norm, "act"):
        norm.register_forward_hook(drop_and_activate)
    elif own_forward or norm.running_mean is None or norm.momentum is None:
        raise ValueError(
            f"bn: only local is possible with the network's {type(norm).__name__}, which has its "
            "own forward, no running statistics or no momentum: --set bn=local"
        )


def drop_and_activate(norm: nn.Module, _: tuple[Tensor], normalised: Tensor) -> Tensor:
    """The operations of timm's BatchNormAct2d after its BatchNorm."""
    activated: Tensor = norm.get_submodule("act")(norm.get_submodule("drop")(normalised))
    return activated


class GroupedBatchNorm(_BatchNorm):
    """A BatchNorm with running statistics and a fixed momentum."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float

    def _check_input_dim(self, x: Tensor) -> None: ...


class SplitBatchNorm(GroupedBatchNorm):
    """Normalises `groups_here` consecutive parts of this rank's batch separately.

    The running statistics are updated with the mean of the statistics of the parts.
    """

    groups_here: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        # Each part updates its own copy of the running statistics.
        means = self.running_mean.repeat(self.groups_here, 1)
        variances = self.running_var.repeat(self.groups_here, 1)
        parts = zip(x.chunk(self.groups_here), means, variances, strict=True)
        options = (self.weight, self.bias, True, self.momentum, self.eps)
        normalised = torch.cat(
            [F.batch_norm(part, mean, variance, *options) for part, mean, variance in parts]
        )
        self.running_mean.copy_(means.mean(0))
        self.running_var.copy_(variances.mean(0))
        return normalised


class SyncBatchNorm(GroupedBatchNorm):
    """Normalises the batch of all ranks together, with one collective forward and one backward.

    Unlike torch's SyncBatchNorm it also runs on CPUs, and it never waits for the device, because
    every rank has the same number of images.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        arguments = x, self.weight, self.bias, self.eps
        outputs: tuple[Tensor, Tensor, Tensor]
        outputs = Normalise.apply(*arguments)  # type: ignore[no-untyped-call]
        normalised, mean, variance = outputs
        # The running variance is unbiased, as in BatchNorm.
        count = world_size() * x.numel() // x.shape[1]
        unbiased = variance.to(self.running_var.dtype) * (count / (count - 1))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(unbiased, self.momentum)
        return normalised


class Normalise(torch.autograd.Function):
    """The normalisation over all ranks, with its gradient.

    On CUDA it uses the kernels of torch's own SyncBatchNorm. The CPU has no such kernels, so the
    same formulas are computed by plain operations. They are also used under torch.compile, which
    fuses them with neighbouring operations.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The mean and the variance of this rank's batch, (C,) each.
        if has_kernels(x):
            mean, inverse_std = torch.batch_norm_stats(x, eps)
            variance = inverse_std**-2 - eps
        else:
            variance, mean = torch.var_mean(at_least_float32(x), all_but_channels(x), correction=0)

        # The mean and the variance of the global batch. The formula mean(x^2) - mean(x)^2 would
        # lose precision by cancellation, so the variance of the ranks' means is added to the mean
        # variance.
        means, variances = gather(torch.stack([mean, variance])[None]).unbind(1)  # (ranks, C)
        mean = means.mean(0)
        variance = (variances + (means - mean).square()).mean(0)

        ctx.save_for_backward(x, weight, mean, (variance + eps).rsqrt())
        ctx.mark_non_differentiable(mean, variance)
        return F.batch_norm(x, mean, variance, weight, bias, False, 0, eps), mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        global_count = world_size() * x.numel() // x.shape[1]
        if has_kernels(x):
            layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
            grad = grad.contiguous(memory_format=layout)
            reduced = torch.batch_norm_backward_reduce(
                grad, x, mean, inverse_std, weight, True, True, True
            )
            sums, grad_weight, grad_bias = torch.stack(reduced[:2]), *reduced[2:]
            dist.all_reduce(sums)
            count = torch.full((1,), global_count, dtype=torch.int32, device=x.device)
            saved = (mean, inverse_std, weight)
            grad_x = torch.batch_norm_backward_elemt(grad, x, *saved, sums[0], sums[1], count)
        else:
            shape = (-1, *[1] * (x.ndim - 2))  # broadcasts a vector (C,) over x
            grad = at_least_float32(grad)
            x_hat = (at_least_float32(x) - mean.view(shape)) * inverse_std.view(shape)
            grad_bias = grad.sum(all_but_channels(x))
            grad_weight = (grad * x_hat).sum(all_but_channels(x))
            sums = torch.stack([grad_bias, grad_weight])
            dist.all_reduce(sums)
            means = (sums / global_count).view(2, *shape)
            scale = inverse_std if weight is None else inverse_std * weight
            grad_x = ((grad - means[0] - x_hat * means[1]) * scale.view(shape)).to(x.dtype)
        if weight is None:
            return grad_x, None, None, None
        return grad_x, grad_weight, grad_bias, None


def has_kernels(x: Tensor) -> bool:
    """Whether the CUDA kernels of torch's SyncBatchNorm are used for `x`."""
    return x.is_cuda and not torch.compiler.is_compiling()


def all_but_channels(x: Tensor) -> list[int]:
    """All dimensions of `x` `(B, C, ...)` except the channels."""
    return [0, *range(2, x.ndim)]


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or unchanged if its type has higher precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
