"""The methods, each a `Method`: `reads`, `forward(batch, beta) -> Loss`, `after_step(tau)` and `encoder`.

A method knows nothing of data, optimiser or logs, and the engine knows no method by name.
"""

from __future__ import annotations

import torch

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
    r, groups = recipe, bn_groups(recipe.bn)
    encoder = Encoder(r.arch, r.stem, r.width, r.zero_init_residual, r.recompute_stages, r.compile)
    match r.method:
        case "byol":
            method = Byol(encoder, r.hidden_dim, r.out_dim, r.pairs)
        case "rsa":
            method = Rsa(encoder, r.hidden_dim, r.out_dim)
        case "simsiam":
            method = SimSiam(encoder, r.projector_layers, r.out_dim, r.hidden_dim, r.constant_predictor_lr)
        case "simsiam-rsa":
            sizes = (r.projector_layers, r.out_dim, r.hidden_dim)
            method = SimSiamRsa(encoder, *sizes, constant_predictor_lr=r.constant_predictor_lr, aa_target=r.aa_target)
        case "simclr":
            method = SimClr(encoder, r.out_dim, r.temperature)
        case "moco":
            method = MoCo(encoder, r.out_dim, r.queue_size, r.temperature, groups)
        case "ressl":
            sizes = (r.hidden_dim, r.out_dim, r.queue_size)
            method = ReSsl(encoder, *sizes, r.temperature, r.teacher_temperature, groups)
        case "supervised":
            method = Supervised(encoder, r.classes)
    return convert_batchnorm(method, groups).to(memory_format=torch.channels_last)
