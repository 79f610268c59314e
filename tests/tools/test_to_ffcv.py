from __future__ import annotations

import io
import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.pipelines.beton import open_beton
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.order import epoch_order
from rsa_fast.pipelines.sources import to_rgb
from rsa_fast.tools.convert import RESIZE_FILTER, Encoding, psnr_db
from rsa_fast.tools.to_ffcv import main
from tests.helpers import NO_FFCV, ROOT, encoded, invoke, natural_image, write_folder
from tests.tools.mixed import converted, digests, kept_as_they_are

ORDER = epoch_order(14, 0, 0)  # in which the 14 training images are written


convert = partial(converted, main)


def test_the_module_runs_and_its_last_line_is_the_result(images, tmp_path):
    command = [
        sys.executable,
        "-m",
        "rsa_fast.tools.to_ffcv",
        str(images),
        str(tmp_path / "a"),
        "--workers",
        "2",
        "--write-mode",
        "jpg",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["val"]["count"] == 2 and "verify" in done.stderr
    convert(images, tmp_path / "b", "--write-mode", "jpg")
    assert digests(tmp_path / "a") == digests(tmp_path / "b")  # for any number of workers


def test_passthrough_keeps_jpegs_and_encodes_the_rest(images, tmp_path):
    result = convert(
        images,
        tmp_path,
        "--write-mode",
        "passthrough",
        "--max-resolution",
        20,
        "--jpeg-quality",
        88,
    )
    source, stored = open_source(images, "train"), open_source(tmp_path, "train")
    assert ORDER.tolist() != sorted(ORDER)
    assert (stored.manifest.sizes == source.manifest.sizes[ORDER]).all()  # No image is resized.
    keep = kept_as_they_are(source)
    for i, own in enumerate(ORDER.tolist()):
        as_it_is = source.encoded(own) if keep[own] else encoded(source.read(own), quality=88)
        assert stored.encoded(i) == as_it_is
    assert (result["jpg"], result["raw"], result["reencoded"]) == (14, 0, 3)
    noise = [
        psnr_db(source.read(own), stored.read(i))
        for i, own in enumerate(ORDER.tolist())
        if not keep[own]
    ]
    assert result["psnr_db"]["min"] == pytest.approx(min(noise), abs=0.01)
    assert result["psnr_db"]["median"] == pytest.approx(np.median(noise), abs=0.01)
    assert (
        stored.manifest.labels == source.manifest.labels[ORDER]
    ).all() and stored.manifest.classes == source.manifest.classes


def test_raw_keeps_pixels(images, tmp_path):
    result = convert(images, tmp_path, "--write-mode", "raw")
    source, stored = open_source(images, "train"), open_source(tmp_path, "train")
    assert all((stored.read(i) == source.read(own)).all() for i, own in enumerate(ORDER.tolist()))
    assert (result["jpg"], result["raw"], result["reencoded"], result["psnr_db"]) == (
        0,
        14,
        0,
        None,
    )


def test_jpg_is_pil_s_jpeg_of_the_area_filtered_image(images, tmp_path):
    result = convert(
        images, tmp_path, "--write-mode", "jpg", "--max-resolution", 60, "--jpeg-quality", 85
    )
    source, stored = open_source(images, "train"), open_source(tmp_path, "train")
    for i, own in enumerate(ORDER.tolist()):
        image, (height, width) = Image.fromarray(source.read(own)), stored.manifest.sizes[i]
        assert max(height, width) == min(60, max(image.size))
        pixels = np.asarray(image.resize((width, height), RESIZE_FILTER))
        assert stored.encoded(i) == encoded(pixels, quality=85)
    assert (
        result["reencoded"] == 14
        and 15 < result["psnr_db"]["min"] < result["psnr_db"]["median"] < 50
    )
    assert result["bytes"] == (tmp_path / "train.beton").stat().st_size


def test_proportion_and_smart_choose_per_image(images, tmp_path):
    pixels = np.zeros((2, 2, 3), np.uint8)

    def raw(seed: int, probability: float) -> np.ndarray:
        encoding = Encoding("proportion", compress_probability=probability, seed=seed)
        return np.array([encoding.stores_raw(sample, pixels) for sample in range(1000)])

    assert abs(raw(0, 0.3).mean() - 0.7) < 0.05 and raw(0, 0).all() and not raw(0, 1).any()
    assert abs((raw(0, 0.3) != raw(1, 0.3)).mean() - 2 * 0.3 * 0.7) < 0.05
    convert(images, tmp_path / "proportion", "--seed", 3)
    encoding = Encoding("proportion", seed=3)
    entries = open_beton(tmp_path / "proportion" / "train.beton").entries
    chosen = [encoding.stores_raw(sample, pixels) for sample in epoch_order(14, 3, 0).tolist()]
    assert entries["raw"].tolist() == chosen
    assert 0 < entries["raw"].sum() < 14
    convert(images, tmp_path / "smart", "--write-mode", "smart", "--smart-threshold", 10_000)
    entries = open_beton(tmp_path / "smart" / "train.beton").entries
    assert (
        entries["raw"] == (entries["height"] * entries["width"] * 3 <= 10_000)
    ).all() and 0 < entries["raw"].sum() < 14
    refused = invoke(main, images, tmp_path / "c", "--write-mode", "smart")
    assert refused.exit_code == 2 and "needs --smart-threshold" in refused.output


def test_sizes_are_those_of_ffcv_s_resizer_to_the_pixel_its_rounding_loses():
    resizer = pytest.importorskip("ffcv.fields.rgb_image", reason=NO_FFCV).resizer
    sizes = np.random.default_rng(0).integers(20, 900, (200, 2))
    for size, (height, width) in zip(
        sizes, Encoding("jpg", longest_px=300).sizes(sizes), strict=True
    ):
        theirs = resizer(np.zeros((*size, 3), np.uint8), 300).shape[:2]
        assert max(height, width) == min(300, size.max())
        assert 0 <= height - theirs[0] <= 1 and 0 <= width - theirs[1] <= 1
    # FFCV fails here.
    assert Encoding("jpg", longest_px=300).sizes(np.array([9000, 3])).tolist() == [300, 1]
    pixels = natural_image(0, 320, 480)
    ours = np.asarray(Image.fromarray(pixels).resize((300, 200), RESIZE_FILTER))
    assert np.abs(ours.astype(int) - resizer(pixels, 300)).mean() < 1  # levels


def test_a_side_that_does_not_fit_the_format_is_refused(tmp_path):
    root = write_folder(tmp_path / "a", {"train": 1})
    Image.fromarray(np.zeros((1, 70_000, 3), np.uint8)).save(root / "train/class_0/long.png")
    result = invoke(main, root, tmp_path / "b", "--write-mode", "raw", "--max-resolution", "80000")
    assert (
        result.exit_code == 1
        and "a side of 70000 px, but the format allows 65535 px" in result.stderr
    )


@pytest.mark.parametrize("mode", ["raw", "passthrough"])
def test_ffcv_s_loader_reads_the_file(mode, tmp_path):
    loader = pytest.importorskip("ffcv.loader", reason=NO_FFCV)
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import SimpleRGBImageDecoder

    src = write_folder(tmp_path / "src", {"train": 3}, size=(24, 32))
    convert(src, tmp_path, "--write-mode", mode)
    threads = torch.get_num_threads()
    pipelines = {"image": [SimpleRGBImageDecoder()], "label": [IntDecoder()]}
    order = loader.OrderOption.SEQUENTIAL
    batches = loader.Loader(
        str(tmp_path / "train.beton"), 6, num_workers=1, order=order, pipelines=pipelines
    )
    found = [(images.copy(), labels.copy()) for images, labels in batches]
    torch.set_num_threads(threads)
    source = open_source(src, "train")
    order = epoch_order(6, 0, 0)
    pixels = np.stack([source.read(own) for own in order.tolist()]).astype(int)
    assert len(found) == 1 and (found[0][1].ravel() == source.manifest.labels[order]).all()
    error = np.abs(found[0][0] - pixels)
    # FFCV's JPEG decoder uses the fast transform.
    assert error.max() == 0 if mode == "raw" else error.mean() < 3


def test_grayscale_is_decoded_to_three_equal_channels(images, tmp_path):
    convert(images, tmp_path, "--write-mode", "passthrough")
    stored = open_source(tmp_path, "train")
    own = open_source(images, "train").manifest.paths.index("train/class_0/gray.jpg")
    gray = ORDER.tolist().index(own)
    assert (
        np.ptp(stored.read(gray), axis=-1).max() == 0
        and Image.open(io.BytesIO(stored.encoded(gray))).mode == "L"
    )
    assert (stored.read(gray) == to_rgb(Image.open(images / "train/class_0/gray.jpg"))).all()
