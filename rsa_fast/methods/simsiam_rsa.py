"""SimSiam with RSA's weak targets (Bai et al., NeurIPS 2022, section 4.7).

The authors released no code for it. The weak targets w are the same network's projections of the
weak views, computed without gradient. With unit-length predictions p of the aggressive views and
targets t for the aggressive pairs, the loss is the batch mean of

    -(1 - beta) (p_1.w_2 + p_2.w_1) / 2 - beta (p_1.t_2 + p_2.t_1) / 2.

The gradient reaches the network through the predictions p only. All four views are read.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch

from rsa_fast.methods.method import BETA_ROWS, BetaRecipe, Loss, Now, unit
from rsa_fast.methods.simsiam import SimSiam, SimSiamRecipe, negative_cosine
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.sourced import Rows, cite, merged_rows


class SimSiamRsaRecipe(SimSiamRecipe, BetaRecipe):
    # The detached targets t of aggressive pairs are predictions (pred), as in RSA's Eq. 5, or
    # projections (proj), as in SimSiam. With proj, beta = 1 is SimSiam.
    aa_target: Literal["pred", "proj"] = "pred"


class SimSiamRsa(SimSiam):
    """SimSiam on all four views, with RSA's decaying weight of aggressive pairs."""

    recipe_type = SimSiamRsaRecipe
    rows: ClassVar[Rows] = merged_rows(
        SimSiam.rows,
        BETA_ROWS,
        {"imagenet1k": cite("chosen: SimSiam's; PAPER Table 8 has no ImageNet-1K", batch_size=256)},
    )
    reads = frozenset(VIEWS)

    def __init__(self, recipe: SimSiamRsaRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.aa_target = recipe.aa_target

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The mean of both directions, between -1 and 1."""
        p_1, z_1 = self.embed(batch.aggressive_1)  # (B, D)
        p_2, z_2 = self.embed(batch.aggressive_2)  # (B, D)
        with torch.no_grad():
            w_1, w_2 = unit(self.online(batch.weak_1)), unit(self.online(batch.weak_2))  # (B, D)
        t_1, t_2 = (p_1.detach(), p_2.detach()) if self.aa_target == "pred" else (z_1, z_2)
        weak = (negative_cosine(p_1, w_2) + negative_cosine(p_2, w_1)) / 2
        aggressive = (negative_cosine(p_1, t_2) + negative_cosine(p_2, t_1)) / 2
        beta = now["beta"]
        total = (1 - beta) * weak + beta * aggressive
        return Loss(total, z_1, {"weak": weak, "aggressive": aggressive})
