"""Supervised training of the same encoder on the same weak views and their labels (RSA Table 4's first row)."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from pipelines.views import Batch
from rsa_fast.methods.method import Loss, Method, Now, unit
from rsa_fast.networks import Encoder
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Rows, cite


class SupervisedRecipe(Recipe):
    classes: int = Field(ge=2)

    def check_labels(self, labelled: bool, classes: int) -> None:
        if not labelled or classes != self.classes:
            found = f"labels of {classes} classes" if labelled else "images without labels"
            raise ValueError(
                f"supervised training on {self.classes} classes found {found}: --set classes={classes or 'N'}"
            )


class Supervised(Method):
    """A linear classifier on the encoder."""

    recipe_type = SupervisedRecipe
    # PAPER Table 4's first row gives epochs and batch only. The rest is the usual recipe, with this
    # project's cosine.
    rows: ClassVar[Rows] = {
        "all": cite("torchvision's default", zero_init_residual=False),
        "imagenet1k": cite(
            "the usual recipe", optimizer="sgd", base_lr=0.1, weight_decay=1e-4, warmup_epochs=0
        )
        | cite("PAPER Table 4", batch_size=256, epochs=100)
        | cite("the usual recipe", bn="local"),
    }
    reads = frozenset({"weak_1"})

    def __init__(self, recipe: SupervisedRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.encoder = encoder  # no other network contains the encoder: it is registered here
        self.classifier = nn.Linear(encoder.feature_dim, recipe.classes)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """Cross-entropy, with the batch's top-1 in percent."""
        features = self.encoder(batch.weak_1)
        logits = self.classifier(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top1 = 100 * (logits.argmax(1) == batch.label).float().mean()
        return Loss(F.cross_entropy(logits, batch.label), unit(features), {"train_top1": top1})
