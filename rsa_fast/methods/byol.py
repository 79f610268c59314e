"""BYOL as RSA re-implements it (Grill et al. 2020; github.com/tmllab/RSA methods/BYOL.py).

An online network with a predictor learns to predict a target network's projection of the image's other view.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipelines.views import Batch
from rsa_fast.methods.method import Loss, TargetMethod, mlp, unit
from rsa_fast.networks import Encoder, Projected

PAIRS = {"AA": ("aggressive_1", "aggressive_2"), "AW": ("aggressive_1", "weak_2")}


class Byol(TargetMethod):
    """`pairs` is `AA` (two aggressive views) or `AW` (aggressive and weak), each through both networks."""

    def __init__(self, encoder: Encoder, hidden_dim: int, out_dim: int, pairs: str = "AA") -> None:
        super().__init__(Projected(encoder, mlp(encoder.feature_dim, hidden_dim, out_dim)))
        if pairs not in PAIRS:
            raise ValueError(f"no pairs {pairs!r}: choose AA or AW")
        self.views = PAIRS[pairs]
        self.predictor = mlp(out_dim, hidden_dim, out_dim)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset(self.views)

    def predict(self, images: Tensor) -> Tensor:
        """Unit-length online predictions `(B, out_dim)`."""
        return unit(self.predictor(self.online(images)))

    @torch.no_grad()
    def project(self, images: Tensor) -> Tensor:
        """Unit-length target projections `(B, out_dim)`, without gradient."""
        return unit(self.target(images))

    def forward(self, batch: Batch, beta: float) -> Loss:
        """Symmetrised loss, the sum of both directions, in 0..8; `beta` is not used."""
        one, two = (getattr(batch, view) for view in self.views)
        z_1, z_2 = self.project(one), self.project(two)  # before a graph is kept: 1.1 GiB less for 256 ImageNet images
        q_1, q_2 = self.predict(one), self.predict(two)
        return Loss(distance(q_1, z_2) + distance(q_2, z_1), q_1, {})


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of unit vectors, 2 - 2 cos (Eq. 2): `(B, D)`, `(B, D)` to a scalar."""
    return (2 - 2 * (a * b).sum(1)).mean()
