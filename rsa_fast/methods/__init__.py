"""The methods. Each is a module with `reads`, `forward(batch, beta) -> Loss`, `after_step(tau)` and `encoder`.

A method knows nothing of data, optimiser, ranks or logs, and the engine knows no method by name.
"""

from __future__ import annotations

import torch
from torch import nn

from rsa_fast.methods.byol import Byol, Loss
from rsa_fast.methods.rsa import Rsa
from rsa_fast.networks import Encoder
from rsa_fast.recipes import Recipe

__all__ = ["Loss", "build_method"]


def build_method(recipe: Recipe) -> nn.Module:
    """The freshly initialised method of a recipe, channels_last, on the CPU; seed torch before."""
    encoder = Encoder(recipe.arch, recipe.stem, recipe.width)
    heads = (recipe.hidden_dim, recipe.out_dim)
    match recipe.method:
        case "byol":
            method = Byol(encoder, *heads, recipe.pairs)
        case "rsa":
            method = Rsa(encoder, *heads)
    return method.to(memory_format=torch.channels_last)
