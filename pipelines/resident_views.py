"""Views of a dataset held as uint8 in memory: CIFAR, STL-10, Tiny ImageNet, the demo.

Nothing is read or decoded after the start. On a CPU the views come from `host_ops` on a pool of threads, on a GPU from
`device_ops` on the images in its memory.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipelines import device_ops
from pipelines.loading import Job, Landing, Loader, finish_on_device, in_parts
from pipelines.views import Batch


class ResidentViews(Loader):
    """Loader over images in memory; `aggressive_on` says where all of a view is made, not only its aggressive stage.

    Raises ValueError when the images do not fit in memory or, on the device, are not all of one size.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.sizes = job.source.manifest.sizes
        self.pool = ThreadPoolExecutor(job.threads)
        pixels = self.load()
        if job.aggressive_on == "host":
            self.pixels, self.make = pixels, self.host_views
            self.landing = Landing(job)
            return
        if (self.sizes != self.sizes[0]).any():
            low, high = self.sizes.min(0), self.sizes.max(0)
            raise ValueError(
                f"images of {low[0]}x{low[1]} to {high[0]}x{high[1]} px: the resident backend on a device needs one size"
            )
        images = torch.from_numpy(pixels).view(-1, *self.sizes[0].tolist(), 3)
        self.images = images.permute(0, 3, 1, 2).contiguous().to(job.device)
        self.make = self.device_views
        self.affine = device_ops.affine(job.spec, job.device)

    def close(self) -> None:
        self.pool.shutdown()

    def batches(self, epoch: int, step: int = 0) -> Generator[Batch]:
        for s in range(step, len(self)):
            yield self.make(epoch, self.stand_ins[self.job.order.ids(epoch, s)])

    def host_views(self, epoch: int, ids: np.ndarray) -> Batch:
        from pipelines.host_ops import batch_views

        params = self.job.params(epoch, ids)
        slot = self.landing.slot(len(ids))
        outputs = self.landing.arrays(slot)

        def work(chunk: slice) -> None:
            source = (self.pixels, self.offsets, self.sizes, ids[chunk])
            batch_views(
                *source, params[chunk], self.landing.table, *(out[chunk] for out in outputs)
            )

        in_parts(self.pool, self.job.threads, len(ids), work)
        return self.landing.batch(slot, ids, params)

    def device_views(self, epoch: int, ids: np.ndarray) -> Batch:
        job = self.job
        params = np.concatenate([job.params(epoch, ids)[:, crop] for crop in job.crops])
        index = device_ops.send(np.tile(ids, len(job.crops)), job.device)
        images = self.images.index_select(0, index)
        weak = device_ops.weak_stage(images, params, job.spec.size_px)
        return Batch(job.labels(ids), finish_on_device(job, weak, params, self.affine))

    def load(self) -> np.ndarray:
        """All images in one flat uint8 array. `offsets` `(N,)` says where each begins, `stand_ins` `(N,)` which to take."""
        job, count = self.job, len(self.sizes)
        ends = (self.sizes.astype(np.int64).prod(1) * 3).cumsum()
        self.offsets = np.concatenate([[0], ends[:-1]])
        free = free_bytes(job.device)
        if ends[-1] > 0.8 * free:
            raise ValueError(
                f"{count} images take {ends[-1] / 2**30:.1f} GiB decoded, {free / 2**30:.1f} GiB are free on {job.device}: "
                "too large for the resident backend"
            )
        pixels = np.empty(ends[-1], np.uint8)

        def read(sample: int) -> int:
            stand_in, image = self.readable(sample, job.read)
            if stand_in == sample:
                pixels[self.offsets[sample] : ends[sample]] = image.reshape(-1)
            return stand_in

        self.stand_ins = np.array(list(self.pool.map(read, range(count))))
        return pixels


def free_bytes(device: torch.device) -> int:
    """Memory free for the images: the host's, and the GPU's if that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(free, torch.cuda.mem_get_info(device)[0]) if device.type == "cuda" else free
