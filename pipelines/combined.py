"""Sources made of other sources: several joined to one, and a part of one.

both = joined([first, second], prefixes=["a", "b"], split="train")
held = held_out_ids(both.manifest.labels, fraction=0.2)
test = subset(both, held, "test")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipelines.draws import sample_keys
from pipelines.manifest import Manifest, Paths, digest
from pipelines.sources import Source


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

    return Source(
        manifest,
        read,
        encoded if all(source.encoded for source in sources) else None,
        file=file if all(source.file for source in sources) else None,
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
    ids = np.flatnonzero(labels >= 0)
    ids = ids[np.lexsort((sample_keys(seed=0, epoch=0, ids=ids), labels[ids]))]
    counts = np.bincount(labels[ids])
    shares = np.minimum(np.maximum(np.rint(fraction * counts), 1), counts - 1)
    places = np.arange(len(ids)) - (np.cumsum(counts) - counts)[labels[ids]]  # within the class
    return np.sort(ids[places < shares[labels[ids]]])
