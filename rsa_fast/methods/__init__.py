"""The methods, each a `Method`: `reads`, `forward(batch, beta) -> Loss`, `after_step(tau)` and `encoder`.

A method knows nothing of data, optimiser or logs, and the engine knows no method by name.
"""

from __future__ import annotations

import torch

from rsa_fast import recipes
from rsa_fast.methods.byol import Byol
from rsa_fast.methods.method import Loss, Method
from rsa_fast.methods.moco import MoCo
from rsa_fast.methods.ressl import ReSsl
from rsa_fast.methods.rsa import Rsa
from rsa_fast.methods.simclr import SimClr
from rsa_fast.methods.simsiam import SimSiam, SimSiamRsa
from rsa_fast.methods.supervised import Supervised
from rsa_fast.networks import Encoder
from rsa_fast.recipes import Recipe
from rsa_fast.syncbn import bn_groups, convert_batchnorm

__all__ = ["Loss", "Method", "build_method"]


def build_method(recipe: Recipe) -> Method:
    """The freshly initialised method of a recipe, channels_last, on the CPU; seed torch before.

    Raises ValueError when the recipe's `bn` does not suit the number of ranks.
    """
    groups = bn_groups(recipe.bn)
    encoder = Encoder(
        recipe.arch,
        recipe.stem,
        recipe.width,
        zero_init_residual=recipe.zero_init_residual,
        recompute_stages=recipe.recompute_stages,
        compiled=recipe.compile,
    )
    method = convert_batchnorm(method_of(recipe, encoder), groups)
    method.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in torch's stubs
    return method


def method_of(recipe: Recipe, encoder: Encoder) -> Method:
    """The method whose recipe it is, around `encoder`. Raises TypeError for a recipe of none."""
    match recipe:
        case recipes.Byol():
            return Byol(recipe, encoder)
        case recipes.Rsa():
            return Rsa(recipe, encoder)
        case recipes.SimSiamRsa():  # before SimSiam, which it extends
            return SimSiamRsa(recipe, encoder)
        case recipes.SimSiam():
            return SimSiam(recipe, encoder)
        case recipes.SimClr():
            return SimClr(recipe, encoder)
        case recipes.MoCo():
            return MoCo(recipe, encoder)
        case recipes.ReSsl():
            return ReSsl(recipe, encoder)
        case recipes.Supervised():
            return Supervised(recipe, encoder)
    raise TypeError(f"no method has recipes of type {type(recipe).__name__}: use build_recipe")
