"""What the system is asked to read ahead and to drop, and that it does."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rsa_fast.insight.profiling import evict
from rsa_fast.pipelines import VIEWS, Loading, Order, open_source, open_views
from rsa_fast.pipelines.combined import joined, subset
from rsa_fast.pipelines.extents import REQUEST_BYTES, Extents
from rsa_fast.pipelines.read_ahead import ReadAhead
from tests.helpers import read_bytes, write_raw_beton
from tests.pipelines.backends import SPEC

COUNT, SIDE_PX = 96, 200
IMAGE_BYTES = 3 * SIDE_PX**2


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A train.beton of 11.5 MB."""
    return write_raw_beton(tmp_path_factory.mktemp("packed"), COUNT, SIDE_PX)


def order_of(source, **ranks) -> Order:
    return Order(len(source.manifest), 16, 0, blocks=source.extents.blocks(2**20, 2**22), **ranks)


def advice_on(monkeypatch) -> list[tuple[int, int, int]]:
    """The advice that is given from now on: offset, length and kind."""
    given: list[tuple[int, int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda file, *advice: given.append(advice))
    return given


def bytes_of(advice: list[tuple[int, int, int]], kind: int) -> np.ndarray:
    """Which bytes of a file are named in advice of a kind, `(bytes,)`: how often."""
    times = np.zeros(2 * COUNT * IMAGE_BYTES, np.int8)
    for offset, length, given in advice:
        times[offset : offset + length] += given == kind
    return times


def test_a_request_covers_each_byte_of_the_images_once_and_linux_does_not_cut_it(data, monkeypatch):
    extents = open_source(data, "pretrain").extents
    ids = np.array([3, 1, 2, 7, COUNT - 1])
    given = advice_on(monkeypatch)
    assert [end - start for _, start, end in extents.runs(ids)] == [
        3 * IMAGE_BYTES,
        IMAGE_BYTES,
        IMAGE_BYTES,
    ]
    assert len(list(extents.read_soon(ids))) == 3
    assert max(length for _, length, _ in given) <= REQUEST_BYTES
    wanted = np.zeros(2 * COUNT * IMAGE_BYTES, np.int8)
    for i in ids:
        wanted[extents.offset[i] : extents.offset[i] + IMAGE_BYTES] = 1
    assert (bytes_of(given, os.POSIX_FADV_WILLNEED) == wanted).all()
    assert list(extents.runs(ids[:0])) == []


def test_images_of_several_files_are_asked_of_their_own(data, tmp_path):
    """Two sources in one, then a part of it: each image is found where it is stored."""
    other = write_raw_beton(tmp_path, COUNT, SIDE_PX, seed=500)
    both = joined([open_source(place, "pretrain") for place in (data, other)], "ab", "pretrain")
    chosen = np.array([5, COUNT + 5, 2 * COUNT - 1, COUNT - 1])
    part = subset(both, chosen, "pretrain")
    for sample, original in enumerate(chosen):
        ((number, start, end),) = part.extents.runs(np.array([sample]))
        stored = os.pread(part.extents.opened(number).fileno(), end - start, start)
        assert stored == both.read(int(original)).tobytes()
    mixed = [both, replace(both, extents=None)]
    assert joined(mixed, "cd", "pretrain").extents is None


def test_each_window_is_read_before_it_is_needed_and_dropped_after(data, monkeypatch):
    """Over two epochs, batch by batch: what a batch needs was asked for, and is not dropped."""
    source = open_source(data, "pretrain")
    order, asked = order_of(source), source.extents
    assert order.window(1, 0) == 3
    given = advice_on(monkeypatch)
    reader = ReadAhead(asked, order)
    in_memory = np.zeros(COUNT, bool)
    for window in range(6):
        given.clear()
        list(reader.advice(window))
        dropped = bytes_of(given, os.POSIX_FADV_DONTNEED)[asked.offset] > 0
        read = bytes_of(given, os.POSIX_FADV_WILLNEED)[asked.offset] > 0
        assert not (dropped & read).any()
        in_memory = (in_memory & ~dropped) | read
        needed = np.union1d(order.window_ids(window), order.window_ids(window + 1))
        assert (np.flatnonzero(in_memory) == needed).all()
    reader.close()


@pytest.mark.parametrize("backend", ["native", "torchvision", "resident"])
def test_a_loader_asks_for_the_windows_as_it_reaches_them(data, monkeypatch, backend):
    reached, walked = [], []
    walk = ReadAhead.walk
    monkeypatch.setattr(
        ReadAhead, "walk", lambda self, window: walked.append(window) or walk(self, window)
    )
    source = open_source(data, "pretrain")
    order = order_of(source)
    with open_views(
        source, SPEC, frozenset(VIEWS[:1]), order, loading=Loading(backend, threads=1)
    ) as loader:
        for number, batch in enumerate(loader.batches(1, 1), 1):
            assert batch.ids.tolist() == order.ids(1, number).tolist()
            reached.append(order.window(1, number))
    assert walked == sorted(set(reached)) == [3, 4, 5]
    assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


def test_a_reader_that_is_overtaken_goes_on_with_the_window_that_is_reached():
    """While the first window is walked, the second is reached: its walk follows at once."""
    blocks = Extents(*np.zeros((2, 8), int), np.ones(8, int), opened=open).blocks(1, 4)
    order = Order(8, 4, 0, blocks=blocks)
    begun, go_on, walked = threading.Event(), threading.Event(), []

    class Slow(ReadAhead):
        def advice(self, window):
            for part in range(3):
                walked.append((window, part))
                begun.set()
                yield go_on.wait(10)

    reader = Slow(None, order)
    reader.reach(0, 0)
    begun.wait(10)
    reader.reach(0, 1)
    go_on.set()
    reader.pool.shutdown()
    assert walked == [(0, 0), (1, 0), (1, 1), (1, 2)]


def read_now(extents: Extents) -> int:
    """Read all images; returns how many bytes of them came from the disk."""
    before = read_bytes()
    for number, start, end in extents.runs(np.arange(COUNT)):
        os.pread(extents.opened(number).fileno(), end - start, start)
    return read_bytes() - before


def test_the_system_reads_what_it_is_asked_for_and_drops_it(data):
    path, extents = data / "train.beton", open_source(data, "pretrain").extents
    if fault := evict([path]):
        pytest.skip(f"files cannot be dropped from the page cache here: {fault}")
    if read_now(extents) < COUNT * IMAGE_BYTES:
        pytest.skip("the system does not count what it reads from this file system")
    list(extents.drop(np.arange(COUNT)))
    before = read_bytes()
    list(extents.read_soon(np.arange(COUNT)))
    assert COUNT * IMAGE_BYTES <= read_bytes() - before <= 1.05 * path.stat().st_size
    assert read_now(extents) < 0.05 * path.stat().st_size
