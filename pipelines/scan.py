"""The manifest of image files: headers are read once, and the result is cached.

The cache is the file `.rsa-fast/<split>.npz` beside the data, or in another folder where the data
are read-only. In a process group rank 0 lists and checks the files, and the others read its cache.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch.distributed as dist
from PIL import Image

from pipelines.files import write_whole
from pipelines.manifest import CHUNK, Listing, Manifest, Paths, digest, fingerprint_files
from pipelines.npz import read_npz

VERSION = 3  # of the cache
CACHE: dict[str, np.dtype] = {
    "meta": np.dtype("|u1"),
    "paths": np.dtype("|u1"),
    "labels": np.dtype("<i8"),
    "sizes": np.dtype("<i4"),
}


def file_manifest(
    data: Path, split: str, list_files: Callable[[], Listing], places: list[Path]
) -> Manifest:
    """The manifest of the image files that `list_files()` returns, from their headers or the cache.

    The paths are relative to `data`. The cache is the first of the files `places` that fits; a new
    one goes to the first of them that can be written. It fits while names, labels, file sizes and
    modification times are unchanged. To know that takes a stat of every file. In a process group
    all ranks must call this function: rank 0 does this work first, and the others use the cache
    that it found or wrote. A rank that does not see that cache, because its node has other disks,
    does the work itself.

    Raises ValueError with the path of every damaged or incomplete image, and as `list_files` does.
    """
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return checked_manifest(data, split, list_files, places)[0]
    if dist.get_rank() == 0:
        state = ""  # where rank 0 fails, every rank does the work, and fails with the same message
        try:
            manifest, state = checked_manifest(data, split, list_files, places)
        finally:
            dist.broadcast_object_list([state])
        return manifest
    received = [""]
    dist.broadcast_object_list(received)
    manifest_of_rank_0 = received[0] and read_cache(places, split, received[0])
    return manifest_of_rank_0 or checked_manifest(data, split, list_files, places)[0]


def checked_manifest(
    data: Path, split: str, list_files: Callable[[], Listing], places: list[Path]
) -> tuple[Manifest, str]:
    """The manifest of the files as they are now, and the hash under which it is cached."""
    listing = paths, labels, classes = list_files()
    stats = map_threaded(lambda path: file_stat(f"{data}/{path}"), paths, np.int64)
    state = digest(json.dumps([VERSION, classes]).encode(), labels, paths.text, stats)
    manifest = read_cache(places, split, state)
    if manifest is None:
        sizes = scan(data, paths)
        fingerprint = fingerprint_files(listing, lengths=stats[:, 0], sizes=sizes)
        manifest = Manifest(split, classes, labels, sizes, fingerprint, paths)
        write_cache(places, state, manifest)
    return manifest, state


def map_threaded(work: Callable[[str], tuple[int, int]], paths: Paths, dtype: type) -> np.ndarray:
    """`(N, 2)`: `work` of every path, on threads, which hide the latency of a network disk."""

    def rows(start: int) -> np.ndarray:
        return np.array([work(path) for path in paths[start : start + CHUNK]], dtype)

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        chunks = pool.map(rows, range(0, len(paths), CHUNK))
        return np.concatenate([np.empty((0, 2), dtype), *chunks])


def file_stat(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


def scan(data: Path, paths: Paths) -> np.ndarray:
    """`(N, 2)` int32 heights and widths from the files' headers.

    Raises ValueError with the path of every file that is not a complete image.
    """
    faults: dict[str, str] = {}

    def size_px(path: str) -> tuple[int, int]:
        size_or_fault = header_size(data / path)
        if isinstance(size_or_fault, str):
            faults[path] = size_or_fault
            return 0, 0
        return size_or_fault

    sizes = map_threaded(size_px, paths, np.int32)
    if faults:
        rows = [f"  {path}: {faults[path]}" for path in sorted(faults)[:20]]
        listed = "\n".join(rows + ["  ..."] * (len(faults) > 20))
        count = f"{len(faults)} of {len(paths)} files under {data}"
        raise ValueError(f"{count} are no whole images; replace or delete them:\n{listed}")
    return sizes


def header_size(path: Path) -> tuple[int, int] | str:
    """Height and width in pixels, or what is wrong with the file.

    A JPEG without its end marker counts as truncated.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            width, height = image.size
            if image.format == "JPEG":
                # Some writers pad the file after the marker.
                file.seek(max(0, file.seek(0, os.SEEK_END) - 64))
                if b"\xff\xd9" not in file.read():
                    return "truncated JPEG (no end marker)"
            return height, width
    except Exception as error:  # on damaged bytes, decoders raise all kinds of exceptions
        if path.stat().st_size == 0:
            return "empty file"
        return f"{type(error).__name__}: {str(error).split(' <')[0]}"


def read_cache(places: list[Path], split: str, state: str) -> Manifest | None:
    """The manifest from the first cache of the files in this state, or None.

    Raises ValueError for a cache that no scan can have written.
    """
    for place in places:
        try:
            stored = read_npz(place, CACHE)
            meta = json.loads(stored["meta"].tobytes())
            if meta["state"] != state:
                continue
            classes, fingerprint = tuple(map(str, meta["classes"])), str(meta["fingerprint"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue  # a damaged cache will be written again
        paths = Paths(stored["paths"].tobytes())
        try:
            return Manifest(
                split, classes, stored["labels"], stored["sizes"], fingerprint, paths=paths
            )
        except ValueError as error:
            raise ValueError(f"{place} is no work of this program: {error}. Delete it") from error
    return None


def write_cache(places: list[Path], state: str, manifest: Manifest) -> None:
    """Write to the first place that is writable; where none is, every start scans the files."""
    meta = {"state": state, "classes": manifest.classes, "fingerprint": manifest.fingerprint}
    arrays = {
        "meta": np.frombuffer(json.dumps(meta).encode(), np.uint8),
        "paths": np.frombuffer(manifest.paths.text, np.uint8),
        "labels": manifest.labels,
        "sizes": manifest.sizes,
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
