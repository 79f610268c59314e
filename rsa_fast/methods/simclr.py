"""SimCLR (Chen et al., ICML 2020).

Source: github.com/google-research/simclr, objective.py.

Each view must find the other view of its image among all views of the global batch. With the 2N
unit-length projections z of N images and the temperature T, the loss (NT-Xent) of a view i whose
partner is j is

    -log(exp(z_i.z_j / T) / sum_{k != i} exp(z_i.z_k / T)),

averaged over all views. There is one network, and the gradient flows through both sides of every
similarity, from other ranks too. Both aggressive views are read.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rsa_fast.distributed import gather, rank
from rsa_fast.methods.method import PAIRS, STRONG_JITTER, Loss, Method, Now, mlp, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite


class SimClrRecipe(Recipe):
    out_dim: int = Field(ge=1)  # D, outputs of the projector
    temperature: float = Field(gt=0)  # divides the similarities before the softmax


class SimClr(Method):
    """SimCLR, whose projector has one hidden layer as wide as the encoder's features."""

    recipe_type = SimClrRecipe
    # Up to ImageNet-100, the rows are those of RSA's own runs of SimCLR: MoCo v2's augmentation and
    # PAPER 4.1's optimiser. The RSA paper names neither temperature nor head. The temperatures are
    # those of SimCLR's CIFAR command and of others' 224 px runs. ImageNet-1K's row is SimCLR's own.
    rows: ClassVar[Rows] = {
        "all": cite("SimCLR 3", out_dim=128)
        | cite("SimCLR README: the CIFAR-10 command", temperature=0.5),
        "224px": cite("solo-learn's choice for batches of 256", temperature=0.2),
        "imagenet1k": cite(
            "SimCLR README",
            temperature=0.1,
            batch_size=4096,
            optimizer="lars",
            base_lr=0.3,
            weight_decay=1e-4,
        )
        | cite("SimCLR run.py, model.py", warmup_epochs=10, lr_per="step")
        | cite(
            "SimCLR data_util.py, with a jitter strength of 1",
            views={
                "crop_area": (0.08, 1.0),
                **STRONG_JITTER,
            },
        ),
    }
    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: SimClrRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        head = mlp(encoder.feature_dim, encoder.feature_dim, recipe.out_dim)
        self.online = Projected(encoder, head)
        self.temperature = recipe.temperature

    def forward(self, batch: Batch, now: Now) -> Loss:
        """NT-Xent against the global batch, averaged over this rank's 2B views."""
        z_1 = unit(self.online(batch.aggressive_1))  # (B, D)
        z_2 = unit(self.online(batch.aggressive_2))  # (B, D)
        return Loss(nt_xent(z_1, z_2, self.temperature), z_1, {})


def nt_xent(z_1: Tensor, z_2: Tensor, temperature: float) -> Tensor:
    """The cross-entropy of finding each view's partner among the 2N - 1 other views of all ranks.

    Takes this rank's unit rows `z_1` and `z_2`, `(B, D)`. Returns the mean over its 2B views.
    """
    every = torch.cat([gather(z_1), gather(z_2)])  # (2N, D)
    half = len(every) // 2  # N
    mine = rank() * len(z_1) + torch.arange(len(z_1), device=z_1.device)  # (B,)
    self_column, partner = torch.cat([mine, mine + half]), torch.cat([mine + half, mine])  # (2B,)
    with torch.autocast(z_1.device.type, enabled=False):
        logits = torch.cat([z_1, z_2]) @ every.T / temperature  # (2B, 2N)
    return F.cross_entropy(logits.scatter(1, self_column[:, None], -torch.inf), partner)
