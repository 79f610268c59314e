"""Make views of a dataset that is in memory as uint8: CIFAR, STL-10, Tiny ImageNet, the demo.

Nothing is read or decoded after the start. On a CPU the views are made by `host_ops` on a pool of
threads. On a GPU they are made by `device_ops` from the images in its memory.
"""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from rsa_fast.pipelines import device_ops
from rsa_fast.pipelines.backends import free_bytes
from rsa_fast.pipelines.loading import Job, Loader, in_parts
from rsa_fast.pipelines.transfer import Transfer, rows_of, views_from_weak
from rsa_fast.pipelines.views import Batch


class ResidentViews(Loader):
    """Loader of images in memory.

    Here `aggressive_on` decides where both stages of a view are made, not only the aggressive one.
    Raises ValueError if the images do not fit in memory, or if they differ in size and the views
    are made on the device.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.sizes = job.source.manifest.sizes
        self.pool = ThreadPoolExecutor(job.loading.threads)
        pixels = self.load()
        if job.loading.aggressive_on == "host":
            self.pixels, self.make = pixels, self.host_views
            self.transfer = Transfer(job)
            return
        if (self.sizes != self.sizes[0]).any():
            low, high = self.sizes.min(0), self.sizes.max(0)
            raise ValueError(
                f"images of {low[0]}x{low[1]} to {high[0]}x{high[1]} px: "
                "the resident backend on a device needs images of one size"
            )
        images = torch.from_numpy(pixels).view(-1, *self.sizes[0].tolist(), 3)  # (N, H, W, 3)
        self.images = images.permute(0, 3, 1, 2).contiguous().to(job.device)
        self.make = self.device_views
        self.affine = device_ops.affine(job.spec, job.device)

    def close(self) -> None:
        self.pool.shutdown()

    def load_batches(self, epoch: int, step: int) -> Generator[Batch]:
        for s in range(step, len(self)):
            yield self.make(epoch, self.stand_ins[self.job.order.ids(epoch, s)])

    def host_views(self, epoch: int, ids: np.ndarray) -> Batch:
        from rsa_fast.pipelines.host_ops import batch_views

        params = self.job.params(epoch, ids)
        memory = self.transfer.take(len(ids))
        weak, aggressive = self.transfer.arrays(memory)

        def work(part: slice) -> None:
            batch_views(
                pixels=self.pixels,
                offsets=self.offsets,
                sizes=self.sizes,
                ids=ids[part],
                params=params[part],
                table=self.transfer.table,
                weak=rows_of(weak, part),
                aggressive=rows_of(aggressive, part),
            )

        in_parts(self.pool, self.job.loading.threads, len(ids), work)
        return self.transfer.batch(memory, ids, params)

    def device_views(self, epoch: int, ids: np.ndarray) -> Batch:
        job, params = self.job, self.job.params(epoch, ids)
        views: dict[str, torch.Tensor] = {}
        for crops in job.crops_alike:
            # The C crops of one size are made together, as C * B views.
            crop_params = np.concatenate([params[:, crop] for crop in crops])  # (C * B,)
            index = device_ops.send(np.tile(ids, len(crops)), job.device)
            images = self.images.index_select(0, index)  # (C * B, 3, H, W)
            weak = device_ops.weak_stage(images, crop_params, job.spec.crops[crops[0]].size_px)
            views |= views_from_weak(job, crops, weak, crop_params, self.affine)
        return job.batch(views, ids, params)

    def load(self) -> np.ndarray:
        """All images in one flat uint8 array, decoded by PIL.

        Also sets `offsets` `(N,)`, the starts of the images, and `stand_ins` `(N,)`, the sample ids
        to use for them. For a bad image this is the id of its replacement, otherwise its own.
        """
        job, count = self.job, len(self.sizes)
        ends = (self.sizes.astype(np.int64).prod(1) * 3).cumsum()
        self.offsets = np.concatenate([[0], ends[:-1]])
        free = free_bytes(job.device)
        if ends[-1] > 0.8 * free:
            raise ValueError(
                f"{count} images take {ends[-1] / 2**30:.1f} GiB decoded, but "
                f"{free / 2**30:.1f} GiB are free on {job.device}: "
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
