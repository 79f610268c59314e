"""The features of a split's images: every rank keeps its own part of them in host memory.

Of N images, rank r of R ranks has the rows r, r + R, r + 2R, ... They stay in the type in which the
encoder computes them, so that nothing is lost: the 1.28 million of ImageNet-1K and a ResNet-50 take
4.9 GiB in half precision, on all ranks together. What a computation needs is moved to the device
and becomes float32 there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from rsa_fast.distributed import gather, rank, world_size

LabelledFeatures = tuple[Tensor, Tensor]  # (N, D), (N,); -1 labels an image that was not read

BLOCK_ROWS = 16_384  # rows on the device at a time: 128 MiB with 2048 features


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, `(N, ...)`, in their original order, on the device of `x`.

    Each rank passes every `world_size`-th row, `(n, ...)`; the ranks' n differ by 1 at most.
    """
    counts = gather(torch.tensor([len(x)], device=x.device))
    padded = F.pad(x, [0, 0] * (x.ndim - 1) + [0, int(counts.max()) - len(x)])
    by_rank = torch.unflatten(gather(padded), 0, (world_size(), -1))
    return by_rank.transpose(0, 1).flatten(0, 1)[: int(counts.sum())]


def gather_features(part: LabelledFeatures, device: torch.device) -> LabelledFeatures:
    """Float32 features and labels of all ranks, in the order of the images, on the device.

    Images with the label -1 could not be read, and are left out.
    """
    rows, labels = gather_rows(part[0].to(device).float()), gather_rows(part[1].to(device))
    readable = labels.cpu() >= 0
    if readable.all():
        return rows, labels
    return rows[readable.to(device)], labels[readable.to(device)]


def take_rows(rows: Tensor, ids: Tensor, device: torch.device) -> Tensor:
    """The features of the images `ids` `(B,)` as float32 `(B, D)`, on the device of every rank.

    `rows` are this rank's. With several ranks, every rank must call this with the same `ids`.
    """
    if world_size() == 1:
        return rows[ids].to(device).float()
    mine = (ids % world_size() == rank()).nonzero()[:, 0]
    taken = torch.zeros(len(ids), rows.shape[1], device=device)
    taken[mine.to(device)] = rows[ids[mine] // world_size()].to(device).float()
    dist.all_reduce(taken)  # each row is zero on all ranks but one
    return taken


def blocks(rows: Tensor, device: torch.device) -> Iterator[Tensor]:
    """This rank's rows as float32 on the device, `BLOCK_ROWS` at a time."""
    for block in torch.split(rows, BLOCK_ROWS):
        yield block.to(device).float()


def mean_and_variance(
    part: LabelledFeatures,
    device: torch.device,
    prepare: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean and the unbiased variance of each feature over the images of all ranks, `(D,)` each.

    Each rank passes its `part`. `prepare` is applied to each block of rows before.
    """
    rows = part[0] if (part[1] >= 0).all() else part[0][part[1] >= 0]

    def total(of_block: Callable[[Tensor], Tensor]) -> Tensor:
        sums = torch.zeros(rows.shape[1], dtype=torch.float64, device=device)
        for block in blocks(rows, device):
            sums += of_block(prepare(block) if prepare else block).sum(0, dtype=torch.float64)
        if world_size() > 1:
            dist.all_reduce(sums)
        return sums

    count = total(torch.ones_like)
    mean = total(lambda block: block) / count
    variance = total(lambda block: (block - mean).square()) / (count - 1)
    return mean.float(), variance.float()
