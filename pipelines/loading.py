"""What all backends share: the settings of loading, a loader's job, and the loader's interface.

loader = open_views(source, spec, reads, order, loading=Loading(backend="native", threads=8))
for batch in loader.batches(epoch=0): ...
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from typing import Literal, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from rsa_fast.pipelines import device_ops
from rsa_fast.pipelines.backends import BACKENDS, choose_backend
from rsa_fast.pipelines.draws import batch_seed, draw
from rsa_fast.pipelines.extra import Extra
from rsa_fast.pipelines.machine import loader_threads
from rsa_fast.pipelines.order import Order
from rsa_fast.pipelines.read_ahead import ReadAhead
from rsa_fast.pipelines.scan import OnBadImage
from rsa_fast.pipelines.sources import Source
from rsa_fast.pipelines.views import Batch, ViewSpec, stage_and_crop, view_name

AggressiveOn = Literal["auto", "host", "device"]
DecodeOn = Literal["gpu", "cpu"]
Read = TypeVar("Read")
log = logging.getLogger("rsa_fast")


@dataclass(frozen=True)
class Loading:
    """How views are loaded. Only `on_bad_image` changes what is seen; the rest is speed.

    `backend` is a name in `BACKENDS`, or "auto". `threads` belong to one rank; by default they are
    its share of the cores. `prefetch_batches` are made ahead of the one in use. `aggressive_on`
    says where the aggressive stage runs: as numba kernels on the host or as tensor operations on
    the device; "auto" is the device on a GPU. `decode_on` is where the dali backend decodes when it
    trains on a GPU. With `on_bad_image` "skip", an image that cannot be read is
    replaced (`Loader.readable`).

    Raises ValueError for a value that does not exist.
    """

    backend: str = "auto"
    threads: int = field(default_factory=loader_threads)
    prefetch_batches: int = 2
    aggressive_on: AggressiveOn = "auto"
    decode_on: DecodeOn = "gpu"
    on_bad_image: OnBadImage = "stop"

    def __post_init__(self) -> None:
        choices = {
            "backend": ("auto", *BACKENDS),
            "aggressive_on": get_args(AggressiveOn),
            "decode_on": get_args(DecodeOn),
            "on_bad_image": get_args(OnBadImage),
        }
        for name, values in choices.items():
            if (value := getattr(self, name)) not in values:
                raise ValueError(f"no {name} {value!r}: choose from {', '.join(values)}")
        for name in ("threads", "prefetch_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} = {getattr(self, name)}: at least 1 is needed")

    def resolved(self, source: Source, device: torch.device) -> tuple[Loading, str]:
        """With what "auto" stands for, and the reason for the backend (empty if it was given)."""
        backend, reason = self.backend, ""
        if backend == "auto":
            backend, reason = choose_backend(source, device)
        aggressive_on = self.aggressive_on
        if aggressive_on == "auto":
            aggressive_on = "device" if device.type == "cuda" else "host"
        return replace(self, backend=backend, aggressive_on=aggressive_on), reason


@dataclass(frozen=True)
class Job:
    """What one loader makes: the views named in `reads`, on `device` in `dtype`."""

    source: Source
    spec: ViewSpec
    reads: frozenset[str]
    order: Order
    device: torch.device
    dtype: torch.dtype
    loading: Loading  # resolved: nothing in it is "auto"

    @cached_property
    def crops(self) -> list[int]:
        """Which of the K crops the views need. No others are made."""
        return sorted({stage_and_crop(view)[1] for view in self.reads})

    @cached_property
    def crops_alike(self) -> list[list[int]]:
        """The needed crops, those of one size and interpolation together."""
        alike: dict[tuple[int, str], list[int]] = {}
        for crop in self.crops:
            spec = self.spec.crops[crop]
            alike.setdefault((spec.size_px, spec.interpolation), []).append(crop)
        return list(alike.values())

    @cached_property
    def whole_views(self) -> frozenset[str]:
        """The views that are made to get those that are read: patches are cut from weak views."""
        made = set()
        for view in self.reads:
            stage, crop = stage_and_crop(view)
            made.add(view_name("weak", crop) if stage == "patches" else view)
        return frozenset(made)

    def params(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """The random parameters of all crops, `(B, K)` of `draws.VIEW_PARAMS`."""
        return draw(self.order.seed, epoch, ids, self.spec, self.source.manifest.sizes[ids])

    def batch(self, views: dict[str, Tensor], ids: np.ndarray, params: np.ndarray) -> Batch:
        """The batch of the images `ids` `(B,)`, from its `whole_views`."""
        labels = self.source.manifest.labels[ids]
        label, sample = device_ops.send(np.stack([labels, ids]), self.device)
        read = {}
        for name in self.spec.views:
            stage, crop = stage_and_crop(name)
            if name not in self.reads:
                continue
            if stage == "patches":
                weak, offsets = views[view_name("weak", crop)], params["patch_offset"][:, crop]
                read[name] = device_ops.patches(weak, offsets)
            else:
                read[name] = views[name]
        return Batch(label, read, sample)

    def jpeg(self, sample: int) -> bytes | None:
        """The stored bytes of a usual JPEG (`jpeg_header`) of the manifest's size. Otherwise None.

        All other images are decoded by PIL (`read`), which also finds out what is wrong with them.
        At unusual sampling, such as 4:4:0, other decoders are up to 5 levels away from PIL, and for
        CMYK images up to 2.
        """
        from rsa_fast.pipelines.host_ops import (
            jpeg_header,  # numba: a GPU can train from memory without it
        )

        data = self.source.jpeg(sample)
        if data and jpeg_header(np.frombuffer(data, np.uint8)) == (*self.size(sample), True):
            return data
        return None

    def read(self, sample: int) -> np.ndarray:
        """The image `(H, W, 3)` uint8, decoded by PIL.

        Raises ValueError when it is damaged, or when its size is no longer the manifest's: the crop
        windows were drawn for the manifest's size.
        """
        image = self.source.read(sample)
        if image.shape[:2] != self.size(sample):
            sizes = f"{image.shape[:2]} px, its manifest says {self.size(sample)}"
            raise ValueError(f"{sizes}: the data changed; delete its .rsa-fast folder")
        return image

    def size(self, sample: int) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.source.manifest.sizes[sample].tolist()
        return height, width


class Loader(ABC):
    """One rank's loader; `len()` is the number of batches per epoch.

    It is a context manager that closes itself. `skipped` holds the bad images met so far: sample id
    and what is wrong. Raises ValueError when the recipe's `views.extra` names no function.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.skipped: dict[int, str] = {}
        self.extra = Extra(job.spec.extra, job.device) if job.spec.extra else None

    def __len__(self) -> int:
        return len(self.job.order)

    def batches(self, epoch: int, step: int = 0) -> Generator[Batch]:
        """The batches of an epoch, from the one numbered `step` to its end.

        With gradient accumulation, a step of the optimiser takes several of them.

        Closing the generator early also ends the work on the batches ahead.
        """
        order, extents = self.job.order, self.job.source.extents
        ahead = ReadAhead(extents, order) if order.blocks and extents else None
        with (
            closing(ahead) if ahead else nullcontext(),
            closing(self.load_batches(epoch, step)) as batches,
        ):
            if ahead:
                ahead.reach(epoch, step)
            for number, batch in enumerate(batches, step):
                if ahead:
                    ahead.reach(epoch, number)
                if self.extra is not None:
                    seed = batch_seed(order.seed, epoch, number, order.rank)
                    batch.views = self.extra(batch.views, seed)
                yield batch

    @abstractmethod
    def load_batches(self, epoch: int, step: int) -> Generator[Batch]:
        """A backend's part of `batches`: all of it but the user's own augmentation."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Join the threads that the loader started."""

    def readable(self, sample: int, read: Callable[[int], Read]) -> tuple[int, Read]:
        """`sample` and `read(sample)`. If it is bad, the same for the next sample id that is not.

        The replacement keeps its own label and random parameters. What is trained on therefore
        depends on the data alone: it is the same on every rank and after a resume. An image that
        was bad once is not tried again. Raises ValueError with the sample id and the file when bad
        images are not to be skipped, or when no image can be read.
        """
        manifest = self.job.source.manifest
        for candidate in chain(range(sample, len(manifest)), range(sample)):
            if candidate in self.skipped:
                continue
            try:
                return candidate, read(candidate)
            except (OSError, ValueError) as error:
                path = f", {manifest.paths[candidate]}" if manifest.paths else ""
                fault = f"sample {candidate}{path}: {error}"
                if self.job.loading.on_bad_image == "stop":
                    advice = "To train on without it: --on-bad-image skip"
                    raise ValueError(f"{fault}. {advice}") from error
                self.skip(candidate, fault)
        raise ValueError(
            f"none of the {len(manifest)} images can be read; one of them: {self.skipped[sample]}"
        )

    def skip(self, sample: int, fault: str) -> None:
        """Remember a bad image, and report it once.

        A worker process reports nothing: the process that it works for does.
        """
        if self.skipped.setdefault(sample, fault) is fault and get_worker_info() is None:
            log.warning(f"skipped {fault}")


def open_views(
    source: Source,
    spec: ViewSpec,
    reads: frozenset[str],
    order: Order,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    loading: Loading | None = None,
) -> Loader:
    """A loader of the views named in `reads` (of `spec.views`) on `device` in `dtype`.

    The loader is a context manager. `len()` is the number of batches per epoch, and
    `batches(epoch, step)` yields those from number `step` on. The backend that "auto" chose is
    logged with the reason.

    Raises ValueError for an unknown view, a missing library, images that the backend cannot take,
    and, while loading, for an image that can no longer be read or whose size differs from the
    manifest's (unless `loading.on_bad_image` is "skip").
    """
    device = torch.device(device)
    if not reads or (unknown := reads - set(spec.views)):
        raise ValueError(
            f"no such views {sorted(unknown if reads else reads)}: choose from "
            f"{', '.join(spec.views)}, or change views.groups, which says what crops there are"
        )
    resolved, reason = (loading or Loading()).resolved(source, device)
    if reason:
        log.info(f"backend {resolved.backend}: {reason}")
    job = Job(source, spec, reads, order, device=device, dtype=dtype, loading=resolved)
    return BACKENDS[resolved.backend].open(job)


def in_parts(
    pool: ThreadPoolExecutor, parts: int, count: int, work: Callable[[slice], None]
) -> None:
    """Run `work` on `count` samples, cut into equal slices, one per thread; return at the end."""
    edges = np.linspace(0, count, parts + 1).astype(int)
    list(pool.map(lambda part: work(slice(edges[part], edges[part + 1])), range(parts)))
