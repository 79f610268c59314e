"""Make views with NVIDIA DALI: it decodes each image once and resizes K regions of it.

This is the default for image files on a GPU. DALI decodes there (`mixed`: the host's threads read
the Huffman codes, the GPU does the rest), or on the host with `decode_on=cpu`. Its outputs are the
weak crops as uint8, HWC.

Every crop window is drawn by `draws` and given to DALI per sample. No random operator, reader or
shuffle of DALI is used. DALI therefore has no state to save, and a new epoch or a resumed run only
gives it other input. The aggressive stage runs in `device_ops` on a GPU and in `host_ops` on a CPU,
because DALI's colour operators differ from torchvision's by 8 of 255 levels.

A batch passes three stages:

1. A pool of threads reads the files of the next `2 * prefetch_batches` batches. The training thread
   waits here only if the storage is too slow.
2. Up to `prefetch_batches` batches are inside DALI, which decodes and crops them. On a CPU the
   training thread waits until the oldest one is finished. On a GPU it waits only until DALI's
   threads have launched the kernels of that batch.
3. The crops are copied out of DALI's memory and finished. On a GPU this runs on the stream of
   `self.transfer`, which waits for DALI's stream. The training stream waits for that stream, and
   the host waits for neither.

The crops that DALI returns are its own memory. They are valid from `share_outputs` until
`release_outputs`, after which DALI writes later batches there. Each batch is therefore copied into
memory of its own, and the crops are released before the batch is handed out.

DALI's dynamic mode (`nvidia.dali.experimental.dynamic`, 2.4.0) was tried instead of the graph
below. On a CPU it gives the same bits at the same speed (1.004 of the graph's wall time, 0.98 of
its CPU time). It would save the queue's start and the restart after a bad image, a third of this
file. But it is experimental, and its GPU operators cannot be checked without a GPU. The graph can
be serialised instead, which checks every operator and argument (tests/pipelines).
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

from rsa_fast.pipelines import device_ops
from rsa_fast.pipelines.draws import VIEW_PARAMS, mirrors
from rsa_fast.pipelines.host_ops import finish_views
from rsa_fast.pipelines.loading import Job, Loader, in_parts
from rsa_fast.pipelines.transfer import Transfer, rows_of
from rsa_fast.pipelines.views import Batch, view_name

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

INSTALL = "pip install nvidia-dali-cuda120 (for CUDA 12; nvidia-dali-cuda130 for CUDA 13)"
# A batch inside DALI: the sample ids `(B,)`, the parameters `(B, K)` and the bytes of each file.
Encoded = tuple[np.ndarray, np.ndarray, list[np.ndarray]]
# A batch whose files are still being read. Each future returns a sample id and the file's bytes.
Reading = list[Future[tuple[int, np.ndarray]]]


def build_graph(job: Job, device: Literal["cpu", "gpu"], device_id: int | None) -> Pipeline:
    """The DALI pipeline whose last operators run on `device`.

    Its inputs are `encoded` (the files' bytes) and, for each crop i, `start_i` and `end_i`, (y, x)
    in pixels, and `from_i`, the side (y, x) where the crop's first pixel is: 0 is the start, 1 the
    end. Its outputs are the crops `(B, S, S, 3)` uint8. Raises ValueError when DALI is missing.
    """
    try:
        from nvidia.dali import Pipeline, fn
        from nvidia.dali.types import DALIDataType, DALIImageType, DALIInterpType
    except ImportError as error:
        reason = f"backend dali needs DALI ({error}): {INSTALL}, or choose another backend"
        raise ValueError(reason) from error
    pipe = Pipeline(
        batch_size=job.order.batch_per_rank,
        num_threads=job.loading.threads,
        device_id=device_id,
        prefetch_queue_depth=job.loading.prefetch_batches,
    )
    tallest, widest = (int(px) for px in job.source.manifest.sizes.max(0))
    interpolations = {
        "bilinear": DALIInterpType.INTERP_LINEAR,
        "bicubic": DALIInterpType.INTERP_CUBIC,
    }
    with pipe:
        image = fn.external_source(name="encoded", dtype=DALIDataType.UINT8, ndim=1)
        # EXIF rotation is not applied here: images to be turned arrive as PNGs of upright pixels.
        if device == "gpu" and job.loading.decode_on == "gpu":
            image = fn.decoders.image(
                image,
                device="mixed",
                output_type=DALIImageType.RGB,
                adjust_orientation=False,
                # libjpeg-turbo, and therefore PIL, upsamples chroma in this way.
                jpeg_fancy_upsampling=True,
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
            spec = job.spec.crops[crop]
            start = fn.external_source(name=f"start_{crop}", dtype=DALIDataType.INT32, ndim=1)
            end = fn.external_source(name=f"end_{crop}", dtype=DALIDataType.INT32, ndim=1)
            first = fn.external_source(name=f"from_{crop}", dtype=DALIDataType.FLOAT, ndim=1)
            # DALI's resize of a region would also read the pixels around it. PIL's does not.
            window = fn.slice(image, device=device, start=start, end=end, axes=[0, 1])
            crops.append(
                fn.resize(
                    window,
                    device=device,
                    size=[spec.size_px, spec.size_px],
                    roi_start=first,
                    roi_end=1.0 - first,
                    roi_relative=True,
                    interp_type=interpolations[spec.interpolation],
                    antialias=True,
                )
            )
        pipe.set_outputs(*crops)
    return pipe


def regions(params: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs "start", "end" and "from" of the graph for one crop, `(B, 2)` each.

    `params` `(B,)` are rows of `draws.VIEW_PARAMS`. For a flip, an axis is resized from its end to
    its start. A quarter turn also needs a transposition, which is applied to DALI's crops later.
    """
    flip_x, flip_y, _ = mirrors(params)
    start = np.stack([params["top"], params["left"]], 1).astype(np.int32)
    size = np.stack([params["height"], params["width"]], 1).astype(np.int32)
    return {
        "start": start,
        "end": start + size,
        "from": np.stack([flip_y, flip_x], 1).astype(np.float32),
    }


class DaliViews(Loader):
    """Loader of encoded images. Raises ValueError when DALI is missing.

    DALI does not reliably report which image it cannot decode, and the failure makes its pipeline
    invalid. PIL then decodes the images of that batch, which also finds the bad one. A new pipeline
    gets them as PNGs and continues from there.
    """

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self.on_gpu = job.device.type == "cuda"
        if self.on_gpu and job.loading.aggressive_on == "host":
            raise ValueError(
                "aggressive_on = host would copy the crops back from the GPU: use device, "
                "or backend native"
            )
        self.pool = ThreadPoolExecutor(job.loading.threads)
        self.transfer = Transfer(job)
        self.pipe = self.start()

    def start(self) -> Pipeline:
        """A new pipeline with an empty queue, in which each `schedule_run` runs one batch."""
        job, batch_size = self.job, self.job.order.batch_per_rank
        device_id = (job.device.index or 0) if self.on_gpu else None
        pipe = build_graph(job, "gpu" if self.on_gpu else "cpu", device_id)
        pipe.build()
        # The first `schedule_run` runs DALI once for each place of its queue. Here these runs get
        # blank images, and their outputs are thrown away. Every later call then runs one batch.
        blank = np.frombuffer(png(np.zeros((8, 8, 3), np.uint8)), np.uint8)
        params = np.zeros((batch_size, len(job.spec.crops)), VIEW_PARAMS)
        params["height"] = params["width"] = 8
        for _ in range(job.loading.prefetch_batches):
            self.feed(pipe, [blank] * batch_size, params)
        pipe.schedule_run()
        for _ in range(job.loading.prefetch_batches):
            pipe.share_outputs()
            pipe.release_outputs()
        return pipe

    def restart(self) -> None:
        """Replace a pipeline that failed at a bad image. The batches inside it are lost."""
        self.pipe._shutdown()
        self.pipe = self.start()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        # A pipeline is part of a reference cycle, so only the garbage collector would finalise it.
        # If that happened in a forked worker process, it would wait there for DALI's threads, which
        # a fork does not copy, and never end. DALI has no public call for the shutdown.
        self.pipe._shutdown()

    def load_batches(self, epoch: int, step: int) -> Generator[Batch]:
        # Batches move from `reading` to `running` and are delivered from there, always in order.
        reading: deque[Reading] = deque()
        running: deque[Encoded] = deque()
        steps = iter(range(step, len(self)))

        def read_next() -> None:
            if (next_step := next(steps, None)) is not None:
                ids = self.job.order.ids(epoch, next_step)
                reading.append(self.start_reading(ids, self.file_bytes))

        for _ in range(2 * self.job.loading.prefetch_batches):
            read_next()
        try:
            while reading or running:
                while reading and len(running) < self.job.loading.prefetch_batches:
                    running.append(self.run(self.collect(epoch, reading.popleft())))
                    read_next()
                try:
                    outputs = self.outputs()
                except RuntimeError:
                    # An image of the oldest batch could not be decoded, and the batches behind it
                    # are lost with the pipeline. A new one gets the oldest batch as PNGs made by
                    # PIL. The others are still in `running` with their files and are run again.
                    (ids, *_), *rest = running
                    running.clear()
                    self.restart()
                    files = self.start_reading(ids, self.png_bytes)
                    running.append(self.run(self.collect(epoch, files)))
                    running.extend(map(self.run, rest))
                    outputs = self.outputs()
                ids, params, _ = running.popleft()
                crops = dict(zip(self.job.crops, outputs, strict=True))
                make = self.batch_on_gpu if self.on_gpu else self.batch_on_cpu
                batch = make(crops, ids, params)
                # The batch has memory of its own by now, so DALI may reuse that of the crops.
                self.pipe.release_outputs()
                yield batch
        finally:
            # The caller may stop before the end of the epoch. The files that are no longer needed
            # are then not read, and DALI's queue is emptied. Otherwise the next iterator would get
            # the batches of this one.
            for files in reading:
                for file in files:
                    file.cancel()
            try:
                for _ in running:
                    self.pipe.share_outputs()
                    self.pipe.release_outputs()
            except RuntimeError:  # A batch that nobody will ask for contains a bad image.
                self.restart()

    def start_reading(self, ids: np.ndarray, read: Callable[[int], np.ndarray]) -> Reading:
        """Start reading a batch's images on the pool. Returns at once."""
        return [self.pool.submit(self.readable, int(sample), read) for sample in ids]

    def collect(self, epoch: int, files: Reading) -> Encoded:
        """Wait until a batch's files are read, then draw its parameters.

        The parameters are drawn only now, because a bad image may have been replaced by another.
        """
        samples, encoded = zip(*(file.result() for file in files), strict=True)
        ids = np.array(samples)
        return ids, self.job.params(epoch, ids), list(encoded)

    def run(self, batch: Encoded) -> Encoded:
        """Start a batch in DALI. Returns the batch, which is needed until it is delivered."""
        _, params, files = batch
        self.feed(self.pipe, files, params)
        self.pipe.schedule_run()
        return batch

    def feed(self, pipe: Pipeline, files: list[np.ndarray], params: np.ndarray) -> None:
        """Queue one batch of inputs: B files and the windows of `params` `(B, K)`."""
        pipe.feed_input("encoded", files)
        for crop in self.job.crops:
            for name, values in regions(params[:, crop]).items():
                pipe.feed_input(f"{name}_{crop}", values)

    def outputs(self) -> list[Any]:
        """The oldest batch's crops in DALI's memory, one `TensorList` for each of `job.crops`.

        On a GPU they are bound to the stream of `self.transfer`, which waits for DALI's stream. The
        host waits only until DALI's threads have launched their kernels. Without a stream it would
        wait for the GPU in every batch. Raises RuntimeError when an image could not be decoded.
        """
        return list(self.pipe.share_outputs(cuda_stream=self.transfer.stream))

    def file_bytes(self, sample: int) -> np.ndarray:
        """The bytes for DALI's decoder: a JPEG unchanged, any other image as `png_bytes`."""
        data = self.job.jpeg(sample)
        return np.frombuffer(data, np.uint8) if data else self.png_bytes(sample)

    def png_bytes(self, sample: int) -> np.ndarray:
        """The image as decoded by PIL, encoded as a PNG."""
        return np.frombuffer(png(self.job.read(sample)), np.uint8)

    def batch_on_gpu(self, crops: dict[int, Any], ids: np.ndarray, params: np.ndarray) -> Batch:
        """The batch made of DALI's crops on the GPU.

        All work is only enqueued, so the host does not wait. The caller may release the crops
        afterwards.
        """
        from nvidia.dali.plugin.pytorch import feed_ndarray

        def receive(stream: torch.cuda.Stream) -> dict[str, torch.Tensor]:
            # Each crop is copied once, in stream order. A copy is 39 MB for 256 images at 224 px,
            # which takes 0.1 ms of a V100's bandwidth. The crop may be released as soon as its copy
            # is enqueued, although the GPU has not executed it yet: `feed_ndarray` also makes the
            # stream on which DALI reuses that memory wait for the copy (CopyToExternalImplGPU in
            # DALI's backend_impl.cc).
            levels = {}
            for crop, output in crops.items():
                name = view_name("weak", crop)
                side = self.job.spec.shape(name)[-1]
                shape = (len(ids), side, side, 3)
                level = torch.empty(shape, dtype=torch.uint8, device=self.job.device)
                levels[name] = feed_ndarray(output.as_tensor(), level, cuda_stream=stream)
                device_ops.transpose_(level.permute(0, 3, 1, 2), params[:, crop])
            return levels

        return self.transfer.on_stream(receive, ids, params)

    def batch_on_cpu(self, crops: dict[int, Any], ids: np.ndarray, params: np.ndarray) -> Batch:
        """The batch made of DALI's crops on the host. It is complete when this returns.

        `levels` are views of DALI's memory. They are read only in here, so the caller may release
        the crops afterwards.
        """
        levels = {crop: np.asarray(output.as_tensor()) for crop, output in crops.items()}
        memory = self.transfer.take(len(ids))
        if self.job.loading.aggressive_on == "device":
            for crop, pixels in levels.items():
                level = memory.views[view_name("weak", crop)]  # (B, S, S, 3)
                level.numpy()[:] = pixels
                device_ops.transpose_(level.permute(0, 3, 1, 2), params[:, crop])
            return self.transfer.batch(memory, ids, params)
        weak, aggressive = self.transfer.arrays(memory)
        unread = np.empty((len(ids), 0, 0, 3), np.uint8)
        every = tuple(levels.get(crop, unread) for crop in range(len(weak)))

        def work(part: slice) -> None:
            finish_views(
                crops=rows_of(every, part),
                params=params[part],
                table=self.transfer.table,
                weak=rows_of(weak, part),
                aggressive=rows_of(aggressive, part),
            )

        in_parts(self.pool, self.job.loading.threads, len(ids), work)
        return self.transfer.batch(memory, ids, params)


def png(image: np.ndarray) -> bytes:
    """`(H, W, 3)` uint8 as an uncompressed PNG."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG", compress_level=0)
    return file.getvalue()
