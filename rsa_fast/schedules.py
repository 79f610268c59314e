"""The learning rate, the target's tau and RSA's beta as pure functions of the step.

`step` counts from 0. `k = step + 1` is the step number of the papers, K the total number of steps.
Beyond K, every schedule stays at its last value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence


def cosine_ramp(k: float, total: float) -> float:
    """The ramp (1 + cos(pi k / K)) / 2, from 1 at k = 0 to 0 at k = K = `total`."""
    return (1 + math.cos(math.pi * min(k / total, 1))) / 2


def tau(k: int, total_steps: int, tau_base: float, schedule: str = "cosine") -> float:
    """The target's weight in its moving average at step k.

    `cosine` rises from `tau_base` to 1 (BYOL). `fixed` stays at `tau_base` (MoCo, ReSSL).
    """
    return tau_base if schedule == "fixed" else 1 - (1 - tau_base) * cosine_ramp(k, total_steps)


def beta(k: int, total_steps: int, beta_base: float, schedule: str) -> float:
    """RSA's weight of aggressive pairs at step k.

    `cosine` falls from `beta_base` to 0 (PAPER Eq. 6). `fixed` stays (ablation in PAPER Table 1).
    """
    return beta_base if schedule == "fixed" else beta_base * cosine_ramp(k, total_steps)


def learning_rate(
    step: int,
    total_steps: int,
    warmup_steps: int,
    peak_lr: float,
    min_lr: float = 0,
    held_steps: int = 1,
    drop_steps: Sequence[int] = (),
    drop: float = 1,
    start_lr: float = 0,
) -> float:
    """The learning rate: linear from `start_lr` to `peak_lr`, then a cosine to `min_lr`.

    The linear part is the warm-up, which moves at every step. The cosine moves once in `held_steps`
    steps. If these are the steps of an epoch, it moves at the start of every epoch.

    With `drop_steps`, there is no cosine. Instead, the rate is multiplied by `drop` at each of
    these steps that comes after the warm-up.

    Source: adjust_learning_rate in train_multi.py of github.com/tmllab/RSA. A run that is shorter
    than its warm-up, such as a test of one epoch, ends before the peak.
    """
    if step < warmup_steps:
        return start_lr + (peak_lr - start_lr) * step / warmup_steps
    if drop_steps:
        return peak_lr * drop ** sum(warmup_steps < at <= step for at in drop_steps)
    since = step - warmup_steps
    ramp = cosine_ramp(since - since % held_steps, max(total_steps - warmup_steps, 1))
    return min_lr + (peak_lr - min_lr) * ramp
