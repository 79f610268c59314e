"""What both converters must do.

They write the same bytes whatever interrupts them, and their errors name what is wrong.
"""

from __future__ import annotations

import errno
import gc
import json
import multiprocessing
import os
import select
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from rsa_fast.pipelines.beton import BetonWriter
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.shards import ShardWriter
from rsa_fast.pipelines.workers import FORKS
from rsa_fast.tools import convert, to_dali, to_ffcv
from tests.garbage import collectors
from tests.helpers import invoke, natural_image, result_of
from tests.tools.mixed import digests

TOOLS = {
    "ffcv": (to_ffcv.main, ["--write-mode", "proportion", "--max-resolution", "60"]),
    "dali": (to_dali.main, ["--short-side", "30"]),
}
WRITERS = {"ffcv": BetonWriter, "dali": ShardWriter}
both = pytest.mark.parametrize("tool", TOOLS)


def run(tool: str, src: Path, dst: Path, *options: object) -> Result:
    command, usual = TOOLS[tool]
    return invoke(command, src, dst, "--workers", "1", *usual, *options)


def refusal(result: Result) -> str:
    assert result.exit_code == 1 and result.stdout == ""
    return result.stderr


def die_at(event: int, tool: str, src: Path, dst: Path) -> None:
    """Convert, and kill this process at the given call of fsync or rename.

    Progress is saved after every image.
    """
    convert.SYNC_EVERY_S = 0
    calls = iter(range(10**6))

    def counted(call):
        def wrapper(*args):
            if next(calls) == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args)

        return wrapper

    os.fsync, Path.rename = counted(os.fsync), counted(Path.rename)
    run(tool, src, dst)
    os._exit(next(calls) % 200)  # the number of events


def forked(target, *args: object) -> int:
    process = FORKS.Process(target=target, args=args)
    process.start()
    process.join(30)
    return process.exitcode


@both
@pytest.mark.slow
def test_a_kill_at_any_moment_changes_no_byte(tool, images, tmp_path):
    src = tmp_path / "src"
    shutil.copytree(images / "train" / "class_0", src / "train" / "class_0")
    open_source(src, "train")  # to write the cache of the scan is no event of the conversion
    events = forked(die_at, -1, tool, src, tmp_path / "whole")
    wanted = digests(tmp_path / "whole")
    assert events > 25 and not [name for name in wanted if "partial" in name]
    # Event 11 is at the beginning. The last six are tables, description and renames.
    for event in (11, *range(events - 6, events)):
        dst = tmp_path / f"killed_{event}"
        assert forked(die_at, event, tool, src, dst) == -signal.SIGKILL
        assert digests(dst) != wanted or event == events - 1
        result_of(run(tool, src, dst))
        assert digests(dst) == wanted, event


@both
def test_what_a_kill_leaves_beyond_the_journal_is_cut(tool, images, tmp_path):
    result_of(run(tool, images, tmp_path / "whole"))
    assert forked(die_at, 21, tool, images, tmp_path / "killed") == -signal.SIGKILL
    work = tmp_path / "killed" / "train.partial"
    for path in (work / "journal", *work.glob("train.beton"), *work.glob("train/shard-*.tar")):
        with path.open("ab") as file:
            file.write(b"half written")
    result = run(tool, images, tmp_path / "killed")
    assert result_of(result) and f"continuing with {work}" in result.stderr
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


@both
def test_other_settings_or_another_source_are_refused(tool, images, tmp_path):
    src = shutil.copytree(images, tmp_path / "src")
    assert forked(die_at, 21, tool, src, tmp_path / "dst") == -signal.SIGKILL
    for state in ("begun", "complete"):
        before = digests(tmp_path / "dst")
        assert "jpeg_quality was 90, now 80" in refusal(
            run(tool, src, tmp_path / "dst", "--jpeg-quality", 80)
        )
        shutil.copy(src / "val/class_0/0.jpg", src / "train/class_0/new.jpg")
        message = refusal(run(tool, src, tmp_path / "dst"))
        assert (
            "count was 14, now 15; source_fingerprint was" in message and "--overwrite" in message
        )
        (src / "train/class_0/new.jpg").unlink()
        assert digests(tmp_path / "dst") == before
        if state == "begun":
            result_of(run(tool, src, tmp_path / "dst"))
    result = run(tool, src, tmp_path / "dst")
    assert (
        result_of(result)["train"]["count"] == 14 and "is complete: left unchanged" in result.stderr
    )
    assert digests(tmp_path / "dst") == before
    (tmp_path / "dst" / ("val.beton" if tool == "ffcv" else "val")).rename(tmp_path / "moved")
    assert "val.json exists but" in refusal(run(tool, src, tmp_path / "dst"))
    result_of(run(tool, src, tmp_path / "dst", "--jpeg-quality", 80, "--overwrite"))
    assert (
        json.loads((tmp_path / "dst" / "train.json").read_text())["settings"]["jpeg_quality"] == 80
    )


@both
def test_a_bad_header_is_named_before_anything_is_written(tool, images, tmp_path):
    src = shutil.copytree(images, tmp_path / "src")
    for path in (src / "train/class_1/2.jpg", src / "val/class_0/0.jpg"):
        whole = path.read_bytes()
        path.write_bytes(whole[:-40])
        name = str(path.relative_to(src))
        assert f"{name}: truncated JPEG" in refusal(run(tool, src, tmp_path / "dst"))
        assert not (tmp_path / "dst").exists()
        path.write_bytes(whole)


@both
def test_damage_behind_a_header_stops_with_the_name_and_goes_on_once_repaired(
    tool, images, tmp_path
):
    result_of(run(tool, images, tmp_path / "whole"))
    src = shutil.copytree(images, tmp_path / "src")
    path = src / "train/class_0/rgb.png"
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes(len(whole) - 100))
    assert "train/class_0/rgb.png" in refusal(run(tool, src, tmp_path / "dst"))
    assert (tmp_path / "dst/train.partial").is_dir() and not (tmp_path / "dst/train.json").exists()
    path.write_bytes(whole)
    result_of(run(tool, src, tmp_path / "dst"))
    assert digests(tmp_path / "dst") == digests(tmp_path / "whole")


def test_damage_in_jpegs_kept_as_they_are_is_found_by_reading_back(images, tmp_path):
    src = shutil.copytree(images, tmp_path / "src")
    path = src / "train/class_0/3.jpg"
    whole = path.read_bytes()
    middle = whole.index(b"\xff\xda") - 40  # This is in the last table before the scan.
    path.write_bytes(whole[:middle] + bytes(60) + whole[middle + 60 :])
    result = invoke(to_dali.main, src, tmp_path / "dst", "--workers", "1")
    assert (
        "train/class_0/3.jpg of the source is damaged" in refusal(result)
        and not (tmp_path / "dst/train").exists()
    )


@both
@pytest.mark.parametrize("what", ["bytes", "label"])
def test_faulty_storage_is_found_by_reading_back(tool, what, images, tmp_path, monkeypatch):
    writer = WRITERS[tool]
    append, finish = writer.append, writer.finish
    if what == "bytes":
        monkeypatch.setattr(
            writer, "append", lambda self, data, label: append(self, data[:-9] + bytes(9), label)
        )
    elif tool == "dali":  # Labels are beside the images, or in one table.
        monkeypatch.setattr(
            writer, "append", lambda self, data, label: append(self, data, 1 - label)
        )
    else:
        monkeypatch.setattr(writer, "finish", lambda self, entries: finish(self, entries[::-1]))
    assert "from what was written: the disk may be faulty" in refusal(
        run(tool, images, tmp_path / "dst")
    )
    assert [path.name for path in (tmp_path / "dst").iterdir()] == ["train.partial"]


@both
def test_a_full_disk_is_said_and_what_is_done_is_kept(tool, images, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(WRITERS[tool], "sync", full)
    message = refusal(run(tool, images, tmp_path / "dst"))
    assert "is full (" in message and "run again to continue with" in message
    assert message.rstrip().endswith("train.partial")
    monkeypatch.undo()
    result_of(run(tool, images, tmp_path / "dst"))


@both
def test_what_others_wrote_is_left_alone(tool, images, tmp_path):
    mine = tmp_path / "dst" / ("train.beton" if tool == "ffcv" else "train")
    mine.mkdir(parents=True)
    (mine / "thesis.txt").write_text("years of work")
    assert "exists but was not written by rsa-fast convert" in refusal(
        run(tool, images, tmp_path / "dst")
    )
    assert (mine / "thesis.txt").read_text() == "years of work"
    assert "is the source itself" in refusal(run(tool, images, images))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.json").write_text("[]")
    assert "was not written by a conversion" in refusal(run(tool, images, tmp_path / "other"))


def test_two_runs_do_not_write_the_same(images, tmp_path):
    started, go_on = multiprocessing.Event(), multiprocessing.Event()

    def slow() -> None:
        encode = convert.encode
        convert.encode = lambda *args: (started.set(), go_on.wait(20), encode(*args))[2]
        run("ffcv", images, tmp_path / "dst")

    process = FORKS.Process(target=slow)
    process.start()
    assert started.wait(20)
    assert "another run is writing" in refusal(run("ffcv", images, tmp_path / "dst"))
    go_on.set()
    process.join()
    assert "is complete" in run("ffcv", images, tmp_path / "dst").stderr


def test_workers_keep_the_order_pass_errors_on_and_end_with_the_run():
    def work(samples: np.ndarray) -> list[int]:
        time.sleep(0.02 * (samples[0] % 3))
        if 90 in samples:
            raise ValueError("image 90 is bad")
        return [int(sample) ** 2 for sample in samples]

    assert list(convert.in_order(work, np.arange(85), 3)) == [i**2 for i in range(85)]
    with pytest.raises(ValueError, match="image 90 is bad"):
        list(convert.in_order(work, np.arange(200), 2))
    with pytest.raises(ChildProcessError, match="fewer --workers"):
        list(
            convert.in_order(lambda samples: os.kill(os.getpid(), signal.SIGKILL), np.arange(20), 1)
        )


def test_workers_never_collect_what_they_inherit(garbage):
    found = convert.in_order(lambda samples: [gc.collect()], np.arange(9), 1)
    assert len(list(found)) == 2 and not collectors(garbage)


def test_workers_of_a_killed_run_do_not_stay():
    read_end, write_end = os.pipe()

    def endless() -> None:
        for _ in convert.in_order(
            lambda samples: [os.write(write_end, b"x"), time.sleep(60)], np.arange(100), 2
        ):
            pass

    process = FORKS.Process(target=endless)
    process.start()
    os.close(write_end)
    assert os.read(read_end, 1) == b"x"
    process.kill()
    while select.select([read_end], [], [], 5)[0]:
        if not os.read(read_end, 100):
            return  # Every process that could write has ended.
    pytest.fail("workers outlived their killed parent by 5 s")


@both
def test_splits_and_their_order(tool, images, tmp_path):
    (tmp_path / "only_train").mkdir()
    shutil.copytree(images / "train", tmp_path / "only_train" / "train")
    result = run(tool, tmp_path / "only_train", tmp_path / "dst")
    assert list(result_of(result)) == ["train"] and "has no val/ or test/" in result.stderr
    result = result_of(run(tool, images, tmp_path / "both"))
    assert [(split, found["count"]) for split, found in result.items()] == [
        ("train", 14),
        ("val", 2),
    ]
    for split, ours in (("pretrain", "train"), ("test", "val")):
        manifest = open_source(tmp_path / "both", split).manifest
        assert manifest.classes == ("class_0", "class_1") and len(manifest) == result[ours]["count"]
        description = json.loads((tmp_path / "both" / f"{ours}.json").read_text())
        assert description["source_fingerprint"] == open_source(images, split).manifest.fingerprint
        assert (
            result[ours].items() >= {k: v for k, v in description.items() if k != "classes"}.items()
        )


def test_equal_images_are_at_100_db():
    black, gray = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 51, np.uint8)
    assert convert.psnr_db(black, black) == 100
    assert convert.psnr_db(black, gray) == pytest.approx(20 * np.log10(5), abs=1e-4)


def test_an_image_that_changed_since_the_scan_is_named(images, tmp_path):
    src = shutil.copytree(images, tmp_path / "src")
    source = open_source(src, "train")
    Image.fromarray(natural_image(0, 31, 33)).save(src / "train/class_0/0.jpg")
    for mode in ("jpg", "passthrough"):
        with pytest.raises(
            ValueError,
            match=r"train/class_0/0\.jpg had \[40 90\] pixels when scanned, and now has \(31, 33\)",
        ):
            convert.encode(source, 0, convert.Encoding(mode))


def test_a_source_without_images_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no images in" in refusal(run("ffcv", tmp_path / "empty", tmp_path / "dst"))


@both
def test_a_class_whose_name_is_no_utf_8_comes_back(tool, tmp_path):
    name = os.fsdecode("café".encode("latin-1"))
    for split, seed in (("train", 0), ("val", 1)):
        for label, folder in enumerate(("ant", name)):
            (tmp_path / "src" / split / folder).mkdir(parents=True)
            image = Image.fromarray(natural_image(seed + label, 40, 40))
            image.save(tmp_path / "src" / split / folder / os.fsdecode(b"\xe9.jpg"))
    result_of(run(tool, tmp_path / "src", tmp_path / "dst"))
    for split in ("pretrain", "test"):
        original, stored = (open_source(tmp_path / place, split) for place in ("src", "dst"))
        assert stored.manifest.classes == original.manifest.classes == ("ant", name)
        assert sorted(stored.manifest.labels) == [0, 1] and len(stored.manifest.fingerprint) == 64
        assert stored.read(0).ndim == 3
