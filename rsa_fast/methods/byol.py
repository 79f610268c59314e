"""BYOL (Grill et al., NeurIPS 2020), as RSA's authors re-implemented it.

Source: github.com/tmllab/RSA, methods/BYOL.py.

The online network and its predictor learn to predict the target network's projection of the image's
other view. With unit-length online predictions q and target projections z, the loss is the batch
mean of

    |q_1 - z_2|^2 + |q_2 - z_1|^2.

The gradient reaches the online network and the predictor. The target network is a moving average of
the online network. Each of the two views goes through both networks: two aggressive views (`pairs`
AA), or an aggressive and a weak one (AW).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rsa_fast.methods.method import PAIRS, Loss, Now, TargetMethod, TargetRecipe, mlp, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, cite

BOOTSTRAP_ROWS = {
    "all": cite("PAPER 4.1", hidden_dim=1024, out_dim=128, tau_base=0.99),
    "224px": cite("CODE methods/BYOL.py", hidden_dim=4096, out_dim=256),
    # A target that follows faster helps short runs more than twice the epochs (docs/results.md).
    "short": cite("chosen: runs of few steps", tau_base=0.97),
}


class BootstrapRecipe(TargetRecipe):
    """The sizes of the heads of BYOL and RSA."""

    hidden_dim: int = Field(ge=1)  # units of the projector's and the predictor's hidden layer
    out_dim: int = Field(ge=1)  # D, outputs of the projector and of the predictor


class ByolRecipe(BootstrapRecipe):
    # Two aggressive views (AA), or an aggressive and a weak one (AW), as in PAPER Table 1.
    pairs: Literal["AA", "AW"] = "AA"


class BootstrapMethod(TargetMethod):
    """The networks of BYOL and RSA: the online network has a predictor, the target has none."""

    mean_over_images = True

    def __init__(self, recipe: BootstrapRecipe, encoder: Encoder) -> None:
        hidden_dim, out_dim = recipe.hidden_dim, recipe.out_dim
        super().__init__(recipe, Projected(encoder, mlp(encoder.feature_dim, hidden_dim, out_dim)))
        self.predictor = mlp(out_dim, hidden_dim, out_dim)

    def predict(self, images: Tensor) -> Tensor:
        """Unit-length online predictions `(B, D)` of `(B, 3, H, W)`."""
        return unit(self.predictor(self.online(images)))

    @torch.no_grad()
    def project(self, images: Tensor) -> Tensor:
        """Unit-length target projections `(B, D)` of `(B, 3, H, W)`, without gradient."""
        return unit(self.target(images))


class Byol(BootstrapMethod):
    """BYOL on the two views that `pairs` names."""

    recipe_type = ByolRecipe
    rows: ClassVar[Rows] = BOOTSTRAP_ROWS | {
        "imagenet1k": cite(
            "chosen: RSA's (PAPER 4.1), as its base_lr, to compare both; no source trains BYOL "
            "with these numbers: PAPER Table 4 has 4096 images for 100 and 200 epochs, or 2048 "
            "for 300",
            optimizer="lars",
            batch_size=2048,
            weight_decay=1e-6,
        )
    }

    def __init__(self, recipe: ByolRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.views = PAIRS[recipe.pairs]
        self.reads = frozenset(self.views)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The sum of both directions, between 0 and 8."""
        one, two = (batch.views[name] for name in self.views)  # (B, 3, H, W)
        # The target goes first, before autograd stores anything: with 256 ImageNet images this
        # saves 1.1 GiB.
        z_1, z_2 = self.project(one), self.project(two)  # (B, D)
        q_1, q_2 = self.predict(one), self.predict(two)  # (B, D)
        return Loss(distance(q_1, z_2) + distance(q_2, z_1), q_1, {})


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The squared distance of unit vectors, 2 - 2 cos (PAPER Eq. 2), averaged over the batch.

    Takes `a` and `b` as unit rows `(B, D)` and returns a scalar.
    """
    return (2 - 2 * (a * b).sum(1)).mean()  # (B, D) -> (B,) -> ()
