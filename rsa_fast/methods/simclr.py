"""SimCLR (Chen et al. 2020; github.com/google-research/simclr objective.py): every other image in the batch is a negative."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pipelines.views import Batch
from rsa_fast.distributed import gather, rank
from rsa_fast.methods.method import PAIRS, Loss, Method, Now, mlp, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite


class SimClrRecipe(Recipe):
    out_dim: int = Field(ge=1)
    temperature: float = Field(gt=0)


class SimClr(Method):
    """The projector has one hidden layer of the encoder's width (the RSA paper does not say which head it used)."""

    recipe_type = SimClrRecipe
    # The RSA paper names neither temperature nor head. The temperatures are those of SimCLR's CIFAR
    # command and of others' 224 px runs.
    rows: ClassVar[Rows] = {
        "all": cite("SimCLR 3", out_dim=128)
        | cite("SimCLR README: the CIFAR-10 command", temperature=0.5),
        "224px": cite("solo-learn's choice for batches of 256", temperature=0.2),
        "imagenet1k": cite(
            "SimCLR README", temperature=0.1, batch_size=4096, base_lr=0.3, weight_decay=1e-4
        ),
    }
    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: SimClrRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        head = mlp(encoder.feature_dim, encoder.feature_dim, recipe.out_dim)
        self.online = Projected(encoder, head)
        self.temperature = recipe.temperature

    def forward(self, batch: Batch, now: Now) -> Loss:
        """NT-Xent over the global batch, the mean over its 2B views."""
        z_1, z_2 = unit(self.online(batch.aggressive_1)), unit(self.online(batch.aggressive_2))
        return Loss(nt_xent(z_1, z_2, self.temperature), z_1, {})


def nt_xent(z_1: Tensor, z_2: Tensor, temperature: float) -> Tensor:
    """Mean over this rank's views of the cross-entropy of finding the partner among the 2B - 1 other views of all ranks.

    `z_1`, `z_2` are unit rows `(b, D)`; the gradient flows through the views gathered from other ranks too.
    """
    every = torch.cat([gather(z_1), gather(z_2)])  # (2B, D)
    half = len(every) // 2
    mine = rank() * len(z_1) + torch.arange(len(z_1), device=z_1.device)
    self_column, partner = torch.cat([mine, mine + half]), torch.cat([mine + half, mine])
    with torch.autocast(z_1.device.type, enabled=False):
        logits = torch.cat([z_1, z_2]) @ every.T / temperature  # (2b, 2B)
    return F.cross_entropy(logits.scatter(1, self_column[:, None], -torch.inf), partner)
