"""What a dataset split is: count, classes, labels, the size of every image, and a fingerprint.

Written once by a scan of the headers, cached in `.rsa-fast/` beside the data (or in `cache`), read by every
backend and rank. One process at a time opens a split; of the ranks of a run one lists and checks the files, the rest read.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import TextIO, overload

import numpy as np
from PIL import Image

from pipelines.npz import read_npz

VERSION = 3  # of the cache
MAX_PIXELS = 178_956_970  # of an image: beyond it PIL too sees a decompression bomb
CACHE: dict[str, np.dtype] = {
    "meta": np.dtype("|u1"),
    "paths": np.dtype("|u1"),
    "labels": np.dtype("<i8"),
    "sizes": np.dtype("<i4"),
}
CHUNK = (
    4096  # files at a time: few enough to hold as Python objects, enough to spare a million futures
)


class Paths(Sequence[str]):
    """A million paths in one buffer: a third of the memory of as many strings. Immutable; indexes, slices, iterates.

    Made of strings, or of the `text` of another.
    """

    def __init__(self, paths: Iterable[str] | bytes = b"") -> None:
        if not isinstance(paths, bytes):
            rest = iter(paths)
            chunks = iter(lambda: list(islice(rest, CHUNK)), [])
            paths = b"\0".join(
                os.fsencode("\0".join(chunk)) for chunk in chunks
            )  # the one character no file name has
        self.text = paths
        ends = np.flatnonzero(np.frombuffer(self.text, np.uint8) == 0)
        self.bounds = (
            np.concatenate([[-1], ends, [len(self.text)]]) if self.text else np.zeros(1, np.int64)
        )

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if len(chosen) > 1 and chosen.step == 1:
                return os.fsdecode(
                    self.text[self.bounds[chosen[0]] + 1 : self.bounds[chosen[-1] + 1]]
                ).split("\0")
            return [self[i] for i in chosen]
        i = range(len(self))[index]  # negative ones count from the end; IndexError beyond it
        return os.fsdecode(self.text[self.bounds[i] + 1 : self.bounds[i + 1]])

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(
            self[start : start + CHUNK] for start in range(0, len(self), CHUNK)
        )


Listing = tuple[Paths, np.ndarray, tuple[str, ...]]  # paths, their labels (int64), class names


@dataclass(frozen=True)
class Manifest:
    """One split. `sizes` is `(N, 2)` height and width in pixels, `labels` `(N,)` int64 with -1 for unlabelled.

    Raises ValueError when they do not fit together, for a path that leads out of the data folder, and for an image of more
    than `MAX_PIXELS`.
    """

    split: str
    classes: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    fingerprint: str  # of names, labels, bytes and sizes; the same wherever the data lies
    paths: Paths = field(
        default_factory=Paths
    )  # relative to the data folder; empty for binary files

    def __post_init__(self) -> None:
        count, sizes = self.labels.size, self.sizes
        if (
            self.labels.shape != (count,)
            or sizes.shape != (count, 2)
            or len(self.paths or self.labels) != count
        ):
            raise ValueError(
                f"{self.labels.shape} labels, {sizes.shape} sizes and {len(self.paths)} paths"
            )
        if not ((self.labels >= -1) & (self.labels < max(1, len(self.classes)))).all():
            raise ValueError(f"labels up to {self.labels.max()} of {len(self.classes)} classes")
        if (bad := (sizes < 1).any(1) | (sizes.astype(np.int64).prod(1) > MAX_PIXELS)).any():
            first = int(bad.argmax())
            name = self.paths[first] if self.paths else first
            raise ValueError(
                f"image {name} is {sizes[first].tolist()} px: images of 1 to {MAX_PIXELS:,} pixels are read"
            )
        parts = b"/%b/" % self.paths.text.replace(b"\0", b"/") if self.paths else b""
        if b"//" in parts or b"/../" in parts:
            outside = next(path for path in self.paths if {"", ".."} & set(path.split("/")))
            raise ValueError(f"path {outside!r}: only images below the data folder are read")

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def labelled(self) -> bool:
        return len(self) > 0 and bool((self.labels >= 0).all())


def array_manifest(
    data: Path, split: str, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> Manifest:
    """The manifest of images already in memory, `pixels` `(N, H, W, 3)` uint8."""
    digest = hashlib.sha256(np.ascontiguousarray(pixels).data)
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    sizes = np.tile(np.array(pixels.shape[1:3], np.int32), (len(pixels), 1))
    return Manifest(split, classes, np.asarray(labels, np.int64), sizes, digest.hexdigest())


def file_manifest(
    data: Path, split: str, listing: Callable[[], Listing], cache: str | Path | None = None
) -> Manifest:
    """The manifest of the image files that `listing()` finds, scanned or read from the cache.

    The cache holds while names, labels, bytes and modification times are unchanged, which takes a stat of every file, or
    once another rank has made sure of that (`vouched`). Raises ValueError naming the files that are no whole images, and
    whatever `listing` does.
    """
    name = "test.npz" if split == "test" else "train.npz"
    places = [Path(place) / ".rsa-fast" / name for place in (data, cache) if place]
    with take_turn(places) as lock:
        manifest = read_cache(places, split, vouched(lock.read(), data))
        if manifest is None:
            lock.truncate(
                0
            )  # should this process fail, those who wait must not take an older word for its own
            began_s = time.time()
            paths, labels, classes = listing()
            stats = by_threads(lambda path: file_stat(f"{data}/{path}"), paths, np.int64)
            state = digest(json.dumps([VERSION, classes]).encode(), labels, paths.text, stats)
            manifest = read_cache(places, split, state)
            if manifest is None:
                sizes = scan(data, paths)
                whole = fingerprint(paths, labels, classes, stats[:, 0], sizes)
                manifest = Manifest(split, classes, labels, sizes, whole, paths)
                write_cache(places, state, manifest)
            lock.write(
                json.dumps({"began_s": began_s, "data": os.path.realpath(data), "state": state})
            )
    return manifest


def take_turn(places: list[Path]) -> TextIO:
    """The lock beside the first cache that can have one, held until closed; its text is for `vouched`. Read-only and some
    network disks have no locks: nobody waits there."""
    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock = place.with_suffix(".lock").open("a+", errors="replace")
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            return lock
        except OSError:
            continue
    return io.StringIO()


def vouched(text: str, data: Path) -> str:
    """The state of the files under `data` as the last check left it in the lock's `text`, if a rank need not check again."""
    # A check that began after this process started saw every change made before that, as one of its own would. Nothing need
    # name the run, and nothing safely could: torchrun's id and port are the same for the next run, one shell starts many, and
    # a folder's modification time does not tell of bytes changed in place. Ranks start within a second, by clocks that agree
    # to less, and import for several before they open: one check serves them all, and who starts later checks again. Ranks
    # alone: a notebook started yesterday should see what was changed today.
    try:
        found = json.loads(text)
        if (
            "RANK" in os.environ
            and found["began_s"] > started_s()
            and found["data"] == os.path.realpath(data)
        ):
            return str(found["state"])
    except (ValueError, KeyError, TypeError, RecursionError):  # nothing yet, or a writer was killed
        pass
    return ""


def started_s() -> float:
    """When this process started, as `time.time()` counts, rounded up."""
    ticks = int(
        Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    )  # since the machine's, rounded down
    return (
        time.time()
        - time.clock_gettime(time.CLOCK_BOOTTIME)
        + (ticks + 1) / os.sysconf("SC_CLK_TCK")
    )


def by_threads(work: Callable[[str], tuple[int, int]], paths: Paths, dtype: type) -> np.ndarray:
    """`(N, 2)`: `work` of every path, on threads, which hide a network disk's latency."""

    def rows(start: int) -> np.ndarray:
        return np.array([work(path) for path in paths[start : start + CHUNK]], dtype)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return np.concatenate(
            [np.empty((0, 2), dtype), *pool.map(rows, range(0, len(paths), CHUNK))]
        )


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
        shown = "\n".join(
            [f"  {path}: {faults[path]}" for path in sorted(faults)[:20]]
            + ["  ..."] * (len(faults) > 20)
        )
        found = f"{len(faults)} of {len(paths)} files under {data} are no whole images"
        raise ValueError(f"{found}; replace or delete them:\n{shown}")
    return sizes


def header_size(path: Path) -> tuple[int, int] | str:
    """Height and width, or in words what is wrong with the file. A JPEG without its end marker counts as truncated."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            if image.format == "JPEG":
                # Some writers pad the file after the marker.
                file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
                if b"\xff\xd9" not in file.read():
                    return "truncated JPEG (no end marker)"
            return height, width
    except (
        Exception
    ) as error:  # on damaged bytes decoders raise whatever their authors did not think of
        return (
            "empty file"
            if path.stat().st_size == 0
            else f"{type(error).__name__}: {str(error).split(' <')[0]}"
        )


def digest(*parts: bytes | np.ndarray) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return total.hexdigest()


def fingerprint(
    paths: Paths,
    labels: np.ndarray,
    classes: tuple[str, ...],
    lengths: np.ndarray,
    sizes: np.ndarray,
) -> str:
    """SHA-256 of the classes and of a line per file, joined by newlines, then of the sizes; `lengths` is in bytes."""
    lines = chain(classes, map("{}\t{}\t{}".format, paths, labels.tolist(), lengths.tolist()))
    total, joint = hashlib.sha256(), b""
    while chunk := list(islice(lines, CHUNK)):
        total.update(joint + "\n".join(chunk).encode("utf-8", "surrogateescape"))
        joint = b"\n"
    total.update(sizes.tobytes())
    return total.hexdigest()


def read_cache(places: list[Path], split: str, state: str) -> Manifest | None:
    """The manifest from the first cache of files in this state. Raises ValueError when no scan can have written it."""
    for place in places:
        try:
            stored = read_npz(place, CACHE)
            meta = json.loads(stored["meta"].tobytes())
            if meta["state"] != state:
                continue
            classes, whole = tuple(map(str, meta["classes"])), str(meta["fingerprint"])
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            RecursionError,
        ):  # damaged: it will be written anew
            continue
        try:
            return Manifest(
                split,
                classes,
                stored["labels"],
                stored["sizes"],
                whole,
                Paths(stored["paths"].tobytes()),
            )
        except ValueError as error:
            raise ValueError(f"{place} is no work of this program: {error}. Delete it") from error
    return None


def write_cache(places: list[Path], state: str, manifest: Manifest) -> None:
    """Write to the first place that takes it, by rename; a read-only dataset without `cache` is scanned each time."""
    meta = json.dumps(
        {"state": state, "classes": manifest.classes, "fingerprint": manifest.fingerprint}
    )
    meta_bytes, path_bytes = (
        np.frombuffer(text, np.uint8) for text in (meta.encode(), manifest.paths.text)
    )
    for place in places:
        partial = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez(
                    file,
                    meta=meta_bytes,
                    paths=path_bytes,
                    labels=manifest.labels,
                    sizes=manifest.sizes,
                )
            partial.replace(place)
            return
        except OSError:
            continue
