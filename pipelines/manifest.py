"""What a dataset split is: count, classes, labels, the size of every image, and a fingerprint.

Written once by a scan of the headers, cached in `.rsa-fast/` beside the data (or in `cache`), read by every
backend and rank. Of the processes that open a split at once, one checks the data and the rest wait for it and read.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TextIO
from zipfile import BadZipFile

import numpy as np
from PIL import Image

VERSION = 2  # of the cache
CHUNK = 4096  # files at a time: few enough to hold as Python objects, enough to spare a million futures


class Paths(Sequence[str]):
    """A million paths in one buffer: a third of the memory of as many strings. Immutable; indexes, slices, iterates."""

    def __init__(self, paths: Iterable[str]) -> None:
        paths, parts = iter(paths), []
        while chunk := list(islice(paths, CHUNK)):
            parts.append(os.fsencode("\0".join(chunk)))  # the one character no file name has
        self.text = b"\0".join(parts)
        ends = np.flatnonzero(np.frombuffer(self.text, np.uint8) == 0)
        self.bounds = np.concatenate([[-1], ends, [len(self.text)]]) if parts else np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if len(chosen) > 1 and chosen.step == 1:
                return os.fsdecode(self.text[self.bounds[chosen[0]] + 1 : self.bounds[chosen[-1] + 1]]).split("\0")
            return [self[i] for i in chosen]
        i = range(len(self))[index]  # negative ones count from the end; IndexError beyond it
        return os.fsdecode(self.text[self.bounds[i] + 1 : self.bounds[i + 1]])

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self[start : start + CHUNK] for start in range(0, len(self), CHUNK))


@dataclass(frozen=True)
class Manifest:
    """One split. `sizes` is `(N, 2)` height and width in pixels, `labels` `(N,)` int64 with -1 for unlabelled."""

    split: str
    classes: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    fingerprint: str  # of names, labels, bytes and sizes; the same wherever the data lies
    paths: Sequence[str] = ()  # relative to the data folder; empty for binary files

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        return len(self) > 0 and bool((self.labels >= 0).all())


def array_manifest(data: Path, split: str, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]) -> Manifest:
    """The manifest of images already in memory, `pixels` `(N, H, W, 3)` uint8."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels))
    digest.update(np.ascontiguousarray(labels, np.int64))
    sizes = np.tile(np.array(pixels.shape[1:3], np.int32), (len(pixels), 1))
    return Manifest(split, classes, np.asarray(labels, np.int64), sizes, digest.hexdigest())


def file_manifest(
    data: Path, split: str, paths: Paths, labels: np.ndarray, classes: tuple[str, ...], cache: str | Path | None = None
) -> Manifest:
    """The manifest of image files `paths` (relative to `data`), scanned or read from the cache.

    The cache holds while names, labels, bytes and modification times are unchanged, which takes a stat of every file. A
    process that finds another one at that waits for it, then reads what it verified and compares the names alone: a file
    replaced under its old name in those moments is noticed at the next opening, not at this one.
    Raises ValueError naming the files that are no whole images.
    """
    labels = np.asarray(labels, np.int64)
    names = digest(json.dumps([VERSION, classes]).encode(), labels, paths.text)
    name = "test.npz" if split == "test" else "train.npz"
    places = [Path(place) / ".rsa-fast" / name for place in (data, cache) if place]
    lock, waited = take_turn(places)
    with lock:
        verified = lock.read() if waited else ""
        stored = read_cache(places, names, verified) if verified else None
        if stored is None:
            lock.truncate(0)  # should this process fail, those who wait must not take an older word for its own
            stats = by_threads(lambda path: file_stat(f"{data}/{path}"), paths, np.int64)
            listing = digest(names.encode(), stats)
            stored = read_cache(places, names, listing)
            if stored is None:
                sizes = scan(data, paths)
                stored = sizes, fingerprint(paths, labels, classes, stats[:, 0], sizes)
                write_cache(places, names, listing, *stored)
            lock.write(listing)
    return Manifest(split, classes, labels, *stored, paths)


def take_turn(places: list[Path]) -> tuple[TextIO, bool]:
    """The lock beside the first cache that can have one, held until closed, and whether another process had to be waited
    for. What a holder verified is the lock file's text. Read-only and some network disks have no locks: nobody waits."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = place.with_suffix(".lock").open("a+")
            lock.seek(0)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(lock, fcntl.LOCK_EX)
                return lock, True
            return lock, False
        except OSError:
            continue
    return io.StringIO(), False


def by_threads(work: Callable[[str], tuple[int, int]], paths: Paths, dtype: type) -> np.ndarray:
    """`(N, 2)`: `work` of every path, on threads, which hide a network disk's latency."""

    def rows(start: int) -> np.ndarray:
        return np.array([work(path) for path in paths[start : start + CHUNK]], dtype)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return np.concatenate([np.empty((0, 2), dtype), *pool.map(rows, range(0, len(paths), CHUNK))])


def file_stat(path: str) -> tuple[int, int]:
    """Bytes and modification time in nanoseconds."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def scan(data: Path, paths: Paths) -> np.ndarray:
    """`(N, 2)` int32 heights and widths from the files' headers. Raises ValueError naming every file at fault."""
    faults: dict[str, str] = {}

    def size(path: str) -> tuple[int, int]:
        found = header_size(data / path)
        if isinstance(found, str):
            faults[path] = found
            return 0, 0
        return found

    sizes = by_threads(size, paths, np.int32)
    if faults:
        shown = "\n".join([f"  {path}: {faults[path]}" for path in sorted(faults)[:20]] + ["  ..."] * (len(faults) > 20))
        found = f"{len(faults)} of {len(paths)} files under {data} are no whole images"
        raise ValueError(f"{found}; replace or delete them:\n{shown}")
    return sizes


def header_size(path: Path) -> tuple[int, int] | str:
    """Height and width, or in words what is wrong with the file. A JPEG without its end marker counts as truncated."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "JPEG":
                image.fp.seek(max(0, image.fp.seek(0, os.SEEK_END) - 64))  # some writers pad after the marker
                if b"\xff\xd9" not in image.fp.read():
                    return "truncated JPEG (no end marker)"
            return height, width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "empty file" if path.stat().st_size == 0 else f"{type(error).__name__}: {str(error).split(' <')[0]}"


def digest(*parts: bytes | np.ndarray) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else part)
    return total.hexdigest()


def fingerprint(paths: Paths, labels: np.ndarray, classes: tuple[str, ...], lengths: np.ndarray, sizes: np.ndarray) -> str:
    """SHA-256 of the classes and of a line per file, joined by newlines, then of the sizes; `lengths` is in bytes."""
    lines = chain(classes, map("{}\t{}\t{}".format, paths, labels.tolist(), lengths.tolist()))
    total, joint = hashlib.sha256(), b""
    while chunk := list(islice(lines, CHUNK)):
        total.update(joint + "\n".join(chunk).encode("utf-8", "surrogateescape"))
        joint = b"\n"
    total.update(sizes.tobytes())
    return total.hexdigest()


def read_cache(places: list[Path], names: str, listing: str) -> tuple[np.ndarray, str] | None:
    """Sizes and fingerprint from the first cache of these names and this listing."""
    for place in places:
        try:
            with np.load(place, allow_pickle=False) as stored:
                meta = json.loads(str(stored["meta"]))
                if (meta["names"], meta["listing"]) == (names, listing):
                    return stored["sizes"], meta["fingerprint"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile):
            continue
    return None


def write_cache(places: list[Path], names: str, listing: str, sizes: np.ndarray, fingerprint: str) -> None:
    """Write to the first place that takes it, by rename; a read-only dataset without `cache` is scanned each time."""
    meta = json.dumps({"names": names, "listing": listing, "fingerprint": fingerprint})
    for place in places:
        partial = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(file, sizes=sizes, meta=meta)
            partial.replace(place)
            return
        except OSError:
            continue
