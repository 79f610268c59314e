"""Sources made of other sources: several joined to one, and a part of one.

both = joined([first, second], prefixes=["a", "b"], split="train")
held = held_out_ids(both.manifest.labels, fraction=0.2)
test = subset(both, held, "test")
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

LABELS_SALT = 0x6C6162656C73  # this draw is not that of the images that are held out


def joined(sources: Sequence[Source], prefixes: Sequence[str], split: str) -> Source:
    """The images of all sources in their order, with classes of the same name merged.

    The classes are sorted by name. `prefixes` are put before the paths of each source, as folders;
    there are no paths if one source has none. Raises ValueError for a file that occurs twice.
    """
    manifests = [source.manifest for source in sources]
    classes = tuple(sorted({name for manifest in manifests for name in manifest.classes}))
    number = {name: i for i, name in enumerate(classes)}
    # The last entry of a table is the one of label -1: an unlabelled image stays unlabelled.
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
    """Raise ValueError if a path occurs twice: a copy held out for scores would be trained on."""
    if len(set(paths)) < len(paths):
        twice = [path for path, count in Counter(paths).items() if count > 1]
        listed = ", ".join(twice[:20] + ["..."] * (len(twice) > 20))
        raise ValueError(f"{len(twice)} images are given twice, give each once: {listed}")


def subset(source: Source, ids: np.ndarray, split: str) -> Source:
    """The images `ids` `(n,)` of a source as a split of their own."""
    whole = source.manifest
    manifest = Manifest(
        split,
        whole.classes,
        whole.labels[ids],
        whole.sizes[ids],
        digest(whole.fingerprint.encode(), ids.astype(np.int64)),
        Paths(whole.paths[i] for i in ids) if whole.paths else Paths(),
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

    At least one image of a class is held out and at least one is left, so that none is held out of
    a class of one image; unlabelled images never are. Which ones are chosen depends on the ids and
    `labels` `(N,)` alone.
    """
    return drawn_ids(
        labels,
        lambda counts: np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1),
        seed=0,
    )


def stratified_ids(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """The sample ids of a fraction of each class, rounded, but at least one image; sorted.

    Which ones are drawn depends on the ids, `labels` `(N,)` and the seed alone. Those of a smaller
    fraction are among those of a larger one.
    """
    return drawn_ids(
        labels, lambda counts: np.maximum(np.rint(fraction * counts), 1), seed ^ LABELS_SALT
    )


def fraction_of(labels: float | str) -> float:
    """The fraction that `10`, `10%`, `"10"` or `0.1` mean.

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
    """Sample ids that are drawn from each class, sorted; no unlabelled image is drawn.

    `shares_of` says how many are drawn of classes with these numbers of images, `(classes,)`.
    """
    ids = np.flatnonzero(labels >= 0)
    ids = ids[np.lexsort((sample_keys(seed=seed, epoch=0, ids=ids), labels[ids]))]
    counts = np.bincount(labels[ids])
    places = np.arange(len(ids)) - (np.cumsum(counts) - counts)[labels[ids]]  # within the class
    return np.sort(ids[places < shares_of(counts)[labels[ids]]])


def listed_ids(source: Source, names: Sequence[str]) -> np.ndarray:
    """The sample ids of the images with these names, sorted.

    A name is the end of an image's path: the file's name, with the folders above it if several
    images have that. Raises ValueError for images without paths, and for names that are given
    twice, that no image has, or that several images have.
    """
    if not source.manifest.paths:
        raise ValueError(
            f"the images in {source.where} have no file names by which a list could choose them: "
            "give the folder with the image files"
        )
    found: dict[str, list[int]] = {name: [] for name in names}
    names_of = defaultdict(list)  # by the name of the file alone
    for name in found:
        names_of[name.rpartition("/")[2]].append(name)
    for sample, path in enumerate(source.manifest.paths):
        for name in names_of.get(path.rpartition("/")[2], ()):
            if f"/{path}".endswith(f"/{name}"):
                found[name].append(sample)
    faults = {
        "are given twice": [name for name, count in Counter(names).items() if count > 1],
        "are not among the images": [name for name, ids in found.items() if not ids],
        "are names of several images (put the folder before them)": [
            name for name, ids in found.items() if len(ids) > 1
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
    return np.sort(np.array([ids[0] for ids in found.values()], np.int64))
