"""RSA (Bai et al., NeurIPS 2022), Eq. 3-6 and Algorithm 1.

Source: github.com/tmllab/RSA, methods/RSA.py.

RSA has the networks and the cost of BYOL, but reads four views: the aggressive ones go through the
online network only, and the weak ones go through the target network only. With unit-length online
predictions q of the aggressive views and target projections z of the weak ones, the loss is the
batch mean of

    (1 - beta) (|q_1 - z_2|^2 + |q_2 - z_1|^2) + beta (|q_1 - sg q_2|^2 + |q_2 - sg q_1|^2).

`sg` stops the gradient, which reaches the online network and the predictor. beta decreases to 0, so
the noisy aggressive pairs count less and less during training. All four views are read.
"""

from __future__ import annotations

from rsa_fast.methods.byol import BOOTSTRAP_ROWS, BootstrapMethod, BootstrapRecipe, distance
from rsa_fast.methods.method import BETA_ROWS, BetaRecipe, Loss, Now
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.sourced import merged_rows


class RsaRecipe(BootstrapRecipe, BetaRecipe):
    pass


class Rsa(BootstrapMethod):
    """RSA on all four views (multi-stage augmentation, MA)."""

    recipe_type = RsaRecipe
    rows = merged_rows(BOOTSTRAP_ROWS, BETA_ROWS)
    reads = frozenset(VIEWS)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """Eq. 5, between 0 and 8.

        The aggressive targets are detached online *predictions*, as in the reference code.
        """
        # The target goes first to save memory, as in Byol.
        z_1, z_2 = self.project(batch.weak_1), self.project(batch.weak_2)  # (B, D)
        q_1, q_2 = self.predict(batch.aggressive_1), self.predict(batch.aggressive_2)  # (B, D)
        weak = distance(q_1, z_2) + distance(q_2, z_1)
        aggressive = distance(q_1, q_2.detach()) + distance(q_2, q_1.detach())
        beta = now["beta"]
        total = (1 - beta) * weak + beta * aggressive
        return Loss(total, q_1, {"weak": weak, "aggressive": aggressive})
