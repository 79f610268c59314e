"""JCL (Cai et al., NeurIPS 2020): a query and the Gaussian of its image's keys.

Source: github.com/caiqi/Joint-Contrastive-Learning.

MoCo v2 compares a query with one key of its image. JCL compares it with M keys, which belong to M
other crops, and treats them as samples of a Gaussian. The loss bounds the expectation of MoCo's
loss over this Gaussian. With the unit-length online query q, target keys k_1 ... k_M, the queue m_1
... m_K and the temperature T, let s_i = q.k_i / T. With the mean and the variance of s_1 ... s_M,
where the variance is divided by M, the loss is the batch mean of

    log(exp(mean + lambda / 2 variance) + sum_j exp(q.m_j / T)) - mean.

The paper and the code write it with the mean mu and the covariance S of the keys. Because q.mu / T
is the mean of s and q.S.q / T^2 is its variance, both forms are equal, and here no image needs a
D x D matrix. With M = 1 this is one direction of MoCo's loss.

The gradient reaches the online network only. The target network is a moving average of it. The
query is the first aggressive view. The other aggressive views go through the target network in one
forward pass, shuffled as in MoCo, so its BatchNorm sees M times as many images. mu enters the
queue. It is shorter than 1, and it is not scaled. lambda increases with every epoch. All this
follows the code.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rsa_fast.distributed import world_size
from rsa_fast.methods.method import (
    EIGHT_GPUS,
    QUEUE_FIELDS,
    Loss,
    Now,
    QueueMethod,
    QueueRecipe,
    unit,
)
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import Derived
from rsa_fast.sourced import Rows, cite


class JclRecipe(QueueRecipe):
    lambda_end: float = Field(ge=0)  # the weight of the variance in the last epoch

    @model_validator(mode="after")
    def one_group_has_the_query_and_its_keys(self) -> JclRecipe:
        groups = self.views.groups
        if len(groups) > 1 or groups[0].count < 2:
            counts = " and ".join(f"{group.count} of {group.name!r}" for group in groups)
            raise ValueError(
                f"views.groups = {counts}: JCL takes one group of 2 or more crops, the query and "
                "its keys"
            )
        return self

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        epoch = min(step // derived.steps_per_epoch, self.epochs - 1)
        lambda_ = self.lambda_end * (epoch + 1) / self.epochs
        return super().schedule(step, derived) | {"lambda_": lambda_}


class Jcl(QueueMethod):
    """JCL, whose head has a hidden layer as wide as the encoder's features."""

    recipe_type = JclRecipe
    # JCL's code has a recipe for ImageNet. For smaller images, the rows are those of MoCo.
    rows: ClassVar[Rows] = {
        "all": QUEUE_FIELDS
        | cite("PAPER 4.1: .99 in all experiments", tau_base=0.99)
        | cite("JCL main_moco.py", out_dim=128)
        | cite(
            "JCL scripts/main_pretrain.sh",
            lambda_end=2.0,
            views={"groups": [{"name": "crops", "count": 5}]},
        )
        | cite("MoCo's CIFAR-10 demo", temperature=0.1, bn="split:8", queue_size=4096),
        "64px": cite("chosen: between the CIFAR demo's and ImageNet's", queue_size=16_384),
        "224px": cite("JCL scripts/main_pretrain.sh", temperature=0.2)
        | cite("JCL main_moco.py", queue_size=65_536)
        | EIGHT_GPUS,
        "imagenet1k": cite(
            "JCL scripts/main_pretrain.sh", base_lr=0.03, batch_size=256, lr_per="epoch"
        )
        | cite(
            "JCL main_moco.py", optimizer="sgd", weight_decay=1e-4, warmup_epochs=0, tau_base=0.999
        ),
    }

    def __init__(self, recipe: JclRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, hidden_dim=encoder.feature_dim)
        self.views = recipe.views.names("aggressive")
        self.reads = frozenset(self.views)

    def forward(self, batch: Batch, now: Now) -> Loss:
        """The loss against the current queue. Then the means of the keys enter the queue."""
        query, *others = (batch.views[name] for name in self.views)  # (B, 3, H, W) each
        # BatchNorm normalises P parts of the queries' batch separately. The crops of a part follow
        # those of the part before, so that ShuffleBN spreads each part over all parts of the keys.
        parts = max(1, self.bn_groups // world_size())  # P on this rank
        chunks = zip(*(view.chunk(parts) for view in others), strict=True)
        images = torch.cat([view for chunk in chunks for view in chunk])  # (M * B, 3, H, W)
        mine, every = (
            keys.view(-1, len(others), len(query) // parts, keys.shape[1])
            for keys in self.keys(images)
        )  # (P, M, B / P, D), and the same for all ranks
        keys = mine.transpose(0, 1).flatten(1, 2)  # (M, B, D)
        q = unit(self.online(query))  # (B, D)
        # `enqueue` changes the queue in place.
        loss = joint_nce(q, keys, self.queue.clone(), self.temperature, now["lambda_"])
        self.enqueue(every.mean(1).flatten(0, 1))  # (N, D)
        return Loss(loss, q, {})


def joint_nce(q: Tensor, keys: Tensor, queue: Tensor, temperature: float, lambda_: float) -> Tensor:
    """The batch mean of the loss of unit rows `q`, `(B, D)`, with M unit keys each, `(M, B, D)`.

    Takes the `queue`, `(D, K)`, and returns a scalar.
    """
    with torch.autocast(q.device.type, enabled=False):
        similarities = (q * keys).sum(2) / temperature  # (M, B)
        variance, mean = torch.var_mean(similarities, 0, correction=0)  # (B,)
        positive = mean + lambda_ / 2 * variance  # (B,)
        logits = torch.cat([positive[:, None], q @ queue / temperature], 1)  # (B, 1 + K)
        return (logits.logsumexp(1) - mean).mean()
