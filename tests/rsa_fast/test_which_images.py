"""What a run does with the images it finds: none is lost, and no score disappears in silence."""

from __future__ import annotations

import json
import logging
import shutil
from functools import partial

import pytest

from rsa_fast import cli
from rsa_fast.evaluation.evaluate import evaluate
from rsa_fast.recipes import dump_yaml
from rsa_fast.training.engine import train
from tests.helpers import invoke, result_of, write_folder
from tests.tiny_runs import NARROW, set_options, tiny

ONE_EPOCH = {"epochs": 1, "backend": "resident"}


run = partial(invoke, cli.main)


@pytest.fixture
def data(tmp_path):
    return write_folder(tmp_path / "data", {"train": 8, "val": 6})


def scores_of(result: dict) -> dict:
    return {key: value for key, value in result.items() if "top1" in key}


@pytest.mark.parametrize("damage", ["in the header", "in the pixels"])
def test_a_bad_test_image_is_left_out_of_the_scores_and_counted(data, tmp_path, damage):
    victim = data / "val" / "class_1" / "003.jpg"
    without = shutil.copytree(data, tmp_path / "without")
    (without / "val" / "class_1" / "003.jpg").unlink()
    if damage == "in the header":
        victim.write_bytes(b"no image")
    else:  # a PNG's header does not tell that its end is missing
        from PIL import Image

        png = victim.with_suffix(".png")
        Image.open(victim).save(png)
        victim.unlink()
        png.write_bytes(png.read_bytes()[:-400])
    expected = train(tiny(**ONE_EPOCH), without, tmp_path / "expected")
    result = train(tiny(**ONE_EPOCH), data, tmp_path / "out")
    assert scores_of(result) == scores_of(expected) and result["knn_top1"] is not None
    assert result["test_images_skipped"] == 1 and "test_images_skipped" not in expected
    checkpoint = next((tmp_path / "out" / "checkpoints").glob("step_*.pt"))
    again = evaluate(checkpoint, data, "knn")
    assert again["test_images_skipped"] == 1 and again["knn_top1"] == expected["knn_top1"]


def test_bad_training_images_are_left_out_of_the_run_and_of_its_evaluation(data, tmp_path, caplog):
    without = shutil.copytree(data, tmp_path / "without")
    (without / "train" / "class_0" / "002.jpg").unlink()
    bad = data / "train" / "class_0" / "002.jpg"
    bad.write_bytes(bad.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"002\.jpg: truncated JPEG"):
        train(tiny(**ONE_EPOCH), data, tmp_path / "refused")
    caplog.set_level(logging.INFO, "rsa_fast")
    result = train(tiny(**ONE_EPOCH, on_bad_image="skip"), data, tmp_path / "out")
    assert "damaged or incomplete: 1\n  train/class_0/002.jpg: truncated JPEG" in caplog.text
    expected = train(tiny(**ONE_EPOCH), without, tmp_path / "expected")
    assert scores_of(result) == scores_of(expected)


@pytest.mark.parametrize(
    ("break_test_split", "message"),
    [
        (lambda val: (val / "class_1").rename(val / "klass_1"), "do not have the same classes"),
        (lambda val: [p.unlink() for p in val.rglob("*.jpg")], "no images in"),
        (
            lambda val: [
                p.rename(val / f"{p.parent.name}-{p.name}") for p in list(val.rglob("*.jpg"))
            ],
            "val contains no class folders",
        ),
    ],
)
def test_test_images_that_cannot_be_used_stop_the_start(
    data, tmp_path, break_test_split, message, caplog
):
    break_test_split(data / "val")
    with pytest.raises(ValueError, match=rf"cannot be used: .*{message}.*--no-eval"):
        train(tiny(**ONE_EPOCH), data, tmp_path / "out")
    recipe = tiny(**ONE_EPOCH)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    words = ("--config", tmp_path / "recipe.yaml", "--no-eval", "--out", tmp_path / "out")
    done = run("train", data, *words)
    assert result_of(done)["knn_top1"] is None


def test_images_without_labels_need_no_option(tmp_path, caplog):
    data = tmp_path / "data"
    write_folder(data, {"train": 8, "val": 4})
    for split in ("train", "val"):
        for path in sorted((data / split).rglob("*.jpg")):
            path.rename(data / split / f"{path.parent.name}-{path.name}")
        shutil.rmtree(data / split / "class_0")
        shutil.rmtree(data / split / "class_1")
    caplog.set_level(logging.INFO, "rsa_fast")
    assert train(tiny(**ONE_EPOCH), data, tmp_path / "out")["knn_top1"] is None
    assert "no kNN or linear evaluation in this run" in caplog.text


def test_tiny_imagenet_sorted_into_class_folders_is_evaluated(data, tmp_path):
    expected = train(tiny(**ONE_EPOCH), data, tmp_path / "expected")
    rows = [f"val_{i}.JPEG\tn0{i}\t0\t0\t63\t63" for i in range(4)]
    (data / "val" / "val_annotations.txt").write_text("\n".join(rows))
    result = train(tiny(**ONE_EPOCH), data, tmp_path / "out")
    assert scores_of(result) == scores_of(expected)


def test_an_image_may_not_be_among_the_training_and_the_test_images(data, tmp_path):
    with pytest.raises(ValueError, match="12 images are among the training and the test images"):
        train(tiny(**ONE_EPOCH), [data, data / "val"], tmp_path / "out")


def test_a_run_in_the_folder_of_its_images_can_be_started_twice(tmp_path, monkeypatch):
    photos = write_folder(tmp_path, {"photos": 20}) / "photos"
    monkeypatch.chdir(photos)
    options = ("--epochs", 1, "--workers", 1, *set_options(NARROW | {"precision": "fp32"}))
    for out in ("run1", "run2"):
        done = run("train", "--data", ".", "--out", out, *options)
        assert done.exit_code == 0, done.output
        assert "32 images in 2 classes" in done.output
    done = run("train", ".", *options)  # to runs/photos-rsa
    assert done.exit_code == 0 and (photos / "runs" / "photos-rsa" / "result.json").exists()
    resumed = run("train", "--resume", "--data", ".", "--out", "run1", *options)
    assert resumed.exit_code == 0, resumed.output


def test_all_images_below_a_folder_can_be_one_set_without_classes(data, tmp_path):
    (data / "train" / "class_0" / "000.jpg").rename(data / "stray.jpg")
    options = ("--epochs", 1, "--workers", 1, *set_options(NARROW | {"precision": "fp32"}))
    done = run(
        "train", data, "--unlabelled", "--out", tmp_path / "out", "--batch-size", 8, *options
    )
    assert done.exit_code == 0, done.output
    assert "train: 28 images without classes from" in done.output
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["step"] == 3 and result["knn_top1"] is None
