"""Barlow Twins (Zbontar et al., ICML 2021).

Source: github.com/facebookresearch/barlowtwins, main.py.

There is one network. Every output of its projector, normalised over the global batch to mean 0 and
variance 1, should be equal for both views of an image and uncorrelated with the other outputs. With
the correlations C_ij = mean_n(a_ni b_nj) of the normalised outputs a and b of the two views, the
loss is

    sum_i (1 - C_ii)^2 + off_diagonal * sum_{i != j} C_ij^2.

The gradient flows through both views, and through the images of other ranks. The loss, the networks
and the numbers of ImageNet-1K are those of the code. Two things differ:

- The code's sum over ranks has no backward pass, so its gradient is 1/ranks of the true one (its
  issue 8). Here the gradient is the true one. The factor does not change how far LARS moves a
  weight, but it changes how far gains and biases move. With the 16 GPUs of the README, their
  learning rate of .0048 was in effect .0003, which is the one in the rows here.
- On small images, the solarized second view is that of solo-learn's recipe for CIFAR. Crops and
  colours are those of all methods here (PAPER 4.1). The learning rate of LARS is our choice.

Both aggressive views are read. On larger images they differ, as in BYOL: the first one is always
blurred. The second one is rarely blurred and sometimes solarized.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from rsa_fast.distributed import gather, rank, world_size
from rsa_fast.methods.method import PAIRS, Loss, Method, Now, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite
from rsa_fast.syncbn import at_least_float32

# BYOL's pair of views, which Barlow Twins and VICReg also use.
ASYMMETRIC = cite(
    "Barlow Twins main.py, VICReg augmentations.py",
    views={
        "interpolation": "bicubic",
        "crop_area": (0.08, 1.0),
        "brightness": 0.4,
        "contrast": 0.4,
        "saturation": 0.2,
        "hue": 0.1,
        "groups": [
            {"name": "first", "count": 1, "blur_p": 1.0},
            {"name": "second", "count": 1, "blur_p": 0.1, "solarize_p": 0.2},
        ],
    },
)

SOLARIZED = {
    "interpolation": "bicubic",
    "groups": [
        {"name": "first", "count": 1},
        {"name": "second", "count": 1, "solarize_p": 0.2},
    ],
}


class BarlowTwinsRecipe(Recipe):
    hidden_dim: int = Field(ge=1)  # units of the projector's two hidden layers
    out_dim: int = Field(ge=2)  # D, outputs of the projector
    off_diagonal: float = Field(ge=0)  # the weight of the correlations of different outputs


class BarlowTwins(Method):
    """Barlow Twins, whose projector is wider than the encoder's features."""

    recipe_type = BarlowTwinsRecipe
    # All rows use LARS, as do the code and solo-learn. After three epochs of the demo (width=8),
    # the kNN score was 14% with SGD as in PAPER 4.1, and 36 to 39% with LARS at rates from .5 to 2.
    rows: ClassVar[Rows] = {
        "all": cite("Barlow Twins main.py; solo-learn's CIFAR recipe", optimizer="lars", bn="sync")
        | cite("Barlow Twins main.py", weight_decay=1e-6, warmup_epochs=10, lr_per="step")
        | cite("Barlow Twins main.py, README: .0048 of .2, on 16 GPUs", bias_lr_ratio=0.0015)
        | cite("Barlow Twins main.py (.005 in the paper)", off_diagonal=0.0051)
        | cite("solo-learn's CIFAR and ImageNet-100 recipes", hidden_dim=2048, out_dim=2048)
        | cite("chosen: between ImageNet's peaks at 256 and at 2048 images", base_lr=1.0),
        "32px": cite("solo-learn's CIFAR recipe, without its crops and colours", views=SOLARIZED),
        "64px": cite("chosen: as for CIFAR", views=SOLARIZED),
        "224px": ASYMMETRIC,
        "imagenet100": cite(
            "Barlow Twins issue 7: the best for ImageNet at 256 images", base_lr=0.4
        ),
        "imagenet1k": cite(
            "Barlow Twins main.py", hidden_dim=8192, out_dim=8192, batch_size=2048, base_lr=0.2
        )
        | cite("Barlow Twins main.py: .001 of the peak", min_lr=0.0016),
        "short": cite("chosen: small batches", hidden_dim=512, out_dim=512, peak_lr=1.0)
        | cite("chosen: runs of few steps", warmup_epochs=1),
    }
    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: BarlowTwinsRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        head = expander(encoder.feature_dim, recipe.hidden_dim, recipe.out_dim)
        self.online = Projected(encoder, head)
        self.norm = nn.BatchNorm1d(recipe.out_dim, affine=False)
        self.off_diagonal = recipe.off_diagonal

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss of the global batch. `off_diagonal` is unweighted."""
        z_1, z_2 = self.online(batch.aggressive_1), self.online(batch.aggressive_2)  # (B, D)
        a, b = self.norm(at_least_float32(z_1)), self.norm(at_least_float32(z_2))  # (B, D)
        correlation, off_diagonal = products(gather(a), gather(b), world_size() * len(a))
        diagonal = (1 - correlation).square().sum()
        total = diagonal + self.off_diagonal * off_diagonal
        return Loss(total, unit(z_1), {"diagonal": diagonal, "off_diagonal": off_diagonal})


def expander(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """The projector of Barlow Twins and VICReg: three linear layers with BatchNorm and ReLU.

    VICReg's hidden layers have biases in its code. They change nothing, because BatchNorm subtracts
    them again.
    """
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, hidden_dim, bias=False),
        nn.BatchNorm1d(hidden_dim),
        nn.ReLU(inplace=True),
        nn.Linear(hidden_dim, out_dim, bias=False),
    )


def products(a: Tensor, b: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    """The diagonal `(D,)` of the matrix a^T b / divisor, and the sum of the other squares.

    `a` and `b`, `(N, D)`, contain the rows of all ranks, and are equal on all ranks. With 8192
    outputs the matrix has 256 MiB, so each rank computes only its part of the rows. The sum is that
    of this part times the number of ranks. Its mean over the ranks is thus the sum over the whole
    matrix.
    """
    first, last = (a.shape[1] * r // world_size() for r in (rank(), rank() + 1))
    with torch.autocast(a.device.type, enabled=False):
        diagonal = (a * b).sum(0) / divisor  # (D,)
        part = a[:, first:last].T @ b / divisor  # (D / ranks, D)
        others = part.square().sum() - diagonal[first:last].square().sum()
    return diagonal, world_size() * others
