"""Which layout the images have, and how to open them.

    source = open_source("data/cifar10", split="pretrain")
    source.manifest, source.read(17)    # what the split is, and an image (H, W, 3)

There are five layouts: folders of image files, FFCV's .beton files, tar shards, the binary files of
CIFAR and STL-10, and a text file of paths. Several of them are read as one dataset. There are three
splits: `pretrain` (all training images, labelled or not), `train` (the labelled ones, for
evaluation) and `test`. The first two differ only for STL-10, whose pre-training set is 5k labelled
and 100k unlabelled images, and where a labelled and an unlabelled dataset are read as one.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch.distributed as dist

from pipelines.beton import beton_source
from pipelines.combined import held_out_ids, joined, refuse_twice, subset
from pipelines.manifest import Listing, Paths, array_manifest
from pipelines.scan import file_manifest, map_threaded
from pipelines.shards import shard_source
from pipelines.sources import Source, read_rgb

log = logging.getLogger("rsa_fast")

Data = str | Path | Sequence[str | Path]  # a folder, a text file of paths, or several of these

SPLITS = ("pretrain", "train", "test")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"}
LIST_SUFFIXES = {".txt", ".tsv"}
TEST_FOLDERS = ("val", "test")
BINARY_FOLDERS = {  # the folder that torchvision's download makes, and torchvision's class for it
    "cifar-10-batches-py": "CIFAR10",
    "cifar-100-python": "CIFAR100",
    "stl10_binary": "STL10",
}
LAYOUT = (
    "wanted: train/<class>/*.jpg with val/<class>/*.jpg or test/<class>/*.jpg, one flat folder of "
    f"images, torchvision's {', '.join(BINARY_FOLDERS)}, FFCV's train*.beton or *.ffcv with val* "
    "or test*, tar shards train/shard-*.tar with val/ or test/, or a .txt or .tsv file with a path "
    "a line"
)


def open_source(
    data: Data, split: str, cache: str | Path | None = None, val_fraction: float = 0.0
) -> Source:
    """The images of a split of `data`: a folder in any of the layouts, a text file, or several.

    If a split is there both packed (a .beton file or tar shards) and as image files, the packed
    form is read. `cache` is a folder for the manifest where `data` is read-only. In a process group
    all ranks must call this (`scan.file_manifest`).

    Where the data have no test split, this fraction `val_fraction` of the labelled training images
    is `test`, and the rest is `train` and `pretrain` (`combined.held_out_ids`). Otherwise it
    changes nothing.

    Raises FileNotFoundError when the folder or the split is missing, and ValueError for an empty
    class, unreadable images (each with its path), a corrupt binary file, a split that is there in
    two packed forms, a faulty line in a text file, or a file that is given twice.
    """
    places = places_of(data)
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose from {', '.join(SPLITS)}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction = {val_fraction}: wanted 0 or more, and less than 1")
    if split != "test" and not val_fraction:
        return open_places(places, split, cache)
    with_test = [place for place in places if has_test_split(place)]
    if with_test and split == "test":
        if (without := [str(place) for place in places if place not in with_test]) and is_rank_0():
            log.info(f"no val/ or test/ in {', '.join(without)}: scores are on the others' images")
        return open_places(with_test, split, cache)
    if with_test:
        return open_places(places, split, cache)
    lack = f"no val/ or test/ folder in {described(data)}"
    if not val_fraction:
        hint = "val_fraction = 0.2 holds out a part of labelled training images"
        raise FileNotFoundError(f"{lack}: without one there is no evaluation; {hint}")
    whole = open_places(places, "pretrain", cache)
    held = held_out_ids(whole.manifest.labels, val_fraction)
    if split == "test":
        if not held.size:
            raise FileNotFoundError(
                f"{lack}, and no class with two images or more, of which some could be held out: "
                "without either there is no evaluation"
            )
        return subset(whole, held, split)
    if not held.size:
        return whole if split == "pretrain" else open_places(places, split, cache)
    labels = whole.manifest.labels
    rest = np.setdiff1d(np.arange(len(labels)), held)
    if split == "train":
        rest = rest[labels[rest] >= 0]
    return replace(subset(whole, rest, split), held_out=len(held))


def places_of(data: Data) -> list[Path]:
    """The folders and text files of `data`.

    Raises FileNotFoundError for those that are not there, and ValueError where there is none or one
    is given twice.
    """
    places = [Path(data)] if isinstance(data, str | Path) else [Path(place) for place in data]
    if not places:
        raise ValueError(f"no folder with images is given; {LAYOUT}")
    for place in places:
        if place.is_file() and place.suffix.lower() not in LIST_SUFFIXES:
            raise ValueError(f"{place} is a file, but no list of paths; {LAYOUT}")
        if not place.exists():
            kind = "file" if place.suffix.lower() in LIST_SUFFIXES else "folder"
            raise FileNotFoundError(f"no {kind} {place}: {LAYOUT}")
    if len({place.resolve() for place in places}) < len(places):
        raise ValueError(f"a folder is given twice: give each once. Found {described(places)}")
    return places


def described(data: Data) -> str:
    """The names of the folders and text files of `data` for a message."""
    return str(data) if isinstance(data, str | Path) else ", ".join(map(str, data))


def log_held_out(source: Source, data: Data) -> None:
    """Log how many training images there are and how many are held out, if any are."""
    if (held := source.held_out) and is_rank_0():
        count, classes = len(source.manifest), len(source.manifest.classes)
        log.info(
            f"train: {count:,} images in {classes:,} classes from {described(data)}; held out for "
            f"scores: {held:,} ({held / (count + held):.0%}), as there is no val/ or test/"
        )


def is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def open_places(places: Sequence[Path], split: str, cache: str | Path | None) -> Source:
    """The images of a split of all places in one source.

    Where only some of several places are labelled, `train` and `test` are the images of those.
    """
    if len(places) == 1:
        return open_place(places[0], split, cache)[0]
    opened = [open_place(place, split, cache, part=f"{i}-") for i, place in enumerate(places)]
    labelled = [(source, root) for source, root in opened if source.manifest.labelled]
    if split != "pretrain" and 0 < len(labelled) < len(opened):
        opened = labelled
    roots = [os.path.abspath(root) for _, root in opened]
    common = os.path.commonpath(roots)
    prefixes = ["" if root == common else os.path.relpath(root, common) for root in roots]
    return joined([source for source, _ in opened], prefixes, split)


def open_place(
    place: Path, split: str, cache: str | Path | None, part: str = ""
) -> tuple[Source, Path]:
    """The images of a split of a folder or text file, and the folder their paths are relative to.

    `part` keeps the files of several places in `cache` apart.
    """
    name = "test.npz" if split == "test" else "train.npz"
    if place.is_file():
        root, listing = read_list(place)
        home, name = place.parent, f"{place.name}.npz"
    elif layout := binary_layout_of(place):
        return binary_source(place, layout, split), place
    elif packed := packed_place(place, split):
        return (beton_source if packed.is_file() else shard_source)(packed, split), place
    else:
        root = home = place
        listing = None

    def list_files() -> Listing:
        return check_list(place, root, listing) if listing else list_images(place, split)

    caches = [home / ".rsa-fast" / name]
    if cache:
        caches.append(Path(cache) / ".rsa-fast" / f"{part}{name}")
    manifest = file_manifest(root, split, list_files, caches)

    # Paths are made when they are needed: a million Path objects take a quarter of a gigabyte.
    def file(sample: int) -> Path:
        return root / manifest.paths[sample]

    def read(sample: int) -> np.ndarray:
        return read_rgb(file(sample))

    def encoded(sample: int) -> bytes:
        return file(sample).read_bytes()

    return Source(manifest, read, encoded, file=file), root


def binary_layout_of(data: Path) -> str | None:
    """torchvision's class for the binary files in a folder, or None."""
    folders = (folder for folder in BINARY_FOLDERS if (data / folder).is_dir())
    return next((BINARY_FOLDERS[folder] for folder in folders), None)


def has_test_split(place: Path) -> bool:
    """Whether a folder has test images of its own; a text file has none."""
    if place.is_file():
        return False
    folders = [place / name for name in TEST_FOLDERS]
    return bool(
        binary_layout_of(place)
        or any(folder.is_dir() for folder in folders)
        or packed_place(place, "test")
    )


def packed_place(data: Path, split: str) -> Path | None:
    """The .beton file or the folder of tar shards of a split, or None.

    Raises ValueError when there is more than one.
    """
    names = TEST_FOLDERS if split == "test" else ("train",)

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


def read_list(place: Path) -> tuple[Path, Listing]:
    """The images in a text file, and the folder that their paths are relative to.

    Each line has a path, which is absolute or relative to the file's folder, and may have a tab and
    the name of a class. Empty lines and those that start with # are skipped. The order is that of
    the lines. Raises ValueError for text in another form, or if only some lines have a class.
    """
    text = os.fsdecode(place.read_bytes()).removeprefix("\ufeff")
    if "\0" in text:
        raise ValueError(f"{place} is no text in UTF-8: wanted a path a line, found binary data")
    files: list[str] = []
    names: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        path, *rest = line.split("\t")
        if len(rest) > 1:
            raise ValueError(
                f"{place}, line {number}: {len(rest)} tabs. Wanted a path, and perhaps one tab and "
                "the name of a class"
            )
        files.append(os.path.abspath(place.parent / path.rstrip()))
        names.append(rest[0].strip() if rest else "")
        if bool(names[-1]) != bool(names[0]):
            raise ValueError(
                f"{place}, line {number}: {'a' if names[-1] else 'no'} class, other than in the "
                "lines before. Give all images a class or none"
            )
    if not files:
        raise ValueError(f"{place} names no image: wanted a path a line")
    root = os.path.commonpath({os.path.dirname(file) for file in files})
    start = len(root.rstrip("/")) + 1
    paths = Paths(file[start:] for file in files)
    refuse_twice(paths)
    classes = tuple(sorted({name for name in names if name}))
    label = {name: i for i, name in enumerate(classes)}
    return Path(root), (paths, np.array([label.get(name, -1) for name in names], np.int64), classes)


def check_list(place: Path, root: Path, listing: Listing) -> Listing:
    """Raise ValueError with the paths in a text file at which there is no file."""
    paths = listing[0]
    exists = map_threaded(lambda path: (os.path.isfile(f"{root}/{path}"), 0), paths, np.bool_)[:, 0]
    if not exists.all():
        missing = np.flatnonzero(~exists)
        rows = [f"  {root / paths[i]}" for i in missing[:20]] + ["  ..."] * (len(missing) > 20)
        listed = "\n".join(rows)
        fault = f"{len(missing)} of the {len(paths)} files in {place} are not there"
        raise ValueError(f"{fault}; correct or remove their lines:\n{listed}")
    return listing


def split_folder(data: Path, split: str) -> Path:
    """The folder of a split: train/, val/ or test/. A root without train/ is the training set."""
    if split != "test":
        return data / "train" if (data / "train").is_dir() else data
    return next(data / name for name in TEST_FOLDERS if (data / name).is_dir())


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
