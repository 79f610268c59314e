"""FFCV's .beton files, read and written without ffcv: the types below equal ffcv's, version 2.

    header | one descriptor per field | N metadata records | padding to a page | images, none across a page | allocations

Files of ffcv's own DatasetWriter are read too, as its ImageNet scripts write them: fields `image` (RGB) and `label` (int).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.packed import ENTRY, Packed, read_classes
from pipelines.sources import Source

VERSION = 2  # of ffcv's format
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("fields", "<u2"),
        ("page_bytes", "<u4"),
        ("count", "<u8"),
        ("allocations_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type", "u1"), ("name", "S16"), ("arguments", "V1024")])
IMAGE = np.dtype([("mode", "u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
ALLOCATION = np.dtype([("sample", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
FIELD_TYPES = {0: np.dtype("<f8"), 1: np.dtype("<i8"), 2: IMAGE}  # float, int, RGB image
WANTED = {"image": 2, "label": 1}
RAW = 1  # the image mode of plain pixels; 0 is JPEG
MAX_SIDE_PX = 2**16 - 1
MAX_CLASSES = 2**16  # for which names are made up; a label beyond them is damage
DEFAULT_PAGE_BYTES = 2**23


def beton_source(path: str | Path, split: str = "train") -> Source:
    """A .beton file as a `Source`, sample ids in the file's order.

    Class names come from the `.json` beside the file; without one, as with ffcv's own files, they are "0", "1", ...
    `read` decodes both modes; `encoded` is None where some image is stored as pixels. Raises FileNotFoundError, and
    ValueError naming the file for another version, other fields, or a file that is truncated or was never finished.
    """
    path = Path(path)
    packed = open_beton(path)
    try:
        classes = read_classes(path.with_suffix(".json"), "beton", len(packed))
    except FileNotFoundError:
        count = min(packed.entries["label"].max(initial=-1), MAX_CLASSES - 1) + 1
        classes = tuple(map(str, range(count)))
    return replace(packed.source(split, classes), beton=path)


def open_beton(path: Path) -> Packed:
    """The images and labels of a .beton file. Raises as `beton_source`."""
    length = path.stat().st_size
    try:
        header = table(path, HEADER, 1, 0)[0]
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']}, this code reads {VERSION}")
        fields = table(path, FIELD, header["fields"], HEADER.itemsize)
        found = {
            name.decode("ascii", "replace"): int(kind)
            for name, kind in zip(fields["name"], fields["type"], strict=True)
        }
        if not WANTED.items() <= found.items() or not set(found.values()) <= set(FIELD_TYPES):
            raise ValueError(f"fields {found}, wanted {WANTED} (name: ffcv's type number)")
        record = np.dtype([(name, FIELD_TYPES[kind]) for name, kind in found.items()], align=True)
        metadata = table(path, record, header["count"], HEADER.itemsize + fields.nbytes)
        start = int(header["allocations_ptr"])
        if not 0 < start <= length:
            raise ValueError(
                "its allocation table is missing: it is truncated, or its writer never finished"
            )
        allocations = table(path, ALLOCATION, (length - start) // ALLOCATION.itemsize, start)
        return Packed([path], entries_of(metadata, allocations))
    except ValueError as error:
        raise ValueError(f"cannot read {path} as FFCV's format: {error}") from error


def table(path: Path, record: np.dtype, count: int, offset: int) -> np.ndarray:
    if (room := max(0, path.stat().st_size - offset) // record.itemsize) < count:
        raise ValueError(
            f"truncated: {room} of {count} records of {record.itemsize} bytes from byte {offset}"
        )
    return np.fromfile(path, record, int(count), offset=offset)


def entries_of(metadata: np.ndarray, allocations: np.ndarray) -> np.ndarray:
    """`(N,)` of `ENTRY`. The size of an image in bytes stands in the allocations only, under its position."""
    image = metadata["image"]
    allocations = allocations[np.argsort(allocations["ptr"], kind="stable")]
    rank = np.searchsorted(allocations["ptr"], image["data_ptr"])
    known = rank < len(allocations)
    known[known] = allocations["ptr"][rank[known]] == image["data_ptr"][known]
    if not known.all():
        raise ValueError(
            f"truncated: {np.count_nonzero(~known)} of {len(known)} images are not in its allocation table"
        )
    entries = np.zeros(len(metadata), ENTRY)
    entries["offset"], entries["size"] = image["data_ptr"], allocations["size"][rank]
    entries["height"], entries["width"], entries["raw"] = (
        image["height"],
        image["width"],
        image["mode"] == RAW,
    )
    entries["label"] = metadata["label"]
    return entries


def page_bytes(largest: int) -> int:
    """The page size for images of up to `largest` bytes: a power of two, ffcv's own default where that is enough."""
    return max(DEFAULT_PAGE_BYTES, 1 << (int(largest) - 1).bit_length())


class BetonWriter:
    """Appends images to a .beton file at `path`, in order; after a kill it goes on behind `done`, what is known written.

    The layout is a function of the images' sizes alone, that of ffcv's writer with one worker: equal images, equal bytes.
    `count` is the number of images in the end. Raises ValueError when the file is shorter than `done` says.
    """

    def __init__(self, path: Path, count: int, page: int, done: np.ndarray) -> None:
        self.count, self.page = count, page
        self.record = np.dtype([("image", IMAGE), ("label", FIELD_TYPES[1])], align=True)
        tables = HEADER.itemsize + len(WANTED) * FIELD.itemsize + count * self.record.itemsize
        self.end = (
            int(done["offset"][-1] + done["size"][-1]) if len(done) else -(-tables // page) * page
        )
        self.file = path.open("r+b" if len(done) else "w+b")
        if len(done) and path.stat().st_size < self.end:
            raise ValueError(f"{path} is shorter than its journal says: restart with --overwrite")
        self.file.truncate(self.end)
        self.file.seek(self.end)

    def append(self, data: bytes, label: int) -> tuple[int, int]:
        """Write one image; returns the file's index, which is 0, and the position in it. The label waits for `finish`."""
        if len(data) > self.page:
            raise ValueError(
                f"an image of {len(data):,} bytes does not fit a page of {self.page:,}"
            )
        if len(data) > self.page - self.end % self.page:
            self.pad_page()
        self.file.write(data)
        self.end += len(data)
        return 0, self.end - len(data)

    def pad_page(self) -> None:
        rest = -self.end % self.page
        self.file.write(bytes(rest))
        self.end += rest

    def sync(self) -> None:
        """Put what was appended on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def finish(self, entries: np.ndarray) -> None:
        """Write the tables for all `entries` `(count,)` of `ENTRY`."""
        self.pad_page()
        allocations = np.zeros(self.count, ALLOCATION)
        allocations["sample"] = np.arange(self.count)
        allocations["ptr"], allocations["size"] = entries["offset"], entries["size"]
        self.file.write(allocations.tobytes())
        fields = np.zeros(len(WANTED), FIELD)
        fields["name"], fields["type"] = list(WANTED), list(WANTED.values())
        metadata = np.zeros(self.count, self.record)
        metadata["image"]["data_ptr"], metadata["image"]["mode"] = (
            entries["offset"],
            entries["raw"] * RAW,
        )
        metadata["image"]["height"], metadata["image"]["width"] = (
            entries["height"],
            entries["width"],
        )
        metadata["label"] = entries["label"]
        self.file.seek(0)
        self.file.write(
            np.array((VERSION, len(WANTED), self.page, self.count, self.end), HEADER).tobytes()
        )
        self.file.write(fields.tobytes() + metadata.tobytes())
        self.sync()

    def close(self) -> None:
        self.file.close()
