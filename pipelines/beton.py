"""Read and write FFCV's .beton files (version 2 of the format) without ffcv.

The record types below are the same as in ffcv. A file consists of:

    a header
    one descriptor for each field
    one metadata record for each of the N images, then padding to a full page
    the images, none of which crosses the border of a page
    one allocation record for each image

Files made by ffcv's own DatasetWriter can be read too, whichever of ffcv's types their fields have.
One RGB image field is read, and one int field as the label (`image_field`, `label_field`). The
other fields are skipped.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch.distributed as dist

from rsa_fast.pipelines.packed import ENTRY, Packed, read_classes
from rsa_fast.pipelines.sources import Source

log = logging.getLogger("rsa_fast")

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
POINTER = np.dtype("<u8")
BYTES = np.dtype([("ptr", "<u8"), ("size", "<u8")])
# The record of a field by ffcv's type number: float, int, RGB image, bytes, array, JSON, tensor.
# A custom field has number 255, and the file does not contain the length of its record.
INT, RGB = 1, 2
FIELD_TYPES: dict[int, np.dtype] = {
    0: np.dtype("<f8"),
    INT: np.dtype("<i8"),
    RGB: IMAGE,
    3: BYTES,
    4: POINTER,
    5: BYTES,
    6: POINTER,
}
WRITTEN = {"image": RGB, "label": INT}  # the fields of our own files
LABEL_NAMES = ("label", "labels", "target", "targets", "class", "cls", "y")
INDEX_NAMES = ("index", "indices", "idx", "id", "ids")
RAW = 1  # the image mode of plain pixels; 0 is JPEG
MAX_SIDE_PX = 2**16 - 1
# Without a description beside the file, at most this many class names are made up. A label beyond
# them means that the file is damaged.
MAX_CLASSES = 2**16
DEFAULT_PAGE_BYTES = 2**23


def beton_source(path: str | Path, split: str = "train") -> Source:
    """A .beton file as a `Source`. The sample ids follow the order of the file.

    The class names come from the `.json` file beside it. If there is none, as with ffcv's own
    files, they are "0", "1", ... Without a field for labels, every label is -1. `read` decodes both
    JPEGs and stored pixels. `encoded` is None if any image is stored as pixels.

    Raises FileNotFoundError if the file is missing. Raises ValueError (with the file's name) for
    another version, for a file without an image field or with a custom field, and for a file that
    is truncated or was never finished.
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
            raise ValueError(f"it has version {header['version']}, this code reads {VERSION}")
        fields = read_fields(path, header["fields"])
        record = np.dtype([("", FIELD_TYPES[kind]) for _, kind in fields], align=True)
        tables = HEADER.itemsize + len(fields) * FIELD.itemsize
        metadata = table(path, record, header["count"], tables)
        ints = {name: metadata[f"f{i}"] for i, (name, kind) in enumerate(fields) if kind == INT}
        image, label = image_field(fields), label_field(ints)
        if dict(fields) != WRITTEN:
            others = ", ".join(name for name, _ in fields if name not in (fields[image][0], label))
            log_once(
                f"{path}: the images are in field {fields[image][0]}, "
                f"{f'the labels in field {label}' if label else 'and there are no labels'}"
                f"{f'; fields not read: {others}' if others else ''}"
            )
        labels = ints[label] if label else np.full(len(metadata), -1)
        start = int(header["allocations_ptr"])
        if not 0 < start <= length:
            raise ValueError(
                "the allocation table is missing: the file is truncated or was never finished"
            )
        allocations = table(path, ALLOCATION, (length - start) // ALLOCATION.itemsize, start)
        return Packed([path], entries_of(metadata[f"f{image}"], labels, allocations))
    except ValueError as error:
        raise ValueError(f"cannot read {path} as FFCV's format: {error}") from error


@cache  # A file is opened for several splits.
def log_once(choice: str) -> None:
    """Log which fields are read, once per file and run."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        log.info(choice)


def read_fields(path: Path, count: int | None = None) -> list[tuple[str, int]]:
    """The names of a file's fields in their order, each with ffcv's number of its type.

    `count` is the number of fields, if it is known. Raises ValueError if the file is truncated, or
    has a custom field, because the length of such a field is not known.
    """
    if count is None:
        count = table(path, HEADER, 1, 0)[0]["fields"]
    descriptors = table(path, FIELD, count, HEADER.itemsize)
    names = [name.partition(b"\0")[0].decode("ascii", "replace") for name in descriptors["name"]]
    fields = list(zip(names, descriptors["type"].tolist(), strict=True))
    if unknown := [f"{name} ({kind})" for name, kind in fields if kind not in FIELD_TYPES]:
        raise ValueError(
            f"it has fields of custom types (with ffcv's number): {', '.join(unknown)}. "
            "Write the file again without them"
        )
    return fields


def image_field(fields: Sequence[tuple[str, int]]) -> int:
    """The position of the image in `fields`: the RGB field `image`, or the first of that type.

    Raises ValueError when there is none.
    """
    images = [i for i, (_, kind) in enumerate(fields) if kind == RGB]
    if not images:
        names = ", ".join(name for name, _ in fields)
        raise ValueError(f"none of its fields ({names}) is an RGBImageField")
    return next((i for i in images if fields[i][0] == "image"), images[0])


def label_field(ints: dict[str, np.ndarray]) -> str | None:
    """The name of the label field, or None. `ints` has the int fields: names and values `(N,)`.

    It is the first of `LABEL_NAMES` that exists, in upper or lower case. Otherwise it is the only
    int field that is not an index of the samples and whose values can be the numbers of classes.
    """
    by_name = {name.lower(): name for name in reversed(ints)}
    if label := next((by_name[name] for name in LABEL_NAMES if name in by_name), None):
        return label
    others = [
        name
        for name, values in ints.items()
        if name.lower() not in INDEX_NAMES
        and not np.array_equal(np.sort(values), np.arange(len(values)))
    ]
    if len(others) != 1:
        return None
    values = ints[others[0]]
    fits = values.min(initial=0) >= -1 and values.max(initial=0) < MAX_CLASSES
    return others[0] if fits else None


def table(path: Path, record: np.dtype, count: int, offset: int) -> np.ndarray:
    """`count` records from byte `offset` of the file. Raises ValueError when it is too short."""
    if (room := max(0, path.stat().st_size - offset) // record.itemsize) < count:
        raise ValueError(
            f"truncated: {room} of {count} records of {record.itemsize} bytes from byte {offset}"
        )
    return np.fromfile(path, record, int(count), offset=offset)


def entries_of(image: np.ndarray, labels: np.ndarray, allocations: np.ndarray) -> np.ndarray:
    """The images as `(N,)` of `ENTRY`, from their records `image` `(N,)` of `IMAGE`.

    Only the allocations contain the size of an image in bytes. The allocation of an image is found
    by its position. If two have the same position, the smaller one is an empty array or text.
    """
    allocations = allocations[np.lexsort((allocations["size"], allocations["ptr"]))]
    rank = np.searchsorted(allocations["ptr"], image["data_ptr"], side="right") - 1
    known = rank >= 0
    known[known] = allocations["ptr"][rank[known]] == image["data_ptr"][known]
    if not known.all():
        raise ValueError(
            f"truncated: {np.count_nonzero(~known)} of {len(known)} images are not in its "
            "allocation table"
        )
    entries = np.zeros(len(image), ENTRY)
    entries["offset"], entries["size"] = image["data_ptr"], allocations["size"][rank]
    entries["height"], entries["width"] = image["height"], image["width"]
    entries["raw"] = image["mode"] == RAW
    entries["label"] = labels
    return entries


def page_bytes(largest: int) -> int:
    """The page size in bytes for images of up to `largest` bytes.

    It is a power of two, and not smaller than ffcv's default.
    """
    return max(DEFAULT_PAGE_BYTES, 1 << (int(largest) - 1).bit_length())


class BetonWriter:
    """Appends images to a .beton file at `path`, in order.

    After a kill it continues after `done` `(n,)` of `ENTRY`, the images that are known to be
    written. `count` is the number of images of the finished file, and `page` is the size of a page
    in bytes. The layout depends only on the sizes of the images, so the same images give the same
    file. It is the layout of ffcv's writer with one worker. Raises ValueError when the file is
    shorter than `done` requires.
    """

    def __init__(self, path: Path, count: int, page: int, done: np.ndarray) -> None:
        self.count, self.page = count, page
        self.record = np.dtype([("image", IMAGE), ("label", FIELD_TYPES[INT])], align=True)
        tables = HEADER.itemsize + len(WRITTEN) * FIELD.itemsize + count * self.record.itemsize
        self.end = -(-tables // page) * page  # the first page that the tables leave free
        if len(done):
            self.end = int(done["offset"][-1] + done["size"][-1])
        self.file = path.open("r+b" if len(done) else "w+b")
        if len(done) and path.stat().st_size < self.end:
            raise ValueError(f"{path} is shorter than its journal: restart with --overwrite")
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
        fields = np.zeros(len(WRITTEN), FIELD)
        fields["name"], fields["type"] = list(WRITTEN), list(WRITTEN.values())
        metadata = np.zeros(self.count, self.record)
        metadata["label"] = entries["label"]
        image = metadata["image"]  # a view: writing to it fills `metadata`
        image["data_ptr"], image["mode"] = entries["offset"], entries["raw"] * RAW
        image["height"], image["width"] = entries["height"], entries["width"]
        header = np.array((VERSION, len(WRITTEN), self.page, self.count, self.end), HEADER)
        self.file.seek(0)
        self.file.write(header.tobytes())
        self.file.write(fields.tobytes() + metadata.tobytes())
        self.sync()

    def close(self) -> None:
        self.file.close()
