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
    """How views are loaded. Only `on_bad_image` can change results, all other fields change speed.

    `backend` is a name in `BACKENDS`, or "auto". `threads` is the number per rank, by default the
    rank's share of the cores. `prefetch_batches` is the number of batches made ahead of the current
    one. `aggressive_on` chooses where the aggressive stage runs: on the host (numba kernels) or on
    the device (tensor operations). "auto" chooses the device if it is a GPU. `decode_on` chooses
    where the dali backend decodes when the device is a GPU. With `on_bad_image` "skip", an image
    that cannot be read is replaced (`Loader.readable`).

    Raises ValueError for an unknown value.
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
        """The settings without "auto", and the reason for the backend (empty if it was given)."""
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
        """The crops, of all K, that the views need. No others are made."""
        return sorted({stage_and_crop(view)[1] for view in self.reads})

    @cached_property
    def crops_alike(self) -> list[list[int]]:
        """The needed crops, grouped by size and interpolation."""
        groups: dict[tuple[int, str], list[int]] = {}
        for crop in self.crops:
            spec = self.spec.crops[crop]
            groups.setdefault((spec.size_px, spec.interpolation), []).append(crop)
        return list(groups.values())

    @cached_property
    def whole_views(self) -> frozenset[str]:
        """The views from which those in `reads` are taken: patches are cut from weak views."""
        views = set()
        for view in self.reads:
            stage, crop = stage_and_crop(view)
            views.add(view_name("weak", crop) if stage == "patches" else view)
        return frozenset(views)

    def params(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """The random parameters of all crops, `(B, K)` of `draws.VIEW_PARAMS`."""
        return draw(self.order.seed, epoch, ids, self.spec, self.source.manifest.sizes[ids])

    def batch(self, views: dict[str, Tensor], ids: np.ndarray, params: np.ndarray) -> Batch:
        """The batch of the images `ids` `(B,)`, from its `whole_views`."""
        labels = self.source.manifest.labels[ids]
        label, sample = device_ops.send(np.stack([labels, ids]), self.device)
        results = {}
        for name in self.spec.views:
            stage, crop = stage_and_crop(name)
            if name not in self.reads:
                continue
            if stage == "patches":
                weak, offsets = views[view_name("weak", crop)], params["patch_offset"][:, crop]
                results[name] = device_ops.patches(weak, offsets)
            else:
                results[name] = views[name]
        return Batch(label, results, sample)

    def jpeg(self, sample: int) -> bytes | None:
        """The stored bytes of a usual JPEG (`jpeg_header`) of the manifest's size, otherwise None.

        All other images are decoded by PIL (`read`), which also reports what is wrong with them.
        With unusual chroma subsampling, such as 4:4:0, other decoders differ from PIL by up to 5
        levels, and for CMYK images by up to 2.
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

        Raises ValueError if it is damaged. Also raises it if its size is no longer the manifest's,
        because the crop windows were drawn for that size.
        """
        image = self.source.read(sample)
        if image.shape[:2] != self.size(sample):
            sizes = f"{image.shape[:2]} px, but {self.size(sample)} px in its manifest"
            raise ValueError(f"{sizes}: the data changed. Delete the .rsa-fast folder")
        return image

    def size(self, sample: int) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.source.manifest.sizes[sample].tolist()
        return height, width


class Loader(ABC):
    """The loader of one rank. `len()` is the number of batches per epoch.

    It is a context manager that closes itself. `skipped` contains the bad images found so far, by
    their sample ids, with what is wrong. Raises ValueError if `views.extra` is not a function.
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
        """A backend's part of `batches`: everything except the user's own augmentation."""

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Join the threads that the loader started."""

    def readable(self, sample: int, read: Callable[[int], Read]) -> tuple[int, Read]:
        """Read an image, or the next one if it is bad. Returns its sample id and `read(id)`.

        A replacement has its own label and random parameters. The choice therefore depends only on
        the data: it is the same on every rank and after a resume. An image that was bad once is not
        tried again. Raises ValueError with the sample id and the file if bad images are not to be
        skipped, or if no image can be read.
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
                    advice = "To continue without it, use --on-bad-image skip"
                    raise ValueError(f"{fault}. {advice}") from error
                self.skip(candidate, fault)
        raise ValueError(
            f"none of the {len(manifest)} images can be read, for example {self.skipped[sample]}"
        )

    def skip(self, sample: int, fault: str) -> None:
        """Remember a bad image, and report it once.

        A worker process reports nothing, because the training process does.
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
    `batches(epoch, step)` yields the batches of an epoch from number `step`. The backend that
    "auto" chose is logged with the reason.

    Raises ValueError for an unknown view, a missing library, and images that the backend does not
    support. Loading raises it for an image that can no longer be read or whose size has changed,
    unless `loading.on_bad_image` is "skip".
    """
    device = torch.device(device)
    if not reads or (unknown := reads - set(spec.views)):
        raise ValueError(
            f"no such views {sorted(unknown if reads else reads)}: choose from "
            f"{', '.join(spec.views)}, or change views.groups, which defines the crops"
        )
    resolved, reason = (loading or Loading()).resolved(source, device)
    if reason:
        log.info(f"backend {resolved.backend}: {reason}")
    job = Job(source, spec, reads, order, device=device, dtype=dtype, loading=resolved)
    return BACKENDS[resolved.backend].open(job)


def in_parts(
    pool: ThreadPoolExecutor, parts: int, count: int, work: Callable[[slice], None]
) -> None:
    """Run `work` on `count` samples in equal slices, one per thread, and wait for all of them."""
    edges = np.linspace(0, count, parts + 1).astype(int)
    list(pool.map(lambda part: work(slice(edges[part], edges[part + 1])), range(parts)))
