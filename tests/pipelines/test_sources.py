from __future__ import annotations

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from rsa_fast.pipelines.layouts import open_source, packed_place
from rsa_fast.pipelines.sources import read_rgb
from tests.helpers import natural_image, write_folder


def test_an_image_folder_lists_classes_labels_and_sizes(folder):
    train, test = (open_source(folder, split).manifest for split in ("pretrain", "test"))
    assert train.classes == test.classes == ("class_0", "class_1")
    assert train.labels.tolist() == [0] * 20 + [1] * 20 and len(test) == 20
    assert (train.sizes == 20).all() and train.labelled
    assert open_source(folder, "train").read(3).shape == (20, 20, 3)


def test_a_source_prints_what_it_is_and_where(tmp_path):
    folder = write_folder(tmp_path / "data", {"train": 2}, size=(20, 30))  # height, width
    text = "pretrain: 4 images in 2 classes\n  30x20 px, in files in {}/"
    assert repr(open_source(str(folder), "pretrain")) == text.format(folder)
    Image.new("RGB", (7, 90)).save(folder / "train" / "class_0" / "tall.png")
    Image.new("RGB", (100, 80)).save(folder / "train" / "class_0" / "large.png")
    shown = str(open_source(folder, "pretrain"))
    assert shown.endswith(f"  30x20 px to 100x80 px, in files in {folder}/")
    flat = open_source(folder / "train" / "class_1", "pretrain")
    assert str(flat).startswith("pretrain: 2 images without labels\n")


def test_val_is_the_test_split_and_wins_over_test(tmp_path):
    write_folder(tmp_path, {"train": 2, "test": 2, "val": 3})
    assert len(open_source(tmp_path, "test").manifest) == 6


def test_a_flat_folder_is_unlabelled(tmp_path):
    for i in range(3):
        Image.fromarray(natural_image(i, 12, 18)).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image")
    manifest = open_source(tmp_path, "pretrain").manifest
    assert len(manifest) == 3 and not manifest.labelled and manifest.labels.tolist() == [-1] * 3
    assert manifest.sizes.tolist() == [[12, 18]] * 3
    with pytest.raises(FileNotFoundError, match="no val/ or test/ folder"):
        open_source(tmp_path, "test")


def test_tiny_imagenet_s_validation_table_gives_the_labels(tmp_path):
    write_folder(tmp_path, {"train": 2}, classes=2)
    images = tmp_path / "val" / "images"
    images.mkdir(parents=True)
    for i in range(3):
        Image.fromarray(natural_image(i, 8, 8)).save(images / f"val_{i}.JPEG")
    rows = [
        "val_0.JPEG\tclass_1\t0\t0\t9\t9",
        "val_1.JPEG\tclass_0\t0\t0\t9\t9",
        "val_2.JPEG\tclass_1\t0\t0\t9\t9",
    ]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    manifest = open_source(tmp_path, "test").manifest
    assert manifest.classes == ("class_0", "class_1") and manifest.labels.tolist() == [1, 0, 1]


def test_missing_folders_name_the_layout_wanted(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: wanted: train/<class>"):
        open_source(tmp_path / "nowhere", "pretrain")
    with pytest.raises(FileNotFoundError, match="no images in"):
        open_source(tmp_path, "pretrain")


def test_empty_classes_are_named(tmp_path):
    write_folder(tmp_path, {"train": 1})
    (tmp_path / "train" / "ghost").mkdir()
    with pytest.raises(ValueError, match=r"no images in 1 class folder\(s\) of .*: ghost"):
        open_source(tmp_path, "pretrain")


def test_every_unreadable_image_is_named_at_once(tmp_path):
    write_folder(tmp_path, {"train": 4})
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    files[0].write_bytes(b"")
    files[1].write_bytes(b"plain text, no image")
    files[2].write_bytes(files[2].read_bytes()[:-40])
    with pytest.raises(ValueError, match="3 of 8 files") as caught:
        open_source(tmp_path, "pretrain")
    for path, fault in zip(
        files[:3], ("empty file", "cannot identify", "truncated JPEG"), strict=True
    ):
        assert f"{path.relative_to(tmp_path)}: " in str(caught.value) and fault in str(caught.value)


def test_damage_that_only_decoding_finds_names_the_file(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(natural_image(0, 40, 40)).save(path)
    path.write_bytes(path.read_bytes()[:-300])
    source = open_source(tmp_path, "pretrain")  # A PNG's header does not tell its end.
    with pytest.raises(ValueError, match=r"cannot read image .*a\.png"):
        source.read(0)


def test_images_that_are_not_rgb_become_rgb(tmp_path):
    rgb = Image.fromarray(natural_image(1, 24, 24))
    ramp = np.linspace(0, 65535, 576).reshape(24, 24).astype(np.uint16)
    saved = {
        "gray.png": rgb.convert("L"),
        "palette.png": rgb.quantize(32),
        "alpha.png": rgb.convert("RGBA"),
    }
    saved |= {
        "cmyk.jpg": rgb.convert("CMYK"),
        "one_bit.png": rgb.convert("1"),
        "deep.png": Image.fromarray(ramp),
    }
    for name, image in saved.items():
        image.save(tmp_path / name)
        pixels = read_rgb(tmp_path / name)
        assert pixels.shape == (24, 24, 3) and pixels.dtype == np.uint8, name
    assert (read_rgb(tmp_path / "gray.png") == np.asarray(rgb.convert("L"))[..., None]).all()
    assert (read_rgb(tmp_path / "alpha.png") == np.asarray(rgb)).all()
    assert (read_rgb(tmp_path / "deep.png") == (ramp >> 8)[..., None]).all()
    assert np.abs(read_rgb(tmp_path / "cmyk.jpg").astype(int) - np.asarray(rgb)).mean() < 12
    assert len(open_source(tmp_path, "pretrain").manifest) == len(saved)


def test_the_manifest_is_cached_until_the_data_change(tmp_path):
    write_folder(tmp_path, {"train": 3})
    first = open_source(tmp_path, "pretrain").manifest
    cache = tmp_path / ".rsa-fast" / "train.npz"
    written = cache.stat().st_mtime_ns
    again = open_source(tmp_path, "pretrain").manifest
    assert cache.stat().st_mtime_ns == written and again.fingerprint == first.fingerprint
    Image.fromarray(natural_image(9, 31, 33)).save(tmp_path / "train" / "class_0" / "000.jpg")
    changed = open_source(tmp_path, "pretrain").manifest
    assert changed.sizes[0].tolist() == [31, 33] and changed.fingerprint != first.fingerprint
    cache.write_bytes(b"damaged")
    assert open_source(tmp_path, "pretrain").manifest.fingerprint == changed.fingerprint


def test_the_fingerprint_is_of_the_data_not_of_its_place(tmp_path):
    here = write_folder(tmp_path / "here", {"train": 3})
    there = shutil.copytree(here, tmp_path / "there", copy_function=shutil.copy)
    assert (
        open_source(here, "train").manifest.fingerprint
        == open_source(there, "train").manifest.fingerprint
    )
    (there / "train" / "class_1").rename(there / "train" / "class_9")
    assert (
        open_source(here, "train").manifest.fingerprint
        != open_source(there, "train").manifest.fingerprint
    )


@pytest.fixture
def cifar10_files(tmp_path, monkeypatch):
    """Write CIFAR-10's folder with 10 images per file, and set the checksums of these files."""
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    rng = np.random.default_rng(0)
    sums = {}
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        content = {
            "data": rng.integers(0, 256, (10, 3072), dtype=np.uint8),
            "labels": list(range(10)),
        }
        (root / name).write_bytes(pickle.dumps(content))
        sums[name] = hashlib.md5((root / name).read_bytes()).hexdigest()
    (root / "batches.meta").write_bytes(
        pickle.dumps({"label_names": [f"name_{i}" for i in range(10)]})
    )
    meta = {
        **datasets.CIFAR10.meta,
        "md5": hashlib.md5((root / "batches.meta").read_bytes()).hexdigest(),
    }
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    monkeypatch.setattr(
        datasets.CIFAR10,
        "train_list",
        [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)],
    )
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    return tmp_path


def test_cifar_s_binary_files_are_read(cifar10_files):
    source = open_source(cifar10_files, "pretrain")
    raw = pickle.loads((cifar10_files / "cifar-10-batches-py" / "data_batch_2").read_bytes())[
        "data"
    ]
    assert len(source.manifest) == 50 and source.manifest.classes[3] == "name_3"
    assert str(source) == "pretrain: 50 images in 10 classes\n  32x32 px, in memory"
    assert (source.read(13) == raw[3].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert len(open_source(cifar10_files, "test").manifest) == 10


def test_a_damaged_binary_file_is_an_error(cifar10_files):
    path = cifar10_files / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"CIFAR10 under .* is incomplete or corrupt"):
        open_source(cifar10_files, "pretrain")


def test_stl10_pretrains_on_all_images_and_trains_on_the_labelled(tmp_path, monkeypatch):
    root = tmp_path / "stl10_binary"
    root.mkdir()
    rng = np.random.default_rng(0)
    for name, count in {"train": 4, "unlabeled": 6, "test": 3}.items():
        rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tofile(root / f"{name}_X.bin")
        if name != "unlabeled":
            np.arange(1, count + 1, dtype=np.uint8).tofile(root / f"{name}_y.bin")
    (root / "class_names.txt").write_text("\n".join(f"name_{i}" for i in range(10)))
    # The checksums are those of the real files.
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    pretrain, train = (open_source(tmp_path, split) for split in ("pretrain", "train"))
    assert len(pretrain.manifest) == 10 and not pretrain.manifest.labelled
    assert train.manifest.labels.tolist() == [0, 1, 2, 3]
    raw = np.fromfile(root / "unlabeled_X.bin", np.uint8).reshape(6, 3, 96, 96)
    assert (pretrain.read(4) == raw[0].transpose(2, 1, 0)).all()  # STL-10's files are column-major


def test_a_split_packed_in_two_forms_is_refused_and_a_folder_is_listed_once(tmp_path, monkeypatch):
    for name in (
        "train.beton",
        "validation.ffcv",
        "train_1.jpg",
        "trainer.txt",
        "train/shard-0.txt",
        "test/shard-000000.tar",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    listed, scandir = [], os.scandir
    monkeypatch.setattr(
        os, "scandir", lambda place: (listed.append(Path(place)), scandir(place))[1]
    )
    assert (
        packed_place(tmp_path, "pretrain") == tmp_path / "train.beton"
        and listed.count(tmp_path) == 1
    )
    with pytest.raises(ValueError, match=r"contains test, validation\.ffcv for one split"):
        packed_place(tmp_path, "test")
    (tmp_path / "validation.ffcv").unlink()
    assert packed_place(tmp_path, "test") == tmp_path / "test"
    (tmp_path / "train.beton").unlink()
    assert packed_place(tmp_path, "train") is None
