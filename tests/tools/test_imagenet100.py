from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from rsa_fast.pipelines.layouts import open_source
from rsa_fast.tools.imagenet100 import main, make_subset, read_classes
from tests.helpers import invoke, write_folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Write three classes of two training images and one validation image."""
    return write_folder(tmp_path / "source", {"train": 2, "val": 1}, size=(3, 3), classes=3)


@pytest.mark.parametrize("copy", [False, True])
def test_the_subset_is_the_listed_classes_of_every_split(source, tmp_path, copy):
    listed = tmp_path / "list.txt"
    listed.write_text("# two of three\n\nclass_2\n  class_0  # with a remark\n")
    arguments = [
        str(source),
        str(tmp_path / "subset"),
        "--classes",
        str(listed),
        *["--copy"] * copy,
    ]
    result = invoke(main, *arguments)
    assert result.exit_code == 0, result.output
    expected = {"path": str(tmp_path / "subset"), "classes": 2, "train": 4, "val": 2}
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    for split, count in (("train", 4), ("test", 2)):
        subset, whole = (open_source(place, split) for place in (tmp_path / "subset", source))
        assert subset.manifest.classes == ("class_0", "class_2") and len(subset.manifest) == count
        same = [list(whole.manifest.paths).index(path) for path in subset.manifest.paths]
        assert all((subset.read(i) == whole.read(j)).all() for i, j in enumerate(same))
    assert (tmp_path / "subset" / "train" / "class_0").is_symlink() != copy
    assert not list(tmp_path.glob("*.partial"))


def test_links_survive_a_move_of_the_subset_and_copies_the_loss_of_the_source(source, tmp_path):
    make_subset(source, tmp_path / "links", ["class_1"])
    make_subset(source, tmp_path / "files", ["class_1"], copy=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "links").rename(tmp_path / "elsewhere" / "links")
    assert open_source(tmp_path / "elsewhere" / "links", "train").read(1).shape == (3, 3, 3)
    shutil.rmtree(source)
    assert open_source(tmp_path / "files", "train").read(1).shape == (3, 3, 3)


def test_all_missing_classes_are_named_before_anything_is_written(source, tmp_path):
    shutil.rmtree(source / "val" / "class_1")
    (source / "train" / "empty").mkdir()
    (tmp_path / "list.txt").write_text("class_0\nclass_1\nghost\nempty")
    result = invoke(main, source, tmp_path / "subset", "--classes", tmp_path / "list.txt")
    assert result.exit_code == 1
    named = "train/empty, train/ghost, val/class_1, val/empty, val/ghost"
    assert f"has no images for 5 class folder(s): {named}" in result.output
    assert not list(tmp_path.glob("subset*"))
    with pytest.raises(FileNotFoundError, match="no train/ in"):
        make_subset(tmp_path, tmp_path / "subset", ["class_0"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n# nothing\n", "lists no class"),
        ("a\nb\na", "twice: a. Remove"),
        ("../other\na", r"invalid names of class folders: \.\./other"),
    ],
)
def test_a_bad_list_says_what_is_wrong(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_classes(tmp_path / "list.txt")


def test_a_finished_subset_is_left_alone_and_another_folder_refused(source, tmp_path):
    subset = tmp_path / "subset"
    subset.mkdir()  # An empty folder has nothing to lose.
    first = make_subset(source, subset, ["class_0"], copy=True)
    image = subset / "train" / "class_0" / "000.jpg"
    image.unlink()
    assert make_subset(source, subset, ["class_0"], copy=True) == first and not image.exists()
    for classes, copy in ((["class_1"], True), (["class_0"], False)):
        with pytest.raises(ValueError, match="is not the requested subset"):
            make_subset(source, subset, classes, copy)
    with pytest.raises(ValueError, match="is not the requested subset"):
        make_subset(source, source, ["class_0"])
    assert (source / "train" / "class_2" / "001.jpg").exists()


def test_an_interrupted_copy_leaves_nothing_and_the_next_run_finishes(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "rsa_fast.tools.imagenet100.shutil.copy2",
        lambda *_: (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        make_subset(source, tmp_path / "subset", ["class_0"], copy=True)
    assert not (tmp_path / "subset").exists()
    monkeypatch.undo()
    assert make_subset(source, tmp_path / "subset", ["class_0"], copy=True)["train"] == 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    "content",
    [
        "\ufeffn00000001\nn00000002\n".encode(),
        "n00000001\r\nn00000002\r\n".encode("utf-16"),
        b"n00000001 robin\nn00000002  sea snake # long\n",
        b"n00000001\trobin\n\nn00000002,snake\n",
    ],
)
def test_the_list_of_classes_may_be_of_any_editor_and_have_columns(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert read_classes(tmp_path / "list.txt") == ["n00000001", "n00000002"]


def test_a_class_with_a_space_in_its_name_is_one_class(tmp_path):
    (tmp_path / "list.txt").write_text("sea snake\nrobin\n")
    assert read_classes(tmp_path / "list.txt") == ["robin", "sea snake"]
