"""Images packed into a few big files. Each image is a range of bytes, which any thread can read.

`beton.py` (FFCV's .beton files) and `shards.py` (tar shards) read their own tables into one array
of `ENTRY` records. There is no object per image, so a million images are opened in well under a
second.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import resource
from collections.abc import Sequence
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from rsa_fast.pipelines.extents import Extents
from rsa_fast.pipelines.files import partial_name
from rsa_fast.pipelines.manifest import Manifest
from rsa_fast.pipelines.sources import Source, open_image, to_rgb

VERSION = 1  # the format of the description that is written beside a packed split
ENTRY = np.dtype(
    [
        ("file", "<i4"),  # index of the file
        ("offset", "<i8"),  # position of the first byte in that file
        ("size", "<i8"),  # in bytes
        ("label", "<i8"),
        ("height", "<i4"),  # in pixels
        ("width", "<i4"),
        ("raw", "?"),  # True for pixels (H, W, 3) uint8, False for a JPEG
    ]
)


class Packed:
    """The images of one split: `entries` `(N,)` of `ENTRY` are their places in the files `paths`.

    A few files are opened once and stay open. A split uses at most a quarter of the file
    descriptors that the process has left. If it has more files, the least recently read ones are
    closed, and are opened again when they are needed.

    Raises FileNotFoundError for a missing file. Raises ValueError for a file that ends before its
    last image (with its name), for entries outside their file, and for overlapping entries.
    """

    def __init__(self, paths: Sequence[Path], entries: np.ndarray) -> None:
        self.paths, self.entries = tuple(paths), entries
        self.states = [state_of(os.stat(path)) for path in paths]
        file, start, size = entries["file"], entries["offset"], entries["size"]
        outside = (file < 0) | (file >= len(paths)) | (start < 0) | (size < 1)
        if outside.any():
            raise ValueError(
                f"image {outside.argmax()} is outside its file: "
                "the table is damaged, convert or index the data again"
            )
        limit = max(1, free_descriptors() // 4)
        # Reading from the cache needs no lock of our own. A file that leaves the cache is closed
        # after its last reader, because nothing refers to it any more.
        self.opened = lru_cache(limit)(partial(open_file, self.paths, self.states))
        # In a folder to which `tools.stage` copies, a file is a link until its copy is complete.
        self.copies = {
            number: (str(path.with_name(partial_name(path.name))), str(path))
            for number, path in enumerate(paths)
            if path.is_symlink()
        }
        for number in range(min(limit, len(paths))):
            self.opened(number)
        lengths = np.array([size for size, _ in self.states], np.int64)
        if (beyond := np.flatnonzero(size > lengths[file] - start)).size:
            last = entries[beyond[-1]]
            end = int(last["offset"]) + int(last["size"])
            raise ValueError(
                f"{paths[last['file']]} is truncated: it has {lengths[last['file']]:,} bytes, but "
                f"its images end at {end:,}. Copy or convert it again"
            )
        order = np.lexsort((start, file))
        file, start, end = file[order], start[order], (start + size)[order]
        overlaps = (file[1:] == file[:-1]) & (start[1:] < end[:-1])
        if overlaps.any():
            pair = sorted(order[overlaps.argmax() :][:2].tolist())
            raise ValueError(
                f"images {pair[0]} and {pair[1]} overlap: "
                "the table is damaged, convert or index the data again"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def bytes_at(self, number: int, size: int, offset: int) -> bytes:
        """Up to `size` bytes of a file from byte `offset`, fewer if the file ends before."""
        for copy in self.copies.get(number, ()):
            if len(data := read_copy(copy, size, offset)) == size:
                return data
        file = self.opened(number)  # this reference keeps the file open until it is read
        return os.pread(file.fileno(), size, offset)

    def stored(self, sample: int) -> bytes:
        """The bytes of one image as stored: a JPEG or, if the entry is raw, its pixels."""
        entry = self.entries[sample]
        size, offset = int(entry["size"]), int(entry["offset"])
        try:
            data = self.bytes_at(int(entry["file"]), size, offset)
        except OSError as error:
            raise ValueError(f"cannot read {self.name(sample)}: {error}") from error
        if len(data) != size:
            raise ValueError(
                f"{self.name(sample)}: found {len(data)} of {size} bytes: "
                "the file was truncated after it was opened"
            )
        return data

    def decode(self, sample: int, data: bytes) -> np.ndarray:
        """The image `(H, W, 3)` uint8 from the bytes that `stored` returned.

        Raises ValueError when they are not an image of the size in the entry.
        """
        entry = self.entries[sample]
        shape = (int(entry["height"]), int(entry["width"]), 3)
        try:
            pixels: np.ndarray
            if entry["raw"]:
                pixels = np.frombuffer(data, np.uint8).reshape(shape).copy()
            else:
                pixels = to_rgb(open_image(io.BytesIO(data)))
        except Exception as error:  # A decoder may raise any exception for damaged bytes.
            reason = f"cannot decode {self.name(sample)}: {error}. Convert or index the data again"
            raise ValueError(reason) from error
        if pixels.shape != shape:
            raise ValueError(
                f"{self.name(sample)} has shape {pixels.shape}, but {shape} in its table. "
                "Convert or index the data again"
            )
        return pixels

    def read(self, sample: int) -> np.ndarray:
        """One image `(H, W, 3)` uint8."""
        return self.decode(sample, self.stored(sample))

    def file(self, sample: int) -> Path:
        """The file that an image is in."""
        return self.paths[int(self.entries["file"][sample])]

    def name(self, sample: int) -> str:
        return f"image {sample} of {self.file(sample)}"

    def source(self, split: str, classes: tuple[str, ...]) -> Source:
        """The split as a `Source`.

        Its `encoded` is None if any image is stored as pixels, because there is no JPEG to return.
        """
        sizes = np.stack([self.entries["height"], self.entries["width"]], -1)
        labels = np.ascontiguousarray(self.entries["label"])
        # The names of folders may be invalid UTF-8, which Python's strings contain as surrogates.
        digest = hashlib.sha256("\n".join(classes).encode("utf-8", "surrogatepass"))
        digest.update(self.entries.data)
        try:
            manifest = Manifest(split, classes, labels, sizes, digest.hexdigest())
        except ValueError as error:
            reason = (
                f"{self.paths[0]} and the files beside it: {error}. Convert or index the data again"
            )
            raise ValueError(reason) from error
        encoded = None if self.entries["raw"].any() else self.stored
        file, offset, size = (self.entries[name] for name in ("file", "offset", "size"))
        extents = Extents(file, offset, size, self.opened)
        return Source(manifest, self.read, encoded, file=self.file, extents=extents)


def read_copy(path: str, size: int, offset: int) -> bytes:
    """Up to `size` bytes of a copy from byte `offset`, fewer if they are not copied yet."""
    try:
        copy = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # a link leads to the original
    except OSError:
        return b""
    try:
        return os.pread(copy, size, offset)
    finally:
        os.close(copy)


def open_file(paths: Sequence[Path], states: Sequence[tuple[int, int]], number: int) -> io.FileIO:
    """Open one of the files `paths`. Replacing the file later does not change the open one.

    Raises ValueError if its state is no longer that in `states` (`state_of`).
    """
    file = io.FileIO(paths[number])
    if (state := state_of(os.fstat(file.fileno()))) != states[number]:
        raise ValueError(
            f"{paths[number]} was changed or replaced after the split was opened: it has "
            f"{state[0]:,} bytes, before it had {states[number][0]:,}"
        )
    return file


def state_of(stat: os.stat_result) -> tuple[int, int]:
    """Size in bytes and modification time in nanoseconds."""
    return stat.st_size, stat.st_mtime_ns


def free_descriptors() -> int:
    """How many more files this process may open."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit - len(os.listdir("/proc/self/fd"))


def read_classes(path: Path, form: str, count: int) -> tuple[str, ...]:
    """The class names from the description that the converters write beside a split.

    `form` is "beton" or "shards", and `count` is the number of images. Raises FileNotFoundError
    if there is no description, and ValueError if it describes other data.
    """
    try:
        description = json.loads(path.read_text())
        if description["version"] != VERSION:
            raise ValueError(f"it has version {description['version']}, this code reads {VERSION}")
        if (description["format"], description["count"]) != (form, count):
            raise ValueError(
                f"it describes {description['count']} images as {description['format']}, but "
                f"there are {count} as {form}"
            )
        classes = description["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise ValueError("its classes are not a list of names")
        return tuple(classes)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not describe the images beside it ({error}): remove it, or convert again"
        ) from error
