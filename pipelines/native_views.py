"""Make views of image files and tar shards with a pool of threads. Each image is decoded once.

This is the default on a CPU. JPEGs are decoded by libjpeg-turbo 3 through simplejpeg, which gives
the same pixels as PIL and releases the interpreter lock. All other images are decoded by PIL. When
training on a GPU, the threads make the weak crops as uint8 in pinned memory and the device does the
rest, or the threads make all views (`aggressive_on=host`).

The training thread waits only for the tasks of the batch that it takes next. A task waits until the
device has read the previous batch from the memory that it writes to.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from simplejpeg import decode_jpeg

from rsa_fast.pipelines.host_ops import sample_views
from rsa_fast.pipelines.loading import Job, Loader
from rsa_fast.pipelines.transfer import HostViews, Transfer
from rsa_fast.pipelines.views import Batch

# This many images are decoded one after the other before their views are made. This makes the
# decoder 4% faster, because its code, tables and branch history stay in the core.
CHUNK = 4
# The most chunks per task. Starting and ending a task takes 10 us, during which it has Python's
# lock.
CHUNKS = 4

# A batch in progress: its tasks, and what they write: memory, ids `(B,)`, parameters `(B, K)`.
Submitted = tuple[list[Future[None]], HostViews, np.ndarray, np.ndarray]


class NativeViews(Loader):
    """Loader of encoded images."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.pool = ThreadPoolExecutor(job.loading.threads)
        self.transfer = Transfer(job)

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def load_batches(self, epoch: int, step: int) -> Generator[Batch]:
        ahead: deque[Submitted] = deque()
        try:
            for s in range(step, len(self) + self.job.loading.prefetch_batches):
                if s < len(self):
                    ahead.append(self.submit(epoch, self.job.order.ids(epoch, s)))
                if s >= step + self.job.loading.prefetch_batches and ahead:
                    tasks, memory, ids, params = ahead.popleft()
                    for task in tasks:
                        task.result()
                    yield self.transfer.batch(memory, ids, params)
        finally:
            # The caller may stop before the end of the epoch. The tasks must then end here,
            # because the next iterator gets the same memory.
            for tasks, *_ in ahead:
                for task in tasks:
                    task.cancel() or task.exception()

    def submit(self, epoch: int, ids: np.ndarray) -> Submitted:
        """Start the tasks of one batch. Returns at once."""
        ids, params = ids.copy(), self.job.params(epoch, ids)
        memory = self.transfer.take(len(ids))
        views = self.transfer.arrays(memory)
        # Each thread gets a task of the batch, if the batch is large enough.
        threads = self.job.loading.threads
        task_size = CHUNK * min(CHUNKS, max(1, len(ids) // (CHUNK * threads)))

        def work(start: int) -> None:
            for first in range(start, min(start + task_size, len(ids)), CHUNK):
                chunk = ids[first : first + CHUNK].tolist()
                images = [self.readable(sample, self.decode) for sample in chunk]
                memory.wait()
                for i, (sample, image) in enumerate(images, first):
                    if sample != ids[i]:  # A bad image was replaced by another.
                        ids[i] = sample
                        params[i] = self.job.params(epoch, ids[i : i + 1])[0]
                    sample_views(image, params[i], self.transfer.table, *views, i)

        tasks = [self.pool.submit(work, start) for start in range(0, len(ids), task_size)]
        return tasks, memory, ids, params

    def decode(self, sample: int) -> np.ndarray:
        """An image `(H, W, 3)` uint8, equal to `job.read(sample)`. Raises the same errors."""
        if not (data := self.job.jpeg(sample)):
            return self.job.read(sample)
        try:
            image: np.ndarray = decode_jpeg(data)
        except ValueError:
            # For a damaged file, the error of `read` names the file. PIL also accepts what
            # libjpeg-turbo only warns about, such as bytes between two segments.
            return self.job.read(sample)
        return image
