"""Optimisers: torch's fused SGD, and LARS on top of it.

Both do a whole step without the host waiting for the device, with a GradScaler too: the fused kernel itself leaves
weights and momentum alone when the gradients overflowed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rsa_fast.methods.method import Method
from rsa_fast.recipes import Recipe

Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]  # or groups, with their own options


class Sgd(torch.optim.SGD):
    """SGD with momentum: mu = m mu + g + wd p; p = p - lr mu. Weight decay on every parameter, as in the reference code."""

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        for group in (
            self.param_groups
        ):  # torch leaves them unset until a first step, and uninitialised if that overflows
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)


class Lars(Sgd):
    """LARS (You et al. 2017) in the dialect of BYOL, MoCo v3 and RSA (common/lars.py).

    For parameters of two or more dimensions g = r (g + wd p) with r = trust |p| / |g + wd p|, or 1 when a norm is 0;
    biases and BatchNorm take no decay and r = 1. Then mu = m mu + g; p = p - lr mu: lr stays outside the momentum.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay=0)
        self.decay, self.trust_coefficient = weight_decay, trust_coefficient

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # a closure would make gradients anew
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        scale = getattr(
            self, "grad_scale", None
        )  # set by GradScaler, which then leaves the gradients scaled
        if scale is not None:
            torch._foreach_mul_([p.grad for p in params], scale.reciprocal())
            self.grad_scale = None
        matrices = [p for p in params if p.ndim > 1]
        grads = [p.grad for p in matrices]
        torch._foreach_add_(grads, matrices, alpha=self.decay)
        weight_norm = torch.stack(torch._foreach_norm(matrices, dtype=torch.float32))
        grad_norm = torch.stack(torch._foreach_norm(grads, dtype=torch.float32))
        ratio = torch.where(
            (weight_norm > 0) & (grad_norm > 0),
            self.trust_coefficient * weight_norm / grad_norm,
            1.0,
        )
        torch._foreach_mul_(grads, list(ratio.unbind()))
        super().step()


def build_optimizer(recipe: Recipe, method: Method, peak_lr: float) -> Sgd:
    """The recipe's optimiser over the parameters that learn; `set_learning_rate` sets the rate of every step."""
    constant = set(method.constant_lr_parameters())
    learning = [p for p in method.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if (p in constant) == flag], "constant_lr": flag}
        for flag in (False, True)
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "lars":
        return Lars(groups, peak_lr, recipe.momentum, recipe.weight_decay, recipe.trust_coefficient)
    return Sgd(groups, peak_lr, recipe.momentum, recipe.weight_decay)


def set_learning_rate(optimizer: Sgd, lr: float) -> None:
    """For every parameter that does not keep the peak rate."""
    for group in optimizer.param_groups:
        if not group["constant_lr"]:
            group["lr"] = lr
