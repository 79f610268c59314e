"""BYOL as RSA re-implements it (Grill et al. 2020; github.com/tmllab/RSA methods/BYOL.py).

An online network with a predictor learns to predict a target network's projection of the image's other view; the target
follows the online weights by an exponential moving average and receives no gradient.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.views import Batch
from rsa_fast.networks import Encoder, Mlp, Projected


@dataclass
class Loss:
    """What every method's forward returns: the scalar to minimise, and named scalars for the log, all on the device."""

    total: Tensor
    parts: dict[str, Tensor]


class Byol(nn.Module):
    """`pairs` is `AA` (two aggressive views) or `AW` (aggressive and weak), each through both networks."""

    def __init__(self, encoder: Encoder, hidden_dim: int, out_dim: int, pairs: str = "AA") -> None:
        super().__init__()
        if pairs not in ("AA", "AW"):
            raise ValueError(f"no pairs {pairs!r}: choose AA or AW")
        self.views = ("aggressive_1", "aggressive_2" if pairs == "AA" else "weak_2")
        self.online = Projected(encoder, hidden_dim, out_dim)
        self.predictor = Mlp(out_dim, hidden_dim, out_dim)
        # A copy of the weights. Its BatchNorm runs in train mode on batch statistics, as in the reference code, so its
        # running statistics drift on their own and are never read.
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    @property
    def encoder(self) -> Encoder:
        return self.online.encoder

    @property
    def reads(self) -> frozenset[str]:
        """The views this method computes with; no other is made."""
        return frozenset(self.views)

    def predict(self, images: Tensor) -> Tensor:
        """Unit-length online predictions `(B, out_dim)`, float32."""
        return unit(self.predictor(self.online(images)))

    @torch.no_grad()
    def project(self, images: Tensor) -> Tensor:
        """Unit-length target projections `(B, out_dim)`, float32, without gradient."""
        return unit(self.target(images))

    def forward(self, batch: Batch, beta: float) -> Loss:
        """Symmetrised loss, the sum of both directions, in 0..8; `beta` is not used."""
        one, two = (getattr(batch, view) for view in self.views)
        q_1, q_2 = self.predict(one), self.predict(two)
        z_1, z_2 = self.project(one), self.project(two)
        return Loss(distance(q_1, z_2) + distance(q_2, z_1), {})

    @torch.no_grad()
    def after_step(self, tau: float) -> None:
        """target = tau target + (1 - tau) online, for the weights; BatchNorm buffers are left alone.

        Called after the optimiser step with the tau of the next step, which gives every forward the same target as the
        reference code, where the move comes first in the forward.
        """
        torch._foreach_lerp_(list(self.target.parameters()), list(self.online.parameters()), 1 - tau)


def unit(x: Tensor) -> Tensor:
    return F.normalize(x.float(), dim=1)


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Mean over the batch of the squared distance of unit vectors, 2 - 2 cos (Eq. 2): `(B, D)`, `(B, D)` to a scalar."""
    return (2 - 2 * (a * b).sum(1)).mean()
