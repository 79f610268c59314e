"""Test images: synthetic ones are always available, real ones only on some machines."""

from __future__ import annotations

import os
import tarfile
import tempfile
from pathlib import Path

# What is cached for a user is kept out of the home of whoever runs the tests.
os.environ.setdefault("XDG_CACHE_HOME", f"{tempfile.gettempdir()}/rsa-fast-tests-{os.getuid()}")

# In torch 2.10.0, oneDNN corrupts the heap or never returns in the backward pass of convolutions
# with few channels on CPUs without AVX-512. The networks of the tests have few channels.
if "avx512f" not in Path("/proc/cpuinfo").read_text():
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "SSE41")

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.pipelines.beton import BetonWriter, page_bytes
from rsa_fast.pipelines.packed import ENTRY

ROOT = Path(__file__).parents[1]
REAL_DATA = Path(os.environ.get("RSA_FAST_TEST_DATA", ROOT.parent / "shared" / "data"))

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def natural_image(seed: int, height: int, width: int) -> np.ndarray:
    """Return a `(H, W, 3)` uint8 image with enough structure to tell filters apart.

    It consists of smooth colour fields with edges and noise.
    """
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    image = np.asarray(coarse).astype(np.int64) + rng.integers(-12, 13, (height, width, 3))
    image[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


def write_folder(
    root: Path, splits: dict[str, int], size: tuple[int, int] = (20, 20), classes: int = 2
) -> Path:
    """Write an ImageFolder of JPEGs with `splits[name]` images per class."""
    for split, per_class in splits.items():
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = natural_image(1000 * label + i + (500 if split != "train" else 0), *size)
                image[..., label % 3] //= 4  # This makes the classes distinguishable.
                Image.fromarray(image).save(folder / f"{i:03}.jpg", quality=95)
    return root


def write_raw_beton(folder: Path, count: int, side_px: int, seed: int = 0) -> Path:
    """Write a train.beton of `count` square images as pixels, labelled 0, 1, 2, 0, 1, ..."""
    entries = np.zeros(count, ENTRY)
    folder.mkdir(exist_ok=True)
    writer = BetonWriter(folder / "train.beton", count, page_bytes(3 * side_px**2), entries[:0])
    for i in range(count):
        data = natural_image(seed + i, side_px, side_px).tobytes()
        file, offset = writer.append(data, i % 3)
        entries[i] = (file, offset, len(data), i % 3, side_px, side_px, True)
    writer.finish(entries)
    writer.close()
    return folder


def read_bytes() -> int:
    """What this process has had read from disks."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of two classes with 20 training and 10 test images each, of 20x20 px."""
    return write_folder(tmp_path_factory.mktemp("folder"), {"train": 20, "test": 10})


def real_images(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    archive = REAL_DATA / f"{name}.tar"
    if not archive.is_file():
        pytest.skip(
            f"no {name}.tar: set RSA_FAST_TEST_DATA to a folder that holds it "
            "to test on real images"
        )
    place = tmp_path_factory.mktemp(name)
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return place / name


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_images(tmp_path_factory, "cifar10-12k")


@pytest.fixture(scope="session")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return real_images(tmp_path_factory, "imagenet-320")


@pytest.fixture(scope="session")
def beton(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of `folder` in .beton files of raw pixels.

    JPEGs would be decoded with FFCV's own libjpeg settings.
    """
    from click.testing import CliRunner

    from rsa_fast.tools.to_ffcv import main

    place = tmp_path_factory.mktemp("beton")
    done = CliRunner().invoke(
        main, [str(folder), str(place), "--write-mode", "raw", "--workers", "1"]
    )
    assert done.exit_code == 0, done.output
    return place


@pytest.fixture(autouse=True)
def features_of_no_other_test(request, tmp_path_factory, monkeypatch):
    """Compute features anew in every test: those of another one may be of the same images."""
    if request.path.parent.name == "rsa_fast":
        place = tmp_path_factory.mktemp("features")
        monkeypatch.setattr("rsa_fast.evaluation.features.user_cache", lambda: place)
