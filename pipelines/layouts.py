"""Which layout the images in a folder have, and how to open it.

    source = open_source("data/cifar10", split="pretrain")
    source.manifest, source.read(17)    # what the split is, and an image (H, W, 3)

There are four layouts: folders of image files, FFCV's .beton files, tar shards, and the binary
files of CIFAR and STL-10. There are three splits: `pretrain` (all training images, labelled or
not), `train` (the labelled ones, for evaluation) and `test`. The first two differ only for STL-10,
whose pre-training set is 5k labelled and 100k unlabelled images.
"""

from __future__ import annotations

import os
from itertools import chain
from pathlib import Path

import numpy as np

from pipelines.beton import beton_source
from pipelines.manifest import Listing, Paths, array_manifest
from pipelines.scan import file_manifest
from pipelines.shards import shard_source
from pipelines.sources import Source, read_rgb

SPLITS = ("pretrain", "train", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
BINARY_FOLDERS = {  # the folder that torchvision's download makes, and torchvision's class for it
    "cifar-10-batches-py": "CIFAR10",
    "cifar-100-python": "CIFAR100",
    "stl10_binary": "STL10",
}
LAYOUT = (
    "wanted: train/<class>/*.jpg with val/<class>/*.jpg or test/<class>/*.jpg, one flat folder of "
    f"images, torchvision's {', '.join(BINARY_FOLDERS)}, FFCV's train*.beton or *.ffcv with val* "
    "or test*, or tar shards train/shard-*.tar with val/ or test/"
)


def open_source(data: str | Path, split: str, cache: str | Path | None = None) -> Source:
    """The images of a split under `data`, in any of the layouts.

    If a split is there both packed (a .beton file or tar shards) and as image files, the packed
    form is read. `cache` is a folder for the manifest where `data` is read-only. In a process group
    all ranks must call this (`scan.file_manifest`).

    Raises FileNotFoundError when the folder or the split is missing, and ValueError for an empty
    class, unreadable images (each with its path), a corrupt binary file, or a split that is there
    in two packed forms.
    """
    data = Path(data)
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose from {', '.join(SPLITS)}")
    if not data.is_dir():
        raise FileNotFoundError(f"no folder {data}: {LAYOUT}")
    for folder, binary_layout in BINARY_FOLDERS.items():
        if (data / folder).is_dir():
            return binary_source(data, binary_layout, split)
    if packed := packed_place(data, split):
        return (beton_source if packed.is_file() else shard_source)(packed, split)
    manifest = file_manifest(data, split, lambda: list_images(data, split), cache)

    # Paths are made when they are needed: a million Path objects take a quarter of a gigabyte.
    def read(sample: int) -> np.ndarray:
        return read_rgb(data / manifest.paths[sample])

    def encoded(sample: int) -> bytes:
        return (data / manifest.paths[sample]).read_bytes()

    return Source(manifest, read, encoded)


def packed_place(data: Path, split: str) -> Path | None:
    """The .beton file or the folder of tar shards of a split, or None.

    Raises ValueError when there is more than one.
    """
    names = ("val", "test") if split == "test" else ("train",)

    def is_packed(entry: os.DirEntry[str]) -> bool:
        if entry.name.startswith(names) and entry.name.endswith((".beton", ".ffcv")):
            return True
        return entry.name in names and any(Path(entry).glob("shard-*.tar"))

    with os.scandir(data) as entries:  # one pass: it may be a flat folder of a million images
        places = sorted(Path(entry) for entry in entries if is_packed(entry))
    if len(places) > 1:
        listed = ", ".join(place.name for place in places)
        raise ValueError(f"{data} holds {listed} for one split: keep one, move the others away")
    return places[0] if places else None


def download(data: str | Path, binary_layout: str) -> None:
    """Fetch "CIFAR10", "CIFAR100" or "STL10" into `data`, by torchvision's class of that name."""
    import torchvision.datasets as datasets

    getattr(datasets, binary_layout)(str(data), download=True)


def binary_source(data: Path, binary_layout: str, split: str) -> Source:
    """CIFAR-10, CIFAR-100 or STL-10 from torchvision's files, whose checksums it verifies."""
    import torchvision.datasets as datasets

    try:
        if binary_layout == "STL10":
            part = {"pretrain": "train+unlabeled", "train": "train", "test": "test"}[split]
            images = datasets.STL10(str(data), split=part)
            pixels, labels = images.data.transpose(0, 2, 3, 1), images.labels
        else:
            images = getattr(datasets, binary_layout)(str(data), train=split != "test")
            pixels, labels = images.data, images.targets
    except RuntimeError as error:
        fault = f"{binary_layout} under {data} is incomplete or corrupt ({error})"
        raise ValueError(f"{fault}: delete it and use --download") from error
    pixels = np.ascontiguousarray(pixels)
    manifest = array_manifest(split, pixels, np.asarray(labels, np.int64), tuple(images.classes))
    return Source(manifest, pixels.__getitem__)


def list_images(data: Path, split: str) -> Listing:
    """The paths of an image folder's split (relative to `data`, sorted), its labels and classes.

    The label is -1 where images are not in class folders.
    """
    root = split_folder(data, split)
    annotations = root / "val_annotations.txt"
    if annotations.is_file():  # Tiny ImageNet's validation images: one flat folder and a table
        rows = [line.split("\t")[:2] for line in annotations.read_text().splitlines()]
        label = {wnid: i for i, wnid in enumerate(sorted({wnid for _, wnid in rows}))}
        paths = Paths(str((root / "images" / name).relative_to(data)) for name, _ in rows)
        return paths, np.array([label[wnid] for _, wnid in rows], np.int64), tuple(label)
    with os.scandir(root) as entries:
        folders = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    if not folders:
        paths = Paths(images_below(root, data))
        if not paths:
            raise FileNotFoundError(f"no images in {root}: {LAYOUT}")
        return paths, np.full(len(paths), -1, np.int64), ()
    by_class = {name: Paths(images_below(root / name, data)) for name in folders}
    if empty := [name for name, paths in by_class.items() if not paths]:
        fault = f"no images in {len(empty)} class folder(s) of {root}: {', '.join(empty[:10])}"
        raise ValueError(f"{fault}. Fill or remove them")
    counts = [len(paths) for paths in by_class.values()]
    labels = np.repeat(np.arange(len(counts)), counts)
    return Paths(chain.from_iterable(by_class.values())), labels, tuple(by_class)


def split_folder(data: Path, split: str) -> Path:
    """The folder of a split: train/, val/ or test/. A root without train/ is the training set."""
    if split != "test":
        return data / "train" if (data / "train").is_dir() else data
    for name in ("val", "test"):
        if (data / name).is_dir():
            return data / name
    raise FileNotFoundError(
        f"no val/ or test/ folder in {data}: without one there is no evaluation"
    )


def images_below(folder: Path, data: Path) -> list[str]:
    """Paths relative to `data` of the images in `folder` and its subfolders, sorted.

    Symbolic links to folders are followed. Hidden folders are not entered.
    """
    images: list[str] = []
    prefix = "".join(f"{part}/" for part in folder.relative_to(data).parts)
    pending = [(os.fspath(folder), prefix)]
    while pending:
        place, prefix = pending.pop()
        with os.scandir(place) as entries:
            for entry in entries:  # the listing itself says what is a folder: no stat is needed
                name = entry.name
                is_image = name[name.rfind(".") :].lower() in IMAGE_SUFFIXES
                if is_image and not entry.is_dir(follow_symlinks=False):
                    images.append(prefix + name)
                elif not name.startswith(".") and entry.is_dir():
                    pending.append((entry.path, f"{prefix}{name}/"))
    return sorted(images)
