"""Make the manifest of image files. Their headers are read once, and the result is cached.

`layouts.open_place` decides where the cache is. In a process group rank 0 lists and checks the
files, and the other ranks read its cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch.distributed as dist

from rsa_fast.pipelines.files import write_whole
from rsa_fast.pipelines.machine import cores
from rsa_fast.pipelines.manifest import (
    CHUNK,
    MAX_PIXELS,
    Listing,
    Manifest,
    Paths,
    digest,
    fingerprint_files,
)
from rsa_fast.pipelines.npz import read_npz
from rsa_fast.pipelines.sources import check_depth, exif_orientation, open_image

OnBadImage = Literal["stop", "skip"]

VERSION = 4  # the version of the cache's format
CACHE: dict[str, np.dtype] = {
    "meta": np.dtype("|u1"),
    "paths": np.dtype("|u1"),
    "labels": np.dtype("<i8"),
    "sizes": np.dtype("<i4"),
    "orientations": np.dtype("|u1"),
}
SHOWN = 20  # the most bad images that a message lists


@dataclass(frozen=True)
class Scan:
    """What was read from the headers of image files.

    `orientations` `(N,)` uint8 are the values in EXIF, 1 for an upright image. `manifest.sizes` are
    the sizes before turning. `bad` are the paths of damaged or incomplete files, with what is
    wrong. These files are not in the manifest.
    """

    manifest: Manifest
    orientations: np.ndarray
    bad: Mapping[str, str]

    def upright(self) -> Manifest:
        """The manifest of the images after they are turned upright."""
        if (self.orientations == 1).all():
            return self.manifest
        sizes, sideways = self.manifest.sizes.copy(), self.orientations >= 5
        sizes[sideways] = sizes[sideways, ::-1]
        fingerprint = digest(self.manifest.fingerprint.encode(), self.orientations)
        return replace(self.manifest, sizes=sizes, fingerprint=fingerprint)


def bad_rows(bad: Mapping[str, str]) -> list[str]:
    """A line for each of the files `bad`, with what is wrong with it, for a message."""
    rows = [f"  {path}: {bad[path]}" for path in sorted(bad)[:SHOWN]]
    return rows + ["  ..."] * (len(bad) > SHOWN)


def scan_files(
    data: Path,
    split: str,
    list_files: Callable[[], Listing],
    places: list[Path],
    on_bad_image: OnBadImage = "stop",
) -> Scan:
    """The scan of the image files that `list_files()` returns, from their headers or the cache.

    The paths are relative to `data`. The cache is the first of the files `places` that is valid. A
    new cache is written to the first of them that can be written. A cache is valid while names,
    labels, file sizes and modification times are unchanged, so the check needs a stat of every
    file.

    In a process group all ranks must call this function. Rank 0 does this work first, and the
    others use the cache that it read or wrote. A rank that cannot see that cache, because its node
    has other disks, does the work itself.

    Raises the errors of `list_files`, and ValueError with the path of every damaged or incomplete
    image. With `on_bad_image` "skip", it is raised only if no image is usable.
    """
    scan = scan_or_cache(data, split, list_files, places)
    if scan.bad and (on_bad_image == "stop" or not len(scan.manifest)):
        total = len(scan.bad) + len(scan.manifest)
        raise ValueError(
            f"{len(scan.bad)} of {total} files under {data} are damaged or incomplete images; "
            f"replace or delete them, repair them with `rsa-fast verify {data} --fix`, or leave "
            "them out with --on-bad-image skip:\n" + "\n".join(bad_rows(scan.bad))
        )
    return scan


def scan_or_cache(
    data: Path, split: str, list_files: Callable[[], Listing], places: list[Path]
) -> Scan:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return checked_scan(data, split, list_files, places)[0]
    if dist.get_rank() == 0:
        state = ""  # if rank 0 fails, every rank does the work and fails with the same message
        try:
            scan, state = checked_scan(data, split, list_files, places)
        finally:
            dist.broadcast_object_list([state])
        return scan
    received = [""]
    dist.broadcast_object_list(received)
    scan_of_rank_0 = received[0] and read_cache(places, split, received[0])
    return scan_of_rank_0 or checked_scan(data, split, list_files, places)[0]


def checked_scan(
    data: Path, split: str, list_files: Callable[[], Listing], places: list[Path]
) -> tuple[Scan, str]:
    """The scan of the files as they are now, and the hash under which it is cached."""
    paths, labels, classes = list_files()
    stats = map_threaded(lambda path: file_stat(f"{data}/{path}"), paths, np.int64)
    state = digest(json.dumps([VERSION, classes]).encode(), labels, paths.text, stats)
    scan = read_cache(places, split, state)
    if scan is None:
        headers, bad = read_headers(data, paths)
        if bad:
            usable = np.flatnonzero(headers[:, 0])
            paths, labels = Paths(paths[i] for i in usable.tolist()), labels[usable]
            headers, stats = headers[usable], stats[usable]
        sizes, orientations = np.ascontiguousarray(headers[:, :2]), headers[:, 2].astype(np.uint8)
        listing = paths, labels, classes
        fingerprint = fingerprint_files(listing, lengths=stats[:, 0], sizes=sizes)
        manifest = Manifest(split, classes, labels, sizes, fingerprint, paths)
        scan = Scan(manifest, orientations, bad)
        write_cache(places, state, scan)
    return scan, state


def map_threaded(work: Callable[[str], tuple[int, ...]], paths: Paths, dtype: type) -> np.ndarray:
    """The results of `work` for all paths, `(N, ...)`. Threads hide a network disk's latency."""

    def rows(start: int) -> np.ndarray:
        return np.array([work(path) for path in paths[start : start + CHUNK]], dtype)

    with ThreadPoolExecutor(max_workers=min(8, cores())) as pool:
        chunks = list(pool.map(rows, range(0, len(paths), CHUNK)))
        return np.concatenate(chunks) if chunks else np.empty((0, 3), dtype)


def file_stat(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds, or -1 twice for a broken link."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def read_headers(data: Path, paths: Paths) -> tuple[np.ndarray, dict[str, str]]:
    """`(N, 3)` int32 heights, widths and EXIF orientations, and what is wrong with bad files.

    The row of a damaged or incomplete file is zero.
    """
    faults: dict[str, str] = {}

    def header(path: str) -> tuple[int, int, int]:
        result = header_size(data / path)
        if isinstance(result, str):
            faults[path] = result
            return 0, 0, 0
        return result

    return map_threaded(header, paths, np.int32), faults


def header_size(path: Path) -> tuple[int, int, int] | str:
    """Height and width in pixels and the EXIF orientation, or what is wrong with the file.

    A complete JPEG has an end marker in its last bytes. Without one, the file may be truncated, or
    other data may follow the image, as in the motion photographs of telephones. The image is then
    decoded to find out.
    """
    try:
        with path.open("rb") as file, open_image(file) as image:
            width, height = image.size
            if height * width > MAX_PIXELS:
                return f"{width}x{height} px: images of up to {MAX_PIXELS:,} pixels are read"
            orientation = exif_orientation(image)
            check_depth(image)
            if image.format in ("JPEG", "MPO"):
                file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
                if b"\xff\xd9" not in file.read():
                    image.load()
            return height, width, orientation
    except Exception as error:  # on damaged bytes, decoders raise all kinds of exceptions
        if not path.exists():
            return f"a link to {path.readlink()}, which does not exist"
        if path.stat().st_size == 0:
            return "empty file"
        if "image file is truncated" in str(error):
            return "truncated JPEG (no end marker)"
        return f"{type(error).__name__}: {str(error).split(' <')[0]}"


def read_cache(places: list[Path], split: str, state: str) -> Scan | None:
    """The scan from the first cache of the files in this state, or None.

    Raises ValueError for a cache that no scan can have written.
    """
    for place in places:
        try:
            stored = read_npz(place, CACHE)
            meta = json.loads(stored["meta"].tobytes())
            if meta["state"] != state:
                continue
            classes, fingerprint = tuple(map(str, meta["classes"])), str(meta["fingerprint"])
            bad = {str(path): str(fault) for path, fault in meta["bad"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue  # a damaged cache will be written again
        paths = Paths(stored["paths"].tobytes())
        try:
            manifest = Manifest(
                split, classes, stored["labels"], stored["sizes"], fingerprint, paths=paths
            )
            if stored["orientations"].shape != (len(manifest),):
                raise ValueError(f"{stored['orientations'].shape} orientations")
        except ValueError as error:
            reason = f"{place} was not written by this program: {error}. Delete it"
            raise ValueError(reason) from error
        return Scan(manifest, stored["orientations"], bad)
    return None


def write_cache(places: list[Path], state: str, scan: Scan) -> None:
    """Write to the first place that is writable. If none is, every start scans the files."""
    manifest = scan.manifest
    meta = {
        "state": state,
        "classes": manifest.classes,
        "fingerprint": manifest.fingerprint,
        "bad": scan.bad,
    }
    arrays = {
        "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        "paths": np.frombuffer(manifest.paths.text, np.uint8),
        "labels": manifest.labels,
        "sizes": manifest.sizes,
        "orientations": scan.orientations,
    }

    def write(file: BinaryIO) -> None:
        np.savez(file, **arrays)  # type: ignore[arg-type]  # savez also has a bool keyword

    for place in places:
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            write_whole(place, write)
            return
        except OSError:
            continue
