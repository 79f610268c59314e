"""BYOL as RSA re-implements it (Grill et al. 2020; github.com/tmllab/RSA methods/BYOL.py).

An online network with a predictor learns to predict a target network's projection of the image's other view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views import Batch
from rsa_fast import recipes
from rsa_fast.methods.method import Loss, TargetMethod, mlp, unit
from rsa_fast.networks import Encoder, Projected

PAIRS = {"AA": ("aggressive_1", "aggressive_2"), "AW": ("aggressive_1", "weak_2")}


class BootstrapMethod(TargetMethod):
    """The networks of BYOL and RSA: the online network has a predictor, the target has none."""

    def __init__(self, recipe: recipes.Bootstrap, encoder: Encoder) -> None:
        hidden_dim, out_dim = recipe.hidden_dim, recipe.out_dim
        super().__init__(Projected(encoder, mlp(encoder.feature_dim, hidden_dim, out_dim)))
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

    def __init__(self, recipe: recipes.Byol, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.views = PAIRS[recipe.pairs]
        self.reads = frozenset(self.views)

    def forward(self, batch: Batch, beta: float) -> Loss:
        """Symmetrised loss, the sum of both directions, in 0..8; `beta` is not used."""
        one, two = (batch.views[name] for name in self.views)
        z_1, z_2 = self.project(one), self.project(two)  # before a graph is kept: 1.1 GiB less for 256 ImageNet images
        q_1, q_2 = self.predict(one), self.predict(two)
        return Loss(distance(q_1, z_2) + distance(q_2, z_1), q_1, {})


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of unit vectors, 2 - 2 cos (Eq. 2): `(B, D)`, `(B, D)` to a scalar."""
    return (2 - 2 * (a * b).sum(1)).mean()
