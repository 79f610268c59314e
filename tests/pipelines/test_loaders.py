"""What every backend promises: the same views, only those read, from any step on, in the compute dtype and layout."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import write_folder

from pipelines import VIEWS, Order, ViewSpec, open_source, open_views

SPEC = ViewSpec(16, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))
EVERY = [("resident", "host"), ("resident", "device"), ("native", "host"), ("native", "device"), ("torchvision", "host")]
every_backend = pytest.mark.parametrize(("backend", "aggressive_on"), EVERY)


def batches(folder, backend, aggressive_on="host", reads=VIEWS, epoch=0, step=0, rank=0, world_size=1, **options):
    source = open_source(folder, "pretrain")
    order = Order(len(source.manifest), 8, 5, rank, world_size)
    with open_views(source, SPEC, frozenset(reads), order, backend=backend, aggressive_on=aggressive_on, **options) as loader:
        return list(loader.batches(epoch, step))


@every_backend
def test_views_equal_the_reference(folder, backend, aggressive_on):
    for ours, theirs in zip(batches(folder, backend, aggressive_on), batches(folder, "torchvision"), strict=True):
        assert torch.equal(ours.label, theirs.label)
        for name in VIEWS:
            gap = (getattr(ours, name) - getattr(theirs, name)).abs() * 0.2 * 255  # in levels
            assert gap.mean() < (0.4 if aggressive_on == "device" else 1e-4), name


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_layout_and_rounding(folder, backend, aggressive_on, dtype):
    exact = batches(folder, backend, aggressive_on)[0]
    batch = batches(folder, backend, aggressive_on, dtype=dtype)[0]
    assert batch.label.dtype == torch.int64 and batch.label.shape == (8,)
    for name in VIEWS:
        view = getattr(batch, name)
        assert view.shape == (8, 3, 16, 16) and view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, getattr(exact, name).to(dtype))


@every_backend
@pytest.mark.parametrize("reads", [("aggressive_1", "aggressive_2"), ("aggressive_1", "weak_2"), ("weak_1",)])
def test_only_the_views_read_are_made_and_they_are_the_same(folder, backend, aggressive_on, reads):
    every, some = batches(folder, backend, aggressive_on)[1], batches(folder, backend, aggressive_on, reads)[1]
    for name in VIEWS:
        if name in reads:
            assert torch.equal(getattr(some, name), getattr(every, name))
        else:
            assert getattr(some, name) is None


@every_backend
def test_starting_at_a_step_is_a_jump(folder, backend, aggressive_on):
    whole, rest = batches(folder, backend, aggressive_on, epoch=2), batches(folder, backend, aggressive_on, epoch=2, step=3)
    assert len(whole) == 5 and len(rest) == 2
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.aggressive_2, other.aggressive_2) and torch.equal(one.label, other.label)
    assert not torch.equal(whole[0].weak_1, batches(folder, backend, aggressive_on, epoch=3)[0].weak_1)


@every_backend
def test_ranks_see_together_what_one_rank_sees(folder, backend, aggressive_on):
    whole = batches(folder, backend, aggressive_on)
    ranks = [batches(folder, backend, aggressive_on, rank=rank, world_size=2) for rank in (0, 1)]
    for step, batch in enumerate(whole):
        for name in VIEWS:
            assert torch.equal(getattr(batch, name), torch.cat([getattr(rank[step], name) for rank in ranks]))


@every_backend
def test_threads_do_not_change_a_view(folder, backend, aggressive_on):
    one, two = batches(folder, backend, aggressive_on, threads=1), batches(folder, backend, aggressive_on, threads=2)
    assert all(torch.equal(a.aggressive_1, b.aggressive_1) for a, b in zip(one, two, strict=True))


def test_images_of_many_sizes_are_resident_on_the_host_and_refused_on_the_device(tmp_path):
    write_folder(tmp_path / "a", {"train": 8}, size=(30, 44))
    for path in write_folder(tmp_path / "b", {"train": 8}, size=(61, 25)).rglob("*.jpg"):
        path.rename(tmp_path / "a" / "train" / path.parent.name / f"tall_{path.name}")
    ours, theirs = batches(tmp_path / "a", "resident"), batches(tmp_path / "a", "torchvision")
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one.aggressive_1, other.aggressive_1, atol=1e-6)
    with pytest.raises(ValueError, match="30x25 to 61x44 px"):
        batches(tmp_path / "a", "resident", "device")


def test_a_dataset_larger_than_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 10)
    with pytest.raises(ValueError, match="too large for the resident backend"):
        batches(folder, "resident")


def test_unknown_backends_and_views_are_errors(folder):
    with pytest.raises(ValueError, match="no backend 'dahli'"):
        batches(folder, "dahli")
    with pytest.raises(ValueError, match="no such views"):
        batches(folder, "resident", reads=("strong_1",))


def test_a_resident_loader_joins_its_threads(folder):
    source = open_source(folder, "pretrain")
    with open_views(source, SPEC, frozenset(VIEWS), Order(40, 8, 0)) as loader:
        next(loader.batches(0))
    with pytest.raises(RuntimeError, match="shutdown"):
        loader.make(0, np.arange(8))
