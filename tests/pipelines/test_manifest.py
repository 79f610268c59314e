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

from pipelines import manifest
from pipelines.manifest import Paths
from pipelines.sources import IMAGE_SUFFIXES, images_below, open_source

FORK = multiprocessing.get_context("fork")


def test_paths_are_a_sequence_of_strings(monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK", 3)
    for count in (0, 1, 3, 4, 10):
        names = [f"train/ä {i}/{'x' * i}.jpg" for i in range(count)]
        paths = Paths(iter(names))
        assert len(paths) == count and list(paths) == names and [paths[i] for i in range(count)] == names
        assert all(paths[part] == names[part] for part in (slice(None), slice(1, 3), slice(None, None, -2), slice(5, 2)))
        with pytest.raises(IndexError):
            paths[count]
    assert paths[-1] == names[-1] and names[4] in paths
    undecodable = os.fsdecode(b"caf\xe9.jpg")  # a file name need not be UTF-8
    assert Paths([undecodable])[0] == undecodable


def test_the_listing_is_what_a_recursive_glob_finds(tmp_path):
    for name in ("b/2.jpg", "b-c/1.JPEG", "b/deep/er/3.png", "b.d/notes.txt", "a.jpg", "b/folder.jpg/4.webp", "b/jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = (p for p in tmp_path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    expected = sorted(str(p.relative_to(tmp_path)) for p in found)
    assert images_below(tmp_path, tmp_path) == expected and len(expected) == 5
    (tmp_path / ".rsa-fast").mkdir()
    (tmp_path / ".rsa-fast" / "hidden.jpg").touch()
    assert images_below(tmp_path, tmp_path) == expected
    (tmp_path / "c").symlink_to(tmp_path / "b")
    assert images_below(tmp_path / "c", tmp_path) == ["c/2.jpg", "c/deep/er/3.png", "c/folder.jpg/4.webp"]


def test_the_fingerprint_is_of_one_line_per_file_and_the_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "CHUNK", 7)
    write_folder(tmp_path, {"train": 10})
    found = open_source(tmp_path, "pretrain").manifest
    files = [tmp_path / path for path in found.paths]
    lines = [f"{p.relative_to(tmp_path)}\t{i // 10}\t{p.stat().st_size}" for i, p in enumerate(files)]
    sizes = np.full((20, 2), 20, np.int32)
    assert found.fingerprint == hashlib.sha256("\n".join(["class_0", "class_1", *lines]).encode() + sizes.tobytes()).hexdigest()
    assert open_source(tmp_path, "pretrain").manifest.fingerprint == found.fingerprint  # now from the cache


def open_in_turn(data: Path, cache: Path | None, log: Path, waiting: int, start, results) -> None:
    """In a process of its own: open, but read no header before `waiting` others wait for this one.

    `log` gets a letter for every wait (w), and for every stat (s) and header read (h) of an image.
    """
    flock, stat, header_size = fcntl.flock, manifest.file_stat, manifest.header_size

    def note(letter: str) -> None:
        with log.open("a") as file:  # appended at once: several processes write
            file.write(letter)

    def slow(path: Path) -> tuple[int, int] | str:
        note("h")
        while log.read_text().count("w") < waiting:
            time.sleep(0.01)
        return header_size(path)

    fcntl.flock = lambda file, how: (note("w") if how == fcntl.LOCK_EX else None, flock(file, how))
    manifest.file_stat = lambda path: (note("s"), stat(path))[1]
    manifest.header_size = slow
    start.wait()
    try:
        results.put(open_source(data, "pretrain", cache).manifest.fingerprint)
    except ValueError as error:
        results.put(str(error))


def open_at_once(data: Path, log: Path, count: int, cache: Path | None = None) -> list[str]:
    start, results = FORK.Barrier(count), FORK.Queue()
    processes = [FORK.Process(target=open_in_turn, args=(data, cache, log, count - 1, start, results)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [results.get(timeout=30) for _ in processes]
    for process in processes:
        process.join()
    return found


@pytest.mark.parametrize("writable", [True, False])
def test_processes_that_open_at_once_scan_once(tmp_path, writable):
    data = write_folder(tmp_path / "data", {"train": 10})
    if not writable:
        (data / ".rsa-fast").write_text("in the way of a folder")
    found = open_at_once(data, tmp_path / "log", 3, tmp_path / "cache")
    assert len(set(found)) == 1 and found[0] == open_source(data, "pretrain", tmp_path / "cache").manifest.fingerprint
    log = (tmp_path / "log").read_text()
    assert {letter: log.count(letter) for letter in "wsh"} == {"w": 2, "s": 20, "h": 20}
    assert (tmp_path / "cache").exists() != writable


def test_those_who_waited_for_a_scan_that_failed_fail_too(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 10})
    open_source(data, "pretrain")  # a cache and a lock file of the time when all was well
    (data / "train" / "class_0" / "003.jpg").write_bytes(b"no image")
    found = open_at_once(data, tmp_path / "log", 2)
    assert all("1 of 20 files" in message and "class_0/003.jpg" in message for message in found)


def test_another_takes_over_from_a_killed_scan(tmp_path):
    data, log, results = write_folder(tmp_path / "data", {"train": 5}), tmp_path / "log", FORK.Queue()
    log.touch()
    first, second = (
        FORK.Process(target=open_in_turn, args=(data, None, log, waiting, FORK.Barrier(1), results)) for waiting in (99, 0)
    )
    for process, letter in ((first, "h"), (second, "w")):
        process.start()
        while letter not in log.read_text():
            time.sleep(0.01)
    os.kill(first.pid, signal.SIGKILL)
    assert len(results.get(timeout=30)) == 64 and log.read_text().count("h") == 1 + 10
    first.join()
    second.join()


def test_one_who_waited_still_compares_the_names(tmp_path, monkeypatch):
    write_folder(tmp_path, {"train": 3})
    open_source(tmp_path, "pretrain")
    (tmp_path / "train" / "class_1" / "002.jpg").rename(tmp_path / "train" / "class_1" / "9.jpg")
    monkeypatch.setattr(manifest, "take_turn", lambda places, take_turn=manifest.take_turn: (take_turn(places)[0], True))
    renamed = open_source(tmp_path, "pretrain").manifest
    monkeypatch.undo()
    assert renamed.paths[-1].endswith("9.jpg") and renamed.fingerprint == open_source(tmp_path, "pretrain").manifest.fingerprint


def test_a_disk_without_locks_or_with_a_broken_cache_is_scanned(tmp_path, monkeypatch):
    write_folder(tmp_path, {"train": 3})
    whole = open_source(tmp_path, "pretrain").manifest
    cache = tmp_path / ".rsa-fast" / "train.npz"
    for damaged in (b"", cache.read_bytes()[:-30]):
        cache.write_bytes(damaged)
        assert open_source(tmp_path, "pretrain").manifest.fingerprint == whole.fingerprint
    monkeypatch.setattr(fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
    assert open_source(tmp_path, "pretrain").manifest.fingerprint == whole.fingerprint


SIMULATION = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from pipelines import manifest
from pipelines.sources import open_source

DATA, CLASSES, PER_CLASS = Path(sys.argv[1]), 1000, 1281
stats = 0

class Entry:
    def __init__(self, name, folder):
        self.name, self.path, self.folder = name, name, folder
    def is_dir(self, follow_symlinks=True):
        return self.folder

class Listing:
    def __init__(self, place):
        self.place = Path(place)
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
take_turn = manifest.take_turn
for role in ("scans", "checks", "waits"):
    if role == "waits":
        manifest.take_turn = lambda places: (take_turn(places)[0], True)
    stats = 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, began = memory_mb("VmRSS"), time.perf_counter()
    found = open_source(DATA, "pretrain").manifest
    assert len(found) == CLASSES * PER_CLASS and found.paths[1281] == "train/n10000001/n10000001_0.JPEG"
    assert found.sizes[-1].tolist() == [375, 500] and found.labels[-1] == CLASSES - 1
    peak = memory_mb("VmHWM") - before
    print(role, stats / len(found), round(peak), round(time.perf_counter() - began, 2))
    del found
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel does not report peak memory: run on Linux")
def test_a_million_files_take_one_stat_each_and_little_memory(tmp_path):
    (tmp_path / "train").mkdir()
    run = subprocess.run([sys.executable, "-c", SIMULATION, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    rows = {role: [float(v) for v in values] for role, *values in (line.split() for line in run.stdout.splitlines())}
    print("role, stats per file, peak growth in MB, seconds:", rows)
    assert {role: row[0] for role, row in rows.items()} == {"scans": 1, "checks": 1, "waits": 0}
    assert all(row[1] < 400 for row in rows.values()), rows
