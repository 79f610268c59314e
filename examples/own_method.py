"""Train with your own method: BYOL without a target network, on RSA's four views.

    rsa-fast train --dataset cifar10 --method examples/own_method.py --data data/cifar10 --download
    rsa-fast recipes cifar10/examples/own_method.py

A method is one file with three parts: the fields of its recipe, their values with a source, and
the networks with their loss. Nothing has to be registered.

There is one network f with a projector, and a predictor q. With the unit-length projections z and
predictions q, the loss is the batch mean of

    2 - q_1.sg(z_2) - q_2.sg(z_1).

`sg` stops the gradient. q_1 and q_2 are computed from aggressive views, z_1 and z_2 from weak ones.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from rsa_fast.methods.method import Loss, Method, Now, mlp, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite


class PlainPairRecipe(Recipe):
    """The fields that this method adds to those of every recipe."""

    hidden_dim: int = Field(ge=1)  # units of the hidden layers of projector and predictor
    out_dim: int = Field(ge=1)  # D, outputs of both


class PlainPair(Method):
    recipe_type = PlainPairRecipe
    # A key is "all", or a scale of the datasets: 32px, 64px, 224px, imagenet100, imagenet1k, short.
    rows: ClassVar[Rows] = {
        "all": cite("chosen", hidden_dim=512, out_dim=128),
        "224px": cite("chosen", hidden_dim=4096, out_dim=256),
    }
    reads = frozenset(VIEWS)  # the loader makes these views and no others
    mean_over_images = True  # the loss is a mean over images, so a batch can be accumulated

    def __init__(self, recipe: PlainPairRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        head = mlp(encoder.feature_dim, recipe.hidden_dim, recipe.out_dim)
        self.online = Projected(encoder, head)
        self.predictor = mlp(recipe.out_dim, recipe.hidden_dim, recipe.out_dim)

    def forward(self, batch: Batch, now: Now) -> Loss:
        q_1 = unit(self.predictor(self.online(batch.aggressive_1)))  # (B, D)
        q_2 = unit(self.predictor(self.online(batch.aggressive_2)))  # (B, D)
        with torch.no_grad():
            z_1 = unit(self.online(batch.weak_1))  # (B, D)
            z_2 = unit(self.online(batch.weak_2))  # (B, D)
        total = 2 - (q_1 * z_2).sum(1).mean() - (q_2 * z_1).sum(1).mean()
        # The second value is monitored for collapse. The dictionary is recorded beside the loss.
        return Loss(total, z_1, {"agreement": (q_1 * z_2).sum(1).mean()})
