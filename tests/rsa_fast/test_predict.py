"""`predict`: the file, the class and its probability, as the network says by hand."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.cli import main
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.finetune import finetune
from rsa_fast.evaluation.predict import predict
from rsa_fast.training import checkpoint
from rsa_fast.training.engine import train
from tests.helpers import invoke, result_of, write_folder
from tests.tiny_runs import tiny

CLASSES = ("class_0", "class_1", "class_2")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> Path:
    """A fine-tuned run on three classes, beside its data and the run it started from."""
    place = tmp_path_factory.mktemp("tuned")
    data = write_folder(place / "data", {"train": 8, "test": 3}, classes=3)
    train(tiny(epochs=1, evaluate=False), data, place / "run")
    finetune(
        place / "run",
        None,
        place / "tuned",
        overrides={"epochs": 1, "batch_size": 8, "lr_drop": 0.5},
    )
    return place / "tuned"


def by_hand(run: Path, path: Path) -> np.ndarray:
    """The probabilities of the classes of an image."""
    encoder, recipe = load_encoder(run)
    image = np.asarray(Image.open(path).convert("RGB")) / 255  # 20 px
    image = (image[2:18, 2:18] - recipe.views.mean) / recipe.views.std  # the centre of 16 px
    head = checkpoint.load_latest(run / "checkpoints")["method"]
    with torch.no_grad():
        features = encoder.eval()(torch.tensor(image).permute(2, 0, 1)[None].float())
    logits = features @ head["classifier.weight"].T + head["classifier.bias"]
    return torch.softmax(logits[0], 0).numpy()


def rows_in(path: Path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_classes_by_name_and_their_probabilities_are_those_by_hand(tuned, tmp_path):
    data = tuned.parent / "data"
    result = predict(tuned, data / "test", tmp_path / "out.csv", top=3)
    rows = rows_in(tmp_path / "out.csv")
    assert [row["file"] for row in rows] == sorted(
        str(path.relative_to(data / "test")) for path in (data / "test").rglob("*.jpg")
    )
    assert (result["images"], result["left_out"], result["classes"]) == (9, 0, 3)
    for row in rows:
        wanted = by_hand(tuned, data / "test" / row["file"])
        found = [(row[f"class{end}"], float(row[f"probability{end}"])) for end in ("", "_2", "_3")]
        assert [name for name, _ in found] == [CLASSES[i] for i in wanted.argsort()[::-1]]
        assert [p for _, p in found] == pytest.approx(np.sort(wanted)[::-1], rel=1e-4, abs=1e-6)


def test_a_flat_folder_and_its_bad_image(tuned, tmp_path, caplog):
    flat = tmp_path / "flat"
    flat.mkdir()
    images = sorted((tuned.parent / "data" / "test").rglob("*.jpg"))[:3]
    for name, path in zip("bca", images, strict=True):
        (flat / f"{name}.jpg").write_bytes(path.read_bytes())
    (flat / "broken.jpg").write_bytes(images[0].read_bytes()[:50])
    command = ["predict", "--checkpoint", tuned, "--data", flat, "--out", tmp_path / "out.csv"]
    done = invoke(main, *command)
    result = result_of(done)
    assert (result["images"], result["left_out"]) == (3, 1) and "no row" in caplog.text
    rows = rows_in(tmp_path / "out.csv")
    assert list(rows[0]) == ["file", "class", "probability"]
    assert [row["file"] for row in rows] == ["a.jpg", "b.jpg", "c.jpg"]
    assert {row["class"] for row in rows} <= set(CLASSES)


def test_what_has_no_classifier_or_too_few_classes_is_refused(tuned, tmp_path):
    data, out = tuned.parent / "data", tmp_path / "out.csv"
    with pytest.raises(
        ValueError, match=r"has no classifier, because its method is rsa: train one"
    ):
        predict(tuned.parent / "run", data, out)
    with pytest.raises(ValueError, match="top = 4: choose 1 to 3, the number of classes"):
        predict(tuned, data, out, top=4)
    assert not out.exists()
