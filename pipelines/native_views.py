"""Views of image files and tar shards by a pool of threads: one decode, K crops per image.

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

# So many images are decoded one after the other, before the first view of them is made. This makes
# the decoder 4% faster, because its code, tables and branch history stay in the core.
CHUNK = 4
# The most chunks per task. To start and end a task takes 10 us with Python's lock held.
CHUNKS = 4

# A batch in work: its tasks, and the memory, the ids `(B,)` and the parameters `(B, K)` they write.
Submitted = tuple[list[Future[None]], HostViews, np.ndarray, np.ndarray]


class NativeViews(Loader):
    """Loader over encoded images."""

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
            # The caller may leave before the end of the epoch. The tasks must then end here,
            # because the next iterator gets the same memory.
            for tasks, *_ in ahead:
                for task in tasks:
                    task.cancel() or task.exception()

    def submit(self, epoch: int, ids: np.ndarray) -> Submitted:
        """Start the tasks of one batch. Returns at once."""
        ids, params = ids.copy(), self.job.params(epoch, ids)
        memory = self.transfer.take(len(ids))
        views = self.transfer.arrays(memory)
        # Each thread has a task of the batch, if it is large enough.
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
            # For a damaged file, PIL's error names the file. It also reads what libjpeg-turbo only
            # warns about, such as bytes between two segments.
            return self.job.read(sample)
        return image
