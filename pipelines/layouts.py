"""Find out in which layout the images are stored, and open them.

    source = open_source("data/cifar10", split="pretrain")
    source.manifest, source.read(17)    # a description of the split, and an image (H, W, 3)

There are five layouts: folders of image files, FFCV's .beton files, tar shards, the binary files of
CIFAR and STL-10, and a text file of paths. Several places can be read as one dataset.

There are three splits: `pretrain` (all training images, labelled or not), `train` (the labelled
ones, for evaluation) and `test`. The first two differ in two cases only. STL-10 has 5k labelled and
100k unlabelled images for pre-training. A labelled and an unlabelled dataset can be read as one.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from rsa_fast.pipelines.beton import beton_source
from rsa_fast.pipelines.combined import held_out_ids, joined, refuse_twice, subset
from rsa_fast.pipelines.files import read_bytes, read_list_text, user_cache
from rsa_fast.pipelines.folders import (
    SPLIT_NAMES,
    TEST_NAMES,
    TRAIN_NAMES,
    VAL_NAMES,
    counts_of,
    list_images,
    splits_of,
)
from rsa_fast.pipelines.manifest import Listing, Manifest, Paths, array_manifest
from rsa_fast.pipelines.scan import OnBadImage, bad_rows, map_threaded, scan_files
from rsa_fast.pipelines.shards import holds_shards, shard_source
from rsa_fast.pipelines.sources import Source, read_rgb, turn_upright

log = logging.getLogger("rsa_fast")

Data = str | Path | Sequence[str | Path]  # a folder, a text file of paths, or several of these

SPLITS = ("pretrain", "train", "test")
LIST_SUFFIXES = {".txt", ".tsv"}
BINARY_FOLDERS = {  # the folder that torchvision's download makes, and torchvision's class for it
    "cifar-10-batches-py": "CIFAR10",
    "cifar-100-python": "CIFAR100",
    "stl10_binary": "STL10",
}
LAYOUT = (
    "wanted: train/<class>/*.jpg with val/<class>/*.jpg or test/<class>/*.jpg, one flat folder of "
    f"images, torchvision's {', '.join(BINARY_FOLDERS)}, FFCV's train*.beton or *.ffcv with val* "
    "or test*, tar shards train/*.tar with val/ or test/, or a .txt or .tsv file with one path "
    "per line"
)


@dataclass(frozen=True)
class Reading:
    """How images are read. The fields are arguments of `open_source`."""

    cache: Path | None = None
    unlabelled: bool = False
    on_bad_image: OnBadImage = "stop"
    exif_orientation: bool = False


def open_source(
    data: Data,
    split: str,
    cache: str | Path | None = None,
    val_fraction: float = 0.0,
    *,
    unlabelled: bool = False,
    on_bad_image: OnBadImage = "stop",
    exif_orientation: bool = False,
) -> Source:
    """Open a split of `data`: a folder in any of the layouts, a text file, or several of these.

    If a split exists both packed (a .beton file or tar shards) and as image files, the packed form
    is read. `cache` is a folder for the manifest, used if no other folder can be written. In a
    process group all ranks must call this function (`scan.scan_files`).

    With `unlabelled`, all images below a folder are training images without labels, and there is no
    test split. With `on_bad_image` "skip", damaged and incomplete files are left out and listed in
    `Source.bad`. With `exif_orientation`, image files are turned upright by their EXIF tags. Packed
    images are never turned.

    If the data have no test split, the fraction `val_fraction` of the labelled training images is
    `test`, and the rest is `train` and `pretrain` (`combined.held_out_ids`). If they have one,
    `val_fraction` has no effect.

    Raises FileNotFoundError if the folder or the split is missing. Raises ValueError for an empty
    class, unreadable images (each with its path), a corrupt binary file, a split that exists in two
    packed forms, a faulty line in a text file, and a file that is given twice.
    """
    places = places_of(data)
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: choose from {', '.join(SPLITS)}")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction = {val_fraction}: wanted 0 or more, and less than 1")
    reading = Reading(Path(cache) if cache else None, unlabelled, on_bad_image, exif_orientation)
    if split != "test" and not val_fraction:
        return open_places(places, split, reading)
    with_test = [place for place in places if not unlabelled and has_test_split(place)]
    if with_test and split == "test":
        if (without := [str(place) for place in places if place not in with_test]) and is_rank_0():
            log.info(f"no val/ or test/ in {', '.join(without)}: the others' images are the test")
        return open_places(with_test, split, reading)
    if with_test:
        return open_places(places, split, reading)
    lack = f"no val/ or test/ folder in {described(data)}"
    if not val_fraction:
        hint = "val_fraction = 0.2 holds out a part of the labelled training images"
        raise FileNotFoundError(f"{lack}: without one there is no evaluation; {hint}")
    images = open_places(places, "pretrain", reading)
    held_out = held_out_ids(images.manifest.labels, val_fraction)
    if split == "test":
        if not held_out.size:
            raise FileNotFoundError(
                f"{lack}, and no class has two or more images, so none can be held out: without "
                "test images there is no evaluation"
            )
        # The training split reports what was left out.
        return replace(subset(images, held_out, split), ignored={}, bad={})
    if not held_out.size:
        return images if split == "pretrain" else open_places(places, split, reading)
    labels = images.manifest.labels
    rest = np.setdiff1d(np.arange(len(labels)), held_out)
    if split == "train":
        rest = rest[labels[rest] >= 0]
    return replace(subset(images, rest, split), held_out=len(held_out))


def places_of(data: Data) -> list[Path]:
    """The folders and text files of `data`.

    Raises FileNotFoundError for one that does not exist. Raises ValueError if none is given, or one
    is given twice.
    """
    places = [Path(data)] if isinstance(data, str | Path) else [Path(place) for place in data]
    if not places:
        raise ValueError(f"no folder with images is given; {LAYOUT}")
    for place in places:
        if place.is_file() and place.suffix.lower() not in LIST_SUFFIXES:
            raise ValueError(f"{place} is a file, but not a list of paths; {LAYOUT}")
        if not place.exists():
            kind = "file" if place.suffix.lower() in LIST_SUFFIXES else "folder"
            raise FileNotFoundError(f"no {kind} {place}: {LAYOUT}")
    if len({place.resolve() for place in places}) < len(places):
        raise ValueError(f"a folder is given twice: give each once. Found {described(places)}")
    return places


def described(data: Data) -> str:
    """The names of the folders and text files of `data` for a message."""
    return str(data) if isinstance(data, str | Path) else ", ".join(map(str, data))


def inventory(train: Source, test: Source | None = None) -> str:
    """One line about what was read and what was left out, and a line for each bad image."""
    parts = [f"train: {described_split(train)} from {train.where}, {train.sizes_in_words()}"]
    if held_out := train.held_out:
        share = held_out / (len(train.manifest) + held_out)
        parts.append(
            f"held out for scores: {held_out:,} ({share:.0%}), as there is no val/ or test/"
        )
    elif test:
        name = Path(test.where).stem if Path(test.where).exists() else "test"
        parts.append(f"{name}: {len(test.manifest):,}")
    ignored = Counter(train.ignored)
    bad = dict(train.bad)
    if test and not held_out:
        ignored.update(test.ignored)
        bad |= test.bad
    if oriented := train.oriented + (test.oriented if test and not held_out else 0):
        parts.append(f"EXIF orientation {'applied' if train.turned else 'ignored'}: {oriented:,}")
    if ignored:
        parts.append(f"ignored: {counts_of(ignored)}")
    if bad:
        rows = "\n".join(bad_rows(bad))
        parts.append(f"left out, because damaged or incomplete: {len(bad):,}\n{rows}")
    return "; ".join(parts)


def described_split(source: Source) -> str:
    """How many images there are in how many classes, and the name of the first class."""
    count, classes = len(source.manifest), source.manifest.classes
    if not classes:
        return f"{count:,} images without classes"
    more = ", ..." if len(classes) > 1 else ""
    return f"{count:,} images in {len(classes):,} classes ({classes[0]}{more})"


def is_rank_0() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def open_places(places: Sequence[Path], split: str, reading: Reading) -> Source:
    """The images of a split of all places in one source.

    If only some of several places are labelled, `train` and `test` are the images of those.
    """
    if len(places) == 1:
        return open_place(places[0], split, reading)[0]
    opened = [open_place(place, split, reading, part=f"{i}-") for i, place in enumerate(places)]
    labelled = [(source, root) for source, root in opened if source.manifest.labelled]
    if split != "pretrain" and 0 < len(labelled) < len(opened):
        opened = labelled
    roots = [os.path.abspath(root) for _, root in opened]
    common = os.path.commonpath(roots)
    prefixes = ["" if root == common else os.path.relpath(root, common) for root in roots]
    return joined([source for source, _ in opened], prefixes, split)


def open_place(place: Path, split: str, reading: Reading, part: str = "") -> tuple[Source, Path]:
    """The images of a split of a folder or text file, and the folder their paths are relative to.

    The scan is cached beside train/, or beside the text file. For a folder without train/, the
    cache is in the user's cache folder, because torchvision's ImageFolder would treat a folder
    beside the classes as a class. If that place cannot be written, the cache is in `reading.cache`.
    `part` distinguishes the cache files of several places.
    """
    name = "test.npz" if split == "test" else "train.npz"
    root, home, listing = place, place if has_train_folder(place) else None, None
    if place.is_file():
        root, listing = read_list(place)
        home, name = place.parent, f"{place.name}.npz"
    elif not reading.unlabelled and (layout := binary_layout_of(place)):
        return binary_source(place, layout, split), place
    elif not reading.unlabelled and (packed := packed_place(place, split)):
        source = (beton_source if packed.is_file() else shard_source)(packed, split)
        return replace(source, where=str(packed)), place
    elif reading.unlabelled:
        name = "unlabelled.npz"
    ignored: Counter[str] = Counter()

    def list_files() -> Listing:
        if listing:
            return check_list(place, root, listing)
        try:
            return list_images(place, split, reading.unlabelled, ignored)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; {LAYOUT}") from None

    key = hashlib.sha256(os.fsencode(place.resolve())).hexdigest()[:16]
    caches = [home / ".rsa-fast" / name if home else user_cache() / "scans" / f"{key}-{name}"]
    if reading.cache:
        caches.append(reading.cache / ".rsa-fast" / f"{part}{name}")
    scan = scan_files(root, split, list_files, caches, reading.on_bad_image)
    turned, orientations, folder = reading.exif_orientation, scan.orientations, str(root)
    manifest = scan.upright() if turned else scan.manifest

    # Paths are made when they are needed: a million Path objects take a quarter of a gigabyte.
    def file(sample: int) -> Path:
        return root / manifest.paths[sample]

    def read(sample: int) -> np.ndarray:
        pixels = read_rgb(file(sample))
        return turn_upright(pixels, int(orientations[sample])) if turned else pixels

    def encoded(sample: int) -> bytes:
        # No bytes are returned for an image to be turned, so that no backend decodes it unturned.
        if turned and orientations[sample] != 1:
            return b""
        return read_bytes(f"{folder}/{manifest.paths[sample]}")

    return Source(
        manifest,
        read,
        encoded,
        file=file,
        where=str(place if listing or reading.unlabelled else split_folder(place, manifest)),
        ignored=ignored,
        bad=scan.bad,
        oriented=int((orientations != 1).sum()),
        turned=turned,
    ), root


def has_train_folder(place: Path) -> bool:
    spellings = (f(name) for name in TRAIN_NAMES for f in (str, str.capitalize, str.upper))
    return any((place / name).is_dir() for name in spellings)


def split_folder(data: Path, manifest: Manifest) -> Path:
    """The folder that contains all images of a split: a folder such as train/, or `data` itself."""
    first, below, _ = manifest.paths[0].partition("/")
    return data / first if below and first.lower() in SPLIT_NAMES else data


def binary_layout_of(data: Path) -> str | None:
    """torchvision's class for the binary files in a folder, or None."""
    folders = (folder for folder in BINARY_FOLDERS if (data / folder).is_dir())
    return next((BINARY_FOLDERS[folder] for folder in folders), None)


def has_test_split(place: Path) -> bool:
    """Whether a folder has its own test images. A text file has none."""
    if place.is_file():
        return False
    return bool(binary_layout_of(place) or packed_place(place, "test") or splits_of(place).test)


def packed_place(data: Path, split: str) -> Path | None:
    """The .beton file or the folder of tar shards of a split, or None.

    Raises ValueError when there is more than one.
    """
    names = VAL_NAMES | TEST_NAMES if split == "test" else TRAIN_NAMES
    places = []
    has_tars = False
    with os.scandir(data) as entries:  # one pass: it may be a flat folder of a million images
        for entry in entries:
            name, place = entry.name.lower(), data / entry.name
            has_tars |= name.endswith(".tar")
            is_beton = name.startswith(tuple(names)) and name.endswith((".beton", ".ffcv"))
            if is_beton or (name in names and place.is_dir() and holds_shards(place)):
                places.append(place)
    if has_tars and holds_shards(data, split):
        places.append(data)
    if len(places) > 1:
        names_found = ", ".join(sorted(place.name for place in places))
        raise ValueError(
            f"{data} contains {names_found} for one split: keep one, move the others away"
        )
    return places[0] if places else None


def download(data: str | Path, binary_layout: str) -> None:
    """Download "CIFAR10", "CIFAR100" or "STL10" to `data` with torchvision's class of that name."""
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
    return Source(manifest, pixels.__getitem__, where=str(data))


def read_list(place: Path) -> tuple[Path, Listing]:
    """The images in a text file, and the folder that their paths are relative to.

    Each line has a path, which is absolute or relative to the file's folder, and may have a tab and
    the name of a class. Empty lines and those that start with # are skipped. The order is that of
    the lines. Raises ValueError for text in another form, or if only some lines have a class.
    """
    text = read_list_text(place)
    if "\0" in text:
        raise ValueError(f"{place} contains binary data: wanted text in UTF-8, one path per line")
    files: list[str] = []
    names: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not (line := line.strip()) or line.startswith("#"):
            continue
        path, *rest = line.split("\t")
        if len(rest) > 1:
            raise ValueError(
                f"{place}, line {number}: found {len(rest)} tabs. Wanted a path, optionally "
                "followed by one tab and the name of a class"
            )
        files.append(os.path.abspath(place.parent / path.rstrip()))
        names.append(rest[0].strip() if rest else "")
        if bool(names[-1]) != bool(names[0]):
            raise ValueError(
                f"{place}, line {number}: found {'a' if names[-1] else 'no'} class, unlike in the "
                "lines before. Give all images a class or none"
            )
    if not files:
        raise ValueError(f"{place} lists no image: wanted one path per line")
    root = os.path.commonpath({os.path.dirname(file) for file in files})
    start = len(root.rstrip("/")) + 1
    paths = Paths(file[start:] for file in files)
    refuse_twice(paths)
    classes = tuple(sorted({name for name in names if name}))
    label = {name: i for i, name in enumerate(classes)}
    return Path(root), (paths, np.array([label.get(name, -1) for name in names], np.int64), classes)


def check_list(place: Path, root: Path, listing: Listing) -> Listing:
    """Return `listing`, or raise ValueError with those of its paths at which there is no file."""
    paths = listing[0]
    exists = map_threaded(lambda path: (os.path.isfile(f"{root}/{path}"), 0), paths, np.bool_)[:, 0]
    if not exists.all():
        missing = np.flatnonzero(~exists)
        rows = [f"  {root / paths[i]}" for i in missing[:20]] + ["  ..."] * (len(missing) > 20)
        listed = "\n".join(rows)
        fault = f"{len(missing)} of the {len(paths)} files in {place} do not exist"
        raise ValueError(f"{fault}; correct or remove their lines:\n{listed}")
    return listing
