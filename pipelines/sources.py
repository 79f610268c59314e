"""A source: the images of one split, each of which is read by its sample id as uint8 RGB.

`layouts.py` makes the source of a folder.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from rsa_fast.pipelines import tiff
from rsa_fast.pipelines.extents import Extents
from rsa_fast.pipelines.manifest import Manifest

# The entry of this filter in warnings.filters.
NO_BOMB_WARNING = ("ignore", None, Image.DecompressionBombWarning, None, 0)
TO_UPRIGHT = {  # by EXIF orientation; PIL's rotations are counter-clockwise
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
EXIF_PLACES = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # keys of Image.info


@dataclass(frozen=True)
class Source:
    """One split: its manifest, and functions that read one image and may run on any thread."""

    manifest: Manifest
    read: Callable[[int], np.ndarray]  # (H, W, 3) uint8, decoded by PIL
    # The file's bytes, which are empty for an image that `read` turns. None if pixels are stored.
    encoded: Callable[[int], bytes] | None = None
    beton: Path | None = None  # the FFCV file that contains all images, in the order of their ids
    file: Callable[[int], Path] | None = None  # the file of an image; None if it is in memory
    extents: Extents | None = None  # the positions in packed files; None for other layouts
    held_out: int = 0  # the number of training images held out for evaluation, not in this split
    where: str = ""  # the folder or file of the split, or several, for messages
    ignored: Mapping[str, int] = field(default_factory=dict)  # the counts of what was left out
    bad: Mapping[str, str] = field(default_factory=dict)  # the damaged files left out, and why
    oriented: int = 0  # the number of images that are not upright by their EXIF orientation
    turned: bool = False  # whether `read` turns these images upright

    def __repr__(self) -> str:
        """The split, its size and the place of its images, in words."""
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

    def sizes_in_words(self) -> str:
        """The shortest and the longest side of all images, such as "68 to 1200 px"."""
        sides = self.manifest.sizes.min(), self.manifest.sizes.max()
        return f"{' to '.join(map(str, dict.fromkeys(sides)))} px"

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
        """The stored bytes of an image if they begin like a JPEG, otherwise None."""
        data = self.encoded(sample) if self.encoded else b""
        return data if data[:2] == b"\xff\xd8" else None

    def files(self, ids: Iterable[int]) -> list[Path]:
        """The files from which these images are read, each once. Empty for images in memory."""
        return list(dict.fromkeys(map(self.file, ids))) if self.file else []


def open_image(file: BinaryIO) -> ImageFile.ImageFile:
    """`Image.open` with checks. Every image is opened by this function.

    It hides PIL's warnings about images with more than half the accepted number of pixels, and
    about damaged EXIF tags. For a TIFF that PIL cannot read or would misread, it raises ValueError
    with a description of the file. The other errors are those of `Image.open`.
    """
    # The filters are checked at every call, because the end of a `warnings.catch_warnings` block
    # removes them. Such a block cannot be used here, because it is not safe in threads.
    if NO_BOMB_WARNING not in warnings.filters:
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)
    advice = "which PIL does not read: convert it to 1 or 3 bands of 8 bits"
    try:
        image = Image.open(file)
    except (UnidentifiedImageError, KeyError):
        if tags := tiff.read_tags(file):
            raise ValueError(f"{tiff.described(tags)}, {advice}") from None
        raise
    if tiff.is_misread(image):
        raise ValueError(f"{tiff.described(tiff.tags_of(image))}, {advice}")
    return image


def read_rgb(path: Path) -> np.ndarray:
    """Decode an image file to `(H, W, 3)` uint8. Raises ValueError with the path on failure."""
    try:
        return to_rgb(open_image(io.BytesIO(path.read_bytes())))
    except Exception as error:  # on damaged bytes, decoders raise all kinds of exceptions
        raise ValueError(f"cannot read image {path}: {error}. Replace or delete it") from error


def to_rgb(image: Image.Image) -> np.ndarray:
    """The first frame of any PIL image as `(H, W, 3)` uint8, as torchvision's ImageFolder gives it.

    Grayscale is repeated, CMYK and palettes are converted, alpha is dropped, and an EXIF rotation
    is not applied. Deep values are scaled to 8 bits from the range that the file declares
    (`declared_range`). PIL's own conversion would clip them at 255.

    Raises ValueError for values outside of that range. If no range is declared, it is raised for
    values that PIL's conversion would clip or make black.
    """
    if not is_deep(image):
        return np.array(image.convert("RGB"))
    declared = declared_range(image)
    low, high = declared or (0, 255)
    values = np.asarray(image)
    if image.mode == "L":
        values = values.view(np.int8)  # PIL reads signed bytes as unsigned ones
    least, most = values.min(), values.max()
    is_float = values.dtype.kind == "f"
    black = is_float and declared is None and 0 < most <= 1
    if black or not (low <= least and most <= high):
        reason = "as the file declares" if declared else "because the file declares no range"
        raise ValueError(
            f"its values are {least:g} to {most:g}, but {low:g} to {high:g} would be shown as "
            f"black to white, {reason}. Convert it to 8 bits, or write the range to a TIFF's "
            "SMinSampleValue and SMaxSampleValue"
        )
    if declared is None:
        return np.array(image.convert("RGB"))
    levels = (values.astype(np.float64) - low) * 256 / (high - low + (not is_float))
    return np.repeat(levels.clip(max=255).astype(np.uint8)[..., None], 3, -1)


def is_deep(image: Image.Image) -> bool:
    """Whether the pixels are not unsigned 8-bit numbers."""
    return image.mode[0] in "IF" or tiff.is_signed(image)


def declared_range(image: Image.Image) -> tuple[float, float] | None:
    """The values of black and white of a deep image, or None if the file does not declare them."""
    if image.format in (None, "PNG", "PPM", "JPEG2000") and image.mode[0] == "I":
        return 0, 65535  # PIL scales values of fewer bits to 16 bits
    return tiff.declared_range(image) if image.format == "TIFF" else None


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation of an opened image, 1 to 8. An upright image has 1.

    A TIFF always has 1, because PIL turns it. As in PIL, the orientation may also be in XMP.
    """
    if image.format == "TIFF" or not EXIF_PLACES & image.info.keys():
        return 1
    try:
        # PngImageFile's own method would decode the image, because the tag may follow the pixels.
        value = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
    except Exception:  # damaged tags are no reason to refuse an image
        return 1
    return int(value) if value in range(1, 9) else 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn an image `(H, W, 3)` uint8 of an EXIF orientation as `ImageOps.exif_transpose` does."""
    if orientation == 1:
        return pixels
    return np.array(Image.fromarray(pixels).transpose(TO_UPRIGHT[orientation]))


def check_depth(image: Image.Image) -> None:
    """Raise ValueError, like `to_rgb`, for an image whose values cannot be scaled to 8 bits.

    The image is decoded only if the file declares no range.
    """
    if is_deep(image) and declared_range(image) is None:
        to_rgb(image)
