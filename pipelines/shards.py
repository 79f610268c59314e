"""Tar shards, as WebDataset and DALI read them, with an index by which an image takes one read.

    train.json
    train/index.npz
    train/shard-000000.tar   train/shard-000000.idx
    train/shard-000001.tar   ...

A sample consists of two members, `<key>.jpg` and `<key>.cls` (its label as text). The key is the
number of the sample in the split. The `.idx` files have the format of DALI's wds2idx. `index.npz`
contains six columns with one number per sample: shard, offset, size, label, height and width.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np

from pipelines.npz import read_npz
from pipelines.packed import ENTRY, Packed, read_classes
from pipelines.sources import Source

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # 512 and 10,240 bytes
# The columns of index.npz, and the fields of `packed.ENTRY` that they are read into.
INDEX = {
    "shard": "file",
    "offset": "offset",
    "size": "size",
    "label": "label",
    "height": "height",
    "width": "width",
}
INDEX_VERSION = "v1.2"  # the version of wds2idx whose format the .idx files have


def shard_source(folder: Path, split: str) -> Source:
    """The shards in a folder as the `Source` of a split.

    Raises FileNotFoundError for missing files, and ValueError for a truncated shard (with its name)
    or an index that does not belong to the shards.
    """
    packed = open_shards(folder)
    classes = read_classes(folder.with_suffix(".json"), "shards", len(packed))
    return packed.source(split, classes)


def open_shards(folder: Path) -> Packed:
    """The images and labels in one folder of shards. Raises the same errors as `shard_source`."""
    index = folder / "index.npz"
    if not index.is_file():
        raise FileNotFoundError(f"no {index}: python -m tools.to_dali writes shards with one")
    try:
        columns = read_npz(index, {column: ENTRY[field] for column, field in INDEX.items()})
        count = len(columns["shard"])
        if any(values.shape != (count,) for values in columns.values()):
            raise ValueError("its columns differ in length")
        if (shards := int(columns["shard"].max(initial=-1)) + 1) > count:
            raise ValueError(f"{shards} shards of {count} images")
    except (ValueError, TypeError) as error:
        reason = f"{index} is no index of shards ({error}): convert the data again"
        raise ValueError(reason) from error
    entries = np.zeros(count, ENTRY)
    for column, field in INDEX.items():
        entries[field] = columns[column]
    try:
        return Packed([shard_path(folder, shard) for shard in range(shards)], entries)
    except ValueError as error:
        raise ValueError(f"{folder} is not what {index.name} says: {error}") from error


def stored_label(packed: Packed, sample: int) -> int:
    """The label of a sample as stored in its `.cls` member, which follows the image."""
    entry = packed.entries[sample]
    start = int(entry["offset"]) + padded(int(entry["size"])) + BLOCK
    return int(os.pread(packed.files[entry["file"]].fileno(), BLOCK, start).rstrip(b"\0"))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06}.tar"


def padded(size: int) -> int:
    """The bytes that `size` bytes of data take in a tar file."""
    return -(-size // BLOCK) * BLOCK


def member(name: str, data: bytes) -> bytes:
    """The bytes of a tar member. They do not depend on the time, the user or the machine."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


class ShardWriter:
    """Appends samples to the shards of `folder`, in order.

    After a kill it continues behind `done` `(n,)` of `ENTRY`, the samples that are known to be
    written. Whatever follows them in the folder is deleted. A shard is closed before the sample
    that would make it larger than `shard_bytes`, but contains at least one sample. Raises
    ValueError when a shard is shorter than `done` says.
    """

    def __init__(self, folder: Path, shard_bytes: int, done: np.ndarray) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.shard_bytes, self.samples = folder, shard_bytes, len(done)
        self.shard, self.end = 0, 0  # the last shard, and its length in bytes
        if len(done):
            self.shard = int(done["file"][-1])
            self.end = int(done["offset"][-1]) + padded(int(done["size"][-1])) + 2 * BLOCK
        for path in folder.glob("shard-*.tar"):
            if path > shard_path(folder, self.shard):
                path.unlink()
        self.open()

    def open(self) -> None:
        """Open the last shard and cut it to the samples that are known to be written."""
        path = shard_path(self.folder, self.shard)
        self.file = path.open("r+b" if self.end else "w+b")
        if path.stat().st_size < self.end:
            raise ValueError(f"{path} is shorter than its journal says: restart with --overwrite")
        self.file.truncate(self.end)
        self.file.seek(self.end)

    def append(self, data: bytes, label: int) -> tuple[int, int]:
        """Write one JPEG and its label. Returns the number of the shard and the JPEG's position."""
        key = f"{self.samples:08}"
        image, text = member(f"{key}.jpg", data), member(f"{key}.cls", str(label).encode())
        if self.end and self.end + len(image) + len(text) + RECORD > self.shard_bytes:
            self.end_shard()
            self.shard, self.end = self.shard + 1, 0
            self.open()
        offset = self.end + BLOCK
        self.file.write(image + text)
        self.end += len(image) + len(text)
        self.samples += 1
        return self.shard, offset

    def sync(self) -> None:
        """Wait until all appended samples are on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def end_shard(self) -> None:
        """Close the last shard: two empty blocks, then zeros up to a multiple of `RECORD`."""
        end = self.end + 2 * BLOCK
        self.file.write(bytes(2 * BLOCK + -end % RECORD))
        self.sync()
        self.close()

    def finish(self, entries: np.ndarray) -> None:
        """Close the last shard and write the index files of all `entries` `(N,)` of `ENTRY`."""
        self.end_shard()
        shards = np.split(np.arange(len(entries)), np.flatnonzero(np.diff(entries["file"])) + 1)
        for shard, samples in enumerate(shards):
            with shard_path(self.folder, shard).with_suffix(".idx").open("w") as file:
                file.write(f"{INDEX_VERSION} {len(samples)}\n")
                file.writelines(index_line(sample, entries[sample]) for sample in samples)
                file.flush()
                os.fsync(file.fileno())
        with (self.folder / "index.npz").open("wb") as file:
            np.savez(
                file,
                shard=entries["file"],
                offset=entries["offset"],
                size=entries["size"],
                label=entries["label"],
                height=entries["height"],
                width=entries["width"],
            )
            file.flush()
            os.fsync(file.fileno())


def index_line(sample: int, entry: np.void) -> str:
    """The line of a sample in an `.idx` file: type, position, size and name of both members."""
    label_offset = entry["offset"] + padded(int(entry["size"])) + BLOCK
    image = f"jpg {entry['offset']} {entry['size']} {sample:08}.jpg"
    return f"{image} cls {label_offset} {len(str(entry['label']))} {sample:08}.cls\n"
