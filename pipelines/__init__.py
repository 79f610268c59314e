"""From images to the views a method reads: `open_views(open_source("data/cifar10", "pretrain"), spec, ...)`.

Every backend yields the same `Batch` from the same dice; this file is the only place that knows the backends' names.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Literal, get_args

import numpy as np
import torch

from pipelines.loading import DecodeOn, Job, Loader, OnBadImage
from pipelines.order import Order
from pipelines.sources import Source, open_source
from pipelines.views import VIEWS, Batch, ViewSpec

AutomaticBackend = Literal["resident", "native", "dali", "ffcv"]  # those `choose_backend` returns
Backend = Literal["auto", "resident", "native", "dali", "ffcv", "torchvision"]
AggressiveOn = Literal["auto", "host", "device"]
BACKENDS = get_args(Backend)
AGGRESSIVE_ON = get_args(AggressiveOn)
ON_BAD_IMAGE = get_args(OnBadImage)
RESIDENT_BYTES = 8 * 2**30  # decoded: all the small datasets, and no ImageNet

__all__ = [
    "AGGRESSIVE_ON",
    "BACKENDS",
    "ON_BAD_IMAGE",
    "VIEWS",
    "AggressiveOn",
    "Backend",
    "Batch",
    "DecodeOn",
    "Loader",
    "OnBadImage",
    "Order",
    "Source",
    "ViewSpec",
    "choose_backend",
    "open_source",
    "open_views",
]


def open_views(
    source: Source,
    spec: ViewSpec,
    reads: frozenset[str],
    order: Order,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
    threads: int = 2,
    prefetch_batches: int = 2,
    aggressive_on: AggressiveOn = "auto",
    decode_on: DecodeOn = "gpu",
    on_bad_image: OnBadImage = "stop",
) -> Loader:
    """A loader of the views named in `reads` (of `VIEWS`) on `device` in `dtype`.

    The loader is a context manager; `len()` is the steps per epoch, `batches(epoch, step)` yields from there on.
    Backends: `resident` holds the images in memory, `native` decodes files on a pool of threads, `dali` by NVIDIA DALI (on
    the GPU, or `decode_on` the cpu), `ffcv` reads .beton files, `torchvision` is the PIL reference with worker processes;
    `auto` says on stderr what it chose and why. The aggressive stage runs by numba kernels on the host or by tensor
    operations on the device; `auto` is the device on a GPU. `threads`, `prefetch_batches` and, but for rounding,
    `aggressive_on` never change a view. Raises ValueError for an unknown backend or view, or a missing library.

    An image that the backend's decoder and PIL cannot read, or of another size than its manifest says, ends the loading with
    a ValueError that names it, or (`on_bad_image` skip) is replaced by the next that can be read (`Loader.readable`).
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if aggressive_on not in AGGRESSIVE_ON:
        raise ValueError(
            f"no aggressive_on {aggressive_on!r}: choose from {', '.join(AGGRESSIVE_ON)}"
        )
    if on_bad_image not in ON_BAD_IMAGE:
        raise ValueError(f"no on_bad_image {on_bad_image!r}: choose from {', '.join(ON_BAD_IMAGE)}")
    if not reads or not reads <= set(VIEWS):
        raise ValueError(f"no such views {sorted(reads)}: choose from {', '.join(VIEWS)}")
    if aggressive_on == "auto":
        aggressive_on = "device" if device.type == "cuda" else "host"
    job = Job(
        source,
        spec,
        reads,
        order,
        device,
        dtype,
        threads,
        prefetch_batches,
        aggressive_on,
        decode_on,
        on_bad_image,
    )
    if backend == "auto":
        backend, reason = choose_backend(source, device)
        print(f"backend {backend}: {reason}", file=sys.stderr)
    match backend:
        case "resident":
            from pipelines.resident_views import ResidentViews

            return ResidentViews(job)
        case "native":
            from pipelines.native_views import NativeViews

            return NativeViews(job)
        case "dali":
            from pipelines.dali_views import DaliViews

            return DaliViews(job)
        case "ffcv":
            from pipelines.ffcv_views import FfcvViews

            return FfcvViews(job)
        case "torchvision":
            from pipelines.torchvision_views import TorchvisionViews

            return TorchvisionViews(job)


def choose_backend(source: Source, device: torch.device) -> tuple[AutomaticBackend, str]:
    """The backend for a source on a device, and why."""
    from pipelines.resident_views import free_bytes

    sizes = source.manifest.sizes
    pixels = 3 * int(sizes.astype(np.int64).prod(1).sum())
    if pixels <= min(RESIDENT_BYTES, free_bytes(device) // 2) and (
        device.type == "cpu" or (sizes == sizes[0]).all()
    ):
        return "resident", f"the images take {pixels / 2**30:.2f} GiB decoded and stay in memory"
    if source.beton and find_spec("ffcv"):
        return "ffcv", f"{source.beton.name} is FFCV's"
    missing = "FFCV is not installed; " if source.beton else ""
    if not source.encoded:
        return "native", f"{missing}stored pixels need no decoder"
    if device.type == "cpu":
        return "native", f"{missing}the fastest decoder of files on a CPU"
    if find_spec("nvidia") and find_spec("nvidia.dali"):  # the second raises without the first
        return "dali", f"{missing}it can decode on the GPU"
    return "native", f"{missing}DALI is not installed"
