"""Batches of small views from every backend."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from rsa_fast.pipelines import VIEWS, Batch, Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.loading import Loader
from tests.helpers import DALI

SPEC = ViewSpec(16, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
EVERY = [
    *[(backend, place) for backend in ("resident", "native") for place in ("host", "device")],
    *[pytest.param("dali", place, marks=DALI) for place in ("host", "device")],
    ("torchvision", "host"),
]
every_backend = pytest.mark.parametrize(("backend", "aggressive_on"), EVERY)
# DALI's resize rounds differently from PIL's, and repeats the pixels at the edges of the window
# where PIL leaves them out. This shows on images as small as these.
RESIZE_LEVELS = {"dali": 0.6}


def open_loader(
    folder: Path,
    backend: str,
    reads: Iterable[str] = VIEWS,
    *,
    rank: int = 0,
    world_size: int = 1,
    dtype: torch.dtype = torch.float32,
    spec: ViewSpec = SPEC,
    **options: Any,
) -> Loader:
    source = open_source(folder, "pretrain")
    order = Order(len(source.manifest), 8, 5, rank, world_size)
    loading = Loading(backend, **options)
    return open_views(source, spec, frozenset(reads), order, dtype=dtype, loading=loading)


def batches(
    folder: Path,
    backend: str,
    aggressive_on: str = "host",
    reads: Iterable[str] = VIEWS,
    epoch: int = 0,
    step: int = 0,
    **options: Any,
) -> list[Batch]:
    with open_loader(folder, backend, reads, aggressive_on=aggressive_on, **options) as loader:
        return list(loader.batches(epoch, step))
