"""Packed data that are copied to another disk while they are read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from rsa_fast.pipelines import open_source
from rsa_fast.pipelines.files import partial_name
from rsa_fast.tools import stage
from rsa_fast.tools.to_dali import main as to_dali
from tests.helpers import ROOT, invoke, write_folder, write_raw_beton


@pytest.fixture(scope="module")
def src(tmp_path_factory) -> dict[str, Path]:
    """A .beton without a description, and shards of both splits in folders."""
    place = tmp_path_factory.mktemp("src")
    images = write_folder(place / "images", {"train": 6, "val": 2}, classes=2)
    done = invoke(to_dali, images, place / "shards", "--workers", "1")
    assert done.exit_code == 0, done.output
    return {"beton": write_raw_beton(place / "beton", 20, 40), "shards": place / "shards"}


def run(src: Path, dst: Path, *options: str):
    return invoke(stage.main, src, dst, *options)


def same_images(one: Path, other: Path, split: str) -> bool:
    first, second = (open_source(place, split) for place in (one, other))
    assert first.manifest.fingerprint == second.manifest.fingerprint
    count = len(first.manifest)
    return all((first.read(i) == second.read(i)).all() for i in range(count)) and count > 1


@pytest.mark.parametrize(
    ("form", "files", "piece_bytes"), [("beton", 1, 2**22), ("shards", 8, 5000)]
)
def test_copies_replace_the_links_and_are_the_same_data(
    src, tmp_path, form, files, piece_bytes, monkeypatch
):
    monkeypatch.setattr(stage, "PIECE_BYTES", piece_bytes)  # files have several pieces
    dst = tmp_path / "dst"
    plan = stage_links(src[form], dst)
    assert len(plan["files"]) == files and all((dst / name).is_symlink() for name in plan["files"])
    splits = ["pretrain", *["test"] * (form == "shards")]
    assert all(same_images(src[form], dst, split) for split in splits)
    done = run(src[form], dst)
    assert done.exit_code == 0, done.output
    total = sum((src[form] / name).stat().st_size for name in plan["files"])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result == {"path": str(dst), "files": files, "bytes": total}
    for name in plan["files"]:
        assert not (dst / name).is_symlink()
        assert (dst / name).read_bytes() == (src[form] / name).read_bytes()
    assert not list(dst.rglob("*.partial"))
    assert all(same_images(src[form], dst, split) for split in splits)
    before = {name: (dst / name).stat() for name in plan["files"]}
    again = run(src[form], dst)  # there is nothing left to do
    assert again.exit_code == 0 and before == {name: (dst / name).stat() for name in before}


def stage_links(src: Path, dst: Path) -> dict:
    dst.mkdir()
    return stage.prepare(src, dst)


def test_an_open_source_reads_what_has_arrived_from_the_copy_and_the_rest_from_the_source(
    src, tmp_path
):
    dst = tmp_path / "dst"
    stage_links(src["beton"], dst)
    original, opened = open_source(src["beton"], "pretrain"), open_source(dst, "pretrain")
    extents, target = original.extents, dst / "train.beton"
    content = np.fromfile(src["beton"] / "train.beton", np.uint8)
    # The copy gets other pixels, by which it is recognised. It ends within image 7.
    arrived = int(extents.offset[7] + 100)
    partial = target.with_name(partial_name("train.beton"))
    (content[:arrived] ^ 255).tofile(partial)
    for i in range(20):
        expected = original.read(i) ^ (255 if i < 7 else 0)
        assert (opened.read(i) == expected).all()
    (content ^ 255).tofile(partial)
    partial.replace(target)
    assert all((opened.read(i) == original.read(i) ^ 255).all() for i in range(20))


def test_a_killed_copy_goes_on_and_what_was_not_on_the_disk_is_copied_again(
    src, tmp_path, monkeypatch
):
    piece_bytes = 2**22
    monkeypatch.setattr(stage, "PIECE_BYTES", piece_bytes)
    dst = tmp_path / "dst"
    stage_links(src["beton"], dst)
    content = (src["beton"] / "train.beton").read_bytes()
    # Two pieces are whole. A power cut has left zeros in the second, whose end was not yet waited
    # for. The first differs from the source here, to show that it is kept.
    first, rest = b"\1" * piece_bytes, content[piece_bytes:]
    (dst / partial_name("train.beton")).write_bytes(first + bytes(piece_bytes))
    stage.copy(
        src["beton"] / "train.beton",
        dst / "train.beton",
        list(stage.state_of((src["beton"] / "train.beton").stat())),
    )
    assert (dst / "train.beton").read_bytes() == first + rest
    # The table in the first piece is then not the source's, which the fingerprint shows.
    refused = run(src["beton"], dst)
    assert refused.exit_code == 1


def test_a_copy_with_other_labels_is_found_by_its_fingerprint(src, tmp_path):
    dst = tmp_path / "dst"
    plan = stage_links(src["beton"], dst)
    plan["fingerprints"]["pretrain"] = "0" * 64
    with pytest.raises(ValueError, match=r"the copies in .* differ from .* \("):
        stage.copy_all(src["beton"], dst, plan)


def test_unsuitable_places_are_refused(src, tmp_path, monkeypatch):
    files = write_folder(tmp_path / "files", {"train": 1})
    assert "has no .beton files or tar shards" in run(files, tmp_path / "a").stderr
    assert "is the source itself" in run(src["beton"], src["beton"]).stderr
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "train.beton").write_bytes(b"mine")
    assert "train.beton already exists" in run(src["beton"], tmp_path / "b").stderr
    assert (tmp_path / "b" / "train.beton").read_bytes() == b"mine"
    changing = Path(shutil.copytree(src["beton"], tmp_path / "changing"))
    stage_links(changing, tmp_path / "c")
    write_raw_beton(changing, 20, 40, seed=1)
    assert "was staged from other files than those in" in run(changing, tmp_path / "c").stderr
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    assert "make room, or choose another DST" in run(src["beton"], tmp_path / "d").stderr


def test_in_the_background_the_command_returns_when_training_can_start(src, tmp_path):
    dst = tmp_path / "dst"
    command = [
        sys.executable,
        "-m",
        "rsa_fast.tools.stage",
        "--background",
        str(src["shards"]),
        str(dst),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "training can start" in done.stderr, done.stderr
    assert same_images(src["shards"], dst, "pretrain")
    log = dst / ".rsa-fast" / "stage.log"
    end = time.monotonic() + 120
    while '"files": 8' not in log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert '"files": 8' in log.read_text(), log.read_text()
    assert not any(path.is_symlink() for path in dst.rglob("*"))
