"""VICReg (Bardes et al., ICLR 2022): variance, invariance and covariance.

Source: github.com/facebookresearch/vicreg, main_vicreg.py, augmentations.py.

There is one network. The outputs of its expander should be equal for both views of an image
(invariance), have a standard deviation of at least 1 over the images (variance), and be
uncorrelated with each other (covariance). With the outputs x and y of the two views, (N, D), the
loss is

    25 mean((x - y)^2) + 25 (v(x) + v(y)) / 2 + 1 (c(x) + c(y)),

    v(x) = mean_i max(0, 1 - sqrt(var_i(x) + .0001)),    c(x) = sum_{i != j} cov_ij(x)^2 / D,

where variances and covariances are those of the global batch, divided by N - 1. The gradient flows
through both views, and through the images of other ranks. The loss, the networks and the numbers of
ImageNet-1K are those of the code. Three things differ:

- The loss is computed in float32. The code computes it in float16, where NaNs are reported (its
  issue 27).
- The rows for CIFAR are solo-learn's, but solo-learn does not halve the two terms of the variance.
- On small images, the solarized views are those of solo-learn's recipe for CIFAR. Crops and colours
  are those of all methods here (PAPER 4.1). The learning rate of LARS is our choice.

Both aggressive views are read. On larger images they differ, as in Barlow Twins.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rsa_fast.distributed import gather
from rsa_fast.methods.barlow_twins import ASYMMETRIC, expander, products
from rsa_fast.methods.method import PAIRS, Loss, Method, Now, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite
from rsa_fast.syncbn import at_least_float32

SOLARIZED = {"interpolation": "bicubic", "solarize_p": 0.1}


class VicRegRecipe(Recipe):
    hidden_dim: int = Field(ge=1)  # units of the expander's two hidden layers
    out_dim: int = Field(ge=2)  # D, outputs of the expander
    invariance_weight: float = Field(ge=0)  # the weight of the views' distance in the loss
    variance_weight: float = Field(ge=0)  # the weight of the outputs' variance in the loss
    covariance_weight: float = Field(ge=0)  # the weight of their covariance in the loss


class VicReg(Method):
    """VICReg, whose expander is that of Barlow Twins."""

    recipe_type = VicRegRecipe
    # All rows use LARS, as do the code and solo-learn. After three epochs of the demo (width=8),
    # the kNN score was 53% with SGD as in PAPER 4.1, and 54 to 61% with LARS at rates from .3 to 2.
    rows: ClassVar[Rows] = {
        "all": cite("VICReg main_vicreg.py; solo-learn's CIFAR recipe", optimizer="lars", bn="sync")
        | cite("VICReg main_vicreg.py", weight_decay=1e-6, warmup_epochs=10, lr_per="step")
        | cite(
            "VICReg main_vicreg.py",
            invariance_weight=25,
            variance_weight=25,
            covariance_weight=1,
        )
        | cite("solo-learn's CIFAR and ImageNet-100 recipes", hidden_dim=2048, out_dim=2048)
        | cite("chosen: between ImageNet's peaks at 256 and at 2048 images", base_lr=1.0),
        "32px": cite("solo-learn's CIFAR recipe, without its crops and colours", views=SOLARIZED),
        "64px": cite("chosen: as for CIFAR", views=SOLARIZED),
        "224px": ASYMMETRIC,
        "imagenet100": cite("VICReg issue 21: for ImageNet at 256 images", base_lr=0.5),
        "imagenet1k": cite("VICReg main_vicreg.py", hidden_dim=8192, out_dim=8192, batch_size=2048)
        | cite("VICReg issue 13: for 100 epochs; .2 for 1000", base_lr=0.3)
        | cite("VICReg main_vicreg.py: .001 of the peak", min_lr=0.0024),
        "short": cite("chosen: small batches", hidden_dim=512, out_dim=512, peak_lr=1.0)
        | cite("chosen: runs of few steps", warmup_epochs=1),
    }
    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: VicRegRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        head = expander(encoder.feature_dim, recipe.hidden_dim, recipe.out_dim)
        self.online = Projected(encoder, head)
        self.invariance_weight = recipe.invariance_weight
        self.variance_weight = recipe.variance_weight
        self.covariance_weight = recipe.covariance_weight

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss, with the invariance of this rank's images. The parts are unweighted."""
        x = at_least_float32(self.online(batch.aggressive_1))  # (B, D)
        y = at_least_float32(self.online(batch.aggressive_2))  # (B, D)
        (variance_x, covariance_x), (variance_y, covariance_y) = spread(x), spread(y)
        parts = {
            "invariance": F.mse_loss(x, y),
            "variance": (variance_x + variance_y) / 2,
            "covariance": covariance_x + covariance_y,
        }
        total = (
            self.invariance_weight * parts["invariance"]
            + self.variance_weight * parts["variance"]
            + self.covariance_weight * parts["covariance"]
        )
        return Loss(total, unit(x), parts)


def spread(x: Tensor) -> tuple[Tensor, Tensor]:
    """v(x) and c(x) of this rank's rows `(B, D)`, among those of all ranks.

    The mean of c(x) over the ranks is that of the global batch (see `products`).
    """
    rows = gather(x)  # (N, D)
    centred = rows - rows.mean(0)  # (N, D)
    variance, off_diagonal = products(centred, centred, len(rows) - 1)  # (D,), ()
    too_low = torch.relu(1 - (variance + 1e-4).sqrt())  # (D,)
    return too_low.mean(), off_diagonal / x.shape[1]
