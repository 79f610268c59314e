"""Learning rate, target momentum and beta as pure functions of the step: nothing remembers a count.

`step` counts from 0, `k = step + 1` is the paper's step number, K the total. Every ramp stays at its end beyond K.
"""

from __future__ import annotations

import math


def cosine_ramp(k: float, total: float) -> float:
    """From 1 at k = 0 to 0 at k = total: (1 + cos(pi k / K)) / 2."""
    return (1 + math.cos(math.pi * min(k / total, 1))) / 2


def tau(k: int, total_steps: int, tau_base: float, schedule: str = "cosine") -> float:
    """The target's share in its moving average at step k: from `tau_base` to 1 (BYOL), or `fixed` (MoCo, ReSSL)."""
    return tau_base if schedule == "fixed" else 1 - (1 - tau_base) * cosine_ramp(k, total_steps)


def beta(k: int, total_steps: int, beta_base: float, schedule: str) -> float:
    """RSA's weight of aggressive pairs at step k: Eq. 6 (`cosine`), or Table 1's ablation (`fixed`)."""
    return beta_base if schedule == "fixed" else beta_base * cosine_ramp(k, total_steps)


def learning_rate(step: int, total_steps: int, warmup_steps: int, peak_lr: float) -> float:
    """Linear from 0 over the warm-up, then a cosine to 0 (reference code: train_multi.py, adjust_learning_rate).

    A run that is shorter than its warm-up, such as one epoch to try things out, ends on the way up.
    """
    if step < warmup_steps:
        return peak_lr * step / warmup_steps
    return peak_lr * cosine_ramp(step - warmup_steps, max(total_steps - warmup_steps, 1))
