"""SimSiam with RSA's weak targets (RSA section 4.7)."""

from __future__ import annotations

from typing import Literal

import torch

from pipelines.views import VIEWS, Batch
from rsa_fast.methods.method import BETA, BetaRecipe, Loss, Now, unit
from rsa_fast.methods.simsiam import SimSiam, SimSiamRecipe, negative_cosine
from rsa_fast.networks import Encoder
from rsa_fast.sourced import stacked


class SimSiamRsaRecipe(SimSiamRecipe, BetaRecipe):
    aa_target: Literal["pred", "proj"] = (
        "pred"  # aggressive pairs: predictions (Eq. 5), projections
    )


class SimSiamRsa(SimSiam):
    """The weak targets are the same network's projections of the weak views, made without gradient.

    The paper releases no code for it. `aa_target` chooses what an aggressive pair is drawn to: `pred`, RSA's predictions, or
    `proj`, SimSiam's projections, with which beta = 1 is SimSiam.
    """

    recipe_type = SimSiamRsaRecipe
    rows = stacked(SimSiam.rows, BETA)
    reads = frozenset(VIEWS)

    def __init__(self, recipe: SimSiamRsaRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.aa_target = recipe.aa_target

    def forward(self, batch: Batch, now: Now) -> Loss:
        (p_1, z_1), (p_2, z_2) = self.embed(batch.aggressive_1), self.embed(batch.aggressive_2)
        with torch.no_grad():
            w_1, w_2 = unit(self.online(batch.weak_1)), unit(self.online(batch.weak_2))
        t_1, t_2 = (p_1.detach(), p_2.detach()) if self.aa_target == "pred" else (z_1, z_2)
        weak = (negative_cosine(p_1, w_2) + negative_cosine(p_2, w_1)) / 2
        aggressive = (negative_cosine(p_1, t_2) + negative_cosine(p_2, t_1)) / 2
        beta = now["beta"]
        return Loss(
            (1 - beta) * weak + beta * aggressive, z_1, {"weak": weak, "aggressive": aggressive}
        )
