"""SwAV (Caron et al., NeurIPS 2020): the cluster of one crop is predicted from the other crops.

Source: github.com/facebookresearch/swav.

The scores of a crop are the similarities s = C z of its unit-length embedding z to K prototypes,
the unit rows of C. The codes Q_1 and Q_2 of the first two crops are assignments to the prototypes
that give all prototypes the same share of the batch (`sinkhorn`). The loss is the batch mean of

    1/2 sum_i 1/(V - 1) sum_{v != i} -Q_i . log softmax(s_v / T),    i = 1, 2;  v = 1 ... V,

where V is the number of crops. The gradient flows through the scores of all crops, into the network
and into the prototypes. The codes have no gradient. The aggressive views of all crops are read. The
rows have two crops of one size, as in PAPER Table 4. The multi-crop of SwAV is

    views={"groups": [{"name": "global", "count": 2, "crop_area": (0.14, 1)},
                      {"name": "local", "count": 6, "size_px": 96, "crop_area": (0.05, 0.14)}]}

As in the code, all crops of one size pass through the encoder together, and all crops pass through
the head together, so BatchNorm normalises them together. The prototypes are scaled to unit length
at the start of each forward pass. The optimiser then changes their length again. They are not
updated in the first epoch.

Unlike in the code, each rank computes the codes of the whole batch from the gathered embeddings.
This is one collective operation instead of eight, and the queue is the same on all ranks.
"""

from __future__ import annotations

from math import ceil
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rsa_fast.distributed import gather, rank
from rsa_fast.methods.method import (
    STRONG_JITTER,
    Loss,
    Method,
    MultiCropRecipe,
    Now,
    cross_view_entropy,
    joint_features,
    unit,
)
from rsa_fast.networks import Encoder, Projected
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Derived
from rsa_fast.sourced import Rows, cite

MORE_PROTOTYPES = cite("chosen: SwAV's issue 37 names 10 for each class", prototypes=1000)
SINKHORN_ITERATIONS = 3  # SwAV main_swav.py


class SwavRecipe(MultiCropRecipe):
    hidden_dim: int = Field(ge=1)  # units of the head's hidden layer
    out_dim: int = Field(ge=1)  # D, length of an embedding
    prototypes: int = Field(ge=1)  # K, the number of clusters
    epsilon: float = Field(gt=0)  # divides the scores from which codes are made; lower is sharper
    # L, past embeddings of each of the first two crops, which are assigned together with the batch.
    # Without them, a batch of fewer images than prototypes leaves prototypes empty.
    queue_size: int = Field(ge=0)
    queue_start_epoch: int = Field(ge=0)  # the first epoch, from 0, that uses the queue

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        """Adds "queue", which is 1 if the queue is full of embeddings and used, and otherwise 0."""
        first = self.queue_start_epoch * derived.steps_per_epoch
        used = step >= max(first, ceil(self.queue_size / self.batch_size))
        return super().schedule(step, derived) | {"queue": float(used)}


class Swav(Method):
    """SwAV with any number of crops."""

    recipe_type = SwavRecipe
    # No source trains SwAV at 32 or 64 px in the setting of the other methods here. For these
    # sizes, the augmentation is that of PAPER 4.1 for all methods, and the optimiser is SwAV's own.
    # After three epochs of the demo (width=8), the kNN score was 22% with SGD, where the loss
    # stayed at ln K, 33% with LARC, and 38% with LARC and an epsilon of .03, as SwAV's README
    # advises first.
    rows: ClassVar[Rows] = {
        "all": cite(
            "SwAV main_swav.py, resnet50.py",
            hidden_dim=2048,
            out_dim=128,
            temperature=0.1,
            epsilon=0.05,
            zero_init_residual=False,
        )
        | cite("SwAV scripts: the steps of one epoch", frozen_epochs=1)
        | cite(
            "SwAV swav_200ep_bs256_pretrain.sh",
            queue_size=3840,
            queue_start_epoch=15,
            optimizer="larc",
            base_lr=0.6,
            min_lr=0.0006,
            weight_decay=1e-6,
            warmup_epochs=0,
        )
        | cite("SwAV main_swav.py: a cosine per step", lr_per="step")
        | cite("chosen: SwAV's issue 23 names 10 to 300 for CIFAR", prototypes=300),
        "64px": MORE_PROTOTYPES,
        "224px": cite(
            "SwAV multicropdataset.py, swav_400ep_2x224_pretrain.sh",
            views={
                "crop_area": (0.08, 1.0),
                **STRONG_JITTER,
            },
        )
        | MORE_PROTOTYPES,
        "imagenet1k": cite(
            "SwAV swav_400ep_2x224_pretrain.sh; it has no script for the 200 epochs of PAPER "
            "Table 4",
            batch_size=4096,
            base_lr=0.3,
            min_lr=0.0048,
            warmup_epochs=10,
            warmup_start_lr=0.3,
            prototypes=3000,
            queue_size=0,
        )
        | cite("SwAV: none with 4096 images", queue_start_epoch=0),
        # Such a run ends before the fifteenth epoch or has fewer images than the queue.
        "short": cite("chosen: runs of few steps", queue_size=512, queue_start_epoch=1, peak_lr=1.0)
        | cite("chosen: few images", prototypes=100)
        | cite("SwAV README: if the loss stays at ln K", epsilon=0.03),
    }

    queue: Tensor

    def __init__(self, recipe: SwavRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        head = nn.Sequential(
            nn.Linear(encoder.feature_dim, recipe.hidden_dim),
            nn.BatchNorm1d(recipe.hidden_dim),
            nn.ReLU(inplace=True),
            nn.Linear(recipe.hidden_dim, recipe.out_dim),
        )
        self.online = Projected(encoder, head)
        self.prototypes = nn.Linear(recipe.out_dim, recipe.prototypes, bias=False)
        self.views = recipe.views.names("aggressive")
        self.reads = frozenset(self.views)
        self.temperature, self.epsilon = recipe.temperature, recipe.epsilon
        # The embeddings of the first two crops, the newest first. It starts empty, as zeros.
        self.register_buffer("queue", torch.zeros(2, recipe.queue_size, recipe.out_dim))

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss, ln K for equal scores. Then the first two crops of all ranks enter the queue.

        The prototypes are scaled to unit length first.
        """
        with torch.no_grad():
            self.prototypes.weight.copy_(unit(self.prototypes.weight))
        views = [batch.views[name] for name in self.views]
        z = unit(self.online.projector(joint_features(self.encoder, views)))  # (V B, D)
        z = z.view(len(views), -1, z.shape[1])  # (V, B, D)
        with torch.autocast(z.device.type, enabled=False):
            scores: Tensor = self.prototypes(z)  # (V, B, K)
            codes = self.codes(z[:2], now)  # (2, B, K)
            loss = cross_view_entropy(codes, (scores / self.temperature).log_softmax(-1))
        return Loss(loss, z[0], {})

    @torch.no_grad()
    def codes(self, z: Tensor, now: Now) -> Tensor:
        """The codes of this rank's embeddings of two crops, from `(2, B, D)` to `(2, B, K)`.

        They depend on the embeddings of all ranks and on the queue. Then all ranks' embeddings
        enter the queue.
        """
        batch = gather(z.transpose(0, 1)).transpose(0, 1)  # (2, N, D)
        samples = torch.cat([batch, self.queue], 1)  # (2, N + L, D)
        used = samples if now["queue"] else batch
        mine = slice(rank() * z.shape[1], (rank() + 1) * z.shape[1])
        codes = sinkhorn(F.linear(used, self.prototypes.weight), self.epsilon)[:, mine]
        self.queue.copy_(samples[:, : self.queue.shape[1]])
        return codes

    def after_backward(self, now: Now) -> None:
        """The prototypes are not updated while they are frozen."""
        if now["frozen"]:
            self.prototypes.weight.grad = None


def sinkhorn(scores: Tensor, epsilon: float) -> Tensor:
    """Codes that give all prototypes about the same share of the samples.

    Takes the scores of N samples, `(..., N, K)`, and returns distributions of that shape. Three
    times, exp(scores / epsilon) is divided so that its sums over the samples are equal, and then so
    that its sums over the prototypes are equal. In logarithms each division is a log-softmax. It
    cannot overflow, whatever epsilon is.
    """
    log_codes = scores / epsilon
    for _ in range(SINKHORN_ITERATIONS):
        log_codes = log_codes.log_softmax(-2).log_softmax(-1)
    return log_codes.exp()
