"""What a source is: the images of one split, each read by its sample id as uint8 RGB.

`layouts.py` makes a source from whatever lies in a folder.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.manifest import Manifest


@dataclass(frozen=True)
class Source:
    """One split: its manifest, and functions that read one image, from any thread."""

    manifest: Manifest
    read: Callable[[int], np.ndarray]  # (H, W, 3) uint8, decoded by PIL
    encoded: Callable[[int], bytes] | None = None  # the file's bytes; None where pixels are stored
    beton: Path | None = None  # the FFCV file that contains all images, in the order of their ids
    file: Callable[[int], Path] | None = None  # what an image is read from; None: from memory
    held_out: int = 0  # how many training images are kept for scores, and not in this split

    def __repr__(self) -> str:
        """What the split is, and where its images are."""
        manifest = self.manifest
        classes = " without labels"
        if manifest.classes:
            classes = f" in {len(manifest.classes):,} classes"
        held_out = f", {self.held_out:,} more held out" if self.held_out else ""
        title = f"{manifest.split}: {len(manifest):,} images{classes}{held_out}"
        if not len(manifest):
            return title
        pixels = manifest.sizes.prod(1, dtype=np.int64)
        extremes = manifest.sizes[[pixels.argmin(), pixels.argmax()]]
        sizes = dict.fromkeys(f"{width}x{height} px" for height, width in extremes)
        return f"{title}\n  {' to '.join(sizes)}, {self.place()}"

    def place(self) -> str:
        """Where the images are, in words."""
        if self.file is None:
            return "in memory"
        first = self.file(0)
        if first.suffix == ".tar":
            return f"in tar shards in {first.parent}"
        if first.suffix in (".beton", ".ffcv"):
            return f"in {first}"
        return f"in files in {str(first).removesuffix(self.manifest.paths[0])}"

    def jpeg(self, sample: int) -> bytes | None:
        """The stored bytes of an image, if its first two bytes say that it is a JPEG."""
        data = self.encoded(sample) if self.encoded else b""
        return data if data[:2] == b"\xff\xd8" else None

    def files(self, ids: Iterable[int]) -> list[Path]:
        """The files from which these images are read, each once; none if they are in memory."""
        return list(dict.fromkeys(map(self.file, ids))) if self.file else []


def read_rgb(path: Path) -> np.ndarray:
    """Decode an image file to `(H, W, 3)` uint8. Raises ValueError with the path on failure."""
    try:
        return to_rgb(Image.open(io.BytesIO(path.read_bytes())))
    except Exception as error:  # on damaged bytes, decoders raise all kinds of exceptions
        raise ValueError(f"cannot read image {path}: {error}. Replace or delete it") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """The first frame of any PIL image as `(H, W, 3)` uint8, as torchvision's ImageFolder gives it.

    Grayscale is repeated, CMYK and palettes are converted, alpha is dropped, and an EXIF rotation
    is not applied. Unlike PIL's own conversion, which clips at 255, 16-bit values are scaled to 8.
    """
    if image.mode.startswith("I"):
        gray = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return np.repeat(gray[..., None], 3, -1)
    return np.array(image.convert("RGB"))
