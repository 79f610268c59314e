from __future__ import annotations

import logging
import os
import shutil

import numpy as np
import pytest
import torch.distributed as dist
from PIL import Image

from rsa_fast.pipelines.combined import held_out_ids, joined, subset
from rsa_fast.pipelines.draws import sample_keys
from rsa_fast.pipelines.layouts import inventory, open_source
from rsa_fast.pipelines.manifest import array_manifest
from rsa_fast.pipelines.sources import Source
from tests.helpers import natural_image, write_folder


@pytest.fixture
def photos(tmp_path):
    """Seven photographs of cats, three of dogs and one of a bird, without val/ or test/."""
    for name, count in {"bird": 1, "cat": 7, "dog": 3}.items():
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(count):
            image = natural_image(100 * len(name) + i, 12 + i, 16)
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


def write_list(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- A held-out part -----------------------------------------------------------------------------


def held_out_by_loops(labels: list[int], fraction: float) -> list[int]:
    held = []
    for label in sorted(set(labels) - {-1}):
        ids = [i for i, own in enumerate(labels) if own == label]
        ids.sort(key=lambda i: int(sample_keys(0, 0, np.array([i]))[0]))
        count = round(fraction * len(ids))
        if len(ids) > 1:
            held += ids[: min(max(1, count), len(ids) - 1)]
    return sorted(held)


@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.99])
def test_the_part_of_each_class_that_is_held_out_is_that_of_a_plain_loop(fraction):
    labels = np.random.default_rng(3).choice([-1, 0, 1, 2, 4], 400, p=[0.1, 0.6, 0.2, 0.09, 0.01])
    labels[7] = 3  # a class of one image
    held = held_out_ids(labels, fraction)
    assert held.tolist() == held_out_by_loops(labels.tolist(), fraction) and 7 not in held
    assert (labels[held] >= 0).all()
    assert set(labels.tolist()) == set(np.delete(labels, held).tolist())
    assert held_out_ids(np.full(9, -1), fraction).size == 0 == held_out_ids(labels[:0], 0.2).size


def test_without_a_test_split_a_part_is_held_out_and_nothing_is_lost(photos):
    whole = open_source(photos, "pretrain")
    opened = {s: open_source(photos, s, val_fraction=0.3) for s in ("pretrain", "train", "test")}
    manifests = {split: source.manifest for split, source in opened.items()}
    assert {m.split for m in manifests.values()} == set(manifests)
    assert np.bincount(manifests["test"].labels).tolist() == [0, 2, 1]
    assert np.bincount(manifests["train"].labels).tolist() == [1, 5, 2]
    assert manifests["train"].classes == manifests["test"].classes == ("bird", "cat", "dog")
    train, test = set(manifests["train"].paths), set(manifests["test"].paths)
    assert not train & test and train | test == set(whole.manifest.paths)
    assert manifests["pretrain"].fingerprint == manifests["train"].fingerprint
    assert len({whole.manifest.fingerprint, *(m.fingerprint for m in manifests.values())}) == 3
    for source in opened.values():
        for sample, path in enumerate(source.manifest.paths):
            pixels = np.asarray(Image.open(photos / path))
            assert (source.read(sample) == pixels).all()
            assert source.encoded(sample) == (photos / path).read_bytes()
            assert source.files([sample]) == [photos / path]
            assert source.manifest.sizes[sample].tolist() == list(pixels.shape[:2])
    assert (opened["train"].held_out, opened["test"].held_out, whole.held_out) == (3, 0, 0)


def test_the_same_images_are_held_out_at_every_start(photos, tmp_path):
    paths = open_source(photos, "test", val_fraction=0.3).manifest.paths
    copy = shutil.copytree(photos, tmp_path / "elsewhere")
    again = open_source(copy, "test", cache=tmp_path / "cache", val_fraction=0.3).manifest
    assert list(again.paths) == list(paths)
    larger = open_source(photos, "test", val_fraction=0.5).manifest
    assert set(paths) < set(larger.paths)


def test_every_rank_holds_out_the_same_images(photos, monkeypatch):
    """The others read the scan of rank 0; what is held out follows from it."""
    expected = open_source(photos, "test", val_fraction=0.3).manifest
    states = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)

        def broadcast(objects, rank=rank):
            if rank == 0:
                states.append(objects[0])
            else:
                objects[0] = states.pop(0)

        monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
        found = open_source(photos, "test", val_fraction=0.3).manifest
        assert found.fingerprint == expected.fingerprint
        assert list(found.paths) == list(expected.paths)
    assert not states


@pytest.mark.parametrize("split", ["pretrain", "train", "test"])
def test_a_test_split_leaves_nothing_to_hold_out(folder, beton, split):
    for data in (folder, beton):
        plain, fraction = open_source(data, split), open_source(data, split, val_fraction=0.5)
        assert plain.manifest.fingerprint == fraction.manifest.fingerprint
        assert plain.beton == fraction.beton and fraction.held_out == 0


def test_a_part_of_a_packed_split_is_held_out_too(beton, tmp_path):
    for name in ("train.beton", "train.json"):
        (tmp_path / name).symlink_to(beton / name)
    whole = open_source(tmp_path, "pretrain")
    held = held_out_ids(whole.manifest.labels, 0.2)
    test = open_source(tmp_path, "test", val_fraction=0.2)
    assert test.manifest.labels.tolist() == whole.manifest.labels[held].tolist()
    assert np.bincount(test.manifest.labels).tolist() == [4, 4] and test.beton is None
    for sample, own in enumerate(held):
        assert (test.read(sample) == whole.read(int(own))).all()
    assert test.files(range(8)) == [tmp_path / "train.beton"]


def test_unlabelled_images_are_never_held_out(photos, tmp_path):
    flat = tmp_path / "flat"
    shutil.copytree(photos / "cat", flat)
    assert len(open_source(flat, "pretrain", val_fraction=0.5).manifest) == 7
    with pytest.raises(FileNotFoundError, match=r"no val/ or test/ folder in .*flat, and no class"):
        open_source(flat, "test", val_fraction=0.5)
    mixed = {
        s: open_source([photos, flat], s, val_fraction=0.3).manifest for s in ("train", "test")
    }
    assert len(mixed["test"]) == 3 and len(mixed["train"]) == 8 and mixed["train"].labelled
    pretrain = open_source([photos, flat], "pretrain", val_fraction=0.3)
    assert len(pretrain.manifest) == 8 + 7 and pretrain.held_out == 3
    assert not set(pretrain.manifest.paths) & set(mixed["test"].paths)
    assert set(mixed["train"].paths) < set(pretrain.manifest.paths)


def test_classes_of_one_image_cannot_be_held_out(tmp_path):
    write_folder(tmp_path, {"train": 1}, classes=3)
    whole = open_source(tmp_path, "train").manifest
    for split in ("pretrain", "train"):
        found = open_source(tmp_path, split, val_fraction=0.5).manifest
        assert found.fingerprint == whole.fingerprint
    with pytest.raises(FileNotFoundError, match="no class has two or more images"):
        open_source(tmp_path, "test", val_fraction=0.5)


@pytest.mark.parametrize("fraction", [-0.1, 1, 20, float("nan")])
def test_a_fraction_that_is_none_is_refused(photos, fraction):
    with pytest.raises(ValueError, match=r"val_fraction = .*: wanted 0 or more, and less than 1"):
        open_source(photos, "train", val_fraction=fraction)


def test_a_line_says_what_was_read_and_what_was_held_out(photos, folder):
    def line(data):
        return inventory(*(open_source(data, s, val_fraction=0.3) for s in ("pretrain", "test")))

    assert line(photos) == (
        f"train: 8 images in 3 classes (bird, ...) from {photos}, 12 to 17 px; "
        "held out for scores: 3 (27%), as there is no val/ or test/"
    )
    assert line(folder) == (
        f"train: 40 images in 2 classes (class_0, ...) from {folder}/train, 20 px; test: 20"
    )


# ---- Several folders -----------------------------------------------------------------------------


def test_several_folders_are_read_as_one_and_each_image_as_alone(folder, photos):
    parts = [open_source(place, "pretrain") for place in (folder, photos)]
    both = open_source([str(folder), photos], "pretrain")
    manifest, names = both.manifest, ("bird", "cat", "class_0", "class_1", "dog")
    assert manifest.classes == names and len(manifest) == 40 + 11
    places = [(part, own) for part in parts for own in range(len(part.manifest))]
    for sample, (part, own) in enumerate(places):
        assert (both.read(sample) == part.read(own)).all()
        assert both.encoded(sample) == part.encoded(own) and both.jpeg(sample) == part.jpeg(own)
        assert both.files([sample]) == part.files([own])
        assert names[manifest.labels[sample]] == part.manifest.classes[part.manifest.labels[own]]
        assert manifest.sizes[sample].tolist() == part.manifest.sizes[own].tolist()
    common = os.path.commonpath([folder, photos])
    assert [f"{common}/{path}" for path in manifest.paths] == [
        str(path) for path in both.files(range(51))
    ]


def test_a_class_of_the_same_name_in_several_folders_is_one_class(tmp_path):
    one, two = (write_folder(tmp_path / name, {"train": 2}) for name in ("one", "two"))
    (two / "train" / "class_0").rename(two / "train" / "a_new_class")
    manifest = open_source((one, two), "train").manifest
    assert manifest.classes == ("a_new_class", "class_0", "class_1")
    assert manifest.labels.tolist() == [1, 1, 2, 2, 0, 0, 2, 2]


def test_the_fingerprint_of_several_folders_is_of_what_is_in_them_and_of_their_order(tmp_path):
    one, two = (write_folder(tmp_path / n, {"train": k}) for n, k in (("one", 2), ("two", 3)))
    first = open_source([one, two], "pretrain").manifest.fingerprint
    moved = shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}_moved"))
    assert open_source([moved / "one", moved / "two"], "pretrain").manifest.fingerprint == first
    assert open_source([two, one], "pretrain").manifest.fingerprint != first
    (two / "train" / "class_1" / "001.jpg").unlink()
    assert open_source([one, two], "pretrain").manifest.fingerprint != first


def test_the_test_images_of_several_folders_are_those_of_the_folders_with_some(tmp_path, caplog):
    with_test = write_folder(tmp_path / "a", {"train": 2, "test": 3})
    without = write_folder(tmp_path / "b", {"train": 4})
    caplog.set_level(logging.INFO)
    both = {s: open_source([without, with_test], s, val_fraction=0.5) for s in ("train", "test")}
    assert len(both["train"].manifest) == 12 and len(both["test"].manifest) == 6
    alone = open_source(with_test, "test")
    assert both["test"].manifest.fingerprint == alone.manifest.fingerprint
    assert caplog.messages == [f"no val/ or test/ in {without}: the others' images are the test"]


def test_packed_images_join_files_but_have_no_paths(beton, photos):
    both = open_source([photos, beton], "pretrain")
    assert len(both.manifest) == 51 and not both.manifest.paths
    assert both.beton is None and both.encoded is None
    assert (both.read(11) == open_source(beton, "pretrain").read(0)).all()
    assert both.files([0, 11, 12]) == [photos / "bird" / "0.png", beton / "train.beton"]


def test_stored_pixels_join_too_and_unlabelled_images_stay_unlabelled():
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (n, 4, 5, 3), dtype=np.uint8) for n in (3, 0, 2)]
    labels = [np.array(x, np.int64) for x in ([1, -1, 0], [], [0, -1])]
    names = (("x", "y"), (), ("y",))
    sources = [
        Source(array_manifest("train", p, label, n), p.__getitem__)
        for p, label, n in zip(pixels, labels, names, strict=True)
    ]
    both = joined(sources, ["a", "b", "c"], "train")
    assert both.manifest.labels.tolist() == [1, -1, 0, 1, -1] and both.files(range(5)) == []
    assert both.encoded is None
    for sample, image in enumerate(np.concatenate(pixels)):
        assert (both.read(sample) == image).all()
    part = subset(both, np.array([4, 2]), "test")
    assert (part.read(0) == pixels[2][1]).all() and part.manifest.labels.tolist() == [-1, 0]


def test_a_folder_or_an_image_that_is_given_twice_is_refused(photos, tmp_path):
    with pytest.raises(ValueError, match="a folder is given twice"):
        open_source([photos, photos / ".." / "photos"], "pretrain")
    inside = write_list(tmp_path / "list.txt", ["photos/cat/1.png\tcat"])
    with pytest.raises(ValueError, match=r"1 images are given twice.*cat/1\.png"):
        open_source([photos, inside], "pretrain")
    with pytest.raises(ValueError, match=r"7 images are given twice"):
        open_source([photos, photos / "cat"], "pretrain")


def test_every_place_has_to_be_there(photos, tmp_path):
    with pytest.raises(ValueError, match="no folder with images is given"):
        open_source([], "pretrain")
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere: wanted"):
        open_source([photos, tmp_path / "nowhere"], "pretrain")
    with pytest.raises(FileNotFoundError, match=r"no file .*list\.txt: wanted"):
        open_source(tmp_path / "list.txt", "pretrain")
    with pytest.raises(ValueError, match=r"0\.png is a file, but not a list of paths"):
        open_source(photos / "cat" / "0.png", "pretrain")


def test_several_read_only_folders_have_scans_of_their_own(tmp_path):
    places = [write_folder(tmp_path / name, {"train": 2}) for name in ("a", "b")]
    for place in places:
        (place / ".rsa-fast").write_text("in the way of a folder")
    first = open_source(places, "pretrain", cache=tmp_path / "cache").manifest
    caches = sorted((tmp_path / "cache" / ".rsa-fast").iterdir())
    written = [cache.stat().st_mtime_ns for cache in caches]
    assert [cache.name for cache in caches] == ["0-train.npz", "1-train.npz"]
    again = open_source(places, "pretrain", cache=tmp_path / "cache").manifest
    assert again.fingerprint == first.fingerprint
    assert [cache.stat().st_mtime_ns for cache in caches] == written


# ---- A text file of paths ------------------------------------------------------------------------


def test_a_text_file_of_paths_gives_the_images_in_its_order(photos, tmp_path):
    outside = tmp_path / "more of them" / "e.png"
    outside.parent.mkdir()
    Image.fromarray(natural_image(5, 9, 8)).save(outside)
    folder = tmp_path / "lists"
    folder.mkdir()
    lines = ["# my images", "", "../photos/dog/2.png", f"  {outside}\r", str(photos / "cat/0.png")]
    source = open_source(write_list(folder / "Some.TXT", lines), "pretrain")
    manifest = source.manifest
    assert list(manifest.paths) == ["photos/dog/2.png", "more of them/e.png", "photos/cat/0.png"]
    assert manifest.labels.tolist() == [-1] * 3 and manifest.classes == ()
    files = [photos / "dog/2.png", outside, photos / "cat/0.png"]
    assert source.files(range(3)) == files
    for sample, path in enumerate(files):
        assert (source.read(sample) == np.asarray(Image.open(path))).all()
        assert source.encoded(sample) == path.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"no val/ or test/ folder in .*Some\.TXT"):
        open_source(folder / "Some.TXT", "test")


def test_a_text_file_may_give_a_class_to_each_image(photos, tmp_path):
    rows = [(f"photos/{name}/{i}.png", f"a {name}") for i in range(3) for name in ("dog", "cat")]
    listed = tmp_path / "list.tsv"
    listed.write_text("\ufeff" + "\n".join(map("\t".join, rows)), encoding="utf-8")
    source = open_source(listed, "train")
    assert source.manifest.classes == ("a cat", "a dog")
    assert source.manifest.labels.tolist() == [1, 0] * 3
    test = open_source(listed, "test", val_fraction=0.4).manifest
    assert test.labels.tolist().count(0) == 1 == test.labels.tolist().count(1)
    assert list(source.manifest.paths) == [path.removeprefix("photos/") for path, _ in rows]


def test_the_scan_of_a_text_file_is_cached_beside_it(photos, tmp_path):
    listed = write_list(tmp_path / "train.txt", ["photos/cat/0.png", "photos/cat/1.png"])
    first = open_source(listed, "pretrain").manifest
    cache = tmp_path / ".rsa-fast" / "train.txt.npz"
    written = cache.stat().st_mtime_ns
    assert open_source(listed, "train").manifest.fingerprint == first.fingerprint
    assert cache.stat().st_mtime_ns == written
    write_list(listed, ["photos/cat/0.png", "photos/cat/2.png"])
    assert open_source(listed, "pretrain").manifest.fingerprint != first.fingerprint
    assert list(open_source(listed, "pretrain").manifest.paths) == ["0.png", "2.png"]


def test_a_text_file_and_folders_are_read_as_one(folder, photos, tmp_path):
    listed = write_list(tmp_path / "list.txt", [f"{photos}/cat/{i}.png\tclass_1" for i in range(3)])
    both = open_source([listed, folder], "train")
    assert both.manifest.classes == ("class_0", "class_1")
    assert both.manifest.labels.tolist() == [1] * 3 + [0] * 20 + [1] * 20
    assert both.files([0, 3]) == [photos / "cat/0.png", folder / "train/class_0/000.jpg"]
    assert (both.read(1) == np.asarray(Image.open(photos / "cat/1.png"))).all()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["photos/cat/0.png\tcat", "photos/cat/1.png"], "line 2: found no class, unlike"),
        (["photos/cat/0.png", "", "photos/cat/1.png\tcat"], "line 3: found a class, unlike"),
        (["photos/cat/0.png\tcat\t7"], "line 1: found 2 tabs"),
        (["# nothing", " "], "lists no image"),
        (["photos/cat/0.png", "photos/../photos/cat/0.png"], r"1 images are given twice.* 0\.png"),
        (["photos/cat/0.png", "a\0b"], "contains binary data: wanted text in UTF-8"),
        (["photos/cat/0.png", "photos/cat"], "1 of the 2 files in .* do not exist"),
    ],
)
def test_a_faulty_text_file_is_refused(photos, tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        open_source(write_list(tmp_path / "list.txt", lines), "pretrain")


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_text_file_may_have_the_mark_of_an_editor(photos, tmp_path, encoding):
    (tmp_path / "list.txt").write_text("photos/cat/0.png\r\nphotos/cat/1.png\r\n", encoding)
    assert list(open_source(tmp_path / "list.txt", "train").manifest.paths) == ["0.png", "1.png"]


def test_missing_files_of_a_text_file_are_all_named(photos, tmp_path):
    lines = [f"photos/{i}.png" for i in range(25)] + ["photos/cat/0.png"]
    with pytest.raises(ValueError, match="25 of the 26 files in") as caught:
        open_source(write_list(tmp_path / "list.txt", lines), "pretrain")
    named = str(caught.value).splitlines()[1:]
    assert named == [f"  {photos}/{i}.png" for i in range(20)] + ["  ..."]
