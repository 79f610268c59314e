"""MoCo v2, symmetrised (Chen et al. 2020, He et al. 2020; github.com/facebookresearch/moco): a queue of past keys is the
dictionary in which a query finds its image's other view."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.views import Batch
from rsa_fast import recipes
from rsa_fast.distributed import gather, rank, world_size
from rsa_fast.methods.byol import PAIRS
from rsa_fast.methods.method import Loss, TargetMethod, mlp_without_bn, unit
from rsa_fast.networks import Encoder, Projected
from rsa_fast.syncbn import bn_groups


class QueueMethod(TargetMethod):
    """A target network whose past outputs are kept in a queue, `(out_dim, queue_size)`, starting as noise of unit length.

    `bn_groups` is how many parts of the global batch BatchNorm normalises apart: the target's batch is then shuffled, so
    that its parts do not hold the same images as the online network's and statistics give no pair away (ShuffleBN).
    """

    queue: Tensor
    pointer: Tensor

    def __init__(self, recipe: recipes.Queue, encoder: Encoder, hidden_dim: int) -> None:
        head = mlp_without_bn(encoder.feature_dim, hidden_dim, recipe.out_dim)
        super().__init__(Projected(encoder, head))
        self.temperature, self.bn_groups = recipe.temperature, bn_groups(recipe.bn)
        noise = torch.randn(recipe.out_dim, recipe.queue_size)
        self.register_buffer("queue", F.normalize(noise, dim=0))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))  # the next column to replace

    @torch.no_grad()
    def keys(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Unit-length target outputs, without gradient: this rank's `(b, out_dim)` and those of all ranks, in order."""
        if self.bn_groups == 1:
            every = gather(unit(self.target(images)))
        else:
            pooled = gather(images.permute(0, 2, 3, 1))  # channels_last as it lies: gather wants it contiguous
            order = shuffle(len(pooled), self.bn_groups, images.device)
            dealt = pooled[order.chunk(world_size())[rank()]].permute(0, 3, 1, 2)
            shuffled = gather(unit(self.target(dealt)))
            every = torch.empty_like(shuffled).index_copy_(0, order, shuffled)
        return every[rank() * len(images) :][: len(images)], every

    @torch.no_grad()
    def enqueue(self, keys: Tensor) -> None:
        """The oldest columns make room for `keys` `(n, out_dim)`; the pointer stays on the device."""
        size = self.queue.shape[1]
        columns = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        self.queue.index_copy_(1, columns, keys.T.to(self.queue.dtype))
        self.pointer.add_(len(keys)).remainder_(size)


class MoCo(QueueMethod):
    """The head's hidden layer is as wide as the features; temperature and queue are those of the loss."""

    reads = frozenset(PAIRS["AA"])

    def __init__(self, recipe: recipes.MoCo, encoder: Encoder) -> None:
        super().__init__(recipe, encoder, hidden_dim=encoder.feature_dim)

    def forward(self, batch: Batch, beta: float) -> Loss:
        """InfoNCE of both directions, summed, against the queue as it was; then the keys of both enter it."""
        (k_1, every_1), (k_2, every_2) = self.keys(batch.aggressive_1), self.keys(batch.aggressive_2)
        q_1, q_2 = unit(self.online(batch.aggressive_1)), unit(self.online(batch.aggressive_2))
        queue = self.queue.clone()  # the backward needs it as it is now
        total = info_nce(q_1, k_2, queue, self.temperature) + info_nce(q_2, k_1, queue, self.temperature)
        self.enqueue(torch.cat([every_1, every_2]))
        return Loss(total, q_1, {})


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Mean over the batch of the cross-entropy of finding k among k and the queue: `(B, D)`, `(B, D)`, `(D, K)`."""
    with torch.autocast(q.device.type, enabled=False):
        logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue], 1) / temperature
    return F.cross_entropy(logits, torch.zeros(len(q), dtype=torch.int64, device=q.device))


def shuffle(count: int, groups: int, device: torch.device) -> Tensor:
    """A permutation of `count` images that deals each of `groups` consecutive parts out over all parts.

    Which images share a batch is drawn anew every epoch, so that a fixed deal is as random as a drawn one, and needs no
    generator to be kept in step across ranks or saved.
    """
    return torch.arange(count, device=device).view(groups, -1).T.flatten()
