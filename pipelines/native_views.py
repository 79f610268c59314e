"""Views of image files and tar shards: decode once per image on a pool of threads, both crops from that one decode.

The default on a CPU. JPEGs are decoded by libjpeg-turbo through torchvision.io, which gives PIL's pixels and lets go of
the interpreter lock; everything else by PIL. On a GPU the threads make the weak crops as uint8 in pinned memory and the
device does the rest, or the threads make all views (`aggressive_on=host`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from pipelines.host_ops import sample_views
from pipelines.loading import Job, Landing, Loader, Slot
from pipelines.views import Batch

# Images per task: few enough to share out evenly, enough that handing out tasks costs nothing. All are decoded before the
# views of the first are made, by which the decoder runs 4% faster: its code, tables and branch history stay in the core.
CHUNK = 4

Submitted = tuple[list[Future[None]], Slot, np.ndarray, np.ndarray]  # tasks, ids, parameters


class NativeViews(Loader):
    """Loader over encoded images."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.pool = ThreadPoolExecutor(job.threads)
        self.landing = Landing(job)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def batches(self, epoch: int, step: int = 0) -> Generator[Batch]:
        ahead: deque[Submitted] = deque()
        try:
            for s in range(step, len(self) + self.job.prefetch_batches):
                if s < len(self):
                    ahead.append(self.submit(epoch, self.job.order.ids(epoch, s)))
                if s >= step + self.job.prefetch_batches and ahead:
                    tasks, slot, ids, params = ahead.popleft()
                    for task in tasks:
                        task.result()
                    yield self.landing.batch(slot, ids, params)
        finally:  # an iterator left early must not write into slots that the next one is given
            for tasks, *_ in ahead:
                for task in tasks:
                    task.cancel() or task.exception()

    def submit(self, epoch: int, ids: np.ndarray) -> Submitted:
        ids, params = ids.copy(), self.job.params(epoch, ids)
        slot = self.landing.slot(len(ids))
        outputs = self.landing.arrays(slot)

        def work(first: int) -> None:
            images = [
                self.readable(int(sample), self.decode) for sample in ids[first : first + CHUNK]
            ]
            slot.wait()
            for i, (sample, image) in enumerate(images, first):
                if sample != ids[i]:
                    ids[i] = sample
                    params[i] = self.job.params(epoch, ids[i : i + 1])[0]
                sample_views(image, params[i], self.landing.table, *(out[i] for out in outputs))

        return (
            [self.pool.submit(work, first) for first in range(0, len(ids), CHUNK)],
            slot,
            ids,
            params,
        )

    def decode(self, sample: int) -> np.ndarray:
        """`(H, W, 3)` uint8, equal to `job.read(sample)`."""
        if not (data := self.job.jpeg(sample)):
            return self.job.read(sample)
        try:
            stored = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            image: torch.Tensor = decode_jpeg(stored, ImageReadMode.RGB)
        except RuntimeError:
            return self.job.read(sample)  # CMYK and its like; or an error that names the file
        return image.permute(1, 2, 0).numpy()
