"""BYOL as RSA re-implements it (Grill et al. 2020; github.com/tmllab/RSA methods/BYOL.py).

An online network with a predictor learns to predict a target network's projection of the image's other view.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from pipelines.views import Batch
from rsa_fast.methods.method import PAIRS, Loss, Now, TargetMethod, TargetRecipe, mlp, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.sourced import cite

HEADS = {
    "all": cite("PAPER 4.1", hidden_dim=1024, out_dim=128, tau_base=0.99),
    "224px": cite("CODE methods/BYOL.py", hidden_dim=4096, out_dim=256),
    "demo": cite("chosen: 1,500 steps", tau_base=0.97),
}


class BootstrapRecipe(TargetRecipe):
    """The sizes of BYOL's networks, which RSA uses too."""

    hidden_dim: int = Field(ge=1)  # of projector and predictor
    out_dim: int = Field(ge=1)  # of projector and predictor


class ByolRecipe(BootstrapRecipe):
    pairs: Literal["AA", "AW"] = "AA"  # two aggressive views, or one of each kind (PAPER Table 1)


class BootstrapMethod(TargetMethod):
    """The networks of BYOL and RSA: the online network has a predictor, the target has none."""

    def __init__(self, recipe: BootstrapRecipe, encoder: Encoder) -> None:
        hidden_dim, out_dim = recipe.hidden_dim, recipe.out_dim
        super().__init__(recipe, Projected(encoder, mlp(encoder.feature_dim, hidden_dim, out_dim)))
        self.predictor = mlp(out_dim, hidden_dim, out_dim)

    def predict(self, images: Tensor) -> Tensor:
        """Unit-length online predictions `(B, out_dim)`."""
        return unit(self.predictor(self.online(images)))

    @torch.no_grad()
    def project(self, images: Tensor) -> Tensor:
        """Unit-length target projections `(B, out_dim)`, without gradient."""
        return unit(self.target(images))


class Byol(BootstrapMethod):
    """`pairs` is `AA` (two aggressive views) or `AW` (aggressive and weak).

    Each view goes through both networks.
    """

    recipe_type = ByolRecipe
    rows = HEADS

    def __init__(self, recipe: ByolRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.views = PAIRS[recipe.pairs]
        self.reads = frozenset(self.views)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """Symmetrised loss, the sum of both directions, in 0..8."""
        one, two = (batch.views[name] for name in self.views)
        z_1, z_2 = (
            self.project(one),
            self.project(two),
        )  # before a graph is kept: 1.1 GiB less for 256 ImageNet images
        q_1, q_2 = self.predict(one), self.predict(two)
        return Loss(distance(q_1, z_2) + distance(q_2, z_1), q_1, {})


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of unit vectors, 2 - 2 cos (Eq. 2): `(B, D)`, `(B, D)` to a scalar."""
    return (2 - 2 * (a * b).sum(1)).mean()
