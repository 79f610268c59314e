"""Views by NVIDIA DALI: one decode per image, two crops of it by region of interest, uint8 HWC weak crops.

The default for image files on a GPU, where DALI decodes (`mixed`: entropy decoding on the host's threads, the rest on
the GPU) or takes what the host decoded (`decode_on=cpu`). The windows are those of `draws`, fed per sample; no DALI
random operator, reader or shuffle is used, so there is no DALI state to save, and a new epoch or a resumed run is only
other input. The aggressive stage is `device_ops` on a GPU and `host_ops` on a CPU, never DALI's colour operators, which
are 8 levels away from torchvision's.
"""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from pipelines.draws import VIEW_PARAMS
from pipelines.host_ops import finish_views
from pipelines.loading import Job, Landing, Loader, in_parts
from pipelines.views import VIEWS, Batch

INSTALL = "pip install nvidia-dali-cuda120 (for CUDA 12; nvidia-dali-cuda130 for CUDA 13)"
Encoded = tuple[np.ndarray, np.ndarray, list[np.ndarray]]  # ids, parameters and files of a batch


def build_graph(job: Job, device: str, device_id: int | None):
    """The DALI pipeline: `device` is `gpu` or `cpu`. Inputs `encoded` and, per crop, `start_i` and `end_i` (y, x) px."""
    try:
        from nvidia.dali import Pipeline, fn, types
    except ImportError as error:
        raise ValueError(f"backend dali needs DALI ({error}): {INSTALL}, or choose another backend") from error
    pipe = Pipeline(
        batch_size=job.order.batch_per_rank,
        num_threads=job.threads,
        device_id=device_id,
        prefetch_queue_depth=job.prefetch_batches,
    )
    tallest, widest = (int(px) for px in job.source.manifest.sizes.max(0))
    # EXIF rotation is not applied: the manifest's sizes, and PIL, know nothing of it
    decode = {"output_type": types.RGB, "adjust_orientation": False}
    with pipe:
        image = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
        if device == "gpu" and job.decode_on == "gpu":
            hints = {"preallocate_width_hint": widest, "preallocate_height_hint": tallest}
            image = fn.decoders.image(image, device="mixed", jpeg_fancy_upsampling=True, **hints, **decode)
        else:
            image = fn.decoders.image(image, device="cpu", **decode)
            image = image.gpu() if device == "gpu" else image
        crops = []
        for crop in job.crops:
            start, end = (fn.external_source(name=f"{edge}_{crop}", dtype=types.FLOAT, ndim=1) for edge in ("start", "end"))
            region = {"roi_start": start, "roi_end": end, "roi_relative": False}
            size = [job.spec.size_px, job.spec.size_px]
            crops.append(fn.resize(image, device=device, size=size, interp_type=types.INTERP_LINEAR, antialias=True, **region))
        pipe.set_outputs(*crops)
    return pipe


def regions(params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Start and end `(B, 2)` (y, x) in pixels of the windows of one crop; a flip swaps the ends along x."""
    top, left, height, width, flip = (params[name] for name in ("top", "left", "height", "width", "flip"))
    right = left + width
    start = np.stack([top, np.where(flip, right, left)], 1)
    end = np.stack([top + height, np.where(flip, left, right)], 1)
    return start.astype(np.float32), end.astype(np.float32)


class DaliViews(Loader):
    """Loader over encoded images. Raises ValueError when DALI is missing.

    DALI does not reliably say which image it cannot decode, and its pipeline is invalid from then on: PIL then decodes that
    batch, or finds the bad one, and a new pipeline goes on from there.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.on_gpu = job.device.type == "cuda"
        if self.on_gpu and job.aggressive_on == "host":
            raise ValueError("aggressive_on: host would bring the crops back from the GPU; use device, or backend native")
        self.pool = ThreadPoolExecutor(job.threads)
        self.landing = Landing(job)
        self.pipe = None
        self.start()

    def start(self) -> None:
        self.shut_down()
        job = self.job
        device_id = (job.device.index or 0) if self.on_gpu else None
        self.pipe = build_graph(job, "gpu" if self.on_gpu else "cpu", device_id)
        self.pipe.build()
        # DALI's first scheduled run is a run for each place of its queue. Blank images go first, so that from then on one
        # call is one batch.
        blank = np.frombuffer(png(np.zeros((8, 8, 3), np.uint8)), np.uint8)
        whole = np.zeros(job.order.batch_per_rank, VIEW_PARAMS)
        whole["height"] = whole["width"] = 8
        for _ in range(job.prefetch_batches):
            self.feed([blank] * len(whole), np.stack([whole, whole], 1))
        self.pipe.schedule_run()
        for _ in range(job.prefetch_batches):
            self.drop()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self.shut_down()

    def shut_down(self) -> None:
        if self.pipe is None:
            return
        if self.on_gpu:
            self.landing.stream.synchronize()  # it may yet copy from the pipeline's memory
        # Left to the garbage collector, in whose cycles it is, it may be finalised in a forked worker, and wait there for
        # threads that a fork does not copy.
        self.pipe._shutdown()
        self.pipe = None

    def batches(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        reading: deque[list[Future]] = deque()  # batches whose files are being read
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
                    outputs = self.pipe.share_outputs()
                except RuntimeError:
                    (ids, *_), *rest = running
                    running.clear()
                    self.start()
                    running.append(self.run(self.collect(epoch, self.read(ids, self.decoded))))
                    running.extend(map(self.run, rest))
                    outputs = self.pipe.share_outputs()
                ids, params, _ = running.popleft()
                crops = dict(zip(self.job.crops, outputs, strict=True))
                batch = self.land_gpu(crops, ids, params) if self.on_gpu else self.land_cpu(crops, ids, params)
                self.pipe.release_outputs()
                yield batch
        finally:
            for files in reading:
                for file in files:
                    file.cancel()
            try:
                for _ in running if self.pipe else ():  # an iterator left early leaves nothing behind for the next one
                    self.drop()
            except RuntimeError:  # a bad image in a batch that nobody will ask for
                self.start()

    def drop(self) -> None:
        self.pipe.share_outputs()
        self.pipe.release_outputs()

    def read(self, ids: np.ndarray, read: Callable[[int], np.ndarray]) -> list[Future]:
        return [self.pool.submit(self.readable, int(sample), read) for sample in ids]

    def collect(self, epoch: int, files: list[Future]) -> Encoded:
        samples, encoded = zip(*(file.result() for file in files), strict=True)
        ids = np.array(samples)
        return ids, self.job.params(epoch, ids), list(encoded)

    def run(self, batch: Encoded) -> Encoded:
        _, params, files = batch
        self.feed(files, params)
        self.pipe.schedule_run()
        return batch

    def feed(self, files: list[np.ndarray], params: np.ndarray) -> None:
        self.pipe.feed_input("encoded", files)
        for crop in self.job.crops:
            for edge, points in zip(("start", "end"), regions(params[:, crop]), strict=True):
                self.pipe.feed_input(f"{edge}_{crop}", points)

    def encoded(self, sample: int) -> np.ndarray:
        """The bytes for DALI's decoder: a JPEG as it is, anything else as `decoded`."""
        data = self.job.jpeg(sample)
        return np.frombuffer(data, np.uint8) if data else self.decoded(sample)

    def decoded(self, sample: int) -> np.ndarray:
        """The bytes of a PNG of the image's RGB pixels by PIL."""
        return np.frombuffer(png(self.job.read(sample)), np.uint8)

    def land_gpu(self, crops: dict, ids: np.ndarray, params: np.ndarray) -> Batch:
        from nvidia.dali.plugin.pytorch import feed_ndarray

        def receive(stream: torch.cuda.Stream) -> dict[str, torch.Tensor]:
            shape = (len(ids), self.job.spec.size_px, self.job.spec.size_px, 3)
            views = {VIEWS[crop]: torch.empty(shape, dtype=torch.uint8, device=self.job.device) for crop in crops}
            for crop, output in crops.items():
                feed_ndarray(output.as_tensor(), views[VIEWS[crop]], cuda_stream=stream, non_blocking=True)
            return views

        return self.landing.on_stream(receive, ids, params)

    def land_cpu(self, crops: dict, ids: np.ndarray, params: np.ndarray) -> Batch:
        levels = {crop: np.asarray(output.as_tensor()) for crop, output in crops.items()}
        slot = self.landing.slot(len(ids))
        if self.job.aggressive_on == "device":
            for crop, pixels in levels.items():
                slot.views[VIEWS[crop]].numpy()[:] = pixels
            return self.landing.batch(slot, ids, params)
        outputs = self.landing.arrays(slot)
        unread = np.empty((len(ids), 0, 0, 3), np.uint8)
        weak = [levels.get(crop, unread) for crop in (0, 1)]

        def work(chunk: slice) -> None:
            finish_views(*(crop[chunk] for crop in weak), params[chunk], self.landing.table, *(out[chunk] for out in outputs))

        in_parts(self.pool, self.job.threads, len(ids), work)
        return self.landing.batch(slot, ids, params)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=0)
    return file.getvalue()
