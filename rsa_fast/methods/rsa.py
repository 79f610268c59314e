"""RSA (NeurIPS 2022, Eq. 3-6, Algorithm 1; github.com/tmllab/RSA methods/RSA.py).

BYOL's networks and cost on four views: aggressive views go through the online network only, weak views through the
target only. Each prediction is drawn to the other crop's weak projection and, weighted by a decaying beta, to the other
crop's aggressive prediction, so that the noisy aggressive pairs count less as training goes on.
"""

from __future__ import annotations

from pipelines.views import VIEWS, Batch
from rsa_fast.methods.byol import HEADS, BootstrapMethod, BootstrapRecipe, distance
from rsa_fast.methods.method import BETA, BetaRecipe, Loss, Now
from rsa_fast.sourced import stacked


class RsaRecipe(BootstrapRecipe, BetaRecipe):
    pass


class Rsa(BootstrapMethod):
    """Reads all four views (multi-stage augmentation, MA)."""

    recipe_type = RsaRecipe
    rows = stacked(HEADS, BETA)
    reads = frozenset(VIEWS)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """Eq. 5, in 0..8. The aggressive targets are the online *predictions*, detached, as in the reference code."""
        z_1, z_2 = self.project(batch.weak_1), self.project(batch.weak_2)  # first: see Byol
        q_1, q_2 = self.predict(batch.aggressive_1), self.predict(batch.aggressive_2)
        weak = distance(q_1, z_2) + distance(q_2, z_1)
        aggressive = distance(q_1, q_2.detach()) + distance(q_2, q_1.detach())
        beta = now["beta"]
        return Loss(
            (1 - beta) * weak + beta * aggressive, q_1, {"weak": weak, "aggressive": aggressive}
        )
