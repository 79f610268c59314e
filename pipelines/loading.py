"""What every backend shares: the job it is given, and the way of its views from the host to a batch on the device.

Three ways end in the same batch: the host makes all views in the compute dtype (a CPU trains), the host makes all views
as 8-bit levels, or the host makes the weak crops as 8-bit levels and the device does the rest.
"""

from __future__ import annotations

import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from pipelines import device_ops
from pipelines.draws import draw
from pipelines.order import Order
from pipelines.sources import Source
from pipelines.views import VIEWS, Batch, ViewSpec

DecodeOn = Literal["gpu", "cpu"]
OnBadImage = Literal["stop", "skip"]
Read = TypeVar("Read")


@dataclass(frozen=True)
class Job:
    """What to load and how; `reads` are names of `VIEWS`. `threads` to `decode_on` change only speed."""

    source: Source
    spec: ViewSpec
    reads: frozenset[str]
    order: Order
    device: torch.device
    dtype: torch.dtype
    threads: int  # of one rank
    prefetch_batches: int  # made ahead of the one in use
    aggressive_on: Literal["host", "device"]
    decode_on: DecodeOn  # only the dali backend on a GPU reads this
    on_bad_image: OnBadImage = "stop"  # what skip does: `Loader.readable`

    @property
    def crops(self) -> list[int]:
        """Which of the two crops, 0 and 1, any view needs."""
        return [crop for crop in (0, 1) if {VIEWS[crop], VIEWS[2 + crop]} & self.reads]

    def params(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """`(B, 2)` of `draws.VIEW_PARAMS`."""
        return draw(self.order.seed, epoch, ids, self.spec, self.source.manifest.sizes[ids])

    def labels(self, ids: np.ndarray) -> Tensor:
        return device_ops.send(self.source.manifest.labels[ids], self.device)

    def jpeg(self, sample: int) -> bytes | None:
        """The stored bytes of a JPEG whose header says the manifest's size; of anything else PIL is the judge (`read`)."""
        from pipelines.host_ops import jpeg_size  # numba: a GPU can train from memory without it

        data = self.source.jpeg(sample)
        return (
            data if data and jpeg_size(np.frombuffer(data, np.uint8)) == self.size(sample) else None
        )

    def read(self, sample: int) -> np.ndarray:
        """`(H, W, 3)` uint8 by PIL. Raises ValueError when it is damaged, or not of the manifest's size any more, in which its
        crops are drawn."""
        image = self.source.read(sample)
        if image.shape[:2] != self.size(sample):
            found = f"{image.shape[:2]} px, its manifest says {self.size(sample)}"
            raise ValueError(f"{found}: the data changed; delete its .rsa-fast folder")
        return image

    def size(self, sample: int) -> tuple[int, int]:
        height, width = self.source.manifest.sizes[sample]
        return int(height), int(width)


class Loader(ABC):
    """One rank's loader; `len()` is the steps per epoch.

    A context manager, which closes it at the end. `skipped` are the bad images met so far: sample id, fault.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.skipped: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.job.order)

    @abstractmethod
    def batches(self, epoch: int, step: int = 0) -> Generator[Batch]:
        """The batches of an epoch, from `step` to its end.

        Closing the generator early ends the work on the batches ahead.
        """

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Join the threads that the loader started."""

    def readable(self, sample: int, read: Callable[[int], Read]) -> tuple[int, Read]:
        """`sample` and what `read` makes of it; if it is bad, those of the next id of the dataset that can be read.

        The stand-in takes the bad one's place in the batch with the dice and the label of its own, so that the data alone
        decide what is seen: on every rank, and after a resume. What was bad is not tried again. Where bad images are not
        skipped, and where none can be read, raises ValueError with the sample id and the file.
        """
        manifest = self.job.source.manifest
        for stand_in in chain(range(sample, len(manifest)), range(sample)):
            if stand_in not in self.skipped:
                try:
                    return stand_in, read(stand_in)
                except (OSError, ValueError) as error:
                    fault = f"sample {stand_in}{f', {manifest.paths[stand_in]}' if manifest.paths else ''}: {error}"
                    if self.job.on_bad_image == "stop":
                        raise ValueError(
                            f"{fault}. To train on without it: --on-bad-image skip"
                        ) from error
                    self.skip(stand_in, fault)
        raise ValueError(
            f"none of the {len(manifest)} images can be read; one of them: {self.skipped[sample]}"
        )

    def skip(self, sample: int, fault: str) -> None:
        """Remember a bad image, and say so once; a worker process leaves that to the one that it works for."""
        if self.skipped.setdefault(sample, fault) is fault and get_worker_info() is None:
            sys.stderr.write(
                f"skipped {fault}\n"
            )  # at once: print() writes the end of a line by itself, and others between


def in_parts(
    pool: ThreadPoolExecutor, parts: int, count: int, work: Callable[[slice], None]
) -> None:
    """Run `work` on `count` samples cut into equal slices, one per thread, and wait."""
    edges = np.linspace(0, count, parts + 1).astype(int)
    list(pool.map(lambda part: work(slice(edges[part], edges[part + 1])), range(parts)))


class Slot:
    """Memory for one batch's views from the host, `(B, S, S, 3)` each, and the event that says the device has read it."""

    def __init__(self, views: dict[str, Tensor]) -> None:
        self.views = views
        self.read: torch.cuda.Event | None = None

    def wait(self) -> None:
        """Return when the slot may be written; called by the threads that write, never by the one that trains."""
        if self.read is not None:
            self.read.synchronize()


class Landing:
    """Where host code writes a batch's views, and how they become a `Batch`.

    `names` are the views the host makes, `table` `(3, 256)` what it writes for each channel's 8-bit level.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.finished = (
            job.device.type == "cpu" and job.aggressive_on == "host"
        )  # the host writes what the batch holds
        made = job.reads if job.aggressive_on == "host" else {VIEWS[crop] for crop in job.crops}
        self.names = [name for name in VIEWS if name in made]
        self.table = (
            level_table(job.spec, job.dtype)
            if self.finished
            else np.tile(np.arange(256, dtype=np.uint8), (3, 1))
        )
        self.stream: torch.cuda.Stream | None = None
        if job.device.type == "cuda":
            self.stream = torch.cuda.Stream(job.device)  # type: ignore[no-untyped-call]  # torch gives no types
        self.ring: list[Slot] = []
        self.used = 0
        self.idle: list[np.ndarray] = []
        self.affine = device_ops.affine(job.spec, job.device)

    def slot(self, count: int) -> Slot:
        """Memory for `count` samples: on a GPU the next of a ring of pinned buffers, on a CPU what no batch uses."""
        shape = (count, self.job.spec.size_px, self.job.spec.size_px, 3)
        if self.stream is None:
            return Slot({name: self.lend(shape) for name in self.names})
        depth = self.job.prefetch_batches + 2
        if len(self.ring) < depth:
            self.ring.append(
                Slot(
                    {
                        name: torch.empty(shape, dtype=torch.uint8).pin_memory()
                        for name in self.names
                    }
                )
            )
        self.used += 1
        return self.ring[(self.used - 1) % depth]

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        """Memory that comes back when the last tensor on it is gone.

        Fresh pages for every batch took 6% of all that `native` does at 224 px, and 3% of `ffcv`.
        """
        dtype = self.job.dtype if self.finished else torch.uint8
        memory = self.idle.pop() if self.idle else bits(torch.empty(shape, dtype=dtype))
        lent = memory[:]  # an array of its own, which the tensor keeps
        weakref.finalize(lent, self.idle.append, memory).atexit = False
        return torch.from_numpy(lent).view(dtype)

    def arrays(self, slot: Slot) -> list[np.ndarray]:
        """The slot's memory for `host_ops`, in the order of `VIEWS`, of the table's dtype, empty where nothing is made."""
        unread = np.empty((self.job.order.batch_per_rank, 0, 0, 3), self.table.dtype)
        return [bits(slot.views[name]) if name in slot.views else unread for name in VIEWS]

    def batch(self, slot: Slot, ids: np.ndarray, params: np.ndarray) -> Batch:
        """The batch of a written slot. On a GPU nothing waits: copies and the device's stages run on a stream of their own."""
        if self.stream is None:
            views = {name: view.permute(0, 3, 1, 2) for name, view in slot.views.items()}
            if not self.finished:
                views = self.finish(views, params)
            return Batch(self.job.labels(ids), views)

        def receive(stream: torch.cuda.Stream) -> dict[str, Tensor]:
            copies = {
                name: view.to(self.job.device, non_blocking=True)
                for name, view in slot.views.items()
            }
            slot.read = stream.record_event()  # type: ignore[no-untyped-call]  # torch gives no types
            return copies

        return self.on_stream(receive, ids, params)

    def on_stream(
        self,
        receive: Callable[[torch.cuda.Stream], dict[str, Tensor]],
        ids: np.ndarray,
        params: np.ndarray,
    ) -> Batch:
        """The batch of the levels `(B, S, S, 3)` that `receive(stream)` brings to the GPU, made on the landing's stream."""
        assert self.stream is not None  # only batches for a GPU are made here
        main = torch.cuda.current_stream(self.job.device)
        with torch.cuda.stream(self.stream):
            levels = {name: view.permute(0, 3, 1, 2) for name, view in receive(self.stream).items()}
            views, label = self.finish(levels, params), self.job.labels(ids)
        main.wait_stream(self.stream)
        for tensor in (label, *views.values()):
            tensor.record_stream(main)
        return Batch(label, views)

    def finish(self, levels: dict[str, Tensor], params: np.ndarray) -> dict[str, Tensor]:
        """The views read, of 8-bit levels `(B, 3, S, S)` on the device."""
        if self.job.aggressive_on == "host":
            return {
                name: device_ops.normalise(view, *self.affine, self.job.dtype)
                for name, view in levels.items()
            }
        crops = self.job.crops
        weak = torch.cat([levels[VIEWS[crop]] for crop in crops]).float().contiguous()
        return finish_on_device(
            self.job, weak, np.concatenate([params[:, crop] for crop in crops]), self.affine
        )


def finish_on_device(
    job: Job, weak: Tensor, params: np.ndarray, affine: tuple[Tensor, Tensor]
) -> dict[str, Tensor]:
    """The views read, of the weak levels `(C * B, 3, S, S)` of all crops that are needed; `params` `(C * B,)`."""
    stages = [weak]
    if job.reads & set(VIEWS[2:]):
        stages.append(device_ops.aggressive_stage(weak, params))
    return {
        name: device_ops.normalise(levels, *affine, job.dtype)
        for stage, both in enumerate(stages)
        for crop, levels in zip(job.crops, both.chunk(len(job.crops)), strict=True)
        if (name := VIEWS[2 * stage + crop]) in job.reads
    }


def level_table(spec: ViewSpec, dtype: torch.dtype) -> np.ndarray:
    """`(3, 256)`: the bits of each channel's normalised value at each 8-bit level, rounded to `dtype` by torch."""
    level = torch.arange(256, dtype=torch.float32) / 255
    mean, std = (torch.tensor(x).view(3, 1) for x in (spec.mean, spec.std))
    return bits(((level - mean) / std).to(dtype))


def bits(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor as integers, for kernels that only move values of types numpy may not know (bfloat16)."""
    return tensor.view(
        {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    ).numpy()
