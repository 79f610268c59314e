"""The manifest of image files: headers are read once, and the result is cached.

`layouts.open_place` says where the cache is. In a process group rank 0 lists and checks the files,
and the others read its cache.
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

VERSION = 4  # of the cache
CACHE: dict[str, np.dtype] = {
    "meta": np.dtype("|u1"),
    "paths": np.dtype("|u1"),
    "labels": np.dtype("<i8"),
    "sizes": np.dtype("<i4"),
    "orientations": np.dtype("|u1"),
}
SHOWN = 20  # bad images in a message


@dataclass(frozen=True)
class Scan:
    """What the headers of image files say.

    `orientations` `(N,)` uint8 are the values of EXIF, 1 for an upright image, which
    `manifest.sizes` does not heed. `bad` are the files that are no whole images and therefore not
    in the manifest, by path, with what is wrong.
    """

    manifest: Manifest
    orientations: np.ndarray
    bad: Mapping[str, str]

    def upright(self) -> Manifest:
        """The manifest of the images as they are once they are turned upright."""
        if (self.orientations == 1).all():
            return self.manifest
        sizes, lying = self.manifest.sizes.copy(), self.orientations >= 5
        sizes[lying] = sizes[lying, ::-1]
        fingerprint = digest(self.manifest.fingerprint.encode(), self.orientations)
        return replace(self.manifest, sizes=sizes, fingerprint=fingerprint)


def bad_rows(bad: Mapping[str, str]) -> list[str]:
    """A line for each of these files and what is wrong with it, for a message."""
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

    The paths are relative to `data`. The cache is the first of the files `places` that fits; a new
    one goes to the first of them that can be written. It fits while names, labels, file sizes and
    modification times are unchanged. To know that takes a stat of every file. In a process group
    all ranks must call this function: rank 0 does this work first, and the others use the cache
    that it found or wrote. A rank that does not see that cache, because its node has other disks,
    does the work itself.

    Raises ValueError with the path of every damaged or incomplete image, unless `on_bad_image` is
    "skip" and some images are whole, and as `list_files` does.
    """
    scan = scan_or_cache(data, split, list_files, places)
    if scan.bad and (on_bad_image == "stop" or not len(scan.manifest)):
        total = len(scan.bad) + len(scan.manifest)
        raise ValueError(
            f"{len(scan.bad)} of {total} files under {data} are no whole images; replace or delete "
            f"them, repair them with `rsa-fast verify {data} --fix`, or leave them out with "
            "--on-bad-image skip:\n" + "\n".join(bad_rows(scan.bad))
        )
    return scan


def scan_or_cache(
    data: Path, split: str, list_files: Callable[[], Listing], places: list[Path]
) -> Scan:
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return checked_scan(data, split, list_files, places)[0]
    if dist.get_rank() == 0:
        state = ""  # where rank 0 fails, every rank does the work, and fails with the same message
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
            whole = np.flatnonzero(headers[:, 0])
            paths, labels = Paths(paths[i] for i in whole.tolist()), labels[whole]
            headers, stats = headers[whole], stats[whole]
        sizes, orientations = np.ascontiguousarray(headers[:, :2]), headers[:, 2].astype(np.uint8)
        listing = paths, labels, classes
        fingerprint = fingerprint_files(listing, lengths=stats[:, 0], sizes=sizes)
        manifest = Manifest(split, classes, labels, sizes, fingerprint, paths)
        scan = Scan(manifest, orientations, bad)
        write_cache(places, state, scan)
    return scan, state


def map_threaded(work: Callable[[str], tuple[int, ...]], paths: Paths, dtype: type) -> np.ndarray:
    """`(N, ...)`: `work` of every path, on threads, which hide the latency of a network disk."""

    def rows(start: int) -> np.ndarray:
        return np.array([work(path) for path in paths[start : start + CHUNK]], dtype)

    with ThreadPoolExecutor(max_workers=min(8, cores())) as pool:
        chunks = list(pool.map(rows, range(0, len(paths), CHUNK)))
        return np.concatenate(chunks) if chunks else np.empty((0, 3), dtype)


def file_stat(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds, or -1 twice for a link that is broken."""
    try:
        stat = os.stat(path)
    except FileNotFoundError:
        return -1, -1
    return stat.st_size, stat.st_mtime_ns


def read_headers(data: Path, paths: Paths) -> tuple[np.ndarray, dict[str, str]]:
    """`(N, 3)` int32 heights, widths and EXIF orientations, and what is wrong with which files.

    The row of a file that is not a complete image is zero.
    """
    faults: dict[str, str] = {}

    def header(path: str) -> tuple[int, int, int]:
        found = header_size(data / path)
        if isinstance(found, str):
            faults[path] = found
            return 0, 0, 0
        return found

    return map_threaded(header, paths, np.int32), faults


def header_size(path: Path) -> tuple[int, int, int] | str:
    """Height and width in pixels and the EXIF orientation, or what is wrong with the file.

    A whole JPEG has an end marker in its last bytes. Where none is there, the file may be cut, or
    other data may follow the image, as in the motion photographs of telephones: the image is then
    decoded to know.
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
            return f"a link to {path.readlink()}, which is not there"
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
            raise ValueError(f"{place} is no work of this program: {error}. Delete it") from error
        return Scan(manifest, stored["orientations"], bad)
    return None


def write_cache(places: list[Path], state: str, scan: Scan) -> None:
    """Write to the first place that is writable; where none is, every start scans the files."""
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
