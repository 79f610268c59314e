"""From images to the views a method reads: `open_views(open_source("data/cifar10", "pretrain"), spec, ...)`.

Every backend yields the same `Batch` from the same dice; this file is the only place that knows the backends' names.
"""

from __future__ import annotations

import torch

from pipelines.order import Order
from pipelines.sources import Source, open_source
from pipelines.views import VIEWS, Batch, ViewSpec

BACKENDS = ("auto", "resident", "resident-device", "torchvision")

__all__ = ["BACKENDS", "VIEWS", "Batch", "Order", "Source", "ViewSpec", "open_source", "open_views"]


def open_views(
    source: Source,
    spec: ViewSpec,
    reads: frozenset[str],
    order: Order,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    threads: int = 2,
):
    """A loader of the views named in `reads` (of `VIEWS`) on `device` in `dtype`.

    The loader is a context manager; `len()` is the steps per epoch, `batches(epoch, step)` yields from there on.
    Backends: `resident` holds the images in memory (numba kernels on a CPU, tensor operations on a GPU),
    `resident-device` uses the tensor operations on a CPU too, `torchvision` is the PIL reference with worker processes.
    `threads` never changes a view. Raises ValueError for an unknown backend or view.
    """
    device = torch.device(device)
    if backend not in BACKENDS:
        raise ValueError(f"no backend {backend!r}: choose from {', '.join(BACKENDS)}")
    if not reads or not reads <= set(VIEWS):
        raise ValueError(f"no such views {sorted(reads)}: choose from {', '.join(VIEWS)}")
    if backend == "torchvision":
        from pipelines.torchvision_views import TorchvisionViews

        return TorchvisionViews(source, spec, reads, order, device, dtype, threads)
    from pipelines.resident_views import ResidentViews

    ops = "device" if backend == "resident-device" or device.type == "cuda" else "host"
    return ResidentViews(source, spec, reads, order, device, dtype, ops, threads)
