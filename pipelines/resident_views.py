"""Views of a dataset held as uint8 in memory: CIFAR, STL-10, Tiny ImageNet, the demo.

Nothing is read or decoded after the start. On a CPU the views come from `host_ops` on a pool of threads, on a GPU from
`device_ops` on the images in its memory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pipelines import device_ops
from pipelines.draws import draw
from pipelines.host_ops import batch_views
from pipelines.order import Order
from pipelines.sources import Source
from pipelines.views import VIEWS, Batch, ViewSpec


class ResidentViews:
    """Loader over images in memory; see `pipelines.open_views` for the arguments.

    `ops` is `host` (numba, CPU only) or `device` (batched tensor operations on `device`). Raises ValueError when the
    images do not fit in memory or, for `device`, are not all of one size.
    """

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        reads: frozenset[str],
        order: Order,
        device: torch.device,
        dtype: torch.dtype,
        ops: str,
        threads: int,
    ) -> None:
        self.spec, self.reads, self.order, self.device, self.dtype = spec, reads, order, device, dtype
        self.sizes, self.labels = source.manifest.sizes, source.manifest.labels
        self.pool = ThreadPoolExecutor(threads)
        self.threads = threads
        pixels, self.offsets = load(source, device, self.pool)
        if ops == "host":
            self.pixels, self.make = pixels, self.host_views
            self.table = level_table(spec, dtype)
        else:
            if (self.sizes != self.sizes[0]).any():
                low, high = self.sizes.min(0), self.sizes.max(0)
                raise ValueError(
                    f"images of {low[0]}x{low[1]} to {high[0]}x{high[1]} px: the resident backend on a device needs one size"
                )
            images = torch.from_numpy(pixels).view(-1, *self.sizes[0].tolist(), 3)
            self.pixels = images.permute(0, 3, 1, 2).contiguous().to(device)
            self.make = self.device_views
            self.mean, self.std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (spec.mean, spec.std))

    def __len__(self) -> int:
        return len(self.order)

    def __enter__(self) -> ResidentViews:
        return self

    def __exit__(self, *_: object) -> None:
        self.pool.shutdown()

    def batches(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `step` on."""
        for s in range(step, len(self)):
            yield self.make(epoch, self.order.ids(epoch, s))

    def host_views(self, epoch: int, ids: np.ndarray) -> Batch:
        params = draw(self.order.seed, epoch, ids, self.spec, self.sizes[ids])
        size = self.spec.size_px
        views = {name: torch.empty((len(ids), size, size, 3), dtype=self.dtype) for name in VIEWS if name in self.reads}
        unread = np.empty((len(ids), 0, 0, 3), self.table.dtype)
        outputs = [bits(views[name]) if name in views else unread for name in VIEWS]
        edges = np.linspace(0, len(ids), self.threads + 1).astype(int)

        def work(part: int) -> None:
            chunk = slice(edges[part], edges[part + 1])
            source = (self.pixels, self.offsets, self.sizes, ids[chunk])
            batch_views(*source, params[chunk], self.table, *(out[chunk] for out in outputs))

        list(self.pool.map(work, range(self.threads)))
        label = torch.from_numpy(self.labels[ids])
        return Batch(label, **{name: view.permute(0, 3, 1, 2) for name, view in views.items()})

    def device_views(self, epoch: int, ids: np.ndarray) -> Batch:
        params = draw(self.order.seed, epoch, ids, self.spec, self.sizes[ids])
        crops = [crop for crop in (0, 1) if {VIEWS[crop], VIEWS[2 + crop]} & self.reads]
        params = np.concatenate([params[:, crop] for crop in crops])
        images = self.pixels.index_select(0, device_ops.send(np.tile(ids, len(crops)), self.device))
        stages = [device_ops.weak_stage(images, params, self.spec.size_px)]
        if self.reads & set(VIEWS[2:]):
            stages.append(device_ops.aggressive_stage(stages[0], params))
        views = {
            name: device_ops.normalise(levels, self.mean, self.std, self.dtype)
            for stage, both in enumerate(stages)
            for crop, levels in zip(crops, both.split(len(ids)), strict=True)
            if (name := VIEWS[2 * stage + crop]) in self.reads
        }
        return Batch(device_ops.send(self.labels[ids], self.device), **views)


def load(source: Source, device: torch.device, pool: ThreadPoolExecutor) -> tuple[np.ndarray, np.ndarray]:
    """All images in one flat uint8 array, and where each begins `(N,)`."""
    lengths = source.manifest.sizes.astype(np.int64).prod(1) * 3
    offsets = np.concatenate([[0], lengths.cumsum()])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(device)[0])
    if offsets[-1] > 0.8 * free:
        raise ValueError(
            f"{len(lengths)} images take {offsets[-1] / 2**30:.1f} GiB decoded, {free / 2**30:.1f} GiB are free on {device}: "
            "too large for the resident backend"
        )
    pixels = np.empty(offsets[-1], np.uint8)

    def read(sample: int) -> None:
        image = source.read(sample)
        if image.shape[:2] != tuple(source.manifest.sizes[sample]):
            raise ValueError(
                f"image {sample} is {image.shape[:2]} px, its manifest says {source.manifest.sizes[sample]}: "
                "the data changed; delete its .rsa-fast folder"
            )
        pixels[offsets[sample] : offsets[sample + 1]] = image.reshape(-1)

    list(pool.map(read, range(len(lengths))))
    return pixels, offsets[:-1]


def level_table(spec: ViewSpec, dtype: torch.dtype) -> np.ndarray:
    """`(3, 256)`: the bits of each channel's normalised value at each 8-bit level, rounded to `dtype` by torch."""
    level = torch.arange(256, dtype=torch.float32) / 255
    mean, std = (torch.tensor(x).view(3, 1) for x in (spec.mean, spec.std))
    return bits(((level - mean) / std).to(dtype))


def bits(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor as integers, for kernels that only move values of types numpy may not know (bfloat16)."""
    return tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()]).numpy()
