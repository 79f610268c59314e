"""Views by NVIDIA DALI: one decode per image, and two crops of it by region of interest.

The default for image files on a GPU. DALI decodes there (`mixed`: the host's threads read the
Huffman codes, the GPU does the rest), or on the host with `decode_on=cpu`. Its outputs are the weak
crops as uint8, HWC.

Every window is drawn by `draws` and fed per sample. No random operator, reader or shuffle of DALI
is used. DALI therefore has no state to save, and a new epoch or a resumed run is only other input.
The aggressive stage is `device_ops` on a GPU and `host_ops` on a CPU: DALI's colour operators are 8
of 255 levels away from torchvision's.

DALI's dynamic mode (`nvidia.dali.experimental.dynamic`, 2.4.0) was tried instead of the graph
below. On a CPU it gives the same bits at the same speed (1.004 of the graph's wall time, 0.98 of
its CPU time). It would save the queue's start and the restart after a bad image, a third of this
file. But it is experimental, and without a GPU nothing checks its GPU operators, while the graph
can be serialised, which checks every operator and argument (tests/pipelines).
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from PIL import Image

from pipelines.draws import VIEW_PARAMS
from pipelines.host_ops import finish_views
from pipelines.loading import Job, Landing, Loader, in_parts
from pipelines.views import VIEWS, Batch

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

INSTALL = "pip install nvidia-dali-cuda120 (for CUDA 12; nvidia-dali-cuda130 for CUDA 13)"
Encoded = tuple[np.ndarray, np.ndarray, list[np.ndarray]]  # a batch's ids, parameters and files
Reading = list[
    Future[tuple[int, np.ndarray]]
]  # a batch's files while they are read: sample id, bytes


def build_graph(job: Job, device: Literal["cpu", "gpu"], device_id: int | None) -> Pipeline:
    """The DALI pipeline whose last operators run on `device`.

    Inputs are `encoded` (the files' bytes) and, for each crop i, `start_i` and `end_i`: (y, x) in
    pixels. Raises ValueError when DALI is missing.
    """
    try:
        from nvidia.dali import Pipeline, fn
        from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
    except ImportError as error:
        reason = f"backend dali needs DALI ({error}): {INSTALL}, or choose another backend"
        raise ValueError(reason) from error
    pipe = Pipeline(
        batch_size=job.order.batch_per_rank,
        num_threads=job.threads,
        device_id=device_id,
        prefetch_queue_depth=job.prefetch_batches,
    )
    tallest, widest = (int(px) for px in job.source.manifest.sizes.max(0))
    size = [job.spec.size_px, job.spec.size_px]
    with pipe:
        image = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        # The manifest's sizes, and PIL, know nothing of EXIF rotation: it is not applied.
        if device == "gpu" and job.decode_on == "gpu":
            image = fn.decoders.image(
                image,
                device="mixed",
                output_type=DALIImageType.RGB,
                adjust_orientation=False,
                jpeg_fancy_upsampling=True,  # as libjpeg-turbo, and so PIL, upsamples chroma
                preallocate_width_hint=widest,
                preallocate_height_hint=tallest,
            )
        else:
            image = fn.decoders.image(
                image, device="cpu", output_type=DALIImageType.RGB, adjust_orientation=False
            )
            image = image.gpu() if device == "gpu" else image
        crops = []
        for crop in job.crops:
            start = fn.external_source(name=f"start_{crop}", dtype=DALIDataType.FLOAT, ndim=1)
            end = fn.external_source(name=f"end_{crop}", dtype=DALIDataType.FLOAT, ndim=1)
            crops.append(
                fn.resize(
                    image,
                    device=device,
                    size=size,
                    roi_start=start,
                    roi_end=end,
                    roi_relative=False,
                    interp_type=DALIInterpType.INTERP_LINEAR,
                    antialias=True,
                )
            )
        pipe.set_outputs(*crops)
    return pipe


def regions(params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end of one crop's windows, `(B, 2)` each: (y, x) in pixels.

    A flip swaps the ends along x.
    """
    top, left, height, width, flip = (
        params[name] for name in ("top", "left", "height", "width", "flip")
    )
    right = left + width
    start = np.stack([top, np.where(flip, right, left)], 1)
    end = np.stack([top + height, np.where(flip, left, right)], 1)
    return start.astype(np.float32), end.astype(np.float32)


class DaliViews(Loader):
    """Loader over encoded images. Raises ValueError when DALI is missing.

    DALI does not reliably say which image it cannot decode, and its pipeline is invalid from then
    on. The batch is then decoded by PIL, which also finds the bad image, and a new pipeline
    continues from there.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.on_gpu = job.device.type == "cuda"
        if self.on_gpu and job.aggressive_on == "host":
            raise ValueError(
                "aggressive_on: host would bring the crops back from the GPU; use device, or backend native"
            )
        self.pool = ThreadPoolExecutor(job.threads)
        self.landing = Landing(job)
        self.pipe = self.start()

    def start(self) -> Pipeline:
        """A new pipeline, ready to run one batch for each `schedule_run`."""
        job, batch_size = self.job, self.job.order.batch_per_rank
        device_id = (job.device.index or 0) if self.on_gpu else None
        pipe = build_graph(job, "gpu" if self.on_gpu else "cpu", device_id)
        pipe.build()
        # The first `schedule_run` runs DALI once for each place of its queue. Those runs get blank
        # images here, so that later one call is one batch.
        blank = np.frombuffer(png(np.zeros((8, 8, 3), np.uint8)), np.uint8)
        params = np.zeros((batch_size, 2), VIEW_PARAMS)
        params["height"] = params["width"] = 8
        for _ in range(job.prefetch_batches):
            self.feed(pipe, [blank] * batch_size, params)
        pipe.schedule_run()
        for _ in range(job.prefetch_batches):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe

    def restart(self) -> None:
        """Replace a pipeline that met a bad image."""
        self.pipe._shutdown()
        self.pipe = self.start()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        # Pipelines are part of reference cycles. One that is left to the garbage collector may be
        # finalised in a forked worker process, and wait there for threads that a fork does not
        # copy. DALI has no public call for it.
        self.pipe._shutdown()

    def batches(self, epoch: int, step: int = 0) -> Generator[Batch]:
        reading: deque[Reading] = deque()  # batches whose files are being read
        running: deque[Encoded] = deque()  # batches inside DALI
        pending = iter(range(step, len(self)))

        def read_next() -> None:
            if (s := next(pending, None)) is not None:
                reading.append(self.read(self.job.order.ids(epoch, s), self.encoded))

        for _ in range(2 * self.job.prefetch_batches):
            read_next()
        try:
            while reading or running:
                while reading and len(running) < self.job.prefetch_batches:
                    running.append(self.run(self.collect(epoch, reading.popleft())))
                    read_next()
                try:
                    outputs = self.outputs()
                except RuntimeError:
                    (ids, *_), *rest = running
                    running.clear()
                    self.restart()
                    running.append(self.run(self.collect(epoch, self.read(ids, self.decoded))))
                    running.extend(map(self.run, rest))
                    outputs = self.outputs()
                ids, params, _ = running.popleft()
                crops = dict(zip(self.job.crops, outputs, strict=True))
                land = self.land_gpu if self.on_gpu else self.land_cpu
                batch = land(crops, ids, params)
                self.pipe.release_outputs()
                yield batch
        finally:
            for files in reading:
                for file in files:
                    file.cancel()
            try:
                for _ in running:  # an iterator left early leaves nothing behind for the next one
                    self.pipe.share_outputs()
                    self.pipe.release_outputs()
            except RuntimeError:  # a bad image in a batch that nobody will ask for
                self.restart()

    def read(self, ids: np.ndarray, read: Callable[[int], np.ndarray]) -> Reading:
        return [self.pool.submit(self.readable, int(sample), read) for sample in ids]

    def collect(self, epoch: int, files: Reading) -> Encoded:
        samples, encoded = zip(*(file.result() for file in files), strict=True)
        ids = np.array(samples)
        return ids, self.job.params(epoch, ids), list(encoded)

    def run(self, batch: Encoded) -> Encoded:
        _, params, files = batch
        self.feed(self.pipe, files, params)
        self.pipe.schedule_run()
        return batch

    def feed(self, pipe: Pipeline, files: list[np.ndarray], params: np.ndarray) -> None:
        pipe.feed_input("encoded", files)
        for crop in self.job.crops:
            start, end = regions(params[:, crop])
            pipe.feed_input(f"start_{crop}", start)
            pipe.feed_input(f"end_{crop}", end)

    def outputs(self) -> list[Any]:
        """The oldest batch's crops, one `TensorList` each. Raises RuntimeError when an image could
        not be decoded.

        On a GPU they are bound to the landing's stream, which waits for DALI's. The host waits only
        until DALI's threads have launched their kernels. Without a stream it would wait for the GPU
        in every batch.
        """
        return list(self.pipe.share_outputs(cuda_stream=self.landing.stream))

    def encoded(self, sample: int) -> np.ndarray:
        """The bytes for DALI's decoder: a JPEG as it is, anything else as `decoded`."""
        data = self.job.jpeg(sample)
        return np.frombuffer(data, np.uint8) if data else self.decoded(sample)

    def decoded(self, sample: int) -> np.ndarray:
        """The bytes of a PNG of the image's RGB pixels by PIL."""
        return np.frombuffer(png(self.job.read(sample)), np.uint8)

    def land_gpu(self, crops: dict[int, Any], ids: np.ndarray, params: np.ndarray) -> Batch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        def receive(stream: torch.cuda.Stream) -> dict[str, torch.Tensor]:
            # One copy of each crop in stream order: 39 MB for 256 images at 224 px, .1 ms of a
            # V100's bandwidth. What keeps DALI's memory alive until the device has read it: the
            # stream on which DALI reuses that memory is made to wait for the copy, by DALI, inside
            # this call (CopyToExternalImplGPU in its backend_impl.cc). The crop may therefore be
            # released as soon as the copy is enqueued.
            shape = (len(ids), self.job.spec.size_px, self.job.spec.size_px, 3)
            levels = {}
            for crop, output in crops.items():
                level = torch.empty(shape, dtype=torch.uint8, device=self.job.device)
                levels[VIEWS[crop]] = feed_ndarray(output.as_tensor(), level, cuda_stream=stream)
            return levels

        return self.landing.on_stream(receive, ids, params)

    def land_cpu(self, crops: dict[int, Any], ids: np.ndarray, params: np.ndarray) -> Batch:
        levels = {crop: np.asarray(output.as_tensor()) for crop, output in crops.items()}
        slot = self.landing.slot(len(ids))
        if self.job.aggressive_on == "device":
            for crop, pixels in levels.items():
                slot.views[VIEWS[crop]].numpy()[:] = pixels
            return self.landing.batch(slot, ids, params)
        outputs, table = self.landing.arrays(slot), self.landing.table
        unread = np.empty((len(ids), 0, 0, 3), np.uint8)
        weak_1, weak_2 = (levels.get(crop, unread) for crop in (0, 1))

        def work(part: slice) -> None:
            views = [output[part] for output in outputs]
            finish_views(weak_1[part], weak_2[part], params[part], table, *views)

        in_parts(self.pool, self.job.threads, len(ids), work)
        return self.landing.batch(slot, ids, params)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=0)
    return file.getvalue()
