"""Images packed in a few big files: each is one range of bytes, read by its position, from any thread.

What FFCV's .beton and tar shards have in common once their own tables are read (`beton.py`, `shards.py`): one array of
`ENTRY` records, no object per image, so that a million images open in well under a second.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.manifest import Manifest
from pipelines.sources import Source, to_rgb

VERSION = 1  # of the description written beside a packed split
ENTRY = np.dtype(
    [
        ("file", "<i4"),  # index into the files
        ("offset", "<i8"),  # of the first byte in that file
        ("size", "<i8"),  # in bytes
        ("label", "<i8"),
        ("height", "<i4"),  # in pixels
        ("width", "<i4"),
        ("raw", "?"),  # pixels (H, W, 3) uint8; else a JPEG
    ]
)


class Packed:
    """The images of one split: `entries` `(N,)` of `ENTRY` into `files`, each opened once and read by position.

    Raises ValueError naming a file that ends before its last image, and for entries outside of their file or one on
    another; FileNotFoundError for a missing file.
    """

    def __init__(self, files: Sequence[Path], entries: np.ndarray) -> None:
        self.paths, self.entries = tuple(files), entries
        file, start, size = entries["file"], entries["offset"], entries["size"]
        if (outside := (file < 0) | (file >= len(files)) | (start < 0) | (size < 1)).any():
            raise ValueError(
                f"image {outside.argmax()} lies outside its file: the table is damaged, convert the data again"
            )
        self.files = [path.open("rb", buffering=0) for path in files]
        lengths = np.array([os.fstat(opened.fileno()).st_size for opened in self.files], np.int64)
        if (beyond := np.flatnonzero(size > lengths[file] - start)).size:
            last = entries[beyond[-1]]
            path, found, end = (
                files[last["file"]],
                lengths[last["file"]],
                int(last["offset"]) + int(last["size"]),
            )
            raise ValueError(
                f"{path} is truncated: {found:,} bytes, its images end at {end:,}. Copy or convert it again"
            )
        order = np.lexsort((start, file))
        file, start, end = file[order], start[order], (start + size)[order]
        if (on_another := (file[1:] == file[:-1]) & (start[1:] < end[:-1])).any():
            pair = sorted(order[on_another.argmax() :][:2].tolist())
            raise ValueError(
                f"images {pair[0]} and {pair[1]} lie on one another: the table is damaged, convert the data again"
            )

    def __len__(self) -> int:
        return len(self.entries)

    def stored(self, sample: int) -> bytes:
        """The bytes of one image as stored: a JPEG or, where the entry says raw, its pixels."""
        entry = self.entries[sample]
        try:
            data = os.pread(
                self.files[entry["file"]].fileno(), int(entry["size"]), int(entry["offset"])
            )
        except OSError as error:
            raise ValueError(f"cannot read {self.name(sample)}: {error}") from error
        if len(data) != entry["size"]:
            raise ValueError(
                f"{self.name(sample)}: {len(data)} of {entry['size']} bytes: the file was cut since it was opened"
            )
        return data

    def decode(self, sample: int, data: bytes) -> np.ndarray:
        """`(H, W, 3)` uint8 from what `stored` gave. Raises ValueError when that is no image of the entry's size."""
        entry = self.entries[sample]
        shape = (int(entry["height"]), int(entry["width"]), 3)
        try:
            pixels: np.ndarray
            if entry["raw"]:
                pixels = np.frombuffer(data, np.uint8).reshape(shape).copy()
            else:
                pixels = to_rgb(Image.open(io.BytesIO(data)))
        except (
            Exception
        ) as error:  # on damaged bytes decoders raise whatever their authors did not think of
            raise ValueError(
                f"cannot decode {self.name(sample)}: {error}. Convert the data again"
            ) from error
        if pixels.shape != shape:
            raise ValueError(
                f"{self.name(sample)} is {pixels.shape}, its table says {shape}. Convert the data again"
            )
        return pixels

    def read(self, sample: int) -> np.ndarray:
        return self.decode(sample, self.stored(sample))

    def name(self, sample: int) -> str:
        return f"image {sample} of {self.paths[self.entries['file'][sample]]}"

    def source(self, split: str, classes: tuple[str, ...]) -> Source:
        """The split as a `Source`. `encoded` is there only when every image is a JPEG: pixels have no file to hand out."""
        sizes = np.stack([self.entries["height"], self.entries["width"]], -1)
        labels = np.ascontiguousarray(self.entries["label"])
        digest = hashlib.sha256("\n".join(classes).encode())
        digest.update(self.entries.data)
        try:
            manifest = Manifest(split, classes, labels, sizes, digest.hexdigest())
        except ValueError as error:
            raise ValueError(
                f"{self.paths[0]} and what is beside it: {error}. Convert the data again"
            ) from error
        return Source(manifest, self.read, None if self.entries["raw"].any() else self.stored)


def read_classes(path: Path, form: str, count: int) -> tuple[str, ...]:
    """The class names in the description that the converters write beside a split.

    `form` is "beton" or "shards"; `count` is the number of images.

    Raises FileNotFoundError when there is none, ValueError naming it when it belongs to something else.
    """
    try:
        found = json.loads(path.read_text())
        if found["version"] != VERSION:
            raise ValueError(f"version {found['version']}, this code reads {VERSION}")
        if (found["format"], found["count"]) != (form, count):
            raise ValueError(
                f"it describes {found['count']} images as {found['format']}, beside {count} as {form}"
            )
        if not isinstance(found["classes"], list) or not all(
            isinstance(name, str) for name in found["classes"]
        ):
            raise ValueError("its classes are no list of names")
        return tuple(found["classes"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} does not describe the images beside it ({error}): remove it, or convert again"
        ) from error
