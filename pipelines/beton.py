"""FFCV's .beton files (version 2 of the format), read and written without ffcv.

The record types below are the same as in ffcv. A file consists of:

    a header
    one descriptor for each field
    one metadata record for each of the N images, then padding to a full page
    the images, none of which crosses the border of a page
    one allocation record for each image

Files made by ffcv's own DatasetWriter can be read too, if they have the fields of ffcv's ImageNet
scripts: `image` (RGB) and `label` (int).
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from pipelines.packed import ENTRY, Packed, read_classes
from pipelines.sources import Source

VERSION = 2  # the version of FFCV's format
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
# Without a description beside the file, at most this many class names are made up. A label beyond
# them means that the file is damaged.
MAX_CLASSES = 2**16
DEFAULT_PAGE_BYTES = 2**23


def beton_source(path: str | Path, split: str = "train") -> Source:
    """A .beton file as a `Source`. The sample ids follow the order of the file.

    The class names come from the `.json` file beside it. If there is none, as with ffcv's own
    files, they are "0", "1", ... `read` decodes both JPEGs and stored pixels. `encoded` is None if
    any image is stored as pixels. Raises FileNotFoundError, and ValueError (with the file's name)
    for another version, other fields, or a file that is truncated or was never finished.
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
    """The images and labels of a .beton file. Raises the same errors as `beton_source`."""
    length = path.stat().st_size
    try:
        header = table(path, HEADER, 1, 0)[0]
        if header["version"] != VERSION:
            raise ValueError(f"version {header['version']}, this code reads {VERSION}")
        fields = table(path, FIELD, header["fields"], HEADER.itemsize)
        names = [name.decode("ascii", "replace") for name in fields["name"]]
        types = dict(zip(names, fields["type"].tolist(), strict=True))
        if not WANTED.items() <= types.items() or not set(types.values()) <= set(FIELD_TYPES):
            raise ValueError(f"fields {types}, wanted {WANTED} (name: ffcv's type number)")
        record = np.dtype([(name, FIELD_TYPES[kind]) for name, kind in types.items()], align=True)
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
    """`count` records from byte `offset` of the file. Raises ValueError when it is too short."""
    if (room := max(0, path.stat().st_size - offset) // record.itemsize) < count:
        raise ValueError(
            f"truncated: {room} of {count} records of {record.itemsize} bytes from byte {offset}"
        )
    return np.fromfile(path, record, int(count), offset=offset)


def entries_of(metadata: np.ndarray, allocations: np.ndarray) -> np.ndarray:
    """The images as `(N,)` of `ENTRY`.

    Only the allocations contain the size of an image in bytes. They are found by its position.
    """
    image = metadata["image"]
    allocations = allocations[np.argsort(allocations["ptr"], kind="stable")]
    rank = np.searchsorted(allocations["ptr"], image["data_ptr"])
    known = rank < len(allocations)
    known[known] = allocations["ptr"][rank[known]] == image["data_ptr"][known]
    if not known.all():
        raise ValueError(
            f"truncated: {np.count_nonzero(~known)} of {len(known)} images are not in its "
            "allocation table"
        )
    entries = np.zeros(len(metadata), ENTRY)
    entries["offset"], entries["size"] = image["data_ptr"], allocations["size"][rank]
    entries["height"], entries["width"] = image["height"], image["width"]
    entries["raw"] = image["mode"] == RAW
    entries["label"] = metadata["label"]
    return entries


def page_bytes(largest: int) -> int:
    """The page size in bytes for images of up to `largest` bytes.

    It is a power of two, and not smaller than ffcv's default.
    """
    return max(DEFAULT_PAGE_BYTES, 1 << (int(largest) - 1).bit_length())


class BetonWriter:
    """Appends images to a .beton file at `path`, in order.

    After a kill it continues behind `done` `(n,)` of `ENTRY`, the images that are known to be
    written. `count` is the number of images of the finished file, and `page` the size of a page in
    bytes. The layout depends only on the sizes of the images, so the same images give the same
    file. It is the layout of ffcv's writer with one worker. Raises ValueError when the file is
    shorter than `done` says.
    """

    def __init__(self, path: Path, count: int, page: int, done: np.ndarray) -> None:
        self.count, self.page = count, page
        self.record = np.dtype([("image", IMAGE), ("label", FIELD_TYPES[1])], align=True)
        tables = HEADER.itemsize + len(WANTED) * FIELD.itemsize + count * self.record.itemsize
        self.end = -(-tables // page) * page  # the first page that the tables leave free
        if len(done):
            self.end = int(done["offset"][-1] + done["size"][-1])
        self.file = path.open("r+b" if len(done) else "w+b")
        if len(done) and path.stat().st_size < self.end:
            raise ValueError(f"{path} is shorter than its journal says: restart with --overwrite")
        self.file.truncate(self.end)
        self.file.seek(self.end)

    def append(self, data: bytes, label: int) -> tuple[int, int]:
        """Write one image. Returns the index of the file, which is 0, and the position in it.

        The labels are written by `finish`. Raises ValueError for an image larger than a page.
        """
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
        """Fill the last page with zeros."""
        rest = -self.end % self.page
        self.file.write(bytes(rest))
        self.end += rest

    def sync(self) -> None:
        """Wait until all appended images are on the disk."""
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
        metadata["label"] = entries["label"]
        image = metadata["image"]  # a view: writing to it fills `metadata`
        image["data_ptr"], image["mode"] = entries["offset"], entries["raw"] * RAW
        image["height"], image["width"] = entries["height"], entries["width"]
        header = np.array((VERSION, len(WANTED), self.page, self.count, self.end), HEADER)
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.write(fields.tobytes() + metadata.tobytes())
        self.sync()

    def close(self) -> None:
        self.file.close()
