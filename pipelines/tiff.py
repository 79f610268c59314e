"""Read from a TIFF's tags what PIL does not report about its pixels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    COMPRESSION,
    COMPRESSION_INFO,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    PREFIXES,
    SAMPLEFORMAT,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
    TiffImageFile,
)

# Tags that PIL has no names for.
MIN_SAMPLE_VALUE, MAX_SAMPLE_VALUE = 280, 281
S_MIN_SAMPLE_VALUE, S_MAX_SAMPLE_VALUE = 340, 341
UNSIGNED, SIGNED = 1, 2  # values of SampleFormat
SAMPLE_FORMATS = {UNSIGNED: "unsigned integers", SIGNED: "signed integers", 3: "floats"}
BIG_TIFF = 43  # the version in the third byte of a file with a header of 16 bytes
SEPARATE = 2  # value of PlanarConfiguration: one band after the other
GRAY = (0, 1)  # values of PhotometricInterpretation: 0 is white, or 0 is black

Tags = Mapping[int, Any]


def value(tags: Tags, tag: int, default: float) -> float:
    """The value of a tag. If every band has its own value, it is the largest one."""
    values = tags.get(tag, default)
    return float(max(values) if isinstance(values, tuple) else values)


def tags_of(image: Image.Image) -> Tags:
    """The tags of an opened image, empty if it is not a TIFF."""
    return image.tag_v2 if isinstance(image, TiffImageFile) else {}


def read_tags(file: BinaryIO) -> Tags:
    """The tags of a file that PIL could not open, empty if it is no TIFF or is cut before them."""
    file.seek(0)
    header = file.read(8)
    if not header.startswith(tuple(PREFIXES)):
        return {}
    tags = ImageFileDirectory_v2(header + file.read(8 if header[2] == BIG_TIFF else 0))
    file.seek(tags.next)
    tags.load(file)
    return tags if BITSPERSAMPLE in tags else {}


def described(tags: Tags) -> str:
    """The layout of a TIFF's pixels in words."""
    bands, bits = int(value(tags, SAMPLESPERPIXEL, 1)), int(value(tags, BITSPERSAMPLE, 1))
    kind = SAMPLE_FORMATS.get(int(value(tags, SAMPLEFORMAT, UNSIGNED)), "numbers")
    compression = int(value(tags, COMPRESSION, 1))
    stored = " one after the other" if value(tags, PLANAR_CONFIGURATION, 1) == SEPARATE else ""
    return (
        f"a TIFF of {bands} band{'s' * (bands > 1)}{stored} of {bits}-bit {kind}, compression "
        f"{COMPRESSION_INFO.get(compression, compression)}"
    )


def is_signed(image: Image.Image) -> bool:
    """Whether the pixels are signed integers."""
    return value(tags_of(image), SAMPLEFORMAT, UNSIGNED) == SIGNED


def is_misread(image: Image.Image) -> bool:
    """Whether PIL opens this TIFF but returns wrong pixels, or only a part of their values.

    PIL does this in three cases. It reads the bytes of uncompressed 16-bit bands as pixels if the
    bands are stored one after the other. It reads the first of many bands as a gray image. It reads
    only the upper byte of 16-bit colours, which is almost zero if the file declares a smaller
    range.
    """
    tags = tags_of(image)
    if not tags:
        return False
    bits, bands = value(tags, BITSPERSAMPLE, 1), value(tags, SAMPLESPERPIXEL, 1)
    separate = value(tags, PLANAR_CONFIGURATION, 1) == SEPARATE
    gray = value(tags, PHOTOMETRIC_INTERPRETATION, 0) in GRAY
    return (
        (separate and bits > 8 and value(tags, COMPRESSION, 1) == 1)
        or (gray and bands > 2)
        or (bands > 1 and bits > 8 and declared_range(image) != (0, 2**bits - 1))
    )


def declared_range(image: Image.Image) -> tuple[float, float] | None:
    """The values of black and white that a TIFF declares, or None.

    Unsigned integers of up to 16 bits need no declaration, because their range is that of the type.
    Integers of more bits and floats rarely use the range of the type, so they must declare the
    largest value. Signed integers must declare both ends.
    """
    tags = tags_of(image)
    bits, kind = value(tags, BITSPERSAMPLE, 1), value(tags, SAMPLEFORMAT, UNSIGNED)
    lowest = float("nan") if kind == SIGNED else 0.0
    highest = 2**bits - 1 if kind == UNSIGNED and bits <= 16 else float("nan")
    low = value(tags, S_MIN_SAMPLE_VALUE, value(tags, MIN_SAMPLE_VALUE, lowest))
    high = value(tags, S_MAX_SAMPLE_VALUE, value(tags, MAX_SAMPLE_VALUE, highest))
    return (low, high) if low < high else None
