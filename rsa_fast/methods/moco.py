"""MoCo v2, symmetrised (Chen et al. 2020, He et al. 2020; github.com/facebookresearch/moco): a queue of past keys is the
dictionary in which a query finds its image's other view."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.views import Batch
from rsa_fast.methods.method import PAIRS, QUEUE_START, Loss, Now, QueueMethod, QueueRecipe, unit
from rsa_fast.networks import Encoder
from rsa_fast.sourced import Rows, cite


class MoCoRecipe(QueueRecipe):
    pass


class MoCo(QueueMethod):
    """The head's hidden layer is as wide as the features; temperature and queue are those of the loss."""

    recipe_type = MoCoRecipe
    rows: ClassVar[Rows] = {
        "all": QUEUE_START
        | cite("PAPER 4.1: .99 in all experiments", tau_base=0.99)
        | cite("MoCo v2", out_dim=128)
        | cite("MoCo's CIFAR-10 demo", temperature=0.1, bn="split:8", queue_size=4096),
        "64px": cite("chosen: between the CIFAR demo's and ImageNet's", queue_size=16_384),
        "224px": cite("MoCo v2", temperature=0.2, queue_size=65_536, bn="local"),
        "imagenet1k": cite(
            "MoCo v2",
            optimizer="sgd",
            base_lr=0.03,
            batch_size=256,
            weight_decay=1e-4,
            warmup_epochs=0,
        )
        | cite("MoCo v1", tau_base=0.999),
    }
    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: MoCoRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, hidden_dim=encoder.feature_dim)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """InfoNCE of both directions, summed, against the queue as it was; then the keys of both enter it."""
        (k_1, every_1), (k_2, every_2) = (
            self.keys(batch.aggressive_1),
            self.keys(batch.aggressive_2),
        )
        q_1, q_2 = unit(self.online(batch.aggressive_1)), unit(self.online(batch.aggressive_2))
        queue = self.queue.clone()  # the backward needs it as it is now
        total = info_nce(q_1, k_2, queue, self.temperature) + info_nce(
            q_2, k_1, queue, self.temperature
        )
        self.enqueue(torch.cat([every_1, every_2]))
        return Loss(total, q_1, {})


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of the cross-entropy of finding k among k and the queue: `(B, D)`, `(B, D)`, `(D, K)`."""
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))
