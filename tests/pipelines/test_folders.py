"""Which images are trained on, which are tested on, and what is said about those left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsa_fast.pipelines.folders import images_below, list_images
from rsa_fast.pipelines.layouts import inventory, open_source
from tests.helpers import natural_image, write_folder


def write_images(root: Path, *names: str) -> Path:
    """Write an image under each name, with pixels of its own."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(natural_image(number, 12, 14)).save(path)
    return root


def paths(data: Path, split: str = "pretrain", **options) -> list[str]:
    return sorted(open_source(data, split, **options).manifest.paths)


# ---- The splits ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train", "val"),
        ("Train", "Test"),
        ("training", "validation"),
        ("TRAIN", "VALID"),
        ("train", "testing"),
    ],
)
def test_the_usual_names_of_splits_are_known_in_any_case(tmp_path, train, test):
    write_images(tmp_path, f"{train}/a/1.png", f"{train}/b/2.png", f"{test}/a/3.png")
    assert paths(tmp_path) == [f"{train}/a/1.png", f"{train}/b/2.png"]
    assert paths(tmp_path, "test") == [f"{test}/a/3.png"]
    assert open_source(tmp_path, "train").manifest.classes == ("a", "b")


def test_a_test_folder_beside_class_folders_is_no_class(tmp_path):
    write_images(tmp_path, "a/1.png", "b/2.png", "Test/a/3.png", "Test/b/4.png")
    source = open_source(tmp_path, "train")
    assert source.manifest.classes == ("a", "b") and paths(tmp_path) == ["a/1.png", "b/2.png"]
    assert paths(tmp_path, "test") == ["Test/a/3.png", "Test/b/4.png"]


def test_flat_images_beside_a_val_folder_are_the_training_images(tmp_path):
    write_images(tmp_path, "1.png", "2.png", "val/3.png")
    assert paths(tmp_path) == ["1.png", "2.png"] and paths(tmp_path, "test") == ["val/3.png"]


def test_val_wins_over_test_and_the_rest_is_counted(tmp_path):
    write_images(tmp_path, "train/a/1.png", "val/a/2.png", "test/3.png", "more/a/4.png", "5.png")
    train, test = (open_source(tmp_path, split) for split in ("pretrain", "test"))
    assert list(train.manifest.paths) == ["train/a/1.png"]
    line = inventory(train, test)
    assert "val: 1; ignored: " in line
    assert all(part in line for part in ("1 in more/", "1 in test/", "1 beside train/")), line


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train2017/1.png", "val2017/2.png"], "train2017/, val2017/, which looks like a split"),
        (["training_set/a/1.png", "test_set/a/1.png"], "looks like a split"),
        (["dev/a/1.png", "other/a/1.png"], "dev/, which looks like a split"),
        (["train/1.png", "training/2.png"], "train/, training/ for one split"),
        (["train/a/1.png", "val/a/1.png", "valid/a/2.png"], "val/, valid/ for one split"),
        (
            ["bus/1.png", "car/2.png", "train/3.png"],
            "is train/ a class, or does it contain the training images",
        ),
        (
            ["bus/1.png", "car/2.png", "test/3.png"],
            "is test/ a class, or does it contain the test images",
        ),
        (["val/a/1.png"], "no training images"),
        (["birds/train/a/1.png", "birds/val/a/2.png"], "birds contains train/, val/"),
        (["cat/train/1.png", "cat/test/2.png", "dog/train/3.png"], "cat contains test/, train/"),
        (
            [f"{i}.png" for i in range(8)] + ["more/8.png", "more/9.png"],
            "8 images, and 2 images in more/",
        ),
        (["1.png", "a/2.png", "b/3.png", "2.png"], "2 images, and 2 images in a/, b/"),
    ],
)
def test_a_folder_that_can_be_read_in_two_ways_is_refused(tmp_path, names, message):
    write_images(tmp_path, *names)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_source(tmp_path, "pretrain")
    # The way out that the message names.
    assert paths(tmp_path, unlabelled=True) == sorted(names)
    assert open_source(tmp_path, "pretrain", unlabelled=True).manifest.classes == ()


def test_names_that_only_begin_like_splits_are_classes(tmp_path):
    names = ["train_station/1.png", "test tube/2.png", "valley/3.png", "evaluators/4.png"]
    write_images(tmp_path, *names)
    found = open_source(tmp_path, "train").manifest.classes
    assert found == ("evaluators", "test tube", "train_station", "valley")


def test_a_class_may_be_called_train_inside_train(tmp_path):
    write_images(tmp_path, "train/train/1.png", "train/bus/2.png", "val/train/3.png")
    assert open_source(tmp_path, "train").manifest.classes == ("bus", "train")


def test_images_beside_many_more_in_class_folders_are_left_out_and_counted(tmp_path):
    write_images(tmp_path, *[f"{c}/{i}.png" for c in "ab" for i in range(3)], "1.png", "2.png")
    source = open_source(tmp_path, "pretrain")
    assert len(source.manifest) == 6 and source.ignored == {"beside the folders": 2}


def test_unlabelled_images_have_no_test_split(tmp_path):
    write_folder(tmp_path, {"train": 2, "val": 1})
    assert len(paths(tmp_path, unlabelled=True)) == 6
    with pytest.raises(FileNotFoundError, match="no val/ or test/ folder"):
        open_source(tmp_path, "test", unlabelled=True)


# ---- What is an image ----------------------------------------------------------------------------


def test_every_format_that_pil_opens_is_read(tmp_path):
    photographs = [".jpg", ".jpe", ".jfif", ".jpeg", ".webp", ".avif", ".jp2", ".j2k", ".tga"]
    drawings = [".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".pcx", ".ico", ".sgi"]
    suffixes = [*photographs, *drawings, ".pgm", ".ppm", ".pnm"]
    for number, suffix in enumerate(suffixes):
        image = Image.fromarray(natural_image(number, 16, 16))
        image = image.convert("L") if suffix == ".pgm" else image
        image.save(tmp_path / f"{number}{suffix.upper() if number % 2 else suffix}")
    source = open_source(tmp_path, "pretrain")
    assert len(source.manifest) == len(suffixes) and not source.ignored
    for sample in range(len(suffixes)):
        assert source.read(sample).shape == (16, 16, 3)


def test_what_is_never_an_image_is_left_out_and_what_else_is_there_is_counted(tmp_path):
    names = ["a/1.png", "b/2.png", "__MACOSX/a/x.png", "a/@eaDir/x.png", "a/._1.png"]
    write_images(tmp_path, *names, ".thumbs/x.png", "a/.x/y.png")
    for name in ("a/photo.heic", "a/notes.txt", "labels.csv", "b/raw", ".DS_Store"):
        (tmp_path / name).write_bytes(b"text")
    source = open_source(tmp_path, "pretrain")
    assert list(source.manifest.paths) == ["a/1.png", "b/2.png"]
    assert source.ignored == {
        "__MACOSX/": 1,
        "@eaDir/": 1,
        "hidden": 3,
        ".heic": 1,
        ".txt": 1,
        ".csv": 1,
        "without a suffix": 1,
    }
    line = inventory(source)
    assert line.startswith(f"train: 2 images in 2 classes (a, ...) from {tmp_path}, 12 to 14 px; ")
    assert "3 hidden" in line and "1 .heic" in line


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("train-00000.parquet", "parquet"),
        ("data_batch_1.bin", "Python version is read"),
        ("images.zip", "unpack it"),
        ("a/scan.dcm", "DICOM"),
    ],
)
def test_where_there_are_no_images_the_message_says_what_there_is(tmp_path, name, hint):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"content")
    suffix = Path(name).suffix
    with pytest.raises(FileNotFoundError, match=rf"(?s)no images in .*1 {suffix}.*{hint}.*wanted:"):
        open_source(tmp_path, "pretrain")


def test_the_folder_of_coco_is_refused_with_the_way_out(tmp_path):
    write_images(tmp_path, "train2017/1.png", "val2017/2.png")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2017.json").write_text("{}")
    with pytest.raises(ValueError, match=r"give the folder.*train2017"):
        open_source(tmp_path, "pretrain")
    assert paths(tmp_path / "train2017") == ["1.png"]


# ---- Links ---------------------------------------------------------------------------------------


def test_a_link_to_a_folder_above_is_not_followed(tmp_path):
    data = write_images(tmp_path / "data", "a/1.png", "b/2.png")
    (data / "a" / "up").symlink_to("../..")
    (data / "loop").symlink_to(".")
    (data / "b" / "other").symlink_to(data / "a")
    left_out = Counter()
    # b/other is a, and its own link up leads out of it again.
    assert images_below(data, data, left_out) == ["a/1.png", "b/2.png", "b/other/1.png"]
    assert left_out == {"links to a folder above": 3}


def test_a_broken_link_to_a_class_folder_is_counted_as_such(tmp_path):
    write_images(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "c").symlink_to("/nowhere")
    source = open_source(tmp_path, "train")
    assert source.manifest.classes == ("a", "b") and source.ignored == {"broken links": 1}


def test_all_broken_links_are_named(tmp_path):
    write_images(tmp_path, "a/1.png", "b/2.png")
    for number in range(3):
        (tmp_path / "a" / f"gone_{number}.png").symlink_to(f"/nowhere/{number}.png")
    with pytest.raises(ValueError, match="3 of 5 files") as caught:
        open_source(tmp_path, "pretrain")
    for number in range(3):
        assert f"a/gone_{number}.png: a link to /nowhere/{number}.png" in str(caught.value)
    source = open_source(tmp_path, "pretrain", on_bad_image="skip")
    assert list(source.manifest.paths) == ["a/1.png", "b/2.png"] and len(source.bad) == 3


# ---- Our own files -------------------------------------------------------------------------------


def test_a_run_s_folder_and_converted_data_among_the_classes_are_no_classes(tmp_path):
    write_images(tmp_path, "a/1.png", "b/2.png", "runs/x/views.png", "packed/train/sheet.png")
    for name in ("recipe.yaml", "env.json", "metrics.jsonl"):
        (tmp_path / "runs" / "x" / name).write_text("")
    (tmp_path / "packed" / "train" / "index.npz").write_bytes(b"")
    (tmp_path / "fresh" / ".rsa-fast").mkdir(parents=True)
    (tmp_path / "ffcv" / "train.partial").mkdir(parents=True)
    (tmp_path / "ffcv" / "train.partial" / "plan.json").write_text("")
    source = open_source(tmp_path, "pretrain")
    assert source.manifest.classes == ("a", "b")
    assert source.ignored == {"written by this program": 4}


def test_the_cache_of_class_folders_is_not_beside_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = write_images(tmp_path / "data", "a/1.png", "b/2.png")
    first = open_source(data, "pretrain")
    assert sorted(path.name for path in data.iterdir()) == ["a", "b"]
    cache, *others = (tmp_path / "cache").rglob("*.npz")
    written = cache.stat().st_mtime_ns
    assert open_source(data, "pretrain").manifest.fingerprint == first.manifest.fingerprint
    assert cache.stat().st_mtime_ns == written and not others


# ---- Tables of labels ----------------------------------------------------------------------------


def test_an_annotation_table_wins_only_where_its_files_are(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png")
    (tmp_path / "val" / "val_annotations.txt").write_text("gone_0.png\ta\ngone_1.png\tb\n")
    manifest = open_source(tmp_path, "test").manifest
    assert list(manifest.paths) == ["val/a/3.png", "val/b/4.png"]


def test_an_annotation_table_may_have_a_mark_and_blank_lines(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/b/2.png", "val/images/x.png", "val/images/y.png")
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text("\ufeffx.png\tb\t0\t0\n\n  \ny.png\ta\t0\t0\r\n")
    manifest = open_source(tmp_path, "test").manifest
    assert manifest.classes == ("a", "b") and manifest.labels.tolist() == [1, 0]


def test_the_columns_of_a_table_may_be_separated_by_spaces_and_each_line_needs_a_class(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/b/2.png", "val/images/x.png", "val/images/y.png")
    table = tmp_path / "val" / "val_annotations.txt"
    table.write_text("x.png  b 0 0\ny.png a 0 0\n")
    assert open_source(tmp_path, "test").manifest.labels.tolist() == [1, 0]
    for line in ("y.png", "y.png\t", "y.png,"):
        table.write_text(f"x.png\tb\n{line}\n")
        with pytest.raises(ValueError, match=r"val_annotations\.txt, line 2: found no class"):
            open_source(tmp_path, "test")


def test_the_table_of_kaggle_labels_the_flat_validation_images_of_imagenet(tmp_path):
    names = [f"ILSVRC2012_val_{i:08}.png" for i in range(1, 4)]
    write_images(tmp_path, "train/n01/1.png", "train/n02/2.png", *(f"val/{n}" for n in names))
    rows = [f"{name[:-4]},n0{1 + i % 2} 1 2 3 4 " for i, name in enumerate(names)]
    table = tmp_path / "LOC_val_solution.csv"
    table.write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))
    manifest = open_source(tmp_path, "test").manifest
    labels = dict(zip(manifest.paths, manifest.labels.tolist(), strict=True))
    assert labels == {f"val/{name}": i % 2 for i, name in enumerate(names)}
    assert manifest.classes == ("n01", "n02")


# ---- Bad images ----------------------------------------------------------------------------------


def test_bytes_after_the_end_of_a_jpeg_are_no_fault_and_a_cut_one_is(tmp_path):
    rng = np.random.default_rng(0)
    for name in "abcd":
        Image.fromarray(natural_image(ord(name), 40, 40)).save(tmp_path / f"{name}.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    trailer = rng.integers(0, 255, 4000, dtype=np.uint8).tobytes().replace(b"\xff\xd9", b"")
    (tmp_path / "a.jpg").write_bytes(whole + trailer)
    (tmp_path / "b.jpg").write_bytes(whole + bytes(5000))
    source = open_source(tmp_path, "pretrain")
    assert (source.read(0) == source.read(1)).all() and len(source.manifest) == 4
    frames = [Image.fromarray(natural_image(i, 40, 40)) for i in range(2)]
    frames[0].save(tmp_path / "d.jpg", format="MPO", save_all=True, append_images=frames[1:])
    pair = (tmp_path / "d.jpg").read_bytes()
    (tmp_path / "d.jpg").write_bytes(pair[: pair.index(b"\xff\xd8", 2) - 60])
    with pytest.raises(ValueError, match=r"(?s)1 of 4 files.*d\.jpg: truncated JPEG"):
        open_source(tmp_path, "pretrain")


def test_bad_images_can_be_left_out_from_the_scan_on(tmp_path):
    data = write_folder(tmp_path / "data", {"train": 4, "val": 2})
    bad = data / "train" / "class_0" / "001.jpg"
    bad.write_bytes(bad.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"rsa-fast verify .* --fix.*--on-bad-image skip"):
        open_source(data, "pretrain")
    source = open_source(data, "pretrain", on_bad_image="skip")
    assert list(source.bad) == ["train/class_0/001.jpg"] and len(source.manifest) == 7
    assert "left out, because damaged or incomplete: 1\n  train/class_0/001.jpg: truncated" in (
        inventory(source)
    )
    bad.unlink()  # The rest is the dataset that it would be without the bad file.
    assert open_source(data, "pretrain").manifest.fingerprint == source.manifest.fingerprint
    (data / "val" / "class_1" / "000.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 4 files"):
        open_source(data, "test")
    test = open_source(data, "test", on_bad_image="skip")
    assert len(test.manifest) == 3 and list(test.bad) == ["val/class_1/000.jpg"]


def test_where_no_image_is_whole_skipping_helps_nobody(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match="1 of 1 files"):
        open_source(tmp_path, "pretrain", on_bad_image="skip")


def test_list_images_is_the_listing_of_open_source(tmp_path):
    write_folder(tmp_path, {"train": 3, "val": 1})
    for split in ("train", "test"):
        listing, manifest = list_images(tmp_path, split), open_source(tmp_path, split).manifest
        assert list(listing[0]) == list(manifest.paths) and listing[2] == manifest.classes
        assert listing[1].tolist() == manifest.labels.tolist()
