"""Decide which image files below a folder are training images, test images or neither.

    splits_of(Path("data/birds"))               # where the training and the test images are
    list_images(Path("data/birds"), "train")    # their paths, labels and classes

No other module decides this. A folder that can be read in two ways is refused. Everything that is
left out is counted, so that it can be reported at the start.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image

from rsa_fast.pipelines.files import read_list_text
from rsa_fast.pipelines.manifest import Listing, Paths

# PIL lists these formats, but it reads only their headers or needs other programs for them.
UNREAD_FORMATS = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
Image.init()
IMAGE_SUFFIXES = {
    suffix
    for suffix, form in Image.registered_extensions().items()
    if form in Image.OPEN and form not in UNREAD_FORMATS
}
TRAIN_NAMES = {"train", "training"}
# If a folder has both of them, the validation images are the test split.
VAL_NAMES, TEST_NAMES = {"val", "valid", "validation"}, {"test", "testing"}
SPLIT_NAMES = TRAIN_NAMES | VAL_NAMES | TEST_NAMES
# Parts of names such as train2017, test_images or val-set, which look like those of splits.
SPLIT_WORDS = SPLIT_NAMES | {"dev", "eval", "evaluation", "holdout"}
FILLERS = ("images", "image", "imgs", "img", "set", "data", "split")
# Folders that operating systems and network disks make.
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "#recycle", "lost+found"}
OURS = "written by this program"  # the name of such files in the counts of what was left out
FOREIGN = {  # other formats that may contain the images, by suffix
    ".parquet": "parquet files, such as Hugging Face's: save their images to class folders",
    ".arrow": "arrow files, such as Hugging Face's: save their images to class folders",
    ".tfrecord": "TFRecord files: save their images to class folders",
    ".mdb": "an LMDB database: save its images to class folders",
    ".bin": "binary files. For CIFAR the Python version is read: use --download",
    ".npz": "NumPy arrays: save their images to class folders",
    ".npy": "NumPy arrays: save their images to class folders",
    ".mat": "MATLAB files: save their images to class folders",
    ".dcm": "DICOM files: save their images as PNG",
    ".heic": "HEIC photographs, which PIL does not open: convert them to JPEG",
    ".zip": "an archive: unpack it",
    ".tar": "tar files: unpack them, or index shards with `rsa-fast convert index`",
    ".gz": "an archive: unpack it",
    ".tgz": "an archive: unpack it",
}
UNLABELLED = "--unlabelled reads all images below it as one set without classes"


@dataclass(frozen=True)
class Splits:
    """Where the images of a folder's splits are.

    `excluded` are the folders in `train` that contain no training images. `unread` are the folders
    beside the splits. They belong to neither split.
    """

    train: Path
    test: Path | None
    excluded: frozenset[str] = frozenset()
    unread: tuple[str, ...] = ()


def splits_of(data: Path) -> Splits:
    """Where the training and the test images of a folder are.

    The folder of a split has one of the usual names, in any case. Without one for training, the
    images beside the test folder are the training images. Raises ValueError for a folder that can
    be read in two ways.
    """
    images, names = read_folder(data)
    names.sort()
    trains, vals, tests = (
        [name for name in names if name.lower() in known]
        for known in (TRAIN_NAMES, VAL_NAMES, TEST_NAMES)
    )
    for rivals in (trains, vals, tests):
        if len(rivals) > 1:
            raise ValueError(
                f"{data} contains {listed(rivals)} for one split: keep one, move the others away"
            )
    test = next(iter(vals + tests), None)
    test_folder = data / test if test else None
    unread = tuple(name for name in names if name not in [*trains, test])
    if trains:
        train = data / trains[0]
        others = [] if test else with_images(data, unread)
        if others and not with_images(train, read_folder(train)[1]):
            raise ValueError(
                f"{data} contains {trains[0]}/ and {listed(others)}, each with images: is "
                f"{trains[0]}/ a class, or does it contain the training images? If it is a class, "
                f"rename it. If not, give {train}. {UNLABELLED}"
            )
        return Splits(train, test_folder, unread=unread)
    if similar := with_images(data, filter(looks_like_a_split, unread)):
        raise ValueError(
            f"{data} contains {listed(similar)}, which looks like a split but is not named "
            "train/, val/ or test/: rename it, or give the folder with the training images, such "
            f"as {data / similar[0]}. {UNLABELLED}"
        )
    classes = []
    if test_folder:
        classes = with_images(data, (name for name in unread if name.lower() not in SPLIT_NAMES))
        if classes and not set(read_folder(test_folder)[1]) & set(classes):
            raise ValueError(
                f"{data} contains {test}/ and {listed(classes)}, but {test}/ has no folders of "
                f"these names: is {test}/ a class, or does it contain the test images? Move the "
                f"training images into train/, or rename the class. {UNLABELLED}"
            )
    if test_folder and not (classes or images):
        raise FileNotFoundError(
            f"{data} contains {test}/, but no training images: put them into train/ beside it"
        )
    excluded = frozenset(name for name in names if name.lower() in SPLIT_NAMES)
    return Splits(data, test_folder, excluded, tuple(sorted(excluded - {test})))


def looks_like_a_split(name: str) -> bool:
    """Whether a folder's name is that of a split with something added, such as train2017."""
    word = "".join(letter for letter in name.lower() if letter.isalpha())
    for filler in FILLERS:
        word = word.removesuffix(filler).removeprefix(filler)
    return word in SPLIT_WORDS and name.lower() not in SPLIT_NAMES


def list_images(
    data: Path, split: str, unlabelled: bool = False, ignored: Counter[str] | None = None
) -> Listing:
    """The paths of an image folder's split (relative to `data`, sorted), its labels and classes.

    The label is -1 for images that are not in class folders. With `unlabelled`, all images below
    the folder are training images without labels. What is left out is counted in `ignored`.

    Raises FileNotFoundError if there are no images. Raises ValueError for a class without images
    and for a folder that can be read in two ways.
    """
    ignored = Counter() if ignored is None else ignored
    if unlabelled:
        return without_labels(Paths(images_below(data, data, ignored)), data, ignored)
    splits = splits_of(data)
    root = splits.train
    if split == "test":
        assert splits.test, "open_source checks that there is one"
        root = splits.test
        if table := labels_of_table(root, data, ignored):
            return table
    else:
        for name in splits.unread:
            if count := len(images_below(data / name, data)):
                ignored[f"in {name}/"] += count
        if root != data and (beside := len(read_folder(data)[0])):
            ignored[f"beside {root.name}/"] += beside
    flat, names = read_folder(root, ignored=ignored)
    flat = sorted(prefix_of(root, data) + name for name in flat)
    by_class: dict[str, Paths] = {}
    empty: dict[str, Counter[str]] = {}
    for name in sorted(names):
        if root == data and name in splits.excluded:
            continue
        left_out: Counter[str] = Counter()
        parts = list(walk(root / name, data, left_out))
        if any(images for _, images in parts):
            refuse_splits_inside(root / name, parts, data)
            by_class[name] = Paths(
                sorted(prefix + image for prefix, images in parts for image in images)
            )
        elif not left_out[OURS]:
            empty[name] = left_out
        ignored.update(left_out)
    count = sum(map(len, by_class.values()))
    if not by_class and (flat or not empty):
        return without_labels(Paths(flat), root, ignored)
    if flat and (len(by_class) < 2 or len(flat) >= count):
        raise ValueError(
            f"{root} contains {len(flat)} images, and {count} images in {listed(by_class)}: are "
            "the folders classes? If so, move the images beside them away or into a class. If not, "
            f"{UNLABELLED}"
        )
    if empty:
        rows = [f"{name}{in_brackets(left_out)}" for name, left_out in list(empty.items())[:10]]
        hints = hints_of(sum(empty.values(), Counter()))
        raise (ValueError if by_class else FileNotFoundError)(
            f"no images in {len(empty)} class folder(s) of {root}: {', '.join(rows)}. Fill or "
            f"remove them, or {UNLABELLED}{hints}"
        )
    if flat:
        ignored["beside the folders"] += len(flat)
    counts = [len(paths) for paths in by_class.values()]
    labels = np.repeat(np.arange(len(counts)), counts)
    return Paths(chain.from_iterable(by_class.values())), labels, tuple(by_class)


def without_labels(paths: Paths, root: Path, ignored: Counter[str]) -> Listing:
    """The listing of images without classes. Raises FileNotFoundError if there are none."""
    if not paths:
        raise FileNotFoundError(f"no images in {root}{in_brackets(ignored)}{hints_of(ignored)}")
    return paths, np.full(len(paths), -1, np.int64), ()


def refuse_splits_inside(folder: Path, parts: list[tuple[str, list[str]]], data: Path) -> None:
    """Raise ValueError if a class folder has images in a folder that is named like a split."""
    start = len(prefix_of(folder, data))
    inside = {prefix[start:].partition("/")[0] for prefix, images in parts if images}
    if splits := sorted(name for name in inside if name.lower() in SPLIT_NAMES):
        raise ValueError(
            f"{folder} contains {listed(splits)}: give {folder} itself if these are its splits. "
            f"Class folders must be inside train/ and val/, not around them. {UNLABELLED}"
        )


def labels_of_table(root: Path, data: Path, ignored: Counter[str]) -> Listing | None:
    """The test images whose classes are in a table, or None if there is no such table.

    The tables are Tiny ImageNet's `val_annotations.txt` and Kaggle's `LOC_val_solution.csv` for
    ImageNet, in the test folder or beside it. A table whose images are missing is ignored.
    """
    for table in (
        root / "val_annotations.txt",
        *(p / "LOC_val_solution.csv" for p in (root, data)),
    ):
        if not table.is_file():
            continue
        rows = read_table(table)
        folder = root / "images" if (root / "images").is_dir() else root
        names = {Path(name).stem: name for name in read_folder(folder)[0]}
        labelled = {stem: label for stem, label in rows.items() if stem in names}
        if not labelled:
            continue
        if left_out := len(names) - len(labelled):
            ignored[f"not in {table.name}"] += left_out
        number = {name: i for i, name in enumerate(sorted(set(labelled.values())))}
        paths = Paths(prefix_of(folder, data) + names[stem] for stem in labelled)
        labels = np.array([number[label] for label in labelled.values()], np.int64)
        return paths, labels, tuple(number)
    return None


def read_table(table: Path) -> dict[str, str]:
    """The class of every image in a table, by the image's name without its suffix.

    The columns are separated by tabs, by commas or by spaces. The first two are the name and the
    class. Raises ValueError for a line without a class.
    """
    classes: dict[str, str] = {}
    for number, line in enumerate(read_list_text(table).splitlines(), 1):
        separator = next((mark for mark in "\t," if mark in line), None)
        columns = line.strip().split(separator)
        if not line.strip() or columns[0] == "ImageId":  # the heading of Kaggle's table
            continue
        if len(columns) < 2 or not (label := columns[1].split()):
            raise ValueError(
                f"{table}, line {number}: found no class. Each line needs an image and its class"
            )
        classes[Path(columns[0]).stem] = label[0]
    return classes


def images_below(folder: Path, data: Path, ignored: Counter[str] | None = None) -> list[str]:
    """Paths relative to `data` of the images in `folder` and its subfolders, sorted.

    What is left out is counted in `ignored`.
    """
    return sorted(prefix + name for prefix, names in walk(folder, data, ignored) for name in names)


def with_images(folder: Path, names: Iterable[str]) -> list[str]:
    """The folders of `names` in a folder that contain an image at any depth."""
    return [name for name in names if any(images for _, images in walk(folder / name, folder))]


def walk(
    folder: Path, data: Path, ignored: Counter[str] | None = None
) -> Iterator[tuple[str, list[str]]]:
    """The images in `folder` and its subfolders: the path relative to `data`, and the names.

    Symbolic links to folders are followed, unless they lead to a folder that contains them. Hidden
    folders and folders written by this program are skipped.
    """
    above: tuple[str, ...] = (os.path.realpath(data),)
    if folder != data:
        above = (*above, os.path.realpath(folder))
    pending = [(folder, above)]
    while pending:
        place, above = pending.pop()
        names, folders = read_folder(place, above, ignored)
        yield prefix_of(place, data), names
        for name in folders:
            path = place / name
            real = os.path.realpath(path) if path.is_symlink() else f"{above[-1]}/{name}"
            pending.append((path, (*above, real)))


def prefix_of(folder: Path, data: Path) -> str:
    """The path of a folder relative to `data`, with a slash at its end unless it is empty."""
    return "".join(f"{part}/" for part in folder.relative_to(data).parts)


def read_folder(
    place: Path, above: tuple[str, ...] = (), ignored: Counter[str] | None = None
) -> tuple[list[str], list[str]]:
    """The names of the images and of the folders in one folder.

    `above` are the real paths of the data folder, of this folder and of all folders between them.
    What is left out is counted in `ignored`.
    """
    above = above or (os.path.realpath(place),)
    ignored = Counter() if ignored is None else ignored
    images: list[str] = []
    folders: list[str] = []
    others: list[str] = []
    has_cache = False
    with os.scandir(place) as entries:
        for entry in entries:  # the listing marks the folders, so no stat is needed
            name = entry.name
            is_image = name[name.rfind(".") :].lower() in IMAGE_SUFFIXES
            if is_image and not entry.is_dir(follow_symlinks=False):
                if name.startswith("."):
                    ignored["hidden"] += 1
                else:
                    images.append(name)
            elif not entry.is_dir():
                if entry.is_symlink() and not os.path.exists(entry.path):
                    ignored["broken links"] += 1
                else:
                    others.append(name)
            elif name.startswith("."):
                if name == ".rsa-fast":
                    has_cache = True
                else:
                    ignored["hidden"] += 1
            elif name in SYSTEM_FOLDERS:
                ignored[f"{name}/"] += 1
            elif entry.is_symlink() and leads_up(entry.path, above):
                ignored["links to a folder above"] += 1
            else:
                folders.append(name)
    if len(above) > 1 and is_ours(others, empty=has_cache and not (images or folders or others)):
        ignored[OURS] += 1
        return [], []
    for name in others:
        if not name.startswith("."):
            ignored[Path(name).suffix.lower() or "without a suffix"] += 1
    return images, folders


def leads_up(link: str, above: tuple[str, ...]) -> bool:
    """Whether a link leads to a folder that contains it."""
    real = os.path.realpath(link)
    return any(folder == real or folder.startswith(f"{real.rstrip('/')}/") for folder in above)


def is_ours(files: Collection[str], empty: bool) -> bool:
    """Whether a folder with these files is a run's folder or a converted dataset.

    `empty` means that it contains nothing except a cache of this program.
    """
    return (
        empty
        or {"recipe.yaml", "env.json"} <= set(files)
        or bool({"run.lock", "plan.json", "index.npz"} & set(files))
        or any(name.endswith((".beton", ".ffcv")) for name in files)
    )


def listed(names: Iterable[str]) -> str:
    """A few names of folders for a message."""
    names = list(names)
    rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(f"{name}/" for name in names[:5]) + rest


def in_brackets(ignored: Counter[str]) -> str:
    """What was left out, in brackets, or an empty string."""
    return f" ({counts_of(ignored)})" if ignored else ""


def counts_of(ignored: Counter[str]) -> str:
    """What was left out, such as "6 beside the folders, 1 .heic"."""
    return ", ".join(f"{count:,} {what}" for what, count in ignored.most_common(12))


def hints_of(ignored: Counter[str]) -> str:
    """A sentence for each file type in `FOREIGN` that was left out."""
    hints = dict.fromkeys(FOREIGN[suffix] for suffix in FOREIGN if ignored[suffix])
    return "".join(f". Found {hint}" for hint in hints)
