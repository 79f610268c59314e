from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rsa_fast.pipelines.layouts import open_source
from rsa_fast.tools.make_demo import CLASSES, SHAPES, TEXTURES, main, make_demo
from tests.helpers import invoke


def digests(root: Path) -> dict[str, str]:
    return {
        str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in root.rglob("*.jpg")
    }


def test_two_runs_draw_the_same_bytes_and_another_seed_others(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_demo(tmp_path / name, per_class=5, seed=seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(set(digests(tmp_path / "a").values()) | set(digests(tmp_path / "c").values())) == 100


def test_splits_classes_and_sizes(tmp_path):
    assert make_demo(tmp_path / "a", per_class=10, size_px=48) == {
        "root": str(tmp_path / "a"),
        "classes": 10,
        "train": 80,
        "test": 20,
    }
    train, test = (open_source(tmp_path / "a", split).manifest for split in ("train", "test"))
    assert (
        (len(train), len(test)) == (80, 20)
        and train.classes == test.classes
        and len(train.classes) == 10
    )
    assert (train.sizes == 48).all()


def test_neither_shape_nor_texture_tells_the_class():
    for part, names in ((0, SHAPES), (1, TEXTURES)):
        assert sorted(pair[part] for pair in CLASSES) == sorted([*range(len(names))] * 2)
    assert len(set(CLASSES)) == 10


def test_a_second_call_draws_nothing_and_a_foreign_folder_is_refused(tmp_path):
    make_demo(tmp_path / "a", per_class=5)
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.jpg")}
    make_demo(tmp_path / "a", per_class=5)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*.jpg")}
    with pytest.raises(ValueError, match="is not the requested demo data"):
        make_demo(tmp_path / "a", per_class=6)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    result = invoke(main, tmp_path / "mine")
    assert result.exit_code == 1 and "remove it, or name another folder" in result.output
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_interrupted_run_leaves_nothing_and_the_next_one_finishes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rsa_fast.tools.make_demo.render", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        make_demo(tmp_path / "a", per_class=5)
    assert not (tmp_path / "a").exists()
    monkeypatch.undo()
    assert make_demo(tmp_path / "a", per_class=5)["train"] == 40
