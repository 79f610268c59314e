"""SimSiam (Chen & He 2021; github.com/facebookresearch/simsiam), alone and with RSA (RSA section 4.7).

One network: its predictor learns to predict the network's own projection of the other view, held fixed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from pipelines.views import VIEWS, Batch
from rsa_fast import recipes
from rsa_fast.methods.byol import PAIRS
from rsa_fast.methods.method import Loss, Method, unit
from rsa_fast.networks import Encoder, Projected


class SimSiam(Method):
    """`projector_layers` is 3 in the paper and 2 in its CIFAR recipe, `hidden_dim` that of the predictor. With
    `constant_predictor_lr` the predictor keeps the peak learning rate (the official --fix-pred-lr)."""

    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: recipes.SimSiam, encoder: Encoder) -> None:
        super().__init__(encoder)
        head = projector(encoder.feature_dim, recipe.projector_layers, recipe.out_dim)
        self.online = Projected(encoder, head)
        self.predictor = nn.Sequential(
            nn.Linear(recipe.out_dim, recipe.hidden_dim, bias=False),
            nn.BatchNorm1d(recipe.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(recipe.hidden_dim, recipe.out_dim),
        )
        self.constant_predictor_lr = recipe.constant_predictor_lr

    def constant_lr_parameters(self) -> Iterable[nn.Parameter]:
        return self.predictor.parameters() if self.constant_predictor_lr else ()

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-length predictions, with gradient, and projections, without: `(B, out_dim)` both."""
        z = self.online(images)
        return unit(self.predictor(z)), unit(z.detach())

    def forward(self, batch: Batch, beta: float) -> Loss:
        """Symmetrised negative cosine, the mean of both directions, in -1..1; `beta` is not used."""
        (p_1, z_1), (p_2, z_2) = self.embed(batch.aggressive_1), self.embed(batch.aggressive_2)
        return Loss((negative_cosine(p_1, z_2) + negative_cosine(p_2, z_1)) / 2, z_1, {})


class SimSiamRsa(SimSiam):
    """The weak targets are the same network's projections of the weak views, made without gradient.

    The paper releases no code for it. `aa_target` chooses what an aggressive pair is drawn to: `pred`, RSA's predictions, or
    `proj`, SimSiam's projections, with which beta = 1 is SimSiam.
    """

    reads = frozenset(VIEWS)

    def __init__(self, recipe: recipes.SimSiamRsa, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.aa_target = recipe.aa_target

    def forward(self, batch: Batch, beta: float) -> Loss:
        (p_1, z_1), (p_2, z_2) = self.embed(batch.aggressive_1), self.embed(batch.aggressive_2)
        with torch.no_grad():
            w_1, w_2 = unit(self.online(batch.weak_1)), unit(self.online(batch.weak_2))
        t_1, t_2 = (p_1.detach(), p_2.detach()) if self.aa_target == "pred" else (z_1, z_2)
        weak = (negative_cosine(p_1, w_2) + negative_cosine(p_2, w_1)) / 2
        aggressive = (negative_cosine(p_1, t_2) + negative_cosine(p_2, t_1)) / 2
        return Loss((1 - beta) * weak + beta * aggressive, z_1, {"weak": weak, "aggressive": aggressive})


def projector(in_dim: int, layers: int, out_dim: int) -> nn.Sequential:
    """`layers` linear layers, each followed by BatchNorm, the last one's without gain and bias; ReLU between them.

    Hidden layers are `in_dim` wide, or `out_dim` with two of them (the CIFAR recipe: 512-2048-2048).
    """
    hidden_dim = in_dim if layers > 2 else out_dim
    parts: list[nn.Module] = []
    for first in (in_dim, *[hidden_dim] * (layers - 2))[: layers - 1]:
        parts += [nn.Linear(first, hidden_dim, bias=False), nn.BatchNorm1d(hidden_dim), nn.ReLU(inplace=True)]
    parts += [nn.Linear(hidden_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False)]
    return nn.Sequential(*parts)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Mean over the batch of -cos, for unit rows: `(B, D)`, `(B, D)` to a scalar."""
    return -(p * z).sum(1).mean()
