"""Images that are held out for scores where the data have no test split, in every command."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rsa_fast import build_recipe, evaluate, train
from rsa_fast.cli import main
from rsa_fast.insight import planning, profiling, tuning
from rsa_fast.pipelines import Source, open_source
from rsa_fast.pipelines.plain import PlainImages
from rsa_fast.recipes import Recipe
from tests.helpers import invoke, result_of, write_folder
from tests.tiny_runs import NETWORK

pytestmark = pytest.mark.usefixtures("one_thread")
FIELDS = NETWORK | {
    "epochs": 1,
    "batch_size": 8,
    "device": "cpu",
    "precision": "fp32",
    "threads": 1,
    "val_fraction": 0.25,
}


def tiny(**overrides) -> Recipe:
    return build_recipe("cifar10", "byol", overrides=FIELDS | overrides)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Two classes of ten images, without val/ or test/."""
    return write_folder(tmp_path_factory.mktemp("photos"), {"train": 10})


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(tiny(), photos, out)
    return out


def pixels(source) -> list[bytes]:
    return [source.read(sample).tobytes() for sample in range(len(source.manifest))]


def checkpoint_of(run: Path) -> Path:
    return max(run.glob("checkpoints/*.pt"))


def test_training_has_scores_on_images_that_it_does_not_train_on(run, photos):
    result = json.loads((run / "result.json").read_text())
    assert result["knn_top1"] is not None and result["linear_top1"] is not None
    assert result["step"] == 2  # of 8 of the 16 images that are left
    splits = ("pretrain", "train", "test")
    trained, bank, test = (pixels(open_source(photos, s, val_fraction=0.25)) for s in splits)
    assert (len(trained), len(test)) == (16, 4) and trained == bank and not set(bank) & set(test)


def test_eval_holds_out_the_images_that_the_run_held_out(run, photos, monkeypatch, caplog):
    read = []
    monkeypatch.setattr(
        PlainImages,
        "__iter__",
        lambda self, images=PlainImages.__iter__: read.append(self.source) or images(self),
    )
    caplog.set_level(logging.INFO)
    result = json.loads((run / "result.json").read_text())
    scores = evaluate(checkpoint_of(run), photos, "knn")
    assert scores["knn_top1"] == result["knn_top1"]
    assert f" (class_0, ...) from {photos}/train, 20 px; held out for scores: 4 (20%), " in (
        caplog.text
    )
    names = ("test", "train")
    expected = [pixels(open_source(photos, split, val_fraction=0.25)) for split in names]
    assert [pixels(source) for source in read] == expected
    # The dataset says how images are sized; the fraction stays that of the run.
    evaluate(checkpoint_of(run), photos, "knn", dataset="demo")
    assert [pixels(source) for source in read[2:]] == expected
    evaluate(checkpoint_of(run), photos, "knn", val_fraction=0.5)
    assert [len(source.manifest) for source in read[4:]] == [10, 10]
    with pytest.raises(ValueError, match="val_fraction"):
        evaluate(checkpoint_of(run), photos, "knn", val_fraction=1)


def test_a_run_is_not_resumed_with_another_part_held_out(run, photos):
    with pytest.raises(ValueError, match=r"val_fraction: 0\.25 in the checkpoint, 0\.5 now"):
        train(tiny(val_fraction=0.5), photos, run, resume=True)


def test_training_without_a_fraction_says_how_to_get_scores(photos, tmp_path, caplog):
    train(tiny(val_fraction=0), photos, tmp_path / "run", stop_at_step=1)
    hint = r"no val/ or test/ folder in .*val_fraction = 0\.2 holds out a part"
    assert any(re.search(hint, message) for message in caplog.messages)


def test_several_folders_and_a_text_file_train_and_are_scored(photos, folder, tmp_path):
    listed = tmp_path / "list.txt"
    files = sorted((photos / "train").rglob("*.jpg"))
    listed.write_text("".join(f"{file}\t{file.parent.name}\n" for file in files))
    data = [listed, str(folder / "train")]
    train(tiny(epochs=1), data, tmp_path / "run", stop_at_step=1)
    scores = evaluate(checkpoint_of(tmp_path / "run"), data, "knn")
    assert 0 <= scores["knn_top1"] <= 100


def test_plan_profile_and_tune_read_what_is_trained_on(photos, tmp_path, monkeypatch):
    def refuse(recipe: Recipe, source: Source | int) -> None:
        raise InterruptedError(str(source if isinstance(source, int) else len(source.manifest)))

    monkeypatch.setattr(profiling, "open_subject", refuse)
    monkeypatch.setattr(tuning, "build_run", refuse)
    monkeypatch.setattr(planning, "dataset_size", refuse)
    with pytest.raises(InterruptedError, match=r"^16$"):
        profiling.profile({"byol": tiny()}, (photos,))
    with pytest.raises(InterruptedError, match=r"^16$"):
        tuning.tune(tiny(), (photos,), tmp_path / "tuned.yaml")
    with pytest.raises(InterruptedError, match=r"^16$"):
        planning.plan(tiny(), "v100-32g", data=[photos])


def command(*words: object):
    return result_of(invoke(main, *words))


def test_the_commands_take_a_fraction_and_several_places(photos, folder, run, tmp_path):
    both = ("--data", photos, "--data", folder / "train")
    recipe = ("--dataset", "cifar10", "--set", "batch_size=8")
    trained = ("train", *both, *recipe, "--method", "byol", "--out", tmp_path / "run", "--dry-run")
    assert command(*trained)["images"] == 60
    assert command(*trained, "--val-fraction", 0.25)["images"] == 60 - 16  # of 30 a class
    sheet = tmp_path / "views.png"
    assert command("preview", *both, *recipe, "--images", 2, "--out", sheet)["images"] == 2
    assert np.asarray(Image.open(sheet)).size
    scored = ("eval", "knn", "--checkpoint", checkpoint_of(run))
    # Each alone, with its own fraction held out.
    alone = command(*scored, *both)["folders"]
    assert [result["knn_protocol"] for result in alone] == ["knn/1", "knn/1"]
    assert [(one["train_images"], one["test_images"]) for one in alone] == [(16, 4), (30, 10)]
    of_fraction = command(*scored, "--data", photos, "--val-fraction", 0.25)
    assert of_fraction == command(*scored, "--data", photos)
