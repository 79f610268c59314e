"""The manifest of a split: its classes, labels, image sizes and paths, and their fingerprint.

`scan.py` makes the manifest of image files. Every backend and every rank reads the same one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import overload

import numpy as np

MAX_PIXELS = 178_956_970  # per image; PIL also refuses larger ones as decompression bombs
CHUNK = 4096  # the number of paths that are Python strings at the same time


class Paths(Sequence[str]):
    """An immutable sequence of paths in one buffer, which takes a third of the memory of strings.

    It is made from strings, or from the `text` of another `Paths`.
    """

    def __init__(self, paths: Iterable[str] | bytes = b"") -> None:
        if not isinstance(paths, bytes):
            rest = iter(paths)
            chunks = iter(lambda: list(islice(rest, CHUNK)), [])
            # A file name may contain any character except this separator.
            paths = b"\0".join(os.fsencode("\0".join(chunk)) for chunk in chunks)
        self.text = paths
        ends = np.flatnonzero(np.frombuffer(paths, np.uint8) == 0)
        self.bounds = np.concatenate([[-1], ends, [len(paths)]]) if paths else np.zeros(1, np.int64)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def decode(self, first: int, last: int) -> str:
        return os.fsdecode(self.text[self.bounds[first] + 1 : self.bounds[last + 1]])

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            chosen = range(len(self))[index]
            if len(chosen) > 1 and chosen.step == 1:
                return self.decode(chosen[0], chosen[-1]).split("\0")
            return [self[i] for i in chosen]
        i = range(len(self))[index]  # this supports negative numbers and raises IndexError
        return self.decode(i, i)

    def __iter__(self) -> Iterator[str]:
        starts = range(0, len(self), CHUNK)
        return chain.from_iterable(self[start : start + CHUNK] for start in starts)


Listing = tuple[Paths, np.ndarray, tuple[str, ...]]  # paths, their labels (int64), class names


@dataclass(frozen=True)
class Manifest:
    """One split: `sizes` `(N, 2)` are heights and widths in pixels, `labels` `(N,)` are int64.

    A label of -1 means unlabelled. Raises ValueError if the fields do not match each other, for a
    path that leads out of the data folder, and for an image of more than `MAX_PIXELS`.
    """

    split: str
    classes: tuple[str, ...]
    labels: np.ndarray
    sizes: np.ndarray
    fingerprint: str  # a hash of the content, which does not depend on the place of the data
    paths: Paths = field(default_factory=Paths)  # relative to the data folder; may be empty

    def __post_init__(self) -> None:
        count, sizes = self.labels.size, self.sizes
        path_count = len(self.paths or self.labels)
        if self.labels.shape != (count,) or sizes.shape != (count, 2) or path_count != count:
            raise ValueError(
                f"{self.labels.shape} labels, {sizes.shape} sizes and {len(self.paths)} paths"
            )
        if not ((self.labels >= -1) & (self.labels < max(1, len(self.classes)))).all():
            raise ValueError(f"labels up to {self.labels.max()} of {len(self.classes)} classes")
        pixels = sizes.astype(np.int64).prod(1)
        if (bad := (sizes < 1).any(1) | (pixels > MAX_PIXELS)).any():
            first = int(bad.argmax())
            name, px = self.paths[first] if self.paths else first, sizes[first].tolist()
            raise ValueError(
                f"image {name} is {px} px: images of 1 to {MAX_PIXELS:,} pixels are read"
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
    split: str, pixels: np.ndarray, labels: np.ndarray, classes: tuple[str, ...]
) -> Manifest:
    """The manifest of images already in memory, `pixels` `(N, H, W, 3)` uint8."""
    fingerprint = digest(pixels, labels.astype(np.int64))
    sizes = np.tile(np.array(pixels.shape[1:3], np.int32), (len(pixels), 1))
    return Manifest(split, classes, labels.astype(np.int64), sizes, fingerprint)


def digest(*parts: bytes | np.ndarray) -> str:
    """SHA-256 of the parts' bytes, one after the other."""
    total = hashlib.sha256()
    for part in parts:
        total.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else part)
    return total.hexdigest()


def fingerprint_files(listing: Listing, lengths: np.ndarray, sizes: np.ndarray) -> str:
    """SHA-256 of the classes and of a line per file (joined by newlines), followed by the sizes.

    `lengths` `(N,)` are the lengths of the files in bytes.
    """
    paths, labels, classes = listing
    lines = chain(classes, map("{}\t{}\t{}".format, paths, labels.tolist(), lengths.tolist()))
    total, joint = hashlib.sha256(), b""
    while chunk := list(islice(lines, CHUNK)):
        total.update(joint + "\n".join(chunk).encode("utf-8", "surrogateescape"))
        joint = b"\n"
    total.update(sizes.tobytes())
    return total.hexdigest()
