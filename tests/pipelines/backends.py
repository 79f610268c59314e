"""Batches of small views from every backend."""

from __future__ import annotations

import pytest
import torch

from rsa_fast.pipelines import VIEWS, Loading, Order, ViewSpec, open_source, open_views
from tests.helpers import DALI

SPEC = ViewSpec(16, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
EVERY = [
    *[(backend, place) for backend in ("resident", "native") for place in ("host", "device")],
    *[pytest.param("dali", place, marks=DALI) for place in ("host", "device")],
    ("torchvision", "host"),
]
every_backend = pytest.mark.parametrize(("backend", "aggressive_on"), EVERY)


def batches(
    folder,
    backend,
    aggressive_on="host",
    reads=VIEWS,
    epoch=0,
    step=0,
    rank=0,
    world_size=1,
    dtype=torch.float32,
    spec=SPEC,
    **options,
):
    source = open_source(folder, "pretrain")
    order = Order(len(source.manifest), 8, 5, rank, world_size)
    with open_views(
        source,
        spec,
        frozenset(reads),
        order,
        dtype=dtype,
        loading=Loading(backend, aggressive_on=aggressive_on, **options),
    ) as loader:
        return list(loader.batches(epoch, step))
