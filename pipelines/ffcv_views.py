"""Make views of an FFCV .beton file. FFCV's libjpeg decodes, and our kernels do the rest.

FFCV opens the file and prepares batches ahead on a thread of its own. Its random crops, its order
and its augmentations are not used: for each batch it only calls `FfcvViews.write`, which decodes
the images and makes all views of them by the kernels of `host_ops`.

The stock decoder keeps a buffer of the largest image for every sample of every batch ahead (65 GiB
on ImageNet at full size). This one allocates memory per image. FFCV also compiles its code again
for each loader, which takes 5.6 s. `decode_views` is compiled once per process, in 1.5 s.

Three kinds of threads take part:

- FFCV's thread runs `write` for one batch after another. On a GPU it first waits until the device
  has read the previous batch from the same pinned buffer. Then it waits for the pool. It puts the
  finished batch into FFCV's queue, and waits there when `prefetch_batches` batches are ready.
- The pool's threads (`threads`) each decode a part of the batch and make its views.
- The training thread takes the finished batches from the queue, waits only when it is empty, and
  enqueues the copies to the device (`self.transfer.batch`).

The views are written into memory of `self.transfer`, never into FFCV's. The stored images are read
directly from the file, which FFCV maps into memory at the loader's first epoch and then keeps.

When a page of the mapped file is not in memory, Linux also reads the pages around it, up to the
read-ahead of the device: 25 to 67 bytes were read for each that was used. The map is therefore
marked for random access. The system is asked to read the images of a batch while the previous batch
is made.

This file is written for ffcv 1.0.2. It replaces some internal parts of FFCV. Comments give the
reasons.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from mmap import MADV_RANDOM, mmap
from typing import cast

import numba
import numpy as np
import torch

from rsa_fast.pipelines.beton import image_field, read_fields
from rsa_fast.pipelines.host_ops import jpeg_header, sample_views
from rsa_fast.pipelines.loading import Job, Loader, in_parts
from rsa_fast.pipelines.transfer import HostViews, Transfer, rows_of
from rsa_fast.pipelines.views import Batch

INSTALL = "apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config g++ && pip install ffcv"
torch_threads = torch.get_num_threads()
# Importing ffcv starts numba's threads, which nothing here uses. With TBB's threads, a process that
# has forked would not end on a machine with one core.
numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]  # a dynamic attribute
try:
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
except ImportError as error:
    raise ValueError(f"backend ffcv needs FFCV ({error}): {INSTALL}, or use image files") from error
# Importing ffcv sets torch's number of threads to one. FFCV would also set torch's and numba's
# numbers of threads at every epoch, for the whole process.
torch.set_num_threads(torch_threads)
Compiler.set_num_threads = staticmethod(lambda count: None)

# What FFCV passes to read a file from memory: the file's bytes, the position at which each image
# starts (sorted), and the size of each image in bytes.
Storage = tuple[np.ndarray, np.ndarray, np.ndarray]
JPEG = IMAGE_MODES["jpg"]
decode_jpeg = numba.njit(nogil=True)(imdecode)


@numba.njit(nogil=True, error_model="numpy")
def decode_views(
    ids: np.ndarray,
    metadata: np.ndarray,
    storage: Storage,
    params: np.ndarray,
    table: np.ndarray,
    failed: np.ndarray,
    weak: tuple[np.ndarray, ...],
    aggressive: tuple[np.ndarray, ...],
) -> None:
    """Decode the images `ids` `(B,)` and write their views, as `sample_views` does.

    `metadata` is FFCV's record for every image of the file. `params` are `(B, K)`, and `table` and
    the outputs as in `sample_views`. `failed` `(B,)` is True for the images to leave out, and is
    set for those that could not be decoded.
    """
    data, starts, sizes = storage
    for i in range(len(ids)):
        field = metadata[ids[i]]
        height, width = np.uint32(field["height"]), np.uint32(field["width"])
        start = field["data_ptr"]
        stored = data[start : start + sizes[np.searchsorted(starts, start)]]
        if failed[i]:
            continue
        if field["mode"] == JPEG:
            image = np.empty((height, width, 3), np.uint8)
            jpeg_height, jpeg_width, _ = jpeg_header(stored)
            if jpeg_height != height or jpeg_width != width:
                # For a smaller JPEG, FFCV would leave the rest of `image` uninitialised.
                failed[i] = True
            else:
                status = decode_jpeg(
                    stored, image, height, width, height, width, 0, 0, 1, 1, False, False
                )
                failed[i] = status != 0
        elif len(stored) == 3 * height * width:
            image = stored.reshape(height, width, 3)
        else:
            failed[i] = True
        if not failed[i]:
            sample_views(image, params[i], table, weak, aggressive, i)


class Decoder(Operation):  # type: ignore[misc]  # ffcv has no types
    """The only operation of our FFCV pipeline: it calls `write`, whose result FFCV yields."""

    def __init__(self, write: Callable[..., object]) -> None:
        super().__init__()
        self.write = write

    def declare_state_and_memory(self, previous_state: object) -> tuple[object, None]:
        # FFCV is asked for no memory, because it overwrites its memory while batches may still be
        # in use. In a test with 15 batches still in use, it overwrote 10 of them.
        return previous_state, None

    def generate_code(self) -> Callable[..., object]:
        return self.write


class FfcvViews(Loader):
    """Loader of a .beton file. Of its fields, only one image is read (`beton.image_field`).

    An image that FFCV cannot decode is decoded by PIL, or reported as bad if PIL fails too. If the
    file is replaced by a rename, the loader continues to read the old one. FFCV maps the file into
    memory: a file that was truncated before a batch is made is detected, but one that is truncated
    just while a batch is made kills the process (SIGBUS).

    Raises ValueError when the data are not a .beton file, or when the file was replaced since the
    source was opened.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.source.beton is None:
            raise ValueError(
                "backend ffcv reads one .beton file: convert the data with "
                "`rsa-fast convert ffcv`, or choose another backend. Several folders and "
                "val_fraction need another one"
            )
        self.transfer = Transfer(job)
        self.pool = ThreadPoolExecutor(job.loading.threads)
        self.epoch = 0
        self.coming: Iterator[np.ndarray] = iter(())  # the ids of the batches to be read ahead
        fields = read_fields(job.source.beton)
        names, image = [name for name, _ in fields], image_field(fields)
        decoder = Decoder(self.write)
        # `write` is a Python method, so FFCV must not compile it. Other FFCV loaders of the process
        # are compiled as usual.
        Compiler.set_enabled(False)
        try:
            self.loader = FfcvLoader(
                str(job.source.beton),
                batch_size=job.order.batch_per_rank,
                num_workers=job.loading.threads,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                batches_ahead=job.loading.prefetch_batches,
                # A field without an entry would be decoded.
                pipelines=dict.fromkeys(names)
                | {names[image]: PipelineSpec(names[image], decoder=decoder)},
            )
        finally:
            Compiler.set_enabled(True)
        # FFCV has opened the file later than the source did, so it may be another file by now.
        reader = self.loader.reader
        images = reader.metadata[f"f{image}"]
        sizes = np.stack([images["height"], images["width"]], 1)
        if not np.array_equal(sizes, job.source.manifest.sizes):
            raise ValueError(f"{job.source.beton} was replaced while it was opened: start again")

    def close(self) -> None:
        self.pool.shutdown()

    def write(
        self, ids: np.ndarray, _: None, metadata: np.ndarray, storage: Storage
    ) -> tuple[HostViews, np.ndarray, np.ndarray] | Exception:
        """The memory with a batch's views, its ids and its parameters, or the error that occurred.

        This runs on FFCV's thread. An exception would end that thread without a message, and the
        training thread would wait for ever. The error is therefore returned, and `load_batches`
        raises it. The ids can differ from those given: a bad image may be replaced by another.
        """
        try:
            params, memory = self.job.params(self.epoch, ids), self.transfer.take(len(ids))
            weak, aggressive = self.transfer.arrays(memory)
            table = self.transfer.table
            self.read_next_soon()
            # If the file was truncated since it was opened, reading one of its missing pages would
            # kill the process. All images of the batch are then left to PIL, which finds those that
            # are missing.
            mapped = cast(mmap, storage[0].base)
            mapped.madvise(MADV_RANDOM)
            failed = np.full(len(ids), mapped.size() < len(storage[0]))
            # The device may still be reading the batch that was in this memory before.
            memory.wait()

            def work(part: slice) -> None:
                decode_views(
                    ids=ids[part],
                    metadata=metadata,
                    storage=storage,
                    params=params[part],
                    table=table,
                    failed=failed[part],
                    weak=rows_of(weak, part),
                    aggressive=rows_of(aggressive, part),
                )

            in_parts(self.pool, self.job.loading.threads, len(ids), work)
            for i in np.flatnonzero(failed).tolist():
                ids[i], image = self.readable(int(ids[i]), self.job.read)
                params[i] = self.job.params(self.epoch, ids[i : i + 1])[0]
                sample_views(image, params[i], table, weak, aggressive, i)
            return memory, ids, params
        except Exception as error:
            return error

    def read_next_soon(self) -> None:
        """Ask the system for the stored images of the next batch, if there is one."""
        extents = self.job.source.extents
        assert extents, "a .beton file has extents"
        for ids in islice(self.coming, 1):
            for _ in extents.read_soon(ids):
                pass

    def load_batches(self, epoch: int, step: int) -> Generator[Batch]:
        self.epoch = epoch
        steps = range(step, len(self))
        batches = [self.job.order.ids(epoch, s) for s in steps]
        self.coming = iter(batches)
        self.read_next_soon()
        ids = np.array(batches, np.int64).reshape(-1)
        # Our order replaces FFCV's. FFCV 1.0.2 has an interface for this (TraversalOrder classes),
        # but because of a bug it refuses every class except its own. It also cuts every order to
        # the length of the loader's first one.
        self.loader.traversal_order.sample_order = lambda _: ids
        self.loader.first_traversal_order = ids
        iterator = iter(self.loader)
        try:
            for _ in steps:
                (result,) = next(iterator)
                if isinstance(result, Exception):
                    raise result
                yield self.transfer.batch(*result)
        finally:
            # FFCV's thread must have ended before the next epoch starts, because it writes into the
            # same memory and reads `self.epoch`. Its own signal is not enough: the thread looks at
            # it only while the queue is full. Without further batches it ends after the current
            # one.
            iterator.iter_ixes = iter(())
            # The last thing it does is to put a None into the queue, which blocks while that is
            # full. The queue is therefore emptied until the thread has ended.
            while iterator.is_alive():
                while not iterator.output_queue.empty():
                    iterator.output_queue.get_nowait()
                iterator.join(0.01)
            iterator.close()
