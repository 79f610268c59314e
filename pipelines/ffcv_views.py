"""Views of an FFCV .beton file: one decode per image in FFCV's loader, all views of it by the kernels of `host_ops`.

FFCV reads, decodes and runs the threads. Its random crops, order and augmentations are not used: a decoder operation of
ours looks up the sample's `ViewParams` and calls `sample_views`. The stock decoder keeps a buffer of the largest image
for every sample of every batch ahead (65 GiB on ImageNet at full size); this one takes memory per image.

Written for ffcv 1.0.2, of which some inner parts are replaced; each says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace

import numba
import numpy as np
import torch
from numba import carray, types
from numba.extending import intrinsic

from pipelines.draws import VIEW_PARAMS
from pipelines.host_ops import sample_views
from pipelines.loading import Job, Landing, Loader, Slot
from pipelines.views import VIEWS, Batch

INSTALL = "apt-get install -y libopencv-dev libturbojpeg0-dev pkg-config g++ && pip install ffcv"
torch_threads = torch.get_num_threads()
try:
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.libffcv import imdecode
    from ffcv.loader import Loader as FfcvLoader
    from ffcv.loader import OrderOption
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.pipeline_spec import PipelineSpec
except ImportError as error:
    raise ValueError(f"backend ffcv needs FFCV ({error}): {INSTALL}, or use image files") from error
torch.set_num_threads(torch_threads)  # importing ffcv sets one


def set_loader_threads(count: int) -> None:
    """FFCV's own also sets torch's threads, for the whole process and whenever an epoch begins."""
    Compiler.num_threads = count
    numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))


Compiler.set_num_threads = staticmethod(set_loader_threads)

PARAMS = types.CPointer(numba.from_dtype(VIEW_PARAMS))
INTEGERS = types.CPointer(types.int64)


@intrinsic
def params_at(typing_context, address):
    return PARAMS(types.uintp), lambda context, builder, _, args: builder.inttoptr(args[0], context.get_value_type(PARAMS))


@intrinsic
def integers_at(typing_context, address):
    return INTEGERS(types.uintp), lambda context, builder, _, args: builder.inttoptr(args[0], context.get_value_type(INTEGERS))


class ViewsDecoder(Operation):
    """One decode of an image to its views, written to four arrays in the order of `VIEWS`.

    The dice of the epoch lie in memory of a fixed place that the compiled code reads through its address: `params`
    `(n, 2)`, and `row` `(N,)`, the place in them of each sample of the dataset. `failed` takes the id of an image that
    libjpeg could not decode.
    """

    def __init__(self, landing: Landing, samples: int, samples_per_epoch: int) -> None:
        super().__init__()
        self.landing = landing
        self.params = np.zeros((samples_per_epoch, 2), VIEW_PARAMS)
        self.row = np.zeros(samples, np.int64)
        self.failed = np.full(1, -1, np.int64)

    def declare_state_and_memory(self, previous_state):
        dtype = self.landing.table.dtype
        state = replace(previous_state, jit_mode=True, shape=(1,), dtype=dtype)
        return state, tuple(AllocationQuery((1,), dtype) for _ in VIEWS)  # `Memory` stands in for what these would give

    def generate_code(self):
        jpeg = IMAGE_MODES["jpg"]
        read, decode_jpeg, table = self.memory_read, Compiler.compile(imdecode), self.landing.table
        loop = Compiler.get_iterator()
        params_address, row_address, failed_address = (x.ctypes.data for x in (self.params, self.row, self.failed))
        params_shape, samples = self.params.shape, len(self.row)

        def decode(batch_indices, views, metadata, storage_state):
            params = carray(params_at(params_address), params_shape)
            row = carray(integers_at(row_address), (samples,))
            failed = carray(integers_at(failed_address), (1,))
            for i in loop(len(batch_indices)):
                sample = batch_indices[i]
                field = metadata[sample]
                stored = read(field["data_ptr"], storage_state)
                height, width = np.uint32(field["height"]), np.uint32(field["width"])
                if field["mode"] == jpeg:
                    image = np.empty((height, width, 3), np.uint8)
                    if decode_jpeg(stored, image, height, width, height, width, 0, 0, 1, 1, False, False) != 0:
                        failed[0] = sample
                else:
                    image = stored.reshape(height, width, 3)
                sample_views(image, params[row[sample]], table, views[0][i], views[1][i], views[2][i], views[3][i])
            return views

        decode.is_parallel = True
        return decode


class Memory:
    """What FFCV indexes by its ring's slot to write a batch: a slot of the landing, new for every batch.

    FFCV's own ring is written again while its batches may be in use; 10 of 15 kept batches were.
    """

    def __init__(self, landing: Landing, batch_size: int) -> None:
        self.landing, self.batch_size = landing, batch_size
        self.slots: deque[Slot] = deque()  # in the order of the batches

    def view(self, index: int) -> Memory.View:
        return Memory.View(self, index)

    class View:
        def __init__(self, memory: Memory, index: int) -> None:
            self.memory, self.index = memory, index

        def __getitem__(self, _: int) -> np.ndarray:
            memory = self.memory
            if self.index == 0:
                slot = memory.landing.slot(memory.batch_size)
                slot.wait()
                memory.arrays = memory.landing.arrays(slot)
                memory.slots.append(slot)
            return memory.arrays[self.index]


class FfcvViews(Loader):
    """Loader over a .beton file with fields `image` and `label`. Raises ValueError naming an image that does not decode."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        if job.source.beton is None:
            raise ValueError(
                "backend ffcv reads .beton files: convert with `python -m tools.to_ffcv`, or choose another backend"
            )
        self.landing = Landing(job)
        per_rank = job.order.batch_per_rank
        self.decoder = ViewsDecoder(self.landing, len(job.source.manifest), len(job.order) * per_rank)
        self.loader = FfcvLoader(
            str(job.source.beton),
            batch_size=per_rank,
            num_workers=job.threads,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            batches_ahead=job.prefetch_batches,
            pipelines={"image": PipelineSpec("image", decoder=self.decoder), "label": None},
        )

    def batches(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        job = self.job
        ids = np.concatenate([job.order.ids(epoch, s) for s in range(step, len(self))] or [np.zeros(0, np.int64)])
        params = job.params(epoch, ids)
        self.decoder.params[: len(ids)], self.decoder.row[ids] = params, np.arange(len(ids))
        memory = Memory(self.landing, job.order.batch_per_rank)
        self.loader.traversal_order.sample_order = lambda _: ids  # a class of ours is refused by a fault of 1.0.2
        self.loader.first_traversal_order = ids  # the loader cuts every order to the length of its first
        node = next(iter(self.loader.graph.root_nodes)).id
        views = tuple(memory.view(index) for index in range(len(VIEWS)))
        self.loader.graph.allocate_memory = lambda *_: {"operation": {node: views}, "shared": {node: None}}
        running = iter(self.loader)
        try:
            for first in range(0, len(ids), job.order.batch_per_rank):
                next(running)
                if (sample := int(self.decoder.failed[0])) >= 0:
                    raise ValueError(f"cannot decode image {sample} of {job.source.beton}: convert it again")
                chunk = slice(first, first + job.order.batch_per_rank)
                yield self.landing.batch(memory.slots.popleft(), ids[chunk], params[chunk])
        finally:
            running.iter_ixes = iter(())  # no batch after the one at work; its own signal is heeded by a full queue only
            while running.is_alive():  # its last act is to put a None, for which a full queue has no room
                while not running.output_queue.empty():
                    running.output_queue.get_nowait()
                running.join(0.01)
            running.close()
