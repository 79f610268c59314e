from __future__ import annotations

import fcntl
import hashlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import write_folder

from pipelines import manifest, sources
from pipelines.manifest import Paths
from pipelines.sources import IMAGE_SUFFIXES, images_below, open_source

FORK = multiprocessing.get_context("fork")


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
    undecodable = os.fsdecode(b"caf\xe9.jpg")  # a file name need not be UTF-8
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
    assert (
        open_source(tmp_path, "pretrain").manifest.fingerprint == found.fingerprint
    )  # now from the cache


def open_as_rank(data: Path, cache: Path | None, log: Path, waiting: int, start, results) -> None:
    """In a process of its own, a rank: open, but read no header before `waiting` others wait for this one.

    `log` gets a letter for every turn asked for (w), listing (l), and for every stat (s) and header read (h) of an image.
    """
    flock, list_images, stat, header_size = (
        fcntl.flock,
        sources.list_images,
        manifest.file_stat,
        manifest.header_size,
    )

    def note(letter: str) -> None:
        with log.open("a") as file:  # appended at once: several processes write
            file.write(letter)

    def slow(path: Path) -> tuple[int, int] | str:
        note("h")
        while log.read_text().count("w") <= waiting:
            time.sleep(0.01)
        return header_size(path)

    fcntl.flock = lambda *args: (note("w"), flock(*args))
    sources.list_images = lambda *args: (note("l"), list_images(*args))[1]
    manifest.file_stat = lambda path: (note("s"), stat(path))[1]
    manifest.header_size = slow
    os.environ["RANK"] = "0"
    start.wait()
    time.sleep(
        0.05
    )  # a check that begins within the tick of the kernel's clock in which a process started does not count
    try:
        found = open_source(data, "pretrain", cache).manifest
        results.put(
            (
                found.fingerprint,
                list(found.paths),
                found.labels.tolist(),
                found.sizes.tolist(),
                found.classes,
            )
        )
    except ValueError as error:
        results.put(str(error))


def open_at_once(data: Path, log: Path, count: int, cache: Path | None = None) -> list:
    start, results = FORK.Barrier(count), FORK.Queue()
    processes = [
        FORK.Process(target=open_as_rank, args=(data, cache, log, count - 1, start, results))
        for _ in range(count)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    return found


@pytest.mark.parametrize("writable", [True, False])
def test_ranks_that_open_at_once_list_and_scan_once(tmp_path, writable):
    data = write_folder(tmp_path / "data", {"train": 10})
    if not writable:
        (data / ".rsa-fast").write_text("in the way of a folder")
    found = open_at_once(data, tmp_path / "log", 3, tmp_path / "cache")
    one = open_source(data, "pretrain", tmp_path / "cache").manifest
    assert (
        found
        == [
            (one.fingerprint, list(one.paths), one.labels.tolist(), one.sizes.tolist(), one.classes)
        ]
        * 3
    )
    log = (tmp_path / "log").read_text()
    assert {letter: log.count(letter) for letter in "wlsh"} == {"w": 3, "l": 1, "s": 20, "h": 20}
    assert (tmp_path / "cache").exists() != writable


def test_a_rank_that_opens_after_the_scan_reads_it_and_a_rank_started_later_checks(tmp_path):
    data, log, results = (
        write_folder(tmp_path / "data", {"train": 10}),
        tmp_path / "log",
        FORK.Queue(),
    )

    def start_rank(event):
        rank = FORK.Process(target=open_as_rank, args=(data, None, log, 0, event, results))
        rank.start()
        return rank

    now, later = FORK.Event(), FORK.Event()
    now.set()
    late = start_rank(later)
    start_rank(now).join()
    later.set()
    late.join()
    first = results.get(timeout=30)
    assert results.get(timeout=30) == first and log.read_text() == "wl" + "s" * 20 + "h" * 20 + "w"
    (data / "train" / "class_0" / "003.jpg").write_bytes(
        (data / "train" / "class_1" / "003.jpg").read_bytes()
    )
    start_rank(now).join()
    assert results.get(timeout=30)[0] != first[0] and log.read_text().endswith(
        "wwl" + "s" * 20 + "h" * 20
    )


def test_those_who_waited_for_a_scan_that_failed_fail_too(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 10})
    open_source(data, "pretrain")  # a cache and a lock file of the time when all was well
    (data / "train" / "class_0" / "003.jpg").write_bytes(b"no image")
    found = open_at_once(data, tmp_path / "log", 2)
    assert all("1 of 20 files" in message and "class_0/003.jpg" in message for message in found)


def test_another_takes_over_from_a_killed_scan(tmp_path):
    data, log, results = (
        write_folder(tmp_path / "data", {"train": 5}),
        tmp_path / "log",
        FORK.Queue(),
    )
    log.touch()
    first, second = (
        FORK.Process(target=open_as_rank, args=(data, None, log, waiting, FORK.Barrier(1), results))
        for waiting in (99, 0)
    )
    for process, letter in ((first, "h"), (second, "w")):
        process.start()
        while letter not in log.read_text():
            time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    assert len(results.get(timeout=30)[1]) == 10 and log.read_text().count("h") == 1 + 10
    first.join()
    second.join()


@pytest.mark.parametrize("change", ["added", "removed", "in place"])
def test_only_a_rank_relies_on_a_check_and_only_on_one_since_it_started(
    tmp_path, monkeypatch, change
):
    file = write_folder(tmp_path, {"train": 3}) / "train" / "class_1" / "002.jpg"
    before = open_source(tmp_path, "pretrain").manifest
    match change:
        case "added":
            (file.parent / "9.jpg").write_bytes(file.read_bytes())
        case "removed":
            file.unlink()
        case "in place":
            file.write_bytes((file.parent / "001.jpg").read_bytes())

    def noticed() -> bool:
        return open_source(tmp_path, "pretrain").manifest.fingerprint != before.fingerprint

    monkeypatch.setenv("RANK", "0")
    assert not noticed()
    monkeypatch.setattr(manifest, "started_s", time.time)
    assert noticed()
    monkeypatch.undo()
    assert noticed()


def test_a_check_of_other_data_with_the_same_cache_does_not_count(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    folders = [
        write_folder(tmp_path / name, {"train": count}) for name, count in (("a", 2), ("b", 3))
    ]
    for folder in folders:
        (folder / ".rsa-fast").write_text("in the way of a folder")
    assert [len(open_source(folder, "pretrain", tmp_path).manifest) for folder in folders * 2] == [
        4,
        6,
        4,
        6,
    ]


def test_a_process_knows_when_it_started():
    def report() -> None:
        first_line_s = time.time()
        time.sleep(0.1)
        results.put((manifest.started_s(), first_line_s))

    results, asked_s = FORK.Queue(), time.time()
    process = FORK.Process(target=report)
    process.start()
    started_s, first_line_s = results.get(timeout=30)
    process.join()
    assert asked_s < started_s < first_line_s + 0.02


def test_a_disk_without_locks_or_with_a_broken_cache_is_scanned(tmp_path, monkeypatch):
    write_folder(tmp_path, {"train": 3})
    whole = open_source(tmp_path, "pretrain").manifest
    cache = tmp_path / ".rsa-fast" / "train.npz"
    for damaged in (b"", cache.read_bytes()[:-30]):
        cache.write_bytes(damaged)
        assert open_source(tmp_path, "pretrain").manifest.fingerprint == whole.fingerprint
    monkeypatch.setattr(
        fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported"))
    )
    assert open_source(tmp_path, "pretrain").manifest.fingerprint == whole.fingerprint


SIMULATION = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipelines import manifest, sources
from pipelines.sources import open_source

DATA, CLASSES, PER_CLASS = Path(sys.argv[1]), 1000, 1281
stats = listings = 0

class Entry:
    def __init__(self, name, folder):
        self.name, self.path, self.folder = name, name, folder
    def is_dir(self, follow_symlinks=True):
        return self.folder

class Listing:
    def __init__(self, place):
        global listings
        self.place, listings = Path(place), listings + (Path(place) != DATA)
    def __enter__(self):
        if self.place == DATA / "train":
            return (Entry(f"n{10000000 + i}", True) for i in range(CLASSES))
        return (Entry(f"{self.place.name}_{i}.JPEG", False) for i in range(PER_CLASS))
    def __exit__(self, *_):
        pass

def stat(path, real=os.stat, fake=SimpleNamespace(st_size=110_000, st_mtime_ns=1_700_000_000_000_000_000), **options):
    global stats
    if not str(path).endswith(".JPEG"):
        return real(path, **options)
    stats += 1
    return fake

def memory_mb(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))

os.scandir, os.stat = Listing, stat
manifest.header_size = lambda path: (375, 500)
for role in ("scans", "checks", "reads"):
    if role == "reads":
        os.environ["RANK"] = "1"
    stats = listings = 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, began = memory_mb("VmRSS"), time.process_time()
    found = open_source(DATA, "pretrain").manifest
    assert len(found) == CLASSES * PER_CLASS and found.paths[1281] == "train/n10000001/n10000001_0.JPEG"
    assert found.sizes[-1].tolist() == [375, 500] and found.labels[-1] == CLASSES - 1
    peak = memory_mb("VmHWM") - before
    print(role, stats / len(found), listings, round(peak), round(time.process_time() - began, 2))
    del found
"""


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
        "scans": [1, 1001],
        "checks": [1, 1001],
        "reads": [0, 0],
    }
    assert all(row[2] < 400 for row in rows.values()) and rows["reads"][3] < 2, rows
