"""Where images come from: image folders and the binary files of CIFAR and STL-10, read as uint8 RGB.

    source = open_source("data/cifar10", split="pretrain")   ->  source.manifest, source.read(17) -> (H, W, 3) uint8

Three splits: `pretrain` (all training images, labelled or not), `train` (the labelled ones, for evaluation), `test`.
They differ only for STL-10, whose pre-training set is 5k labelled + 100k unlabelled images.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.manifest import Manifest, array_manifest, file_manifest

SPLITS = ("pretrain", "train", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
BINARY_FOLDERS = {"cifar-10-batches-py": "CIFAR10", "cifar-100-python": "CIFAR100", "stl10_binary": "STL10"}
LAYOUT = (
    "wanted: train/<class>/*.jpg with val/<class>/*.jpg or test/<class>/*.jpg, one flat folder of images, "
    f"or torchvision's {', '.join(BINARY_FOLDERS)}"
)


@dataclass(frozen=True)
class Source:
    """One split: its manifest, and thread-safe readers of one image by its id."""

    manifest: Manifest
    read: Callable[[int], np.ndarray]  # (H, W, 3) uint8, decoded by PIL
    encoded: Callable[[int], bytes] | None = None  # the image file as stored; None where pixels are stored


def open_source(data: str | Path, split: str, cache: str | Path | None = None) -> Source:
    """The images under `data`, in whichever layout lies there.

    `cache` is a folder for the manifest when `data` is read-only. Raises FileNotFoundError when the folder or the split
    is missing, ValueError for an empty class, unreadable images (each named) or a corrupt binary file.
    """
    data = Path(data)
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose from {', '.join(SPLITS)}")
    if not data.is_dir():
        raise FileNotFoundError(f"no folder {data}: {LAYOUT}")
    for folder, dataset in BINARY_FOLDERS.items():
        if (data / folder).is_dir():
            return binary_source(data, dataset, split)
    paths, labels, classes = list_images(data, split)
    manifest = file_manifest(data, split, paths, labels, classes, cache)

    def path(sample: int) -> Path:  # made when asked for: a million Path objects take a quarter of a gigabyte
        return data / manifest.paths[sample]

    return Source(manifest, lambda sample: read_rgb(path(sample)), lambda sample: path(sample).read_bytes())


def download(data: str | Path, dataset: str) -> None:
    """Fetch CIFAR-10, CIFAR-100 or STL-10 into `data` by torchvision. Raises ValueError for any other dataset."""
    import torchvision.datasets as datasets

    by_name = {name.lower(): name for name in BINARY_FOLDERS.values()}
    if dataset not in by_name:
        raise ValueError(f"--download knows {', '.join(by_name)}; put the images of {dataset} under {data} yourself: {LAYOUT}")
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
        raise ValueError(f"{dataset} under {data} is incomplete or corrupt ({error}): delete it and use --download") from error
    pixels = np.ascontiguousarray(pixels)
    manifest = array_manifest(data, split, pixels, np.asarray(labels, np.int64), tuple(images.classes))
    return Source(manifest, pixels.__getitem__)


def list_images(data: Path, split: str) -> tuple[list[str], np.ndarray, tuple[str, ...]]:
    """Paths relative to `data` (sorted), labels (-1: none) and class names of an image folder's split."""
    root = split_folder(data, split)
    if (root / "val_annotations.txt").is_file():  # Tiny ImageNet's validation folder: one flat folder and a table
        rows = [line.split("\t")[:2] for line in (root / "val_annotations.txt").read_text().splitlines()]
        classes = tuple(sorted({wnid for _, wnid in rows}))
        paths = [str((root / "images" / name).relative_to(data)) for name, _ in rows]
        return paths, np.array([classes.index(wnid) for _, wnid in rows], np.int64), classes
    folders = sorted(f for f in root.iterdir() if f.is_dir() and not f.name.startswith("."))
    if not folders:
        paths = images_below(root, data)
        if not paths:
            raise FileNotFoundError(f"no images in {root}: {LAYOUT}")
        return paths, np.full(len(paths), -1, np.int64), ()
    by_class = {folder.name: images_below(folder, data) for folder in folders}
    empty = [name for name, paths in by_class.items() if not paths]
    if empty:
        raise ValueError(f"no images in {len(empty)} class folder(s) of {root}: {', '.join(empty[:10])}. Fill or remove them")
    counts = [len(paths) for paths in by_class.values()]
    return list(chain(*by_class.values())), np.repeat(np.arange(len(counts)), counts), tuple(by_class)


def split_folder(data: Path, split: str) -> Path:
    """The folder of a split: train/, val/ or test/; a root without train/ is itself the training set."""
    if split != "test":
        return data / "train" if (data / "train").is_dir() else data
    for name in ("val", "test"):
        if (data / name).is_dir():
            return data / name
    raise FileNotFoundError(f"no val/ or test/ folder in {data}: without one there is no evaluation")


def images_below(folder: Path, data: Path) -> list[str]:
    return sorted(str(p.relative_to(data)) for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)


def read_rgb(path: Path) -> np.ndarray:
    """Decode one image file to `(H, W, 3)` uint8. Raises ValueError naming the file when it cannot be read whole."""
    try:
        return to_rgb(Image.open(io.BytesIO(path.read_bytes())))
    except OSError as error:
        raise ValueError(f"cannot read image {path}: {error}. Replace or delete it") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """Any PIL image as `(H, W, 3)` uint8: grayscale is repeated, CMYK and palette converted, alpha dropped, as ImageFolder
    does; 16-bit is scaled to 8 (PIL's own conversion clips at 255); EXIF rotation is not applied; first frame only."""
    if image.mode.startswith("I"):
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, -1)
    return np.array(image.convert("RGB"))
