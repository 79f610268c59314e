"""One's own images: what `auto` chooses for them, and a run from nothing but their folder."""

from __future__ import annotations

import json
import logging
import sys
from functools import partial

import numpy as np
import pytest
from PIL import Image

from rsa_fast import cli, distributed
from rsa_fast.datasets import own_dataset, own_rules
from rsa_fast.methods import METHODS
from rsa_fast.recipes import build_recipe, dump_yaml, name_of, own_row, row
from tests.helpers import invoke, natural_image, result_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Two class folders with 20 PNGs each, 40 px high and 44 or 45 px wide. 8 are held out."""
    place = tmp_path_factory.mktemp("own") / "my_photos"
    for label in range(2):
        folder = place / f"class_{label}"
        folder.mkdir(parents=True)
        for i in range(20):
            image = natural_image(100 * label + i, 40, 44 + i % 2)
            image[..., label] //= 4
            Image.fromarray(image).save(folder / f"{i}.png")
    return place


run = partial(invoke, cli.main)


def square(images: int, px: int) -> np.ndarray:
    return np.full((images, 2), px, np.int32)


# images, shorter side: px, stem, arch, batch, epochs, kNN every, checkpoint every, tau. By hand:
# 240 images are 15 steps of 16, and 3,200 steps are 213.3 epochs of 15, so 214.
CHOICES = {
    (240, 300): (224, "imagenet", "resnet18", 16, 214, 21, 11, 0.97),
    (256, 32): (32, "cifar", "resnet18", 16, 200, 20, 10, 0.97),
    (3_000, 32): (32, "cifar", "resnet18", 128, 279, 28, 14, 0.97),
    (10_000, 48): (32, "cifar", "resnet18", 256, 329, 33, 16, 0.97),
    (10_000, 49): (64, "cifar", "resnet18", 256, 329, 33, 16, 0.97),
    (30_000, 128): (64, "cifar", "resnet18", 256, 274, 27, 14, 0.99),
    (30_000, 129): (224, "imagenet", "resnet50", 128, 137, 14, 7, 0.99),
    (19_999, 500): (224, "imagenet", "resnet18", 128, 83, 8, 4, 0.97),
    (600_000, 500): (224, "imagenet", "resnet50", 128, 200, 20, 10, 0.99),
}


@pytest.mark.parametrize(("images", "px"), CHOICES)
def test_the_choices_are_those_worked_out_by_hand(images, px):
    fields = row("auto", "rsa", own_dataset(square(images, px), classes=4))
    names = ("stem", "arch", "batch_size", "epochs", "knn_every_epochs", "checkpoint_every_epochs")
    chosen = [fields[name].value for name in (*names, "tau_base")]
    assert (fields["views"].value["size_px"], *chosen) == CHOICES[images, px]
    assert fields["eval_resize_px"].value == {32: 32, 64: 64, 224: 256}[CHOICES[images, px][0]]
    assert fields["hidden_dim"].value == (4096 if px > 128 else 1024)
    assert all(sourced.source for sourced in fields.values())


def test_the_size_follows_the_median_of_the_shorter_sides():
    sizes = np.array([[30, 900]] * 34 + [[700, 500]] * 30, np.int32)
    assert own_dataset(sizes, 0).fields["views"].value["size_px"] == 32
    assert own_dataset(sizes[3:], 0).fields["views"].value["size_px"] == 32
    assert own_dataset(sizes[8:], 0).fields["views"].value["size_px"] == 224


def test_too_few_images_are_refused_unless_the_batch_is_given():
    with pytest.raises(ValueError, match="found 31 training images and needs at least 32"):
        own_dataset(square(31, 32), 0)
    assert own_dataset(square(31, 32), 0, batch_size=8).run_length["epochs"].value == 1067


def test_a_queue_is_shorter_than_an_epoch():
    for method in ("moco", "ressl"):
        for images, size in ((240, 64), (100_000, 4096)):
            fields = row("auto", method, own_dataset(square(images, 32), 0))
            assert fields["queue_size"].value == size


def test_every_method_starts_from_a_folder(photos):
    for method in METHODS:
        recipe = build_recipe("auto", method, data=photos)
        assert (recipe.batch_size, recipe.epochs, recipe.val_fraction) == (16, 1600, 0.2)
        assert recipe.data_name == recipe.name == "my_photos"
    assert build_recipe("auto", "supervised", data=photos).classes == 2


def test_what_a_user_chose_wins_and_the_rest_follows(photos, tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("batch_size: 4\nbeta_base: 0.2\n")
    recipe = build_recipe("auto", "rsa", file, data=photos)
    assert (recipe.batch_size, recipe.epochs, recipe.beta_base) == (4, 400, 0.2)
    recipe = build_recipe("auto", "rsa", file, {"batch_size": 8}, data=photos)
    assert (recipe.batch_size, recipe.epochs, recipe.knn_every_epochs) == (8, 800, 80)
    recipe = build_recipe("auto", "rsa", data=photos, epochs=20, views={"size_px": 112})
    assert (recipe.knn_every_epochs, recipe.checkpoint_every_epochs) == (2, 1)
    assert (recipe.stem, recipe.eval_resize_px, recipe.hidden_dim) == ("imagenet", 128, 4096)
    assert build_recipe("auto", "rsa", data=photos, stem="imagenet").views.size_px == 32
    assert build_recipe("auto", "rsa", data=photos, epochs=20_000).tau_base == 0.99
    # Fewer images are left if more are held out: 20 of 40, a step of 16.
    assert build_recipe("auto", "rsa", data=photos, val_fraction=0.5, batch_size=16).epochs == 3200
    with pytest.raises(ValueError, match="batch_size = -1"):
        build_recipe("auto", "rsa", data=photos, batch_size=-1)


def test_the_recipe_of_a_run_needs_no_images_and_nothing_else_does_without(photos, tmp_path):
    recipe = build_recipe("auto", "byol", data=photos, pairs="AW")
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    assert build_recipe("auto", "byol", tmp_path / "recipe.yaml") == recipe
    with pytest.raises(ValueError, match="auto chooses from the images"):
        build_recipe("auto", "byol")


def test_data_are_called_as_their_folder_and_several_as_all(photos, tmp_path, monkeypatch):
    (tmp_path / "birds.txt").write_text("")
    monkeypatch.chdir(photos)
    assert name_of(".") == name_of(f"{photos}/") == "my_photos"
    assert name_of([photos, tmp_path / "birds.txt"]) == "my_photos+birds"


def test_the_rules_name_every_field_that_is_chosen(photos):
    own = own_row(photos)
    rules = {name for names, _, _ in own_rules() for name in names.split(", ")}
    chosen = {*own.fields, *own.run_length} - {"views"}
    assert chosen | {"views.size_px", "views.mean", "views.std", "the method's"} == rules
    shown = run("recipes", "auto")
    assert shown.exit_code == 0 and "resnet50" in shown.output and "3,200 steps" in shown.output
    of_photos = run("recipes", "auto/byol", "--data", photos)
    assert json.loads(of_photos.output.splitlines()[-1])["epochs"] == 1600
    shown_in_one_line = " ".join(of_photos.output.split())
    assert "median of" in shown_in_one_line and "40 px" in shown_in_one_line


def test_a_run_needs_nothing_but_the_folder(photos, tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    options = ("--epochs", 1, "--set", "width=4", "--set", "precision=fp32", "--workers", 1)
    with caplog.at_level(logging.INFO, "rsa_fast"):
        done = run("train", photos, *options)
    result = result_of(done)
    assert 0 <= result["knn_top1"] <= 100
    assert (result["dataset"], result["out"]) == ("my_photos", "runs/my_photos-rsa")
    header = "\n".join(caplog.messages[:9])
    for text in (
        "rsa on my_photos",
        "images    train: 32 images in 2 classes (class_0, ...) from ",
        "my_photos, 40 to 45 px; held out for scores: 8 (20%), as there is no val/ or test/\n",
        "recipe    auto: resnet18, 32 px, batch 16, 1 epochs = 2 steps",
        "peak_lr 0.00625",
        "start     from scratch; 32 images are few: --init-from starts from trained weights",
        "device    c",
        "out       runs/my_photos-rsa",
        "backend resident:",
    ):
        assert header.count(text) == 1, header
    assert "my_photos" in (tmp_path / "runs" / "my_photos-rsa" / "report.html").read_text()

    # The next one gets a folder of its own, and is the one that is resumed, with its own recipe.
    again = run("train", "--data", photos, *options, "--name", "pictures", "--out", "runs/pictures")
    assert json.loads(again.stdout.splitlines()[-1])["dataset"] == "pictures"
    second = run("train", photos, *options, "--seed", 3)
    assert json.loads(second.stdout.splitlines()[-1])["out"] == "runs/my_photos-rsa-2"
    caplog.clear()
    with caplog.at_level(logging.INFO, "rsa_fast"):
        finished = run("train", photos, "--resume")
        resumed = run("train", photos, "--resume", "--epochs", 2)
    assert finished.stdout == second.stdout
    assert "the run in runs/my_photos-rsa-2 finished" in caplog.text
    assert result_of(resumed)["out"] == "runs/my_photos-rsa-2"
    assert "start     at step 2 of the run in runs/my_photos-rsa-2" in caplog.text

    file = next((tmp_path / "runs" / "pictures" / "checkpoints").glob("*.pt"))
    exported = run(
        "export", "--checkpoint", file, "--format", "safetensors", "--out", "e.safetensors"
    )
    assert exported.exit_code == 0, exported.output
    assert "rsa on pictures, step 2" in (tmp_path / "README.md").read_text()


def test_folders_are_counted_up_from_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def folder(resume: bool = False) -> str:
        return str(cli.default_out(None, "my.photos", "auto", "rsa", resume=resume))

    assert folder() == folder(resume=True) == "runs/my.photos-rsa"
    for name in ("my.photos-rsa", "my.photos-rsa-10", "my.photos-rsa-b", "myxphotos-rsa-99"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert folder() == "runs/my.photos-rsa-11" and folder(resume=True) == "runs/my.photos-rsa-10"
    assert str(cli.default_out(None, "x", "cifar10", "a/b.py", resume=False)) == "runs/cifar10-b"


def test_all_processes_get_the_folder_that_was_counted_once(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(distributed, "launch", lambda *arguments: started.append(arguments) or 0)
    words = ["train", str(photos), "--nproc", "2"]
    monkeypatch.setattr(sys, "argv", ["rsa-fast", *words])
    assert run(*words).exit_code == 0
    assert started == [(2, 0, [*words, "--out", "runs/my_photos-rsa"])]
    ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    for name, value in (ranks | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert "several processes need --out" in run("train", photos).output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give the folder with the images"),
        (("photos", "--data", "photos"), "DATA and --data cannot be combined"),
        (("photos", "--overwrite"), "--overwrite needs --out"),
        (("nowhere",), "no folder nowhere"),
        (("photos", "--download"), "--download supports cifar10, cifar100, stl10"),
    ],
)
def test_what_a_run_cannot_start_from_is_one_line(words, message):
    done = run("train", *words)
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output


def test_other_commands_choose_from_the_folder_too(photos, tmp_path):
    done = run("preview", "--data", photos, "--out", tmp_path / "views.png", "--images", 2)
    assert done.exit_code == 0, done.output
    options = ("--set", "width=8", "--gpu", "v100-32g")
    planned = run("plan", "--data", photos, *options)
    prediction = json.loads(planned.output.splitlines()[-1])
    assert (prediction["dataset"], prediction["batch_size"]) == ("my_photos", 16)
    (tmp_path / "recipe.yaml").write_text(dump_yaml(build_recipe("auto", "rsa", data=photos)))
    without = run("plan", "--config", tmp_path / "recipe.yaml", *options)
    assert "auto is not a published dataset: give its place by --data" in without.output
