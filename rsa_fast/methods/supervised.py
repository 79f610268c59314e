"""Supervised training of the same encoder on weak views (the first row of RSA's Table 4).

With the logits y of a linear classifier on the encoder and the label c, the loss is the batch mean
of the cross-entropy

    -log(exp(y_c) / sum_j exp(y_j)).

The gradient reaches the encoder and the classifier. One weak view and the labels are read.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from rsa_fast.methods.method import Loss, Method, Now, unit
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite


class SupervisedRecipe(Recipe):
    classes: int = Field(ge=2)  # C, outputs of the classifier

    def check_labels(self, labelled: bool, classes: int) -> None:
        if not labelled or classes != self.classes:
            labels = f"labels of {classes} classes" if labelled else "images without labels"
            raise ValueError(
                f"supervised training on {self.classes} classes found {labels}: "
                f"--set classes={classes or 'N'}"
            )


class Supervised(Method):
    """An encoder and a linear classifier on it, which are trained together."""

    recipe_type: ClassVar[type[Recipe]] = SupervisedRecipe
    # The first row of PAPER Table 4 gives only epochs and batch. The rest is the usual recipe.
    rows: ClassVar[Rows] = {
        "all": cite("torchvision's default", zero_init_residual=False),
        "imagenet1k": cite(
            "the usual recipe",
            optimizer="sgd",
            base_lr=0.1,
            weight_decay=1e-4,
            warmup_epochs=0,
            bn="local",
        )
        | cite(
            "chosen: a cosine, where the usual recipe divides by 10 after 30, 60 and 90 epochs",
            lr_per="step",
        )
        | cite("PAPER Table 4", batch_size=256, epochs=100)
        | cite("torchvision's RandomResizedCrop", views={"crop_area": (0.08, 1.0)}),
    }
    reads = frozenset({"weak_1"})
    mean_over_images = True

    def __init__(self, recipe: SupervisedRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.encoder = encoder  # no other network contains the encoder: it is registered here
        self.classifier = nn.Linear(encoder.feature_dim, recipe.classes)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The cross-entropy. `train_top1` is the batch's top-1 accuracy in percent."""
        features = self.encoder(batch.weak_1)  # (B, feature_dim)
        logits = self.classifier(features)  # (B, C)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top1 = 100 * (logits.argmax(1) == batch.label).float().mean()
        return Loss(F.cross_entropy(logits, batch.label), unit(features), {"train_top1": top1})
