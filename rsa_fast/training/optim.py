"""Optimisers: torch's fused SGD and AdamW, and LARS on top of SGD.

With all of them, the host never waits for the device during a step, not even with a GradScaler: if
the gradients overflowed, it is the fused kernel that leaves weights and momentum unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from rsa_fast.methods.method import Method
from rsa_fast.recipes import Recipe

ADAMW_BETA_2 = 0.999  # torch's default

# Parameters, or groups of parameters with options of their own.
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Sgd(torch.optim.SGD):
    """SGD with momentum: mu = m mu + g + wd p, then p = p - lr mu.

    Weight decay applies to every parameter, as in the reference code, unless a group excludes its.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float,
        weight_decay: float,
    ) -> None:
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay, fused=True)
        # torch creates the momentum in the first step, and leaves it uninitialised if the gradients
        # of that step overflowed.
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)


class Lars(Sgd):
    """LARS (You et al. 2017) in the variant of BYOL, MoCo v3 and RSA (common/lars.py).

    For parameters of two or more dimensions g = r (g + wd p), where r = trust |p| / |g + wd p|, or
    1 if one of the norms is 0. Biases and BatchNorm parameters have no weight decay and r = 1.
    Then mu = m mu + g and p = p - lr mu: the learning rate is not part of the momentum.
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

    # There is no `closure`, which would compute the gradients again.
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]

        # A GradScaler leaves the gradients scaled and sets this attribute for optimisers that
        # unscale by themselves.
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            torch._foreach_mul_([p.grad for p in params], scale.reciprocal())
            self.grad_scale = None

        # Weight decay and the ratio r, for all parameters but biases and BatchNorm.
        matrices = [p for p in params if p.ndim > 1]
        grads = [p.grad for p in matrices]
        torch._foreach_add_(grads, matrices, alpha=self.decay)
        # Norms are computed in float32, or in float64 if one of the parameters is.
        dtype = reduce(torch.promote_types, {p.dtype for p in matrices}, torch.float32)
        weight_norm = torch.stack(torch._foreach_norm(matrices, dtype=dtype))
        grad_norm = torch.stack(torch._foreach_norm(grads, dtype=dtype))
        ratio = torch.where(
            (weight_norm > 0) & (grad_norm > 0),
            self.trust_coefficient * weight_norm / grad_norm,
            1.0,
        )
        torch._foreach_mul_(grads, list(ratio.unbind()))

        # Momentum and the update, without weight decay: it is in the gradients already.
        super().step()


def build_optimizer(recipe: Recipe, method: Method, peak_lr: float) -> Optimizer:
    """The recipe's optimiser for the parameters of `method` that require a gradient.

    The learning rate starts at `peak_lr`; `set_learning_rate` sets it before every step.
    """
    constant = set(method.constant_lr_parameters())
    exclude = recipe.decay_exclude == "norm_and_bias"
    # Keyed by whether the learning rate is constant, and whether there is no weight decay.
    members: dict[tuple[bool, bool], list[nn.Parameter]] = {
        (flag, excluded): [] for flag in (False, True) for excluded in (False, True)
    }
    for p in method.parameters():
        if p.requires_grad:
            members[p in constant, exclude and p.ndim <= 1].append(p)
    groups = [
        {"params": params, "constant_lr": flag} | ({"weight_decay": 0.0} if excluded else {})
        for (flag, excluded), params in members.items()
        if params
    ]
    if recipe.optimizer == "adamw":
        # Before its first step, torch sets the moments to zero, also if the gradients overflowed.
        return AdamW(
            groups,
            lr=peak_lr,
            betas=(recipe.momentum, ADAMW_BETA_2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    if recipe.optimizer == "lars":
        return Lars(
            groups,
            lr=peak_lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            trust_coefficient=recipe.trust_coefficient,
        )
    return Sgd(groups, peak_lr, recipe.momentum, recipe.weight_decay)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters except those that keep the peak rate."""
    for group in optimizer.param_groups:
        if not group["constant_lr"]:
            group["lr"] = lr
