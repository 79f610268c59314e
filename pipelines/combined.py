"""Make sources from other sources: join several, or take a part of one.

both = joined([first, second], prefixes=["a", "b"], split="train")
test = subset(both, held_out_ids(both.manifest.labels, fraction=0.2), "test")
few = subset(both, stratified_ids(both.manifest.labels, fraction=0.1, seed=0), "train")
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rsa_fast.pipelines.draws import sample_keys
from rsa_fast.pipelines.extents import joined_extents
from rsa_fast.pipelines.manifest import Manifest, Paths, digest
from rsa_fast.pipelines.sources import Source

LABELS_SALT = 0x6C6162656C73  # gives other random numbers than the choice of held-out images


def joined(sources: Sequence[Source], prefixes: Sequence[str], split: str) -> Source:
    """The images of all sources in their order, with classes of the same name merged.

    The classes are sorted by name. The paths of each source get its prefix in `prefixes`, as a
    folder. If one source has no paths, the result has none. Raises ValueError for a file that
    occurs twice.
    """
    manifests = [source.manifest for source in sources]
    classes = tuple(sorted({name for manifest in manifests for name in manifest.classes}))
    number = {name: i for i, name in enumerate(classes)}
    # The last entry of a table belongs to label -1, so an unlabelled image stays unlabelled.
    tables = [
        np.array([*map(number.get, manifest.classes), -1], np.int64) for manifest in manifests
    ]
    labels = [table[manifest.labels] for table, manifest in zip(tables, manifests, strict=True)]
    paths = Paths()
    if all(manifest.paths for manifest in manifests):
        paths = Paths(
            f"{prefix}/{path}" if prefix else path
            for prefix, manifest in zip(prefixes, manifests, strict=True)
            for path in manifest.paths
        )
        refuse_twice(paths)
    manifest = Manifest(
        split,
        classes,
        np.concatenate(labels),
        np.concatenate([manifest.sizes for manifest in manifests]),
        digest(*(manifest.fingerprint.encode() for manifest in manifests)),
        paths,
    )
    ends = np.cumsum([len(manifest) for manifest in manifests])
    starts = [0, *ends.tolist()]

    def place(sample: int) -> tuple[Source, int]:
        """The source of an image, and the image's sample id there."""
        i = int(np.searchsorted(ends, sample, side="right"))
        return sources[i], sample - starts[i]

    def read(sample: int) -> np.ndarray:
        source, own = place(sample)
        return source.read(own)

    def encoded(sample: int) -> bytes:
        source, own = place(sample)
        assert source.encoded
        return source.encoded(own)

    def file(sample: int) -> Path:
        source, own = place(sample)
        assert source.file
        return source.file(own)

    extents = [source.extents for source in sources if source.extents]
    return Source(
        manifest,
        read,
        encoded if all(source.encoded for source in sources) else None,
        file=file if all(source.file for source in sources) else None,
        extents=joined_extents(extents) if len(extents) == len(sources) else None,
        where=", ".join(source.where for source in sources),
        ignored=sum((Counter(source.ignored) for source in sources), Counter()),
        bad={path: fault for source in sources for path, fault in source.bad.items()},
        oriented=sum(source.oriented for source in sources),
        turned=any(source.turned for source in sources),
    )


def refuse_twice(paths: Sequence[str]) -> None:
    """Raise ValueError if a path occurs twice. One copy could be held out, the other trained on."""
    if len(set(paths)) < len(paths):
        twice = [path for path, count in Counter(paths).items() if count > 1]
        listed = ", ".join(twice[:20] + ["..."] * (len(twice) > 20))
        raise ValueError(f"{len(twice)} images are given twice, give each once: {listed}")


def subset(source: Source, ids: np.ndarray, split: str) -> Source:
    """The images `ids` `(n,)` of a source as a separate split."""
    parent = source.manifest
    manifest = Manifest(
        split,
        parent.classes,
        parent.labels[ids],
        parent.sizes[ids],
        digest(parent.fingerprint.encode(), ids.astype(np.int64)),
        Paths(parent.paths[i] for i in ids) if parent.paths else Paths(),
    )
    encoded, file = source.encoded, source.file
    return Source(
        manifest,
        lambda sample: source.read(int(ids[sample])),
        encoded and (lambda sample: encoded(int(ids[sample]))),
        file=file and (lambda sample: file(int(ids[sample]))),
        extents=source.extents and source.extents.subset(ids),
        where=source.where,
        ignored=source.ignored,
        bad=source.bad,
        oriented=source.oriented,
        turned=source.turned,
    )


def held_out_ids(labels: np.ndarray, fraction: float) -> np.ndarray:
    """The sample ids to hold out, sorted: a fraction of each class, rounded.

    In each class, at least one image is held out and at least one is left. A class with one image
    is therefore not split. Unlabelled images are never held out. The choice depends only on the ids
    and `labels` `(N,)`.
    """
    return drawn_ids(
        labels,
        lambda counts: np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1),
        seed=0,
    )


def stratified_ids(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The sample ids of a fraction of each class (rounded, at least one image), sorted.

    The choice depends only on the ids, `labels` `(N,)` and the seed. The images of a smaller
    fraction are a subset of those of a larger one.
    """
    return drawn_ids(
        labels, lambda counts: np.maximum(np.rint(fraction * counts), 1), seed ^ LABELS_SALT
    )


def fraction_of(labels: float | str) -> float:
    """Parse a fraction: `10`, `10%`, `"10"` and `0.1` all mean 0.1.

    Raises ValueError unless it is in (0, 1].
    """
    text = str(labels).strip()
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = 0
    fraction = number / 100 if text.endswith("%") or number >= 1 else number
    if not 0 < fraction <= 1:
        raise ValueError(
            f"labels = {labels}: wanted a percentage from 1 to 100, such as 10, or a fraction "
            "below 1, such as 0.1"
        )
    return fraction


def drawn_ids(
    labels: np.ndarray, shares_of: Callable[[np.ndarray], np.ndarray], seed: int
) -> np.ndarray:
    """Sample ids that are drawn from each class, sorted. No unlabelled image is drawn.

    `shares_of` gets the number of images of each class, `(classes,)`, and returns how many of them
    to draw.
    """
    ids = np.flatnonzero(labels >= 0)
    ids = ids[np.lexsort((sample_keys(seed=seed, epoch=0, ids=ids), labels[ids]))]
    counts = np.bincount(labels[ids])
    places = np.arange(len(ids)) - (np.cumsum(counts) - counts)[labels[ids]]  # within the class
    return np.sort(ids[places < shares_of(counts)[labels[ids]]])


def listed_ids(source: Source, names: Sequence[str]) -> np.ndarray:
    """The sample ids of the images with these names, sorted.

    A name is the end of an image's path: the file's name, preceded by its folders if several images
    have the same file name. Raises ValueError for images without paths, and for names that are
    given twice, that no image has, or that several images have.
    """
    if not source.manifest.paths:
        raise ValueError(
            f"the images in {source.where} have no file names by which a list could choose them: "
            "give the folder with the image files"
        )
    ids_of: dict[str, list[int]] = {name: [] for name in names}
    names_of = defaultdict(list)  # the keys are the names of the files without folders
    for name in ids_of:
        names_of[name.rpartition("/")[2]].append(name)
    for sample, path in enumerate(source.manifest.paths):
        for name in names_of.get(path.rpartition("/")[2], ()):
            if f"/{path}".endswith(f"/{name}"):
                ids_of[name].append(sample)
    faults = {
        "are given twice": [name for name, count in Counter(names).items() if count > 1],
        "are not among the images": [name for name, ids in ids_of.items() if not ids],
        "are names of several images (put the folder before them)": [
            name for name, ids in ids_of.items() if len(ids) > 1
        ],
    }
    rows = [
        f"{len(faulty):,} {fault}: {', '.join(faulty[:5] + ['...'] * (len(faulty) > 5))}"
        for fault, faulty in faults.items()
        if faulty
    ]
    if rows:
        raise ValueError(
            f"of {len(names):,} names for {len(source.manifest):,} images in {source.where}, "
            + "; ".join(rows)
        )
    return np.sort(np.array([ids[0] for ids in ids_of.values()], np.int64))
