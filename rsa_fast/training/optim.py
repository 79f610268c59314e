"""Optimisers: torch's fused SGD, Adam and AdamW, and LARS and LARC on top of SGD.

With none of them does the host wait for the device during a step, not even with a GradScaler. If
the gradients overflowed, the fused kernel leaves weights and momentum unchanged.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from rsa_fast.methods.method import Method
from rsa_fast.recipes import Recipe

ADAM_BETA_2 = 0.999  # torch's default for Adam and AdamW

LARC_EPS = 1e-8  # apex/parallel/LARC.py
CLIP_EPS = 1e-6  # DINO utils.py clip_gradients, and torch's clip_grad_norm_

# Parameters, or groups of parameters with their own options.
Parameters = Iterable[nn.Parameter] | Iterable[dict[str, Any]]


class Sgd(torch.optim.SGD):
    """SGD with momentum: with g = gradient + wd p, mu = m mu + g, then p = p - lr mu.

    With `nesterov`, p = p - lr (g + m mu). Weight decay applies to every parameter, as in the
    reference code, unless a group excludes it.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float,
        weight_decay: float,
        nesterov: bool = False,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            fused=True,
        )
        # torch would create the momentum in the first step. If the gradients of that step
        # overflowed, it would leave the momentum uninitialised.
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def unscale(self) -> None:
        """Divide the gradients by the scale of a GradScaler, unless they are unscaled already.

        A GradScaler leaves them scaled and sets `grad_scale` for optimisers that unscale by
        themselves, as the fused kernel does.
        """
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            params = [p for group in self.param_groups for p in group["params"]]
            torch._foreach_mul_(gradients(params), scale.reciprocal())
            self.grad_scale = None


class Lars(Sgd):
    """LARS (You et al. 2017) in the variant of BYOL, MoCo v3 and RSA (common/lars.py).

    For parameters of two or more dimensions, g = r (g + wd p), where r = trust |p| / |g + wd p|, or
    1 if one of the norms is 0. Biases and BatchNorm parameters have no weight decay and r = 1. Then
    mu = m mu + g and p = p - lr mu, so the learning rate is not part of the momentum.
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

    # There is no argument `closure`, which would compute the gradients again.
    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.unscale()

        # Apply weight decay and the ratio r to all parameters except biases and BatchNorm.
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        matrices = [p for p in params if p.ndim > 1]
        grads = gradients(matrices)
        torch._foreach_add_(grads, matrices, alpha=self.decay)
        weight_norm, grad_norm = norms(matrices), norms(grads)
        ratio = torch.where(
            (weight_norm > 0) & (grad_norm > 0),
            self.trust_coefficient * weight_norm / grad_norm,
            1.0,
        )
        torch._foreach_mul_(grads, list(ratio.unbind()))

        # Apply momentum and the update. Weight decay is already in the gradients.
        super().step()


class Larc(Sgd):
    """LARC without clipping, as SwAV uses it (apex/parallel/LARC.py).

    For every parameter, even with one dimension, g = r (g + wd p), where r = trust |p| / (|g| + wd
    |p| + 1e-8). If one of the norms is 0, then g does not change and there is no weight decay. The
    first step of a bias that starts at 0 thus has the full learning rate. Then mu = m mu + g and p
    = p - lr mu.
    """

    def __init__(
        self,
        params: Parameters,
        lr: float,
        momentum: float,
        weight_decay: float,
        trust_coefficient: float,
    ) -> None:
        super().__init__(params, lr, momentum, weight_decay)
        self.trust_coefficient = trust_coefficient

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        self.unscale()
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = 0  # SGD must not add it once more
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = gradients(params)
            weight_norm, grad_norm = norms(params), norms(grads)
            both = (weight_norm > 0) & (grad_norm > 0)
            ratio = weight_norm / (grad_norm + decay * weight_norm + LARC_EPS)
            ratio = torch.where(both, self.trust_coefficient * ratio, 1.0)
            decayed = torch.where(both, decay, torch.zeros_like(ratio))
            torch._foreach_add_(grads, torch._foreach_mul(params, list(decayed.unbind())))
            torch._foreach_mul_(grads, list(ratio.unbind()))
        super().step()
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


@torch.no_grad()
def clip_each_grad_norm_(params: Iterable[nn.Parameter], limit: float) -> None:
    """Scale every gradient whose norm exceeds `limit` down to it, each one separately."""
    grads = gradients(params)
    shares = (limit / (norms(grads) + CLIP_EPS)).clamp(max=1)  # (len(grads),)
    torch._foreach_mul_(grads, list(shares.unbind()))


def gradients(params: Iterable[nn.Parameter]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def norms(tensors: list[Tensor]) -> Tensor:
    """The norms of n tensors, `(n,)`, in float32, or in float64 if one of them is float64."""
    dtype = reduce(torch.promote_types, {t.dtype for t in tensors}, torch.float32)
    return torch.stack(torch._foreach_norm(tensors, dtype=dtype))


def build_optimizer(
    recipe: Recipe,
    method: Method,
    peak_lr: float,
    lr_ratios: Mapping[nn.Parameter, float] | None = None,
) -> Optimizer:
    """The recipe's optimiser for the parameters of `method` that require a gradient.

    The learning rate starts at its peak; `set_learning_rate` sets it before every step. `peak_lr`
    is the peak of all parameters, except for gains and biases if these have a `bias_lr_ratio`, and
    except for those in `lr_ratios` (see `Method.lr_ratios`).
    """
    constant, ratios = set(method.constant_lr_parameters()), lr_ratios or {}
    own: dict[str, float] = {}  # the options of gains and biases, if they have their own
    if recipe.decay_exclude == "norm_and_bias":
        own["weight_decay"] = 0.0
    # The keys are: whether the learning rate is constant, whether these are gains and biases with
    # their own options, and the ratio of their learning rate to `peak_lr`.
    members = defaultdict[tuple[bool, bool, float], list[nn.Parameter]](list)
    for p in method.parameters():
        if p.requires_grad:
            small, ratio = p.ndim <= 1, ratios.get(p, 1.0)
            ratio *= recipe.bias_lr_ratio if small else 1
            has_own = small and (bool(own) or recipe.bias_lr_ratio != 1)
            members[p in constant, has_own, ratio].append(p)
    groups = [
        {"params": params, "constant_lr": flag}
        | (own if has_own else {})
        | ({"lr": ratio * peak_lr, "lr_ratio": ratio} if ratio != 1 else {})
        for (flag, has_own, ratio), params in sorted(members.items(), key=lambda item: item[0])
    ]
    if recipe.optimizer in ("adam", "adamw"):
        # Before the first step, torch sets the moments to zero, even if the gradients overflowed.
        return (Adam if recipe.optimizer == "adam" else AdamW)(
            groups,
            lr=peak_lr,
            betas=(recipe.momentum, ADAM_BETA_2),
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    if recipe.optimizer in ("lars", "larc"):
        return (Lars if recipe.optimizer == "lars" else Larc)(
            groups,
            lr=peak_lr,
            momentum=recipe.momentum,
            weight_decay=recipe.weight_decay,
            trust_coefficient=recipe.trust_coefficient,
        )
    return Sgd(groups, peak_lr, recipe.momentum, recipe.weight_decay, recipe.nesterov)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """Set the learning rate of all parameters except those that keep the peak rate.

    A group with an `lr_ratio` gets `lr` times this ratio.
    """
    for group in optimizer.param_groups:
        if not group["constant_lr"]:
            group["lr"] = lr * group.get("lr_ratio", 1)
