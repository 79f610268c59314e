from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch.distributed as dist

from rsa_fast.pipelines import layouts, manifest, scan
from rsa_fast.pipelines.folders import IMAGE_SUFFIXES, images_below
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.manifest import Manifest, Paths
from rsa_fast.pipelines.workers import FORKS
from tests.helpers import write_folder


def test_paths_are_a_sequence_of_strings(monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK", 3)
    for count in (0, 1, 3, 4, 10):
        names = [f"train/ä {i}/{'x' * i}.jpg" for i in range(count)]
        paths = Paths(iter(names))
        assert (
            len(paths) == count
            and list(paths) == names
            and [paths[i] for i in range(count)] == names
        )
        assert all(
            paths[part] == names[part]
            for part in (slice(None), slice(1, 3), slice(None, None, -2), slice(5, 2))
        )
        with pytest.raises(IndexError):
            paths[count]
    assert paths[-1] == names[-1] and names[4] in paths
    undecodable = os.fsdecode(b"caf\xe9.jpg")  # A file name need not be UTF-8.
    assert Paths([undecodable])[0] == undecodable
    assert list(Paths(Paths(names).text)) == names and len(Paths(b"")) == 0


def test_the_listing_is_what_a_recursive_glob_finds(tmp_path):
    for name in (
        "b/2.jpg",
        "b-c/1.JPEG",
        "b/deep/er/3.png",
        "b.d/notes.txt",
        "a.jpg",
        "b/folder.jpg/4.webp",
        "b/jpg",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = (p for p in tmp_path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    expected = sorted(str(p.relative_to(tmp_path)) for p in found)
    assert images_below(tmp_path, tmp_path) == expected and len(expected) == 5
    (tmp_path / ".rsa-fast").mkdir()
    (tmp_path / ".rsa-fast" / "hidden.jpg").touch()
    assert images_below(tmp_path, tmp_path) == expected
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert images_below(tmp_path / "c", tmp_path) == [
        "c/2.jpg",
        "c/deep/er/3.png",
        "c/folder.jpg/4.webp",
    ]


def test_the_fingerprint_is_of_one_line_per_file_and_the_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK", 7)
    write_folder(tmp_path, {"train": 10})
    found = open_source(tmp_path, "pretrain").manifest
    files = [tmp_path / path for path in found.paths]
    lines = [
        f"{p.relative_to(tmp_path)}\t{i // 10}\t{p.stat().st_size}" for i, p in enumerate(files)
    ]
    sizes = np.full((20, 2), 20, np.int32)
    assert (
        found.fingerprint
        == hashlib.sha256(
            "\n".join(["class_0", "class_1", *lines]).encode() + sizes.tobytes()
        ).hexdigest()
    )
    # This time the manifest comes from the cache.
    assert open_source(tmp_path, "pretrain").manifest.fingerprint == found.fingerprint


def open_as_rank(
    rank: int, data: Path, cache: Path | None, store: Path, log: Path, results
) -> None:
    """Open the data as one of two ranks, in its own process; put the contents in `results`.

    `log` gets a letter for every listing (l), and for every stat (s) and header read (h).
    """

    def logged(letter: str, function):
        def call(*args):
            with log.open("a") as file:  # Both processes append.
                file.write(letter)
            return function(*args)

        return call

    layouts.list_images = logged("l", layouts.list_images)
    scan.file_stat = logged("s", scan.file_stat)
    scan.header_size = logged("h", scan.header_size)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        results.put(contents(open_source(data, "pretrain", cache).manifest))
    except ValueError as error:
        results.put(str(error))
    dist.barrier()
    dist.destroy_process_group()


def contents(manifest: Manifest) -> tuple:
    lists = list(manifest.paths), manifest.labels.tolist(), manifest.sizes.tolist()
    return manifest.fingerprint, manifest.classes, *lists


def open_as_two_ranks(tmp_path: Path, folders: list[Path], cache: Path | None = None) -> list:
    """Return what both ranks read, each from its folder, and count the letters of their log."""
    log, results = tmp_path / "log", FORKS.Queue()
    log.unlink(missing_ok=True)
    processes = [
        FORKS.Process(
            target=open_as_rank,
            args=(rank, data, cache, tmp_path / "store", log, results),
        )
        for rank, data in enumerate(folders)
    ]
    for process in processes:
        process.start()
    read = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    (tmp_path / "store").unlink(missing_ok=True)
    return [*read, Counter(log.read_text())]


@pytest.mark.parametrize("place", ["data", "cache", "nowhere"])
def test_one_of_two_ranks_lists_and_scans_where_a_cache_can_be_written(tmp_path, place):
    data = write_folder(tmp_path / "data", {"train": 10})
    if place != "data":
        (data / ".rsa-fast").write_text("in the way of a folder")
    cache = tmp_path / "cache" if place == "cache" else None
    *read, letters = open_as_two_ranks(tmp_path, [data, data], cache)
    assert read == [contents(open_source(data, "pretrain").manifest)] * 2
    ranks_at_work = 2 if place == "nowhere" else 1
    assert letters == {
        letter: ranks_at_work * n for letter, n in {"l": 1, "s": 20, "h": 20}.items()
    }
    assert (tmp_path / "cache").exists() == (place == "cache")
    if place == "data":
        *again, letters = open_as_two_ranks(tmp_path, [data, data])
        assert again == read and letters == {"l": 1, "s": 20}


def test_a_rank_with_a_copy_of_the_data_on_another_disk_scans_it(tmp_path):
    one = write_folder(tmp_path / "one", {"train": 10})
    two = shutil.copytree(one, tmp_path / "two", copy_function=shutil.copy)  # new times
    *read, letters = open_as_two_ranks(tmp_path, [one, two])
    assert read[0] == read[1] and letters == {"l": 2, "s": 40, "h": 40}


def test_all_ranks_fail_where_the_scan_fails(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 10})
    open_source(data, "pretrain")  # a cache from before the damage
    (data / "train" / "class_0" / "003.jpg").write_bytes(b"no image")
    *messages, _ = open_as_two_ranks(tmp_path, [data, data])
    assert all("1 of 20 files" in message and "class_0/003.jpg" in message for message in messages)


@pytest.mark.parametrize("change", ["added", "removed", "in place"])
def test_a_changed_file_is_noticed(tmp_path, change):
    file = write_folder(tmp_path, {"train": 3}) / "train" / "class_1" / "002.jpg"
    before = open_source(tmp_path, "pretrain").manifest
    match change:
        case "added":
            (file.parent / "9.jpg").write_bytes(file.read_bytes())
        case "removed":
            file.unlink()
        case "in place":
            file.write_bytes((file.parent / "001.jpg").read_bytes())
    assert open_source(tmp_path, "pretrain").manifest.fingerprint != before.fingerprint


def test_two_folders_with_the_same_cache_are_not_mixed_up(tmp_path):
    folders = [write_folder(tmp_path / name, {"train": n}) for name, n in (("a", 2), ("b", 3))]
    for folder in folders:
        (folder / ".rsa-fast").write_text("in the way of a folder")
    counts = [len(open_source(folder, "pretrain", tmp_path).manifest) for folder in folders * 2]
    assert counts == [4, 6, 4, 6]


def test_files_with_a_broken_cache_are_scanned(tmp_path):
    write_folder(tmp_path, {"train": 3})
    whole = open_source(tmp_path, "pretrain").manifest
    cache = tmp_path / ".rsa-fast" / "train.npz"
    for damaged in (b"", cache.read_bytes()[:-30]):
        cache.write_bytes(damaged)
        assert open_source(tmp_path, "pretrain").manifest.fingerprint == whole.fingerprint
        assert cache.read_bytes() != damaged


SIMULATION = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from rsa_fast.pipelines import layouts, manifest, scan
from rsa_fast.pipelines.layouts import open_source

DATA, CLASSES, PER_CLASS = Path(sys.argv[1]), 1000, 1281
stats = listings = 0

class Entry:
    def __init__(self, name, folder):
        self.name, self.path, self.folder = name, name, folder
    def is_dir(self, follow_symlinks=True):
        return self.folder
    def is_symlink(self):
        return False

class Listing:
    def __init__(self, place):
        global listings
        self.place, listings = Path(place), listings + (Path(place) != DATA)
    def __enter__(self):
        if self.place == DATA:
            return iter([Entry("train", True)])
        if self.place == DATA / "train":
            return (Entry(f"n{10000000 + i}", True) for i in range(CLASSES))
        return (Entry(f"{self.place.name}_{i}.JPEG", False) for i in range(PER_CLASS))
    def __exit__(self, *_):
        pass

FAKE = SimpleNamespace(st_size=110_000, st_mtime_ns=1_700_000_000_000_000_000)

def stat(path, real=os.stat, **options):
    global stats
    if not str(path).endswith(".JPEG"):
        return real(path, **options)
    stats += 1
    return FAKE

def memory_mb(key):
    lines = open("/proc/self/status")
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

os.scandir, os.stat = Listing, stat
scan.header_size = lambda path: (375, 500, 1)
dist = scan.dist
for role in ("scans", "checks", "reads"):
    if role == "scans":  # what rank 0 sends to the others
        hand_over = {}
        dist.is_initialized, dist.get_world_size, dist.get_rank = lambda: True, lambda: 2, lambda: 0
        dist.broadcast_object_list = lambda box: hand_over.update(state=box[0])
    if role == "reads":
        dist.get_rank = lambda: 1
        dist.broadcast_object_list = lambda box: box.__setitem__(0, hand_over["state"])
    stats = listings = 0
    Path("/proc/self/clear_refs").write_text("5")  # This resets the peak.
    before, began = memory_mb("VmRSS"), time.process_time()
    found = open_source(DATA, "pretrain").manifest
    assert len(found) == CLASSES * PER_CLASS
    assert found.paths[1281] == "train/n10000001/n10000001_0.JPEG"
    assert found.sizes[-1].tolist() == [375, 500] and found.labels[-1] == CLASSES - 1
    peak = memory_mb("VmHWM") - before
    print(role, stats / len(found), listings, round(peak), round(time.process_time() - began, 2))
    del found
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(),
    reason="the kernel does not report peak memory: run on Linux",
)
def test_a_million_files_take_one_stat_each_and_little_memory(tmp_path):
    (tmp_path / "train").mkdir()
    run = subprocess.run(
        [sys.executable, "-c", SIMULATION, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    rows = {
        role: [float(v) for v in values]
        for role, *values in (line.split() for line in run.stdout.splitlines())
    }
    print("role, stats per file, folders listed, peak growth in MB, CPU seconds:", rows)
    assert {role: row[:2] for role, row in rows.items()} == {
        "scans": [1, 1002],  # train/, to see whether it holds tar shards, then it and each class
        "checks": [1, 1002],
        "reads": [0, 1],
    }
    assert all(row[2] < 400 for row in rows.values()) and rows["reads"][3] < 2, rows
