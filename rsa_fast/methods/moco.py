"""MoCo v2 (Chen et al., arXiv 2020; MoCo: He et al., CVPR 2020) with the symmetric loss.

Source: github.com/facebookresearch/moco.

Each query must find the key of its image's other view in a dictionary: that key and a queue of past
keys m_1 ... m_K. With unit-length online queries q, target keys k and the temperature T, the loss
is the batch mean of ce(q_1, k_2) + ce(q_2, k_1), where

    ce(q, k) = -log(exp(q.k / T) / (exp(q.k / T) + sum_j exp(q.m_j / T))).

The gradient reaches the online network only. The target network is a moving average of it. Both
aggressive views are read, and each goes through both networks.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from rsa_fast.methods.method import (
    EIGHT_GPUS,
    PAIRS,
    QUEUE_FIELDS,
    Loss,
    Now,
    QueueMethod,
    QueueRecipe,
    info_nce,
    unit,
)
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import Batch
from rsa_fast.sourced import Rows, cite


class MoCoRecipe(QueueRecipe):
    pass


class MoCo(QueueMethod):
    """MoCo v2, whose head has a hidden layer as wide as the encoder's features."""

    recipe_type = MoCoRecipe
    rows: ClassVar[Rows] = {
        "all": QUEUE_FIELDS
        | cite("PAPER 4.1: .99 in all experiments", tau_base=0.99)
        | cite("MoCo v2", out_dim=128)
        | cite("MoCo's CIFAR-10 demo", temperature=0.1, bn="split:8", queue_size=4096),
        "64px": cite("chosen: between the CIFAR demo's and ImageNet's", queue_size=16_384),
        "224px": cite("MoCo v2", temperature=0.2, queue_size=65_536) | EIGHT_GPUS,
        "imagenet1k": cite(
            "MoCo v2",
            optimizer="sgd",
            base_lr=0.03,
            batch_size=256,
            weight_decay=1e-4,
            warmup_epochs=0,
        )
        | cite("MoCo main_moco.py", lr_per="epoch")
        | cite("MoCo v1", tau_base=0.999),
    }
    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: MoCoRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, hidden_dim=encoder.feature_dim)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The sum of both directions. Afterwards the keys of both views enter the queue."""
        one, two = batch.aggressive_1, batch.aggressive_2  # (B, 3, H, W)
        (k_1, all_1), (k_2, all_2) = self.keys(one), self.keys(two)  # (B, D), (N, D) each
        q_1, q_2 = unit(self.online(one)), unit(self.online(two))  # (B, D)
        # The backward pass needs the queue as it is now, and `enqueue` changes it in place.
        queue = self.queue.clone()  # (D, K)
        loss_1 = info_nce(q_1, k_2, queue, self.temperature)
        loss_2 = info_nce(q_2, k_1, queue, self.temperature)
        self.enqueue(torch.cat([all_1, all_2]))  # (2N, D)
        return Loss(loss_1 + loss_2, q_1, {})
