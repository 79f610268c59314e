"""Images that EXIF says to turn: turned by every backend alike, or by none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from rsa_fast.pipelines import Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.layouts import inventory
from rsa_fast.pipelines.order import epoch_order
from rsa_fast.pipelines.plain import PlainImages, plain_image
from rsa_fast.recipes import build_recipe
from rsa_fast.tools.to_dali import main as to_dali
from rsa_fast.tools.to_ffcv import main as to_ffcv
from tests.helpers import DALI, invoke, natural_image, write_folder

FORMATS = ("jpg", "png", "webp", "tif")
SPEC = ViewSpec(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.fixture(scope="module")
def oriented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image of 40x56 px in each orientation and format, in two classes."""
    place = tmp_path_factory.mktemp("oriented")
    for orientation in range(1, 9):
        tags = Image.Exif()
        tags[ExifTags.Base.Orientation] = orientation
        for form in FORMATS:
            path = place / "train" / f"class_{orientation % 2}" / f"{orientation}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(natural_image(orientation, 40, 56)).save(path, exif=tags)
    return place


@pytest.mark.parametrize("on", [False, True])
def test_pixels_and_sizes_are_those_of_pil(oriented, on):
    source = open_source(oriented, "pretrain", exif_orientation=on)
    assert source.oriented == 21 and source.turned == on  # PIL turns the TIFFs by itself
    for sample, path in enumerate(source.manifest.paths):
        image = Image.open(oriented / path)
        expected = np.asarray(ImageOps.exif_transpose(image) if on else image)
        assert (source.read(sample) == expected).all(), path
        assert source.manifest.sizes[sample].tolist() == list(expected.shape[:2]), path
        as_stored = not on or path.endswith(".tif") or Path(path).stem == "1"
        stored = (oriented / path).read_bytes() if as_stored else b""
        assert source.encoded and source.encoded(sample) == stored, path
    assert f"; EXIF orientation {'applied' if on else 'ignored'}: 21" in inventory(source)


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("backend", ["native", "resident", pytest.param("dali", marks=DALI)])
def test_every_backend_turns_an_image_or_none_does(oriented, backend, on):
    def weak_views(backend: str) -> torch.Tensor:
        source = open_source(oriented, "pretrain", exif_orientation=on)
        loading = Loading(backend, aggressive_on="host")
        order = Order(len(source.manifest), 16, 5)
        reads = frozenset({"weak_1"})
        with open_views(source, SPEC, reads, order, loading=loading) as loader:
            return torch.cat([batch.weak_1 for batch in loader.batches(0)]) * 255

    gap = (weak_views(backend) - weak_views("torchvision")).abs()
    assert gap.max() < (3 if backend == "dali" else 1e-3)


def test_evaluation_sees_the_images_upright(oriented):
    source = open_source(oriented, "train", exif_orientation=True)
    images = PlainImages(source, SPEC, 32, 32, torch.device("cpu"), torch.float32, threads=1)
    ((batch, _),) = images
    for sample, path in enumerate(source.manifest.paths):
        upright = np.asarray(ImageOps.exif_transpose(Image.open(oriented / path)))
        expected = torch.from_numpy(plain_image(upright, 32, 32).copy()).permute(2, 0, 1) / 255
        assert torch.equal(batch[sample], expected), path


def test_parts_of_a_source_and_several_sources_are_turned(oriented, folder):
    whole = open_source(oriented, "train", exif_orientation=True)
    part = open_source(oriented, "test", val_fraction=0.3, exif_orientation=True)
    for sample, path in enumerate(part.manifest.paths):
        own = whole.manifest.paths.index(path)
        assert (part.manifest.sizes[sample] == whole.manifest.sizes[own]).all()
        assert (part.read(sample) == whole.read(own)).all() and part.jpeg(sample) == whole.jpeg(own)
    both = open_source([folder, oriented], "train", exif_orientation=True)
    first = len(open_source(folder, "train").manifest)
    assert (both.manifest.sizes[first:] == whole.manifest.sizes).all() and both.oriented == 21
    assert all((both.read(first + i) == whole.read(i)).all() for i in range(len(whole.manifest)))


def test_only_images_to_turn_change_the_fingerprint(oriented, folder):
    for place, same in ((folder, True), (oriented, False)):
        on, off = (open_source(place, "pretrain", exif_orientation=on) for on in (True, False))
        assert (on.manifest.fingerprint == off.manifest.fingerprint) == same
        assert "EXIF" in inventory(on) or same


def test_damaged_tags_are_ignored(tmp_path, recwarn):
    pixels = natural_image(0, 40, 56)
    for name, tags in {
        "a.png": b"Exif\0\0nothing",
        "b.png": b"Exif\0\0II*\0\xff\xff\xff\0",
    }.items():
        Image.fromarray(pixels).save(tmp_path / name, exif=tags)
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = 9
    Image.fromarray(pixels).save(tmp_path / "c.png", exif=tags)
    source = open_source(tmp_path, "pretrain", exif_orientation=True)
    assert source.oriented == 0 and all((source.read(i) == pixels).all() for i in range(3))
    assert not recwarn


def test_own_images_are_turned_and_the_benchmarks_are_not(tmp_path):
    photos = write_folder(tmp_path / "photos", {"train": 20})
    assert build_recipe("auto", "rsa", data=photos).exif_orientation
    for dataset in ("cifar10", "stl10", "tinyimagenet", "imagenet100", "imagenet1k", "demo"):
        assert not build_recipe(dataset, "rsa").exif_orientation


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("convert", [to_ffcv, to_dali])
def test_converters_store_images_upright_or_say_that_they_do_not(oriented, tmp_path, convert, on):
    options = ["--workers", "1", *["--write-mode", "passthrough"] * (convert is to_ffcv)]
    options += ["--exif-orientation"] * on
    done = invoke(convert, oriented, tmp_path, *options)
    assert done.exit_code == 0, done.output
    assert f"EXIF orientation {'applied' if on else 'ignored'}: 21" in done.stderr
    stored = open_source(tmp_path, "train")
    source = open_source(oriented, "train", exif_orientation=on)
    count = len(source.manifest)
    for sample, own in enumerate(epoch_order(count, 0, 0)):
        expected = source.read(int(own)).astype(int)
        assert stored.manifest.sizes[sample].tolist() == list(expected.shape[:2])
        assert np.abs(stored.read(sample) - expected).mean() < 8  # of 255, in a new JPEG
