"""The environment of the tests, and images: synthetic ones always, real ones on some machines."""

from __future__ import annotations

import gc
import os
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import invoke, result_of

# What is cached for a user is kept out of the home of whoever runs the tests.
os.environ.setdefault("XDG_CACHE_HOME", f"{tempfile.gettempdir()}/rsa-fast-tests-{os.getuid()}")

# In torch 2.10.0, oneDNN corrupts the heap or never returns in the backward pass of convolutions
# with few channels on CPUs without AVX-512. The networks of the tests have few channels.
if "avx512f" not in Path("/proc/cpuinfo").read_text():
    os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "SSE41")

import pytest
import torch

from tests.garbage import Garbage
from tests.helpers import ROOT, write_folder

REAL_DATA = Path(os.environ.get("RSA_FAST_TEST_DATA", ROOT.parent / "shared" / "data"))

# Garbage collections while the test modules are imported would take five of twelve seconds.
gc.disable()

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of two classes with 20 training and 10 test images each, of 20x20 px."""
    return write_folder(tmp_path_factory.mktemp("folder"), {"train": 20, "test": 10})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 images of 20 px without a test split: an epoch has 5 steps, and nothing is evaluated."""
    return write_folder(tmp_path_factory.mktemp("data"), {"train": 20})


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

    from rsa_fast.tools.to_ffcv import main

    place = tmp_path_factory.mktemp("beton")
    result_of(invoke(main, folder, place, "--write-mode", "raw", "--workers", "1"))
    return place


@pytest.fixture(autouse=True)
def features_of_no_other_test(request, tmp_path_factory, monkeypatch):
    """Compute features anew in every test: those of another one may be of the same images."""
    if request.path.parent.name == "rsa_fast":
        place = tmp_path_factory.mktemp("features")
        monkeypatch.setattr("rsa_fast.evaluation.features.user_cache", lambda: place)


@pytest.fixture
def garbage(tmp_path: Path) -> Iterator[Path]:
    """The folder of an object that this process no longer uses and has not collected yet."""
    folder = tmp_path / "collectors"
    folder.mkdir()
    gc.disable()
    Garbage(folder)
    yield folder
    gc.enable()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread. Layers of tests are too small for two, which then wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
