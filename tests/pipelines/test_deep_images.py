"""Images of more than 8 bits: read as PIL does, scaled as declared, or refused with a reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.sources import read_rgb
from tests.helpers import encoded, natural_image

RAMP = np.arange(64 * 64).reshape(64, 64)  # 0 to 4095
LEVELS = RAMP >> 4  # what it is in 8 bits
MAX, S_MIN, S_MAX = 281, 340, 341  # tags
KINDS = {"u": 1, "i": 2, "f": 3}  # values of SampleFormat
TYPES = {"H": 3, "L": 4, "h": 8, "f": 11}  # numbers of TIFF's types
Tags = dict[int, tuple[str, list[float]]]


def tiff(
    pixels: np.ndarray,
    tags: Tags | None = None,
    *,
    order: str = "<",
    packed: bytes = b"",
    compressed: bool = False,
    separate: bool = False,
) -> bytes:
    """A TIFF of `pixels` `(H, W)` or `(H, W, C)`, which may have more `tags`.

    `packed` are the bytes of 12-bit pixels. `separate` stores one band after the other.
    """
    height, width, bands = (*pixels.shape, 1)[:3]
    stored = pixels.astype(pixels.dtype.newbyteorder(order))
    planes = [packed or stored.tobytes()]
    if separate:
        planes = [stored[..., band].tobytes() for band in range(bands)]
    if compressed:
        planes = [zlib.compress(plane) for plane in planes]
    offsets = 8 + np.cumsum([0, *map(len, planes)])
    every: Tags = {
        256: ("L", [width]),
        257: ("L", [height]),
        258: ("H", [12 if packed else 8 * pixels.itemsize] * bands),
        259: ("H", [8 if compressed else 1]),
        262: ("H", [2 if bands == 3 else 1]),
        273: ("L", offsets[:-1].tolist()),
        277: ("H", [bands]),
        278: ("L", [height]),
        279: ("L", [len(plane) for plane in planes]),
        284: ("H", [2 if separate else 1]),
        339: ("H", [KINDS[pixels.dtype.kind]] * bands),
    }
    if bands > 3:
        every[338] = ("H", [0] * (bands - 1))  # bands of no known meaning
    every |= tags or {}
    at = int(offsets[-1])
    table, rest = struct.pack(f"{order}H", len(every)), b""
    for tag, (kind, values) in sorted(every.items()):
        field = struct.pack(order + kind * len(values), *values).ljust(4, b"\0")
        if len(field) > 4:
            rest_at = at + 2 + 12 * len(every) + 4 + len(rest)
            field, rest = struct.pack(f"{order}L", rest_at), rest + field
        table += struct.pack(f"{order}HHL", tag, TYPES[kind], len(values)) + field
    header = struct.pack(f"{order}2sHL", b"II" if order == "<" else b"MM", 42, at)
    return header + b"".join(planes) + table + bytes(4) + rest


def packed_12(values: np.ndarray) -> bytes:
    first, second = values[:, 0::2], values[:, 1::2]
    triple = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
    return np.stack(triple, -1).astype(np.uint8).tobytes()


BYTE = (RAMP % 256).astype(np.uint8)
# What each file must be read as.
READ = {
    "32 bits of 0 to 255": (tiff(BYTE.astype(np.uint32)), BYTE),
    "32 bits of 0 to 255, signed": (tiff(BYTE.astype(np.int32), order=">"), BYTE),
    "16 bits of 0 to 255, signed": (tiff(BYTE.astype(np.int16)), BYTE),
    "8 bits of 0 to 127, signed": (tiff((BYTE % 128).astype(np.int8)), BYTE % 128),
    "floats of 0 to 255": (tiff(BYTE.astype(np.float32)), BYTE),
    "16 bits": (tiff((RAMP << 4).astype(np.uint16)), LEVELS),
    "16 bits, big-endian, compressed": (
        tiff((RAMP << 4).astype(np.uint16), order=">", compressed=True),
        LEVELS,
    ),
    "16 bits in a PNG": (encoded((RAMP << 4).astype(np.uint16), "PNG"), LEVELS),
    "16 bits in a PGM": (encoded((RAMP << 4).astype(np.uint16), "PPM"), LEVELS),
    "16 bits in a JPEG 2000": (encoded((RAMP << 4).astype(np.uint16), "JPEG2000"), LEVELS),
    "12 bits in a PGM": (b"P5 64 64 4095\n" + RAMP.astype(">u2").tobytes(), LEVELS),
    "12 bits": (tiff(RAMP.astype(np.uint16), packed=packed_12(RAMP)), LEVELS),
    "12 bits, compressed": (
        tiff(RAMP.astype(np.uint16), packed=packed_12(RAMP), compressed=True),
        LEVELS,
    ),
    "12 of 16 bits": (tiff(RAMP.astype(np.uint16), {MAX: ("H", [4095])}), LEVELS),
    "12 of 16 bits, declared in the newer tag": (
        tiff(RAMP.astype(np.uint16), {S_MAX: ("H", [4095])}),
        LEVELS,
    ),
    "12 of 32 bits": (tiff(RAMP.astype(np.uint32), {S_MAX: ("L", [4095])}), LEVELS),
    "-1000 to 3095": (
        tiff((RAMP - 1000).astype(np.int16), {S_MIN: ("h", [-1000]), S_MAX: ("h", [3095])}),
        LEVELS,
    ),
    "floats of 0 to 1": (tiff((BYTE / 255).astype(np.float32), {S_MAX: ("f", [1.0])}), BYTE),
    "floats of -1 to 1": (
        tiff((BYTE / 127.5 - 1).astype(np.float32), {S_MIN: ("f", [-1.0]), S_MAX: ("f", [1.0])}),
        BYTE,
    ),
}
RGB = np.repeat(RAMP[..., None], 3, -1)
BANDS = np.repeat(BYTE[..., None], 5, -1)
# What is said of the files that cannot be read.
REFUSED = {
    "signed": (tiff((RAMP - 1000).astype(np.int16)), "its values are -1000 to 3095, but 0 to 255"),
    "signed bytes": (tiff(BYTE.view(np.int8)), "its values are -128 to 127, but 0 to 255"),
    "32 bits": (tiff(RAMP.astype(np.int32)), "its values are 0 to 4095, but 0 to 255 would be"),
    "floats of 0 to 1": (tiff((RAMP / 4095).astype(np.float32)), "its values are 0 to 1, but"),
    "floats with a hole": (
        tiff(np.where(RAMP > 9, BYTE, np.nan).astype(np.float32)),
        "its values are nan to nan, but",
    ),
    "floats in a PFM": (encoded((RAMP / 4095).astype(np.float32), "PPM"), "its values are 0 to 1"),
    "five bands": (tiff(BANDS), "a TIFF of 5 bands of 8-bit unsigned integers, compression raw,"),
    "five bands, one after the other": (
        tiff(BANDS, separate=True, compressed=True),
        "a TIFF of 5 bands one after the other of 8-bit unsigned integers, compression tiff_adobe_",
    ),
    "16-bit colours, one after the other": (
        tiff(RGB.astype(np.uint16), separate=True),
        "a TIFF of 3 bands one after the other of 16-bit unsigned integers, compression raw,",
    ),
    "colours of 12 of 16 bits": (
        tiff(RGB.astype(np.uint16), {MAX: ("H", [4095] * 3)}),
        "a TIFF of 3 bands of 16-bit unsigned integers",
    ),
    "colours in floats": (tiff(RGB.astype(np.float32)), "a TIFF of 3 bands of 32-bit floats"),
    "64-bit floats": (tiff(RAMP.astype(np.float64)), "a TIFF of 1 band of 64-bit floats"),
    "an unknown compression": (
        tiff(BYTE, {259: ("H", [34887])}),
        "a TIFF of 1 band of 8-bit unsigned integers, compression 34887,",
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_a_deep_image_is_scaled_from_the_range_that_it_declares(kind, tmp_path):
    data, levels = READ[kind]
    (tmp_path / "image.tif").write_bytes(data)
    assert (open_source(tmp_path, "pretrain").read(0) == levels[..., None]).all()


def test_deep_colours_keep_their_upper_8_bits(tmp_path):
    (tmp_path / "image.tif").write_bytes(tiff((RGB << 4).astype(np.uint16)))
    assert (read_rgb(tmp_path / "image.tif") == LEVELS[..., None]).all()


@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_that_would_be_black_or_misread_is_named_by_the_scan(kind, tmp_path):
    data, fault = REFUSED[kind]
    Image.fromarray(natural_image(0, 20, 20)).save(tmp_path / "fine.png")
    path = tmp_path / "image.tif"
    path.write_bytes(data)
    with pytest.raises(ValueError, match="1 of 2 files") as caught:
        open_source(tmp_path, "pretrain")
    assert "image.tif: " in str(caught.value) and fault in str(caught.value)
    with pytest.raises(ValueError, match="cannot read image") as caught:
        read_rgb(path)
    assert f"{path}: {fault}" in str(caught.value)
    assert "onvert it to " in str(caught.value)


def test_values_outside_the_declared_range_are_refused_when_they_are_read(tmp_path):
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(RAMP.astype(np.uint16), {MAX: ("H", [255])}))
    with pytest.raises(
        ValueError,
        match="0 to 4095, but 0 to 255 would be shown as black to white, as the file declares",
    ):
        read_rgb(path)


def test_a_tiff_that_is_cut_is_not_described_by_half_of_its_tags(tmp_path):
    path = tmp_path / "image.tif"
    path.write_bytes(tiff(BANDS)[:-150])
    with pytest.raises(ValueError, match="cannot identify image file"):
        read_rgb(path)


def test_a_large_image_is_opened_without_a_warning(tmp_path: Path, monkeypatch, recwarn):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 300)
    Image.new("RGB", (20, 20)).save(tmp_path / "image.png")
    assert open_source(tmp_path, "pretrain").read(0).shape == (20, 20, 3)
    assert not recwarn
    with pytest.warns(Image.DecompressionBombWarning):  # what PIL itself says
        Image.open(tmp_path / "image.png")
