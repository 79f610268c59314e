"""Tar shards, as WebDataset and DALI read them, with an index that makes every image one read.

    train.json   train/index.npz   train/shard-000000.tar   train/shard-000000.idx   train/shard-000001.tar ...

A sample is two members, `<key>.jpg` and `<key>.cls` (its label as text); the key is its number in the split. The `.idx` is
what DALI's wds2idx writes. `index.npz` holds shard, offset, size, label, height and width, one number each per sample.
"""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import numpy as np

from pipelines.npz import read_npz
from pipelines.packed import ENTRY, Packed, read_classes
from pipelines.sources import Source, split_folder

BLOCK, RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE  # 512 and 10,240 bytes
INDEX = {
    "shard": "file",
    "offset": "offset",
    "size": "size",
    "label": "label",
    "height": "height",
    "width": "width",
}
INDEX_VERSION = "v1.2"  # of wds2idx


def shard_source(data: str | Path, split: str) -> Source:
    """The shards under `data` of "pretrain" and "train" (`train/`) or "test" (`val/` or `test/`) as a `Source`.

    Raises FileNotFoundError for missing files, ValueError naming a truncated shard or an index of something else.
    """
    folder = split_folder(Path(data), split)
    packed = open_shards(folder)
    classes = read_classes(folder.with_suffix(".json"), "shards", len(packed))
    return packed.source(split, classes)


def open_shards(folder: Path) -> Packed:
    """The images and labels of one folder of shards. Raises as `shard_source`."""
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
        raise ValueError(
            f"{index} is no index of shards ({error}): convert the data again"
        ) from error
    entries = np.zeros(count, ENTRY)
    for column, field in INDEX.items():
        entries[field] = columns[column]
    try:
        return Packed([shard_path(folder, shard) for shard in range(shards)], entries)
    except ValueError as error:
        raise ValueError(f"{folder} is not what {index.name} says: {error}") from error


def stored_label(packed: Packed, sample: int) -> int:
    """The label as its tar member says it, behind the image."""
    entry = packed.entries[sample]
    start = int(entry["offset"]) + padded(int(entry["size"])) + BLOCK
    return int(os.pread(packed.files[entry["file"]].fileno(), BLOCK, start).rstrip(b"\0"))


def shard_path(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:06}.tar"


def padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def member(name: str, data: bytes) -> bytes:
    """A tar member: the same bytes wherever and whenever it is written."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % BLOCK)


class ShardWriter:
    """Appends samples to the shards of `folder`, in order; after a kill it goes on behind `done`, what is known written.

    A shard is closed before the sample that would take it over `shard_bytes`, and holds at least one. Raises ValueError
    when a shard is shorter than `done` says.
    """

    def __init__(self, folder: Path, shard_bytes: int, done: np.ndarray) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.shard_bytes, self.samples = folder, shard_bytes, len(done)
        self.shard, self.end = int(done["file"][-1]) if len(done) else 0, 0
        if len(done):
            self.end = int(done["offset"][-1]) + padded(int(done["size"][-1])) + 2 * BLOCK
        for path in folder.glob("shard-*.tar"):
            if path > shard_path(folder, self.shard):
                path.unlink()
        self.open()

    def open(self) -> None:
        path = shard_path(self.folder, self.shard)
        self.file = path.open("r+b" if self.end else "w+b")
        if path.stat().st_size < self.end:
            raise ValueError(f"{path} is shorter than its journal says: restart with --overwrite")
        self.file.truncate(self.end)
        self.file.seek(self.end)

    def append(self, data: bytes, label: int) -> tuple[int, int]:
        """Write one JPEG and its label; returns the shard's number and the position of the JPEG in it."""
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
        """Put what was appended on the disk."""
        self.file.flush()
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.file.close()

    def end_shard(self) -> None:
        end = self.end + 2 * BLOCK  # two empty blocks end an archive
        self.file.write(bytes(2 * BLOCK + -end % RECORD))
        self.sync()
        self.close()

    def finish(self, entries: np.ndarray) -> None:
        """End the last shard and write the indices of all `entries` `(N,)` of `ENTRY`."""
        self.end_shard()
        shards = np.split(np.arange(len(entries)), np.flatnonzero(np.diff(entries["file"])) + 1)
        for shard, samples in enumerate(shards):
            lines = [
                f"{INDEX_VERSION} {len(samples)}\n",
                *(index_line(sample, entries[sample]) for sample in samples),
            ]
            with shard_path(self.folder, shard).with_suffix(".idx").open("w") as file:
                file.writelines(lines)
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
    label_offset = entry["offset"] + padded(int(entry["size"])) + BLOCK
    key, label_size = f"{sample:08}", len(str(entry["label"]))
    return f"jpg {entry['offset']} {entry['size']} {key}.jpg cls {label_offset} {label_size} {key}.cls\n"
