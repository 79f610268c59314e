"""What a dataset split is: count, classes, labels, the size of every image, and a fingerprint.

Written once by a scan of the headers, cached in `.rsa-fast/` beside the data (or in `cache`), read by every
backend and rank. The cache holds for as long as the listing of names, bytes and modification times is unchanged.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """One split. `sizes` is `(N, 2)` height and width in pixels, `labels` `(N,)` int64 with -1 for unlabelled."""

    split: str
    classes: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    fingerprint: str  # of names, labels, bytes and sizes; the same wherever the data lies
    paths: tuple[str, ...] = ()  # relative to the data folder; empty for binary files

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
    data: Path, split: str, paths: list[str], labels: np.ndarray, classes: tuple[str, ...], cache: str | Path | None = None
) -> Manifest:
    """The manifest of image files `paths` (relative to `data`), scanned or read from the cache.

    Raises ValueError naming the files that are no whole images.
    """
    stats = [os.stat(data / path) for path in paths]
    lines = [f"{path}\t{label}\t{stat.st_size}" for path, label, stat in zip(paths, labels, stats, strict=True)]
    listing = hashlib.sha256("\n".join([str(VERSION), *lines, *(str(s.st_mtime_ns) for s in stats)]).encode()).hexdigest()
    name = "test.npz" if split == "test" else "train.npz"
    places = [Path(place) / ".rsa-fast" / name for place in (data, cache) if place]
    for place in places:
        if (sizes := cached_sizes(place, listing)) is not None:
            break
    else:
        sizes = scan(data, paths)
        write_cache(places, listing, sizes)
    content = hashlib.sha256("\n".join([*classes, *lines]).encode() + sizes.tobytes()).hexdigest()
    return Manifest(split, classes, np.asarray(labels, np.int64), sizes, content, tuple(paths))


def scan(data: Path, paths: list[str]) -> np.ndarray:
    """`(N, 2)` int32 heights and widths from the files' headers. Raises ValueError naming every file at fault."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = list(pool.map(lambda path: header_size(data / path), paths, chunksize=256))
    bad = [f"  {path}: {found}" for path, found in zip(paths, results, strict=True) if isinstance(found, str)]
    if bad:
        shown = "\n".join(bad[:20] + (["  ..."] if len(bad) > 20 else []))
        raise ValueError(f"{len(bad)} of {len(paths)} files under {data} are no whole images; replace or delete them:\n{shown}")
    return np.array(results, np.int32).reshape(-1, 2)


def header_size(path: Path) -> tuple[int, int] | str:
    """Height and width, or in words what is wrong with the file. A JPEG without its end marker counts as truncated."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if image.format == "JPEG":
                image.fp.seek(-min(64, path.stat().st_size), os.SEEK_END)  # some writers pad after the marker
                if b"\xff\xd9" not in image.fp.read():
                    return "truncated JPEG (no end marker)"
            return height, width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        return "empty file" if path.stat().st_size == 0 else f"{type(error).__name__}: {str(error).split(' <')[0]}"


def cached_sizes(place: Path, listing: str) -> np.ndarray | None:
    try:
        with np.load(place, allow_pickle=False) as stored:
            return stored["sizes"] if json.loads(str(stored["meta"]))["listing"] == listing else None
    except (OSError, ValueError, KeyError):
        return None


def write_cache(places: list[Path], listing: str, sizes: np.ndarray) -> None:
    """Write to the first place that takes it, by rename; a read-only dataset without `cache` is scanned each time."""
    for place in places:
        partial = place.with_name(f"{place.name}.{os.getpid()}.tmp")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                np.savez_compressed(file, sizes=sizes, meta=json.dumps({"listing": listing}))
            partial.replace(place)
            return
        except OSError:
            continue
