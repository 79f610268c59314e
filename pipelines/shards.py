"""Read and write tar shards in WebDataset's format. With their index, one read gets one image.

    train.json
    train/index.npz
    train/shard-000000.tar   train/shard-000000.idx
    train/shard-000001.tar   ...

These are the files that `ShardWriter` writes. A sample consists of two members, `<key>.jpg` and
`<key>.cls` (its label as text). The key is the number of the sample in the split. The `.idx` files
have the format of DALI's wds2idx. `index.npz` contains six columns with one number per sample:
shard, offset, size, label, height and width.

    index.npz   imagenet1k-train-0000.tar   imagenet1k-train-0001.tar   ...
    index.json  imagenet1k-validation-00.tar   ...

Shards from other programs may have any names and image formats. `tools/index.py` writes their index
and description into the folder. This index also contains the names of the shards. The shards of
both splits may be in one folder if words in their names tell them apart.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from rsa_fast.pipelines.folders import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    TEST_NAMES,
    TRAIN_NAMES,
    VAL_NAMES,
)
from rsa_fast.pipelines.manifest import Paths
from rsa_fast.pipelines.npz import read_npz
from rsa_fast.pipelines.packed import ENTRY, Packed, read_classes
from rsa_fast.pipelines.sources import Source

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
# The names of the shards, joined by zero bytes. Without them, they are `shard_path(folder, shard)`.
NAMES = {"names": np.dtype("|u1")}
INDEX_VERSION = "v1.2"  # the version of wds2idx whose format the .idx files have


def shard_source(folder: Path, split: str) -> Source:
    """The shards in a folder as the `Source` of a split.

    Raises FileNotFoundError for missing files, and ValueError for a truncated shard (with its name)
    or an index that does not belong to the shards.
    """
    paths, entries = read_index(folder)
    description = folder / "index.json"
    if not description.is_file():
        description = folder.with_suffix(".json")
    classes = read_classes(description, "shards", len(entries))
    chosen = shards_of([path.name for path in paths], split)
    if len(chosen) < len(paths):
        entries = entries[np.isin(entries["file"], chosen)]
        entries["file"] = np.searchsorted(chosen, entries["file"])
        paths = [paths[shard] for shard in chosen]
    return pack(folder, paths, entries).source(split, classes)


def open_shards(folder: Path) -> Packed:
    """The images and labels in one folder of shards. Raises the same errors as `shard_source`."""
    return pack(folder, *read_index(folder))


def pack(folder: Path, paths: Sequence[Path], entries: np.ndarray) -> Packed:
    try:
        return Packed(paths, entries)
    except ValueError as error:
        raise ValueError(f"{folder} does not match its index.npz: {error}") from error


def read_index(folder: Path) -> tuple[list[Path], np.ndarray]:
    """The files of the shards in a folder, and the images in them `(N,)` of `ENTRY`."""
    index = folder / "index.npz"
    # The index of both splits is made at once, so that they have the same classes.
    place = folder.parent if folder.name.lower() in SPLIT_NAMES else folder
    command = f"rsa-fast convert index {place}"
    if not index.is_file():
        raise FileNotFoundError(f"no {index}: {command} writes it")
    try:
        types = {column: ENTRY[field] for column, field in INDEX.items()}
        columns = read_npz(index, types, NAMES)
        text = columns.pop("names", None)
        count = len(columns["shard"])
        if any(values.shape != (count,) for values in columns.values()):
            raise ValueError("its columns differ in length")
        if text is None:
            if (shards := int(columns["shard"].max(initial=-1)) + 1) > count:
                raise ValueError(f"it has {shards} shards, but {count} images")
            paths = [shard_path(folder, shard) for shard in range(shards)]
        else:
            names = Paths(text.tobytes())
            if outside := [name for name in names if "/" in name or name in ("", ".", "..")]:
                raise ValueError(f"{outside[0]!r} is not the name of a file in the folder")
            paths = [folder / name for name in names]
            if new := set(tar_names(folder)) - set(names):
                raise ValueError(f"{len(new)} of the .tar files are not in it, such as {min(new)}")
    except (ValueError, TypeError) as error:
        reason = f"{index} is not a valid index ({error}): convert the data again, or {command}"
        raise ValueError(reason) from error
    entries = np.zeros(count, ENTRY)
    for column, field in INDEX.items():
        entries[field] = columns[column]
    return paths, entries


def write_index(file: BinaryIO, entries: np.ndarray, names: Sequence[str] = ()) -> None:
    """Write `index.npz` for `entries` `(N,)` of `ENTRY`, which are in the files `names`."""
    columns = {column: entries[field] for column, field in INDEX.items()}
    if names:
        columns["names"] = np.frombuffer(Paths(names).text, np.uint8)
    np.savez(file, **columns)  # type: ignore[arg-type]  # savez also has a bool keyword


def holds_shards(folder: Path, split: str | None = None) -> bool:
    """Whether a folder contains tar shards.

    It then has an index, or it has tar files and neither images nor folders. If `split` is "test",
    it must also have test shards beside those for training. If `split` is None, its shards may
    belong to any split.
    """
    if not (folder / "index.npz").is_file():
        with os.scandir(folder) as entries:
            visible = (entry for entry in entries if not entry.name.startswith("."))
            if any(Path(e.name).suffix.lower() in IMAGE_SUFFIXES or e.is_dir() for e in visible):
                return False
    names = tar_names(folder)
    return bool(names) and (split != "test" or len(shards_of(names, split)) < len(names))


def tar_names(folder: Path) -> list[str]:
    """The names of the tar files in a folder, sorted."""
    with os.scandir(folder) as entries:
        names = (entry.name for entry in entries if not entry.is_dir())
        return sorted(name for name in names if name.lower().endswith(".tar") and name[0] != ".")


def shards_of(names: Sequence[str], split: str) -> np.ndarray:
    """The positions in `names` of the shards of a split.

    If the names contain words for both training and test, these are the shards of the split. As
    with folders, validation comes before test. Otherwise all shards belong to one split.
    """
    kinds = [kind_of(name) for name in names]
    kind = "train"
    if split == "test":
        kind = "val" if "val" in kinds else "test"
    mixed = "train" in kinds and len(set(kinds)) > 1
    return np.flatnonzero([not mixed or kind == each for each in kinds])


def kind_of(name: str) -> str:
    """The split by the words in a shard's name: "val", "test" or, by default, "train"."""
    words = set(re.split("[^a-z]+", name.lower()))
    if words & TRAIN_NAMES:
        return "train"
    return "val" if words & VAL_NAMES else "test" if words & TEST_NAMES else "train"


def stored_label(packed: Packed, sample: int) -> int:
    """The label of a sample as stored in its `.cls` member, which follows the image."""
    entry = packed.entries[sample]
    start = int(entry["offset"]) + padded(int(entry["size"])) + BLOCK
    return int(packed.bytes_at(int(entry["file"]), BLOCK, start).rstrip(b"\0"))


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

    After a kill it continues after `done` `(n,)` of `ENTRY`, the samples that are known to be
    written. Everything after them in the folder is deleted. A shard is closed before the sample
    that would make it larger than `shard_bytes`, but it contains at least one sample. Raises
    ValueError if a shard is shorter than `done` requires.
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
            raise ValueError(f"{path} is shorter than its journal: restart with --overwrite")
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
            write_index(file, entries)
            file.flush()
            os.fsync(file.fileno())


def index_line(sample: int, entry: np.void) -> str:
    """The line of a sample in an `.idx` file: type, position, size and name of both members."""
    label_offset = entry["offset"] + padded(int(entry["size"])) + BLOCK
    image = f"jpg {entry['offset']} {entry['size']} {sample:08}.jpg"
    return f"{image} cls {label_offset} {len(str(entry['label']))} {sample:08}.cls\n"
