"""Write the index of tar shards that were made by other programs, for WebDataset or timm.

    python -m tools.index data/imagenet-wds

The folder contains the `.tar` files, or folders of them, such as `train/` and `val/`. The files of
both splits may be in one folder if their names tell them apart: `imagenet1k-validation-00.tar`.

A sample consists of the members of a shard whose names are equal up to the first dot, as in
WebDataset: `n01440764/7.jpg` and `n01440764/7.cls`. One of them is the image, in any format that
training reads. Its label is the text in `.cls`. Without `.cls`, it is the value of `label`, `cls`,
`class`, `class_name`, `class_id` or `target` in `.json`. Numbers are the labels themselves.
Otherwise the labels are the names of the classes. A sample without a label gets -1.

The headers of all members and images are read once. This writes two files beside the shards:
`index.npz` with the position of each image, and `index.json` with a description of the images. The
shards are not changed.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import click
import numpy as np

from rsa_fast.pipelines.beton import MAX_CLASSES
from rsa_fast.pipelines.files import write_whole
from rsa_fast.pipelines.folders import IMAGE_SUFFIXES
from rsa_fast.pipelines.machine import cores
from rsa_fast.pipelines.manifest import MAX_PIXELS
from rsa_fast.pipelines.packed import ENTRY, VERSION
from rsa_fast.pipelines.shards import BLOCK, kind_of, tar_names, write_index
from rsa_fast.pipelines.sources import open_image
from rsa_fast.tools.convert import in_order, note, progress, write_json

LABEL_KEYS = ("label", "cls", "class", "class_name", "class_id", "target")
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2?|txz)$", re.IGNORECASE)
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
NOT_SEEKABLE = (
    "is compressed, so an image can only be read together with all images before it. "
    "Decompress it first: gunzip (bunzip2, unxz, unzstd) leaves a .tar file"
)
MAX_SHOWN = 20  # the most faults in a message

Label = int | str | None
Parts = dict[str, tarfile.TarInfo]  # the members of a sample, by their names after the first dot


@dataclass
class Shard:
    """The contents of a shard.

    `entries` `(n,)` of `ENTRY` do not contain the shard's number yet. Their labels are in `labels`.
    `left_out` counts the members that are not read, by kind. `faults` are the samples that stop the
    work, and `unreadable` are the images that are left out, each with the reason.
    """

    entries: np.ndarray = field(default_factory=lambda: np.zeros(0, ENTRY))
    labels: list[Label] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    unreadable: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def read_shard(path: Path) -> Shard:
    """Read the headers of a shard. Raises ValueError for a file that is not a complete tar file."""
    shard = Shard()
    rows = []
    with path.open("rb") as file:
        try:
            tar = tarfile.TarFile(fileobj=file)
            samples = group(path, tar, shard)
            check_end(file, tar.offset)
        except tarfile.TarError as error:
            if os.pread(file.fileno(), 8, 0).startswith(MAGIC):
                raise ValueError(f"{path} {NOT_SEEKABLE}") from error
            raise ValueError(f"{path} is not a complete tar file: {error}") from error
        for key, parts in samples.items():
            try:
                image = image_of(parts)
                if not image:
                    shard.left_out.update(f".{kind}" for kind in parts)
                    continue
                label = label_of(file.fileno(), parts)
            except ValueError as error:
                shard.faults.append(f"{path.name}: {key} {error}")
                continue
            try:
                rows.append(entry_of(tar, parts[image]))
            except Exception as error:  # damaged bytes make PIL raise exceptions of any type
                shard.unreadable.append(f"{path.name}: {key}.{image}: {error}")
                continue
            shard.labels.append(label)
            used = (image, "cls" if "cls" in parts else "json")
            shard.left_out.update(f".{kind}" for kind in parts if kind not in used)
    shard.entries = np.array(rows, ENTRY)
    return shard


def check_end(file: BinaryIO, offset: int) -> None:
    """Raise ReadError unless a tar file ends at `offset`, where tarfile found no more header."""
    file.seek(offset)
    if file.read(BLOCK) != bytes(BLOCK):  # tarfile also treats a damaged header as the end
        raise tarfile.ReadError(f"no member and no end mark at byte {offset:,}: copy it again")
    while chunk := file.read(2**20):
        if chunk.strip(b"\0"):
            raise tarfile.ReadError(
                f"data follow its end mark at byte {offset:,}, as in joined tar files: unpack it "
                "with tar --ignore-zeros and pack it again"
            )


def group(path: Path, tar: tarfile.TarFile, shard: Shard) -> dict[str, Parts]:
    """The members of a shard by the keys of their samples, in their order."""
    samples: dict[str, Parts] = {}
    for member in tar:
        folder, slash, name = member.name.rpartition("/")
        stem, _, kind = name.partition(".")
        if member.isdir():
            continue
        if not member.isreg():
            shard.left_out["links and special files"] += 1
            if Path(name).suffix.lower() in IMAGE_SUFFIXES:
                shard.faults.append(
                    f"{path.name}: {member.name} is a link, which has no bytes: make the shard "
                    "with tar --dereference --hard-dereference"
                )
        elif not stem:
            shard.left_out["hidden"] += 1
        elif not kind or (stem.startswith("__") and name.endswith("__")):
            shard.left_out["without a suffix"] += 1
        else:
            parts = samples.setdefault(f"{folder}{slash}{stem}", {})
            if parts.setdefault(kind.lower(), member) is not member:
                shard.faults.append(f"{path.name}: {folder}{slash}{stem} has .{kind} twice")
    return samples


def image_of(parts: Parts) -> str:
    """The part of a sample that is its image, or an empty string if the members are no sample.

    Raises ValueError for two images, and for a label without an image.
    """
    images = [kind for kind in parts if f".{kind}" in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise ValueError(f"has {len(images)} images: .{', .'.join(images)}")
    if not images and {"cls", "json"} & parts.keys():
        raise ValueError(f"has no image, only .{', .'.join(parts)}")
    return images[0] if images else ""


def entry_of(tar: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, ...]:
    """The row of `ENTRY` of an image. Its size in pixels is read from its header."""
    file = cast(BinaryIO, tar.extractfile(member))  # None only if it is not a regular file
    with file, open_image(file) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} px, wanted at most {MAX_PIXELS:,}")
        return 0, member.offset_data, member.size, -1, image.height, image.width, False


def label_of(file: int, parts: Parts) -> Label:
    """The label of a sample: a number, the name of a class, or None if it has no label.

    `file` is the shard's descriptor. Raises ValueError for a `.json` that is not valid JSON.
    """

    def text(member: tarfile.TarInfo) -> str:
        return os.fsdecode(os.pread(file, member.size, member.offset_data)).strip()

    if "cls" in parts:
        return as_label(text(parts["cls"]))
    if "json" not in parts:
        return None
    try:
        content = json.loads(text(parts["json"]))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"has a .json that cannot be read: {error}") from error
    keys = LABEL_KEYS if isinstance(content, dict) else ()
    return next((as_label(content[key]) for key in keys if key in content), None)


def as_label(value: Any) -> Label:
    """A value as a number or a name, or None if it is neither, such as a list."""
    if isinstance(value, str):
        return int(value) if value.removeprefix("-").isdecimal() else value or None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def numbered(labels: list[list[Label]]) -> tuple[list[np.ndarray], list[str]]:
    """The labels of each folder as int64, and the class names of all folders together.

    If all labels are numbers of classes, the names are "0", "1", ... up to the largest. Otherwise
    they are the labels as text, sorted.
    """
    distinct = {label for each in labels for label in each if label is not None}
    numbers = [label for label in distinct if isinstance(label, int) and -1 <= label < MAX_CLASSES]
    if len(numbers) == len(distinct):
        classes = [str(i) for i in range(max(numbers, default=-1) + 1)]
    else:
        classes = sorted(map(str, distinct))
    number = {name: i for i, name in enumerate(classes)}
    return [
        np.array([number.get(str(label), -1) for label in each], "<i8") for each in labels
    ], classes


def shard_folders(place: Path) -> list[Path]:
    """The folder itself if it contains tar files, otherwise the folders in it that do.

    Raises ValueError if there are none, if some are compressed, or if another tool wrote the index.
    """
    inside = sorted(path for path in place.iterdir() if path.is_dir() and path.name[0] != ".")
    folders = [place] if tar_names(place) else [path for path in inside if tar_names(path)]
    for folder in folders or [place, *inside]:
        for path in sorted(folder.iterdir()):
            if COMPRESSED.search(path.name):
                raise ValueError(f"{path} {NOT_SEEKABLE}")
    if not folders:
        raise ValueError(f"no .tar files in {place} or in the folders in it")
    for folder in folders:
        if (folder / "index.npz").exists() and not (folder / "index.json").exists():
            raise ValueError(
                f"{folder} already has an index by rsa-fast convert dali: train on it as it is"
            )
    return folders


def index(place: Path) -> dict[str, dict[str, Any]]:
    """Write the index of each folder of shards. Returns a summary of each.

    Raises ValueError with the shard and the key of every sample that is not one image.
    """
    folders = shard_folders(place)
    paths = [folder / name for folder in folders for name in tar_names(folder)]
    chunks = in_order(
        lambda chosen: [read_shard(paths[i]) for i in chosen], np.arange(len(paths)), cores()
    )
    shards = list(progress(chunks, "index", 0, len(paths)))
    if faults := [fault for shard in shards for fault in shard.faults]:
        rows = "\n".join(f"  {fault}" for fault in faults[:MAX_SHOWN])
        more = f"\n  and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
        raise ValueError(f"{len(faults)} samples are not one image with its label:\n{rows}{more}")
    left_out = sum((shard.left_out for shard in shards), Counter[str]())
    if left_out:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
        note(f"left out, because they are neither images nor labels: {counts}")
    if unreadable := [fault for shard in shards for fault in shard.unreadable]:
        shown = "; ".join(unreadable[:MAX_SHOWN])
        note(f"left out {len(unreadable)} images that cannot be read: {shown}")
    by_folder = [
        [shard for path, shard in zip(paths, shards, strict=True) if path.parent == folder]
        for folder in folders
    ]
    labels, classes = numbered(
        [list(chain.from_iterable(s.labels for s in each)) for each in by_folder]
    )
    return {
        str(folder): write(folder, each, numbers, classes)
        for folder, each, numbers in zip(folders, by_folder, labels, strict=True)
    }


def write(
    folder: Path, shards: list[Shard], labels: np.ndarray, classes: list[str]
) -> dict[str, Any]:
    """Write the index of a folder. Returns its summary."""
    entries = np.concatenate([shard.entries for shard in shards])
    entries["file"] = np.repeat(np.arange(len(shards)), [len(shard.entries) for shard in shards])
    entries["label"] = labels
    if not len(entries):
        raise ValueError(f"no images in the shards in {folder}")
    names = tar_names(folder)
    description = {
        "format": "shards",
        "version": VERSION,
        "count": len(entries),
        "classes": classes,
    }
    # The index is written last, because a folder without it counts as not indexed.
    write_json(folder / "index.json", description)
    write_whole(folder / "index.npz", lambda file: write_index(file, entries, names))
    return {
        "images": len(entries),
        "classes": len(classes),
        "without_label": int((labels < 0).sum()),
        "shards": Counter(map(kind_of, names)),
    }


@click.command()
@click.argument("shards", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(shards: Path) -> None:
    """Write the index of the tar shards in SHARDS, or in the folders in SHARDS.

    The last line of the output is a JSON object that describes what was indexed.
    """
    try:
        written = index(shards)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(written))


if __name__ == "__main__":
    main()
