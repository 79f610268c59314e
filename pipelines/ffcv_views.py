"""Views of an FFCV .beton file: one decode per image by FFCV's libjpeg, all views of it by the kernels of `host_ops`.

FFCV opens the file and makes batches ahead on a thread of its own. Its random crops, order and augmentations are not used:
what it runs for a batch is `FfcvViews.write`. The stock decoder keeps a buffer of the largest image for every sample of
every batch ahead (65 GiB on ImageNet at full size); this one takes memory per image. FFCV also compiles its code anew for
each loader, 5.6 s of every opening; `decode_views` is compiled once per process, in 1.5 s.

Written for ffcv 1.0.2, of which some inner parts are replaced; each says why.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from typing import cast

import numba
import numpy as np
import torch

from pipelines.host_ops import jpeg_size, sample_views
from pipelines.loading import Job, Landing, Loader, Slot, in_parts
from pipelines.views import Batch

INSTALL = "apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config g++ && pip install ffcv"
torch_threads = torch.get_num_threads()
# Importing ffcv starts numba's threads, which nothing here uses. TBB's would keep a process that has forked from ending where
# it has one core.
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
torch.set_num_threads(torch_threads)  # importing ffcv sets one
Compiler.set_num_threads = staticmethod(
    lambda count: None
)  # torch's and numba's, process-wide, at every epoch

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
    weak_1: np.ndarray,
    weak_2: np.ndarray,
    aggressive_1: np.ndarray,
    aggressive_2: np.ndarray,
) -> None:
    """The views `(B, S, S, 3)` of the images `ids`, as `sample_views`; `failed` `(B,)` says which to leave out, and becomes
    those that did not decode as well.

    `metadata` is FFCV's record for every image.
    """
    data, starts, sizes = storage
    for i in range(len(ids)):
        field = metadata[ids[i]]
        start, height, width = (
            field["data_ptr"],
            np.uint32(field["height"]),
            np.uint32(field["width"]),
        )
        stored = data[start : start + sizes[np.searchsorted(starts, start)]]
        if failed[i]:
            continue
        if field["mode"] == JPEG:
            image = np.empty((height, width, 3), np.uint8)
            jpeg_height, jpeg_width = jpeg_size(stored)
            # FFCV would leave the rest of a larger image as it is in memory.
            other_size = jpeg_height != height or jpeg_width != width
            failed[i] = other_size or (
                decode_jpeg(stored, image, height, width, height, width, 0, 0, 1, 1, False, False)
                != 0
            )
        elif len(stored) == 3 * height * width:
            image = stored.reshape(height, width, 3)
        else:
            failed[i] = True
        if not failed[i]:
            sample_views(
                image, params[i], table, weak_1[i], weak_2[i], aggressive_1[i], aggressive_2[i]
            )


class Decoder(Operation):  # type: ignore[misc]  # ffcv has no types
    """What FFCV runs for a batch is `write`, and what that returns is what FFCV yields."""

    def __init__(self, write: Callable[..., object]) -> None:
        super().__init__()
        self.write = write

    def declare_state_and_memory(self, previous_state: object) -> tuple[object, None]:
        return (
            previous_state,
            None,
        )  # no memory: FFCV writes its own again while batches may be in use, 10 of 15 kept ones

    def generate_code(self) -> Callable[..., object]:
        return self.write


class FfcvViews(Loader):
    """Loader over a .beton file with fields `image` and `label`. What FFCV cannot decode, PIL does or finds bad.

    A file replaced by rename is read on as it was. FFCV maps the file into memory: one cut in the very moment that a batch is
    made kills the process (SIGBUS), one cut before is found.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.source.beton is None:
            raise ValueError(
                "backend ffcv reads .beton files: convert with `python -m tools.to_ffcv`, or choose another backend"
            )
        self.landing = Landing(job)
        self.pool = ThreadPoolExecutor(job.threads)
        self.epoch = 0
        Compiler.set_enabled(False)  # for this loader: `write` is Python
        try:
            self.loader = FfcvLoader(
                str(job.source.beton),
                batch_size=job.order.batch_per_rank,
                num_workers=job.threads,
                os_cache=True,
                order=OrderOption.SEQUENTIAL,
                batches_ahead=job.prefetch_batches,
                pipelines={
                    "image": PipelineSpec("image", decoder=Decoder(self.write)),
                    "label": None,
                },
            )
        finally:
            Compiler.set_enabled(True)
        reader = self.loader.reader  # opened later than the source
        images = reader.metadata[f"f{reader.field_names.index('image')}"]
        if not np.array_equal(
            np.stack([images["height"], images["width"]], 1), job.source.manifest.sizes
        ):
            raise ValueError(f"{job.source.beton} was replaced while it was opened: start again")

    def close(self) -> None:
        self.pool.shutdown()

    def write(
        self, ids: np.ndarray, _: None, metadata: np.ndarray, storage: Storage
    ) -> tuple[Slot, np.ndarray, np.ndarray] | Exception:
        """A batch's slot, written, with its ids and parameters. On FFCV's thread, which an exception would end in silence."""
        try:
            params, slot = self.job.params(self.epoch, ids), self.landing.slot(len(ids))
            views, table = self.landing.arrays(slot), self.landing.table
            mapped = cast(mmap, storage[0].base)
            # If the file was cut since it was opened, touching a missing page kills the process.
            failed = np.full(len(ids), mapped.size() < len(storage[0]))
            slot.wait()

            def work(part: slice) -> None:
                outputs = (view[part] for view in views)
                decode_views(
                    ids[part], metadata, storage, params[part], table, failed[part], *outputs
                )

            in_parts(self.pool, self.job.threads, len(ids), work)
            for i in np.flatnonzero(failed):
                ids[i], image = self.readable(int(ids[i]), self.job.read)
                params[i] = self.job.params(self.epoch, ids[i : i + 1])[0]
                sample_views(image, params[i], table, *(view[i] for view in views))
            return slot, ids, params
        except Exception as error:
            return error

    def batches(self, epoch: int, step: int = 0) -> Generator[Batch]:
        self.epoch = epoch
        ids = np.concatenate(
            [self.job.order.ids(epoch, s) for s in range(step, len(self))]
            or [np.zeros(0, np.int64)]
        )
        self.loader.traversal_order.sample_order = lambda _: (
            ids
        )  # a class of ours is refused by a fault of 1.0.2
        self.loader.first_traversal_order = (
            ids  # the loader cuts every order to the length of its first
        )
        running = iter(self.loader)
        try:
            for _ in range(step, len(self)):
                (made,) = next(running)
                if isinstance(made, Exception):
                    raise made
                yield self.landing.batch(*made)
        finally:
            running.iter_ixes = iter(
                ()
            )  # no batch after the one at work; its own signal is heeded by a full queue only
            while (
                running.is_alive()
            ):  # its last act is to put a None, for which a full queue has no room
                while not running.output_queue.empty():
                    running.output_queue.get_nowait()
                running.join(0.01)
            running.close()
