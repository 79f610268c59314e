"""SimSiam (Chen & He, CVPR 2021).

Source: github.com/facebookresearch/simsiam.

There is one network. Its predictor learns to predict the network's own projection of the image's
other view. With unit-length predictions p and projections z, the loss is the batch mean of

    -(p_1.sg z_2 + p_2.sg z_1) / 2.

`sg` stops the gradient, which reaches the network through the predictions only. Both aggressive
views are read.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from rsa_fast.methods.method import PAIRS, Loss, Method, Now, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite


class SimSiamRecipe(Recipe):
    projector_layers: int = Field(ge=2)  # linear layers: 3 in the paper, 2 in its CIFAR recipe
    out_dim: int = Field(ge=1)  # D, outputs of the projector and of the predictor
    hidden_dim: int = Field(ge=1)  # units of the predictor's hidden layer
    # The predictor's learning rate stays at its peak (the official --fix-pred-lr).
    constant_predictor_lr: bool = True


class SimSiam(Method):
    """SimSiam with the projector of the paper or of its CIFAR recipe.

    Up to ImageNet-100, the optimiser and the augmentation are those of RSA's own runs of SimSiam
    (PAPER 4.1). ImageNet-1K's row is SimSiam's own.
    """

    recipe_type: ClassVar[type[Recipe]] = SimSiamRecipe
    rows: ClassVar[Rows] = {
        "all": cite(
            "facebookresearch/simsiam issue 9: the CIFAR recipe, 512-512-2048", projector_layers=2
        )
        | cite("SimSiam 3, builder.py", out_dim=2048, hidden_dim=512),
        "224px": cite("SimSiam 3, builder.py", projector_layers=3),
        "imagenet1k": cite(
            "SimSiam 4",
            optimizer="sgd",
            base_lr=0.05,
            weight_decay=1e-4,
            warmup_epochs=0,
            bn="sync",
        )
        | cite("PAPER Table 4; SimSiam's default is 512", batch_size=256)
        | cite("SimSiam main_simsiam.py", lr_per="epoch"),
    }
    reads = frozenset(PAIRS["AA"])
    mean_over_images = True

    def __init__(self, recipe: SimSiamRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
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
        """Unit-length predictions with gradient, and projections without, both `(B, D)`."""
        z = self.online(images)  # (B, D)
        return unit(self.predictor(z)), unit(z.detach())

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The mean of both directions, between -1 and 1."""
        p_1, z_1 = self.embed(batch.aggressive_1)  # (B, D)
        p_2, z_2 = self.embed(batch.aggressive_2)  # (B, D)
        return Loss((negative_cosine(p_1, z_2) + negative_cosine(p_2, z_1)) / 2, z_1, {})


def projector(in_dim: int, layers: int, out_dim: int) -> nn.Sequential:
    """`layers` linear layers, each followed by BatchNorm, and ReLU between them.

    The last BatchNorm has neither gain nor bias. Hidden layers have `in_dim` units, as in
    builder.py. In the CIFAR recipe, the widths are 512-512-2048.
    """
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [
            nn.Linear(in_dim, in_dim, bias=False),
            nn.BatchNorm1d(in_dim),
            nn.ReLU(inplace=True),
        ]
    parts += [nn.Linear(in_dim, out_dim, bias=False), nn.BatchNorm1d(out_dim, affine=False)]
    return nn.Sequential(*parts)


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """-cos, averaged over the batch. Takes unit rows `(B, D)` and returns a scalar."""
    return -(p * z).sum(1).mean()  # (B, D) -> (B,) -> ()
