"""An augmentation of one's own, as a user would write it, for a case of backends.py."""

from __future__ import annotations

import torch
from torch import Tensor


def noise(views: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    for view in views.values():
        view += 0.1 * torch.randn(view.shape, generator=generator, device=view.device)
    return views
