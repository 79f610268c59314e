"""JPEGs of every chroma sampling are read as PIL reads them."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.pipelines import Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.host_ops import jpeg_header
from rsa_fast.pipelines.loading import Job
from rsa_fast.pipelines.native_views import NativeViews

# Codes for the numbers of bits 0 to 11 of a block's mean, and for the end of a block.
DC_BITS = [0, 1, 5, 1, 1, 1, 1, 1, 1, *[0] * 7]
AC_BITS = [1, *[0] * 15]
USUAL = {  # the ratios by which a decoder enlarges the components, with their usual names
    "4:4:4": [(1, 1), (1, 1), (1, 1)],
    "4:2:2": [(2, 1), (1, 1), (1, 1)],
    "4:2:0": [(2, 2), (1, 1), (1, 1)],
    "4:2:2 of twice the rows": [(2, 2), (1, 2), (1, 2)],
    "gray": [(1, 1)],
    "gray of 2x2": [(2, 2)],
}
UNUSUAL = {
    "4:4:0": [(1, 2), (1, 1), (1, 1)],
    "4:1:1": [(4, 1), (1, 1), (1, 1)],
    "4:1:0": [(4, 2), (1, 1), (1, 1)],
    "4:2:0 of wide chroma": [(2, 2), (2, 1), (2, 1)],
    "one of them 4:4:0": [(2, 2), (1, 1), (2, 1)],
    "tall chroma": [(1, 1), (1, 2), (1, 2)],
    "CMYK": [(1, 1)] * 4,  # PIL and simplejpeg convert it differently
}
SAMPLINGS = USUAL | UNUSUAL


def jpeg(height: int, width: int, sampling: list[tuple[int, int]]) -> bytes:
    """A JPEG whose blocks of 8x8 have a random level each.

    `sampling` are the factors of each component along x and y.
    """
    rng = np.random.default_rng(0)
    codes, code = {}, 0
    for length, count in enumerate(DC_BITS, 1):
        for _ in range(count):
            codes[len(codes)] = f"{code:0{length}b}"
            code += 1
        code <<= 1
    h_max, v_max = (
        max(factors) if len(sampling) > 1 else 1 for factors in zip(*sampling, strict=True)
    )
    units = -(-width // (8 * h_max)) * -(-height // (8 * v_max))
    bits, before = "", [0] * len(sampling)
    for _, component in product(range(units), range(len(sampling))):
        h, v = sampling[component] if len(sampling) > 1 else (1, 1)
        for level in rng.integers(-60, 61, h * v).tolist():
            change, before[component] = level - before[component], level
            size = abs(change).bit_length()
            value = change if change > 0 else change + (1 << size) - 1
            mean = f"{value:0{size}b}" if size else ""
            bits += codes[size] + mean + "0"  # and no detail
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker: int, *content: int) -> bytes:
        return bytes([0xFF, marker, *(len(content) + 2).to_bytes(2, "big"), *content])

    frame = [8, *height.to_bytes(2, "big"), *width.to_bytes(2, "big"), len(sampling)]
    components = []
    for number, (h, v) in enumerate(sampling, 1):
        frame += [number, h << 4 | v, 0]
        components += [number, 0]
    return (
        b"\xff\xd8"
        + segment(0xE0, *b"JFIF\0\1\1\0\0\1\0\1\0\0")
        + segment(0xDB, 0, *[8] * 64)
        + segment(0xC0, *frame)
        + segment(0xC4, 0, *DC_BITS, *range(12))
        + segment(0xC4, 16, *AC_BITS, 0)
        + segment(0xDA, len(sampling), *components, 0, 63, 0)
        + scan
        + b"\xff\xd9"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JPEG of 37x45 px of each sampling, in the order of the names."""
    place = tmp_path_factory.mktemp("samplings")
    for number, sampling in enumerate(SAMPLINGS.values()):
        (place / f"{number:02}.jpg").write_bytes(jpeg(37, 45, sampling))
    return place


def weak_views(folder: Path, backend: str) -> torch.Tensor:
    """The first weak views `(N, 3, 32, 32)` in 8-bit levels."""
    spec = ViewSpec(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    order = Order(len(SAMPLINGS), len(SAMPLINGS), 0)
    with open_views(
        open_source(folder, "pretrain"),
        spec,
        frozenset({"weak_1"}),
        order,
        loading=Loading(backend, aggressive_on="host"),
    ) as loader:
        (batch,) = loader.batches(0)
    return batch.weak_1 * 255


@pytest.mark.parametrize("backend", ["native", "resident"])
def test_every_sampling_is_read_as_pil_reads_it(folder, backend):
    gap = (weak_views(folder, backend) - weak_views(folder, "torchvision")).abs()
    assert gap.max() < 1e-3


def test_native_decodes_every_sampling_to_the_pixels_of_pil(folder):
    source = open_source(folder, "pretrain")
    job = Job(
        source,
        ViewSpec(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        frozenset({"weak_1"}),
        Order(len(SAMPLINGS), len(SAMPLINGS), 0),
        torch.device("cpu"),
        torch.float32,
        Loading("native", aggressive_on="host"),
    )
    with NativeViews(job) as loader:
        for sample, name in enumerate(SAMPLINGS):
            pixels = np.asarray(Image.open(folder / f"{sample:02}.jpg").convert("RGB"))
            assert (loader.decode(sample) == pixels).all(), name
            assert (job.jpeg(sample) is not None) == (name in USUAL), name


@pytest.mark.parametrize("name", SAMPLINGS)
def test_what_is_usual(name):
    data = np.frombuffer(jpeg(37, 45, SAMPLINGS[name]), np.uint8)
    assert jpeg_header(data) == (37, 45, name in USUAL)
    for length in range(len(data)):  # no cut reads beyond the end
        height, width, _ = jpeg_header(data[:length])
        assert (height, width) in ((0, 0), (37, 45))
