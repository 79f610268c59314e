"""Supervised training of the same encoder on the same weak views and their labels (RSA Table 4's first row)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from pipelines.views import Batch
from rsa_fast import recipes
from rsa_fast.methods.method import Loss, Method, unit
from rsa_fast.networks import Encoder


class Supervised(Method):
    """A linear classifier on the encoder."""

    reads = frozenset({"weak_1"})

    def __init__(self, recipe: recipes.Supervised, encoder: Encoder) -> None:
        super().__init__(encoder)
        self.encoder = encoder  # no other network contains the encoder: it is registered here
        self.classifier = nn.Linear(encoder.feature_dim, recipe.classes)

    def forward(self, batch: Batch, beta: float) -> Loss:
        """Cross-entropy, with the batch's top-1 in percent; `beta` is not used."""
        features = self.encoder(batch.weak_1)
        logits = self.classifier(features)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        top1 = 100 * (logits.argmax(1) == batch.label).float().mean()
        return Loss(F.cross_entropy(logits, batch.label), unit(features), {"train_top1": top1})
