"""A small image folder with every kind of file the converters meet."""

from __future__ import annotations

import hashlib
from pathlib import Path

import click
import numpy as np
from PIL import Image

from rsa_fast.pipelines.sources import Source
from tests.helpers import invoke, natural_image, result_of

TO_JPEG = ("gray_alpha.png", "rgb.png", "cmyk.jpg")  # Passthrough cannot keep these.


def mixed_folder(root: Path, per_class: int = 5) -> Path:
    """Write two classes of `train`, and a small `val`.

    `train` has `per_class` RGB JPEGs of several sizes, and one image of each other kind.
    """
    for split, count in (("train", per_class), ("val", 1)):
        for label in range(2):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = natural_image(100 * label + i, 40 + 7 * i, 90 - 9 * i)
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=92)
    odd = Image.fromarray(natural_image(7, 30, 44))
    folder = root / "train" / "class_0"
    odd.convert("L").save(folder / "gray.jpg")
    odd.convert("LA").save(folder / "gray_alpha.png")
    odd.save(folder / "rgb.png")
    odd.convert("CMYK").save(folder / "cmyk.jpg")
    return root


def kept_as_they_are(source: Source) -> np.ndarray:
    """Return `(N,)` bool: the images whose bytes passthrough keeps."""
    return np.array([not path.endswith(TO_JPEG) for path in source.manifest.paths])


def digests(root: Path) -> dict[str, str]:
    """Return the digest of every file below `root` except for the scan's cache."""
    files = (path for path in root.rglob("*") if path.is_file() and ".rsa-fast" not in path.parts)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(files)
    }


def converted(tool: click.Command, src: Path, dst: Path, *options: object) -> dict:
    """Convert, and return what `tool` reports about the train split."""
    return result_of(invoke(tool, src, dst, "--workers", "1", *options))["train"]
