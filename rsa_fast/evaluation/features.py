"""The features of a split's images. Every rank has its own part of them in host memory.

Rank r of R ranks has the rows r, r + R, r + 2R, ... They stay in the type in which the encoder
computes them, so no precision is lost. The 1.28 million rows of ImageNet-1K and a ResNet-50 take
4.9 GiB in half precision, on all ranks together. A computation moves the rows that it needs to the
device and converts them to float32 there.

`rsa-fast eval` stores them in the user's cache (`cached`), so that another score of the same
encoder on the same images does not compute them again.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from rsa_fast.distributed import gather, rank, world_size
from rsa_fast.pipelines.files import user_cache, write_whole
from rsa_fast.pipelines.manifest import digest
from rsa_fast.pipelines.plain import PlainImages
from rsa_fast.pipelines.scan import OnBadImage
from rsa_fast.pipelines.sources import Source
from rsa_fast.recipes import Recipe

LabelledFeatures = tuple[Tensor, Tensor]  # (N, D), (N,); an unreadable image has the label -1

log = logging.getLogger("rsa_fast")

CACHE_BYTES = 8 * 2**30  # the limit of the cache, above which the oldest features are removed
BATCH_SIZE = 256  # number of images on the device at a time, for which 224 px keep a GPU busy
# On a CPU, the activations of a small batch stay in the caches. A ResNet-50 in bf16 on two cores
# (Emerald Rapids) computes 17.4 images of 224 px per second 16 at a time, and 15.4 at 256.
CPU_BATCH_PIXELS = 16 * 224**2
BLOCK_ROWS = 16_384  # number of rows on the device at a time: 128 MiB with 2048 features


def gather_rows(x: Tensor) -> Tensor:
    """The rows of all ranks, `(N, ...)`, in their original order, on the device of `x`.

    Each rank passes every `world_size`-th row, `(n, ...)`. The ranks' n differ by 1 at most.
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

    `rows` are the rows of this rank. With several ranks, every rank must call this with the same
    `ids`.
    """
    if world_size() == 1:
        return rows[ids].to(device).float()
    mine = (ids % world_size() == rank()).nonzero()[:, 0]
    features = torch.zeros(len(ids), rows.shape[1], device=device)
    features[mine.to(device)] = rows[ids[mine] // world_size()].to(device).float()
    dist.all_reduce(features)  # each row is zero on all ranks except one
    return features


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

    Each rank passes its `part`. `prepare` is first applied to each block of rows.
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


@contextmanager
def eval_mode(network: nn.Module) -> Iterator[None]:
    """Put the network into eval mode. Afterwards, its previous mode is restored."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def plain_images(
    source: Source,
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    on_bad_image: OnBadImage = "skip",
) -> PlainImages:
    """This rank's part of the images, sized and normalised by the recipe."""
    batch_size = BATCH_SIZE
    if device.type == "cpu":
        batch_size = min(batch_size, max(1, CPU_BATCH_PIXELS // recipe.views.size_px**2))
    return PlainImages(
        source,
        recipe.views,
        recipe.eval_resize_px,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        threads=recipe.threads,
        rank=rank(),
        world_size=world_size(),
        on_bad_image=on_bad_image,
    )


def cached(
    encoder: nn.Module, images: PlainImages, compute: Callable[[], LabelledFeatures]
) -> LabelledFeatures:
    """This rank's features of the images, from the user's cache or else from `compute`.

    The key consists of the encoder's layers and weights, the fingerprint of the images, and how the
    images are sized and normalised. If the features are in the cache, a log line says so. Otherwise
    the result of `compute` is stored, and the least recently used features are removed.
    """
    folder = user_cache() / "features"
    path = folder / f"{cache_key(encoder, images)}.pt"
    try:
        features: LabelledFeatures = torch.load(path, weights_only=True)
        os.utime(path)
        if rank() == 0:
            log.info(f"features of {images.source.where}: cached in {path}")
        return features
    except FileNotFoundError:
        pass
    except Exception as error:  # torch can raise almost any exception for a damaged file
        log.info(f"the cached features {path} are damaged ({error}) and are computed again")
    features = compute()
    if features[0].nbytes <= CACHE_BYTES:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, partial(torch.save, features))
            remove_oldest(folder)
        except (OSError, RuntimeError) as error:  # torch raises its own for a full disk
            log.info(f"the features are not cached: {error}")
    return features


def cache_key(encoder: nn.Module, images: PlainImages) -> str:
    """The key of this rank's features in the cache."""
    manifest, device = images.source.manifest, images.device.type
    about = [
        torch.__version__,
        version("pillow"),
        str(encoder),
        rank(),
        world_size(),
        device,
        images.dtype,
    ]
    about += [manifest.fingerprint, manifest.classes, images.source.turned, images.on_bad_image]
    about += [images.size_px, images.resize_px, images.mean.tolist(), images.std.tolist()]
    weights = [
        value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        for value in encoder.state_dict().values()
    ]
    return digest(repr(about).encode(), *weights)


def remove_oldest(folder: Path) -> None:
    """Remove the least recently used features until the rest fits into `CACHE_BYTES`."""
    files = [(path, path.stat()) for path in folder.glob("*.pt")]
    total_bytes = 0
    for path, stat in sorted(files, key=lambda file: file[1].st_mtime, reverse=True):
        total_bytes += stat.st_size
        if total_bytes > CACHE_BYTES:
            path.unlink(missing_ok=True)
