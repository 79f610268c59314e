"""Where images come from: image folders, FFCV's .beton, tar shards and the files of CIFAR and STL-10, read as uint8 RGB.

    source = open_source("data/cifar10", split="pretrain")   ->  source.manifest, source.read(17) -> (H, W, 3) uint8

Three splits: `pretrain` (all training images, labelled or not), `train` (the labelled ones, for evaluation), `test`.
They differ only for STL-10, whose pre-training set is 5k labelled + 100k unlabelled images.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.manifest import Listing, Manifest, Paths, array_manifest, file_manifest

SPLITS = ("pretrain", "train", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
BINARY_FOLDERS = {
    "cifar-10-batches-py": "CIFAR10",
    "cifar-100-python": "CIFAR100",
    "stl10_binary": "STL10",
}
LAYOUT = (
    "wanted: train/<class>/*.jpg with val/<class>/*.jpg or test/<class>/*.jpg, one flat folder of images, "
    f"torchvision's {', '.join(BINARY_FOLDERS)}, "
    "FFCV's train*.beton or *.ffcv with val* or test*, or tar shards train/shard-*.tar with val/ or test/"
)


@dataclass(frozen=True)
class Source:
    """One split: its manifest, and thread-safe readers of one image by its id."""

    manifest: Manifest
    read: Callable[[int], np.ndarray]  # (H, W, 3) uint8, decoded by PIL
    encoded: Callable[[int], bytes] | None = (
        None  # the image file as stored; None where pixels are stored
    )
    beton: Path | None = None  # the FFCV file all of it lies in

    def jpeg(self, sample: int) -> bytes | None:
        """The stored bytes of an image that is a JPEG, by its first two."""
        data = self.encoded(sample) if self.encoded else b""
        return data if data[:2] == b"\xff\xd8" else None


def open_source(data: str | Path, split: str, cache: str | Path | None = None) -> Source:
    """The images under `data`, in whichever layout lies there.

    `cache` is a folder for the manifest when `data` is read-only. Raises FileNotFoundError when the folder or the split
    is missing, ValueError for an empty class, unreadable images (each named), a corrupt binary file, or a split that is
    there in two packed forms. A .beton file or tar shards go before an image folder.
    """
    data = Path(data)
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose from {', '.join(SPLITS)}")
    if not data.is_dir():
        raise FileNotFoundError(f"no folder {data}: {LAYOUT}")
    for folder, dataset in BINARY_FOLDERS.items():
        if (data / folder).is_dir():
            return binary_source(data, dataset, split)
    if packed := packed_place(data, split):
        from pipelines.beton import beton_source  # both build on this file
        from pipelines.shards import shard_source

        return beton_source(packed, split) if packed.is_file() else shard_source(data, split)
    manifest = file_manifest(data, split, lambda: list_images(data, split), cache)

    def path(
        sample: int,
    ) -> Path:  # made when asked for: a million Path objects take a quarter of a gigabyte
        return data / manifest.paths[sample]

    return Source(
        manifest, lambda sample: read_rgb(path(sample)), lambda sample: path(sample).read_bytes()
    )


def packed_place(data: Path, split: str) -> Path | None:
    """The .beton file or the folder of tar shards of a split, if there is one. Raises ValueError when there are more."""
    names = ("val", "test") if split == "test" else ("train",)
    with os.scandir(data) as entries:  # one pass: it may be a flat folder of a million images
        found = sorted(
            Path(entry)
            for entry in entries
            if entry.name.startswith(names)
            and (
                entry.name.endswith((".beton", ".ffcv"))
                or (entry.name in names and any(Path(entry).glob("shard-*.tar")))
            )
        )
    if len(found) > 1:
        raise ValueError(
            f"{data} holds {', '.join(path.name for path in found)} for one split: keep one, move the others away"
        )
    return found[0] if found else None


def download(data: str | Path, dataset: str) -> None:
    """Fetch CIFAR-10, CIFAR-100 or STL-10 into `data` by torchvision. Raises ValueError for any other dataset."""
    import torchvision.datasets as datasets

    by_name = {name.lower(): name for name in BINARY_FOLDERS.values()}
    if dataset not in by_name:
        raise ValueError(
            f"--download knows {', '.join(by_name)}; put the images of {dataset} under {data} yourself: {LAYOUT}"
        )
    getattr(datasets, by_name[dataset])(str(data), download=True)


def binary_source(data: Path, dataset: str, split: str) -> Source:
    """CIFAR-10, CIFAR-100 or STL-10 from the files torchvision downloads; their checksums are verified."""
    import torchvision.datasets as datasets

    which = {"pretrain": "train+unlabeled", "train": "train", "test": "test"}[split]
    try:
        if dataset == "STL10":
            images = datasets.STL10(str(data), split=which)
            pixels, labels = images.data.transpose(0, 2, 3, 1), images.labels
        else:
            images = getattr(datasets, dataset)(str(data), train=split != "test")
            pixels, labels = images.data, images.targets
    except RuntimeError as error:
        raise ValueError(
            f"{dataset} under {data} is incomplete or corrupt ({error}): delete it and use --download"
        ) from error
    pixels = np.ascontiguousarray(pixels)
    manifest = array_manifest(
        data, split, pixels, np.asarray(labels, np.int64), tuple(images.classes)
    )
    return Source(manifest, pixels.__getitem__)


def list_images(data: Path, split: str) -> Listing:
    """Paths relative to `data` (sorted), labels (-1: none) and class names of an image folder's split."""
    root = split_folder(data, split)
    if (
        root / "val_annotations.txt"
    ).is_file():  # Tiny ImageNet's validation folder: one flat folder and a table
        rows = [
            line.split("\t")[:2] for line in (root / "val_annotations.txt").read_text().splitlines()
        ]
        label = {wnid: i for i, wnid in enumerate(sorted({wnid for _, wnid in rows}))}
        paths = Paths(str((root / "images" / name).relative_to(data)) for name, _ in rows)
        return paths, np.array([label[wnid] for _, wnid in rows], np.int64), tuple(label)
    with os.scandir(root) as entries:
        folders = sorted(
            entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()
        )
    if not folders:
        paths = Paths(images_below(root, data))
        if not paths:
            raise FileNotFoundError(f"no images in {root}: {LAYOUT}")
        return paths, np.full(len(paths), -1, np.int64), ()
    by_class = {name: Paths(images_below(root / name, data)) for name in folders}
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise ValueError(
            f"no images in {len(empty)} class folder(s) of {root}: {', '.join(empty[:10])}. Fill or remove them"
        )
    counts = [len(paths) for paths in by_class.values()]
    return (
        Paths(chain.from_iterable(by_class.values())),
        np.repeat(np.arange(len(counts)), counts),
        tuple(by_class),
    )


def split_folder(data: Path, split: str) -> Path:
    """The folder of a split: train/, val/ or test/; a root without train/ is itself the training set."""
    if split != "test":
        return data / "train" if (data / "train").is_dir() else data
    for name in ("val", "test"):
        if (data / name).is_dir():
            return data / name
    raise FileNotFoundError(
        f"no val/ or test/ folder in {data}: without one there is no evaluation"
    )


def images_below(folder: Path, data: Path) -> list[str]:
    """Paths relative to `data` of the images in `folder` and below, sorted. Linked folders are followed, hidden ones not."""
    found, waiting = (
        [],
        [(os.fspath(folder), "".join(f"{part}/" for part in folder.relative_to(data).parts))],
    )
    while waiting:
        place, prefix = waiting.pop()
        with os.scandir(place) as entries:
            for entry in entries:  # no stat: the listing says what a folder is
                name = entry.name
                if name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not entry.is_dir(
                    follow_symlinks=False
                ):
                    found.append(prefix + name)
                elif not name.startswith(".") and entry.is_dir():
                    waiting.append((entry.path, f"{prefix}{name}/"))
    return sorted(found)


def read_rgb(path: Path) -> np.ndarray:
    """Decode one image file to `(H, W, 3)` uint8. Raises ValueError naming the file when it cannot be read whole."""
    try:
        return to_rgb(Image.open(io.BytesIO(path.read_bytes())))
    except (
        Exception
    ) as error:  # on damaged bytes decoders raise whatever their authors did not think of
        raise ValueError(f"cannot read image {path}: {error}. Replace or delete it") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL image as `(H, W, 3)` uint8: grayscale is repeated, CMYK and palette converted, alpha dropped, as ImageFolder
    does; 16-bit is scaled to 8 (PIL's own conversion clips at 255); EXIF rotation is not applied; first frame only."""
    if image.mode.startswith("I"):
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, -1)
    return np.array(image.convert("RGB"))
