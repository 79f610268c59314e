from __future__ import annotations

import copy
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import Result
from PIL import Image
from torchvision import transforms

import rsa_fast
from rsa_fast.cli import main
from rsa_fast.distributed import rank, world_size
from rsa_fast.evaluation import evaluate, features, linear
from rsa_fast.evaluation.accuracy import Predictions
from rsa_fast.evaluation.evaluate import Evaluation, extract_features, gather_rows, knn
from rsa_fast.methods.method import build_method
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.beton import BetonWriter
from rsa_fast.pipelines.draws import draw
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.order import epoch_order
from rsa_fast.pipelines.packed import ENTRY
from rsa_fast.pipelines.plain import PlainImages, plain_image
from rsa_fast.pipelines.torchvision_views import weak_view
from rsa_fast.pipelines.views import ViewSpec
from rsa_fast.recipes import build_recipe
from rsa_fast.training import checkpoint
from tests.helpers import clusters, invoke, natural_image, result_of, write_folder
from tests.rsa_fast.ranks import run_ranks
from tests.tiny_runs import tiny

CPU = torch.device("cpu")


def naive_knn(bank, bank_labels, queries, labels, classes, k, temperature) -> float:
    """Classify one query at a time, in Python."""
    hits = 0
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        scored = []
        for row, owner in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            inner = sum(a * b for a, b in zip(query, row, strict=True))
            scored.append((inner / math.hypot(*query) / math.hypot(*row), owner))
        votes = [0.0] * classes
        for cosine, owner in sorted(scored, reverse=True)[:k]:
            votes[owner] += math.exp(cosine / temperature)
        hits += votes.index(max(votes)) == label
    return 100 * hits / len(labels)


def test_knn_equals_a_loop_over_queries(monkeypatch):
    monkeypatch.setattr(evaluate, "KNN_CHUNK", 7)  # The last chunk of 40 queries is short.
    bank, queries = clusters(300, 1.6, 0), clusters(40, 1.6, 1)
    scores = knn(*bank, *queries, 3)
    assert scores["knn_top1"] == pytest.approx(naive_knn(*bank, *queries, 3, 200, 0.1))
    assert scores["knn20_top1"] == pytest.approx(naive_knn(*bank, *queries, 3, 20, 0.07))
    assert 40 < scores["knn_top1"] < 100 and scores["knn_top1"] != scores["knn20_top1"]


def test_knn_with_other_neighbours_and_twelve_classes_equals_a_loop(monkeypatch):
    monkeypatch.setattr(evaluate, "KNN_CHUNK", 7)
    bank, queries = (clusters(count, 0.9, count, classes=8) for count in (300, 40))
    found: dict = {}
    scores = knn(*bank, *queries, 12, {"knn_top1": (5, 0.2)}, found)
    assert scores.keys() == {"knn_top1", "knn_top5"}
    assert scores["knn_top1"] == pytest.approx(naive_knn(*bank, *queries, 12, 5, 0.2))
    rows, owners = bank
    cosines = torch.nn.functional.normalize(queries[0]) @ torch.nn.functional.normalize(rows).T
    votes = np.zeros((40, 12))
    for i, order in enumerate(cosines.argsort(1, descending=True)[:, :5].tolist()):
        for j in order:
            votes[i, owners[j]] += math.exp(float(cosines[i, j]) / 0.2)
    # Of classes without votes, any may be among the first five.
    hits = [votes[i, label] >= sorted(votes[i])[-5] for i, label in enumerate(queries[1])]
    voted = [votes[i, label] > 0 for i, label in enumerate(queries[1])]
    sure = 100 * np.mean(np.logical_and(hits, voted))
    assert scores["knn_top1"] < 100 and sure <= scores["knn_top5"] <= 100 * np.mean(hits)


def test_predictions_are_counted_as_by_a_loop():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 12, generator=generator)
    labels = torch.randint(0, 11, (50,), generator=generator)  # none of the last class
    predictions = Predictions(12)
    for part in (slice(0, 30), slice(30, 50)):
        predictions.add(logits[part], labels[part])
    counts = np.zeros((12, 12), int)
    top1 = top5 = 0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ranked = sorted(range(12), key=lambda c: -row[c])
        counts[label, ranked[0]] += 1
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked[:5])
    assert predictions.scores("x") == {"x_top1": 2 * top1, "x_top5": 2 * top5}
    found = np.zeros((12, 12), int)
    for label, predicted, count in predictions.confusion():
        found[label, predicted] = count
    assert (found == counts).all() and all(count for _, _, count in predictions.confusion())
    names = [f"c{i}" for i in range(12)]
    expected = {
        name: 100 * row[i] / row.sum() if row.sum() else None
        for i, (name, row) in enumerate(zip(names, counts, strict=True))
    }
    assert predictions.per_class(names) == pytest.approx(expected)
    assert expected["c11"] is None
    assert Predictions(10).classes == 10
    few = Predictions(10)
    few.add(logits[:, :10], labels % 10)
    assert few.scores("x").keys() == {"x_top1"}


def test_knn_of_a_bank_smaller_than_k_uses_all_of_it():
    bank, queries = clusters(9, 0.1, 0), clusters(6, 0.1, 1)
    assert knn(*bank, *queries, 3) == {"knn_top1": 100.0, "knn20_top1": 100.0}


def test_a_bank_that_passes_in_blocks_gives_the_same_neighbours(monkeypatch):
    bank, queries = clusters(300, 1.6, 0), clusters(40, 1.6, 1)
    whole = knn(*bank, *queries, 3)
    monkeypatch.setattr(features, "BLOCK_ROWS", 37)
    monkeypatch.setattr(evaluate, "BLOCK_ROWS", 37)
    assert knn(*bank, *queries, 3) == whole
    # Images that could not be read are neither neighbours nor queries.
    unread = [
        (torch.cat([rows[:5], rows]), torch.cat([torch.full((5,), -1), labels]))
        for rows, labels in (bank, queries)
    ]
    assert knn(*unread[0], *unread[1], 3) == whole


def test_images_that_were_not_read_do_not_count_for_the_classifier(monkeypatch):
    monkeypatch.setattr(linear, "FAST_EPOCHS", 5)
    train, test = clusters(300, 1.6, 0), clusters(40, 1.6, 1)
    rows, labels = clusters(20, 9.0, 2)
    more = torch.cat([train[0], rows]), torch.cat([train[1], torch.full_like(labels, -1)])
    assert linear.fast(more, test, 3) == linear.fast(train, test, 3)


class Halving(torch.nn.Flatten):
    """An encoder whose features are in half precision."""

    def forward(self, images):
        return super().forward(images).bfloat16()


def test_features_are_kept_in_host_memory_in_the_type_of_the_encoder(folder, monkeypatch):
    evaluation = Evaluation(folder, tiny(), CPU, torch.float32)
    rows, labels = extract_features(Halving(), evaluation.train)
    assert rows.dtype == torch.bfloat16 and rows.device == labels.device == CPU
    exact, _ = extract_features(torch.nn.Flatten(), evaluation.train)
    assert torch.equal(rows, exact.bfloat16())
    # No rank has all of the training features as float32: they pass in blocks and batches.
    sizes = []
    to_float = torch.Tensor.float
    monkeypatch.setattr(linear, "FAST_EPOCHS", 2)
    monkeypatch.setattr(linear, "BATCH_SIZE", 8)
    monkeypatch.setattr(linear, "TEST_ROWS", 8)
    for module in (features, evaluate):
        monkeypatch.setattr(module, "BLOCK_ROWS", 8)
    monkeypatch.setattr(
        torch.Tensor,
        "float",
        lambda x: (sizes.append(len(x)) if x.ndim == 2 else None) or to_float(x),
    )
    evaluation.score(Halving())
    assert max(sizes) == len(evaluation.test.ids) < len(rows)


def test_features_come_from_eval_mode_and_change_no_buffer(folder):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "cifar", width=4).train()
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    spec = ViewSpec(20, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    source = open_source(folder, "test")
    images = PlainImages(source, spec, None, 7, CPU, torch.float32, 2)
    rows, labels = extract_features(encoder, images)
    assert encoder.training and all(
        torch.equal(value, buffers[name]) for name, value in encoder.named_buffers()
    )
    one = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    with torch.no_grad():
        expected = encoder.eval()(
            torch.stack([one(Image.fromarray(source.read(i))) for i in range(20)])
        )
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, torch.from_numpy(source.manifest.labels))


@pytest.mark.parametrize(
    ("size", "resize_px", "reference"),
    [
        ((32, 32), None, transforms.CenterCrop(32)),
        ((96, 96), None, transforms.CenterCrop(64)),  # STL-10 in the reference code
        ((96, 96), 64, transforms.Resize(64)),  # STL-10 in the paper
        # ImageNet
        ((375, 500), 256, transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])),
        # This image is narrower than the crop and is enlarged.
        ((40, 30), None, transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])),
    ],
)
def test_plain_images_equal_torchvision_s_transform(size, resize_px, reference):
    image = natural_image(0, *size)
    expected = np.asarray(reference(Image.fromarray(image)))
    assert (plain_image(image, expected.shape[0], resize_px) == expected).all()


def test_a_cpu_gets_as_many_images_as_its_caches_hold(folder):
    source, recipe = open_source(folder, "pretrain"), tiny()

    def batch(size_px, device):
        views = replace(recipe.views, size_px=size_px)
        sized = recipe.model_copy(update={"views": views, "eval_resize_px": None})
        return features.plain_images(source, sized, device, torch.float32).batch_size

    assert [batch(size_px, CPU) for size_px in (224, 112, 32, 1000)] == [16, 64, 256, 1]
    assert batch(224, torch.device("meta")) == 256


def test_a_very_long_image_is_cropped_without_resizing_all_of_it(monkeypatch):
    for size in ((20, 901), (901, 20)):
        image = natural_image(0, *size)
        expected = np.asarray(
            transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(
                Image.fromarray(image)
            )
        )
        assert np.abs(plain_image(image, 224, 256) - expected.astype(int)).max() <= 1
    image = natural_image(0, 2, 30_000)
    resized = []
    resize = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, *args, **kwargs: (
            resized.append(size) or resize(self, size, *args, **kwargs)
        ),
    )
    crop = plain_image(image, 224, 256)
    assert resized == [(224, 224)]
    # Its scale is a whole number, so that its centre alone is resized to the same pixels.
    centre = plain_image(np.ascontiguousarray(image[:, 14_990:15_010]), 224, 256)
    assert np.abs(crop - centre.astype(int)).max() <= 1


def test_data_that_cannot_be_evaluated_on_says_why(tmp_path):
    recipe = build_recipe("cifar10", "rsa")
    write_folder(tmp_path / "a", {"train": 2})
    with pytest.raises(FileNotFoundError, match="no val/ or test/"):
        Evaluation(tmp_path / "a", recipe, CPU, torch.float32)
    write_folder(tmp_path / "b", {"train": 2}, classes=2)
    write_folder(tmp_path / "b", {"test": 2}, classes=3)
    with pytest.raises(ValueError, match="only the test images have class_2"):
        Evaluation(tmp_path / "b", recipe, CPU, torch.float32)


def test_classes_without_test_images_are_named_and_the_others_keep_their_numbers(tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    data = write_folder(tmp_path, {"train": 6, "test": 3}, classes=4)
    for name in ("class_0", "class_2"):  # so that the rest would be numbered otherwise
        shutil.rmtree(data / "test" / name)
    evaluation = Evaluation(data, tiny(), CPU, torch.float32)
    assert "2 of 4 classes have no test images, so their accuracy is not measured: " in caplog.text
    assert evaluation.classes == 4
    manifest = evaluation.test.source.manifest
    assert [manifest.paths[i].split("/")[1] for i in range(6)] == [
        f"class_{label}" for label in manifest.labels
    ]
    # The training images of the same classes as test images are all recognised.
    shutil.rmtree(data / "test")
    shutil.copytree(data / "train" / "class_3", data / "val" / "class_3")
    evaluation = Evaluation(data, tiny(), CPU, torch.float32)
    scores = evaluation.score(torch.nn.Flatten(), ("knn",), k=1)
    assert scores["knn_top1"] == 100
    expected = {"class_0": None, "class_1": None, "class_2": None, "class_3": 100}
    assert evaluation.per_class() == {"knn_per_class": expected}


def write_unnamed(path: Path, labels: list[int]) -> None:
    """A .beton file of one image for each label. No description beside it names the classes."""
    writer = BetonWriter(path, len(labels), 2**21, np.zeros(0, ENTRY))
    entries = np.zeros(len(labels), ENTRY)
    for i, label in enumerate(labels):
        pixels = natural_image(i, 20, 20).tobytes()
        entries[i] = (*writer.append(pixels, label), len(pixels), label, 20, 20, True)
    writer.finish(entries)
    writer.close()


def test_unnamed_classes_are_those_of_the_training_images(tmp_path):
    write_unnamed(tmp_path / "train.beton", [0, 1, 2, 11])
    write_unnamed(tmp_path / "val.beton", [0, 2])
    evaluation = Evaluation(tmp_path, tiny(), CPU, torch.float32)
    assert evaluation.classes == 12
    assert evaluation.score(torch.nn.Flatten(), ("knn",))["knn_top1"] >= 0
    write_unnamed(tmp_path / "val.beton", [0, 12])
    with pytest.raises(ValueError, match="only the test images have 12"):
        Evaluation(tmp_path, tiny(), CPU, torch.float32)


def test_a_crop_larger_than_the_resized_image_is_refused(folder):
    with pytest.raises(ValueError, match="resized to 16 px do not fill the centre crop of 32 px"):
        Evaluation(
            folder,
            build_recipe("cifar10", "rsa", overrides={"eval_resize_px": 16}),
            CPU,
            torch.float32,
        )


def test_classifiers_are_trained_on_crops_of_8_percent_or_more_and_flips(folder):
    small = {"count": 2, "size_px": 8, "crop_area": (0.1, 0.2), "vertical_flip_p": 1}
    evaluation = Evaluation(
        folder,
        tiny(
            **{"views.flip_p": 0, "views.crop_area": (0.5, 0.5), "seed": 3},
            # These belong to pre-training.
            **{"views.vertical_flip_p": 1, "views.quarter_turns": True, "views.extra": "no.py:f"},
            **{"views.interpolation": "bicubic", "views.groups": [{"name": "small", **small}]},
        ),
        CPU,
        torch.float32,
    )
    spec, source = evaluation.recipe.views, evaluation.train.source
    spec = ViewSpec(16, spec.mean, spec.std, crop_area=(0.08, 1.0), flip_p=0.5)
    ids = epoch_order(40, 3, 1)
    to_tensor = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)]
    )
    params = draw(3, 1, ids, spec, source.manifest.sizes[ids])[:, 0]
    views = [
        to_tensor(weak_view(Image.fromarray(source.read(i)), p, 16))
        for i, p in zip(ids, params, strict=True)
    ]
    with evaluation.augmented(torch.nn.Flatten()) as batches:
        ((rows, labels),) = batches(1)
    torch.testing.assert_close(rows, torch.stack(views).flatten(1), rtol=0, atol=1e-5)
    assert torch.equal(labels, torch.from_numpy(source.manifest.labels[ids]))


def test_recalibrating_replaces_the_statistics_of_a_copy_and_freezing_changes_nothing(
    folder, monkeypatch
):
    torch.manual_seed(0)
    evaluation = Evaluation(folder, tiny(), CPU, torch.float32)
    encoder = Encoder("resnet18", "cifar", width=4)
    for name, buffer in encoder.named_buffers():
        if name.endswith("running_mean"):
            buffer.fill_(-0.5)
    before, twin = copy.deepcopy(encoder.state_dict()), copy.deepcopy(encoder)
    seen = {}

    def protocol(batches, test, **_):
        list(batches(0))
        seen["rows"], _ = test()
        return {}

    monkeypatch.setattr(linear, "rsa_small", protocol)
    assert (
        evaluation.score(encoder, ("linear-rsa-small",), recalibrate=True)["linear_bn"]
        == "recalibrate"
    )
    with evaluation.augmented(twin.train()) as batches:
        list(batches(0))
    torch.testing.assert_close(seen["rows"], extract_features(twin, evaluation.test)[0])
    recalibrated = seen["rows"]
    assert evaluation.score(encoder, ("linear-rsa-small",))["linear_bn"] == "eval"
    assert torch.equal(seen["rows"], extract_features(encoder, evaluation.test)[0])
    assert (recalibrated - seen["rows"]).abs().mean() > 0.01
    assert encoder.training and all(
        torch.equal(value, before[key]) for key, value in encoder.state_dict().items()
    )


class Drifting(torch.nn.Flatten):
    """A network whose buffer changes in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, images):
        self.count += 1
        return super().forward(images)


def test_an_encoder_that_changes_in_evaluation_is_noticed(folder):
    with pytest.raises(AssertionError, match="the encoder changed in evaluation"):
        Evaluation(folder, tiny(), CPU, torch.float32).score(Drifting(), ("knn",))


def test_an_unknown_protocol_is_refused(folder):
    with pytest.raises(ValueError, match="no protocol linear: choose from knn, linear-fast"):
        Evaluation(folder, tiny(), CPU, torch.float32).score(torch.nn.Flatten(), ("linear",))


def test_several_linear_protocols_have_keys_of_their_own(folder, monkeypatch):
    monkeypatch.setattr(linear, "FAST_EPOCHS", 5)
    evaluation, names = Evaluation(folder, tiny(), CPU, torch.float32), evaluate.PROTOCOLS

    def score(*protocols: str) -> dict:
        return evaluation.score(torch.nn.Flatten(), protocols, epochs=2)

    alone, together = {name: score(name) for name in names}, score(*names)
    assert {"linear_protocol", "linear_top1"} < alone["linear-fast"].keys()
    expected = dict(alone["knn"])
    for name in names[1:]:
        own = name.replace("-", "_")
        expected |= {key.replace("linear", own, 1): value for key, value in alone[name].items()}
    assert together == expected and together["linear_rsa_small_protocol"] == "linear-rsa-small/1"
    # One of each kind, even if it is named twice, has the keys that it has alone.
    assert score("knn", "linear-fast", "linear-fast") == alone["knn"] | alone["linear-fast"]


def results(folder) -> dict:
    """Return what one of any number of ranks gets for the images in `folder`.

    The features are the pixels, so no bit of them depends on the size of a batch.
    """
    evaluate.KNN_CHUNK, linear.BATCH_SIZE, linear.FAST_EPOCHS = 7, 8, 5
    bank, queries = clusters(301, 1.6, 0), clusters(41, 1.6, 1)
    mine = [part[rank() :: world_size()] for part in (*bank, *queries)]
    assert torch.equal(gather_rows(mine[0]), bank[0])
    evaluation = Evaluation(folder, tiny(precision="fp32"), CPU, torch.float32)
    scores = [evaluation.score(torch.nn.Flatten(), ("knn", "linear-fast"))]
    scores += [
        evaluation.score(torch.nn.Flatten(), (f"linear-rsa-{size}",), epochs=2)
        for size in ("small", "large")
    ]
    if world_size() > 1:
        with pytest.raises(ValueError, match="needs one process, found 2"):
            evaluation.score(torch.nn.Flatten(), ("linear-rsa-small",), recalibrate=True)
    return {"clusters": knn(*mine, 3), "images": scores}


def test_two_ranks_get_the_results_of_one(tmp_path, monkeypatch):
    for module, name in ((evaluate, "KNN_CHUNK"), (linear, "BATCH_SIZE"), (linear, "FAST_EPOCHS")):
        monkeypatch.setattr(module, name, None)  # `results` sets it; the test restores it.
    # 21 and 15 images do not divide evenly over two ranks.
    write_folder(tmp_path, {"train": 7, "test": 5}, classes=3)
    alone, ranks = results(tmp_path), run_ranks(results, 2, tmp_path)
    assert alone["clusters"]["knn_top1"] == pytest.approx(
        naive_knn(*clusters(301, 1.6, 0), *clusters(41, 1.6, 1), 3, 200, 0.1)
    )
    assert len({json.dumps(scores) for scores in alone["images"]}) == 3
    assert ranks == [alone, alone]


@pytest.fixture
def untrained(tmp_path) -> Path:
    """A checkpoint of a network with random weights."""
    torch.manual_seed(0)
    recipe = tiny(precision="fp32")
    state = {
        "step": 1,
        "recipe": recipe.model_dump(mode="json"),
        "method": build_method(recipe).state_dict(),
    }
    return checkpoint.save(tmp_path, state, 1)


def run_eval(command: str, path: Path, data: Path) -> Result:
    """The outcome of `rsa-fast eval` with the words of `command`."""
    words = [*command.split(), "--checkpoint", str(path), "--data", str(data)]
    return invoke(main, "eval", *words)


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("knn", {}, {"knn_protocol": "knn/1", "test_transform": "centre crop 16 px"}),
        (
            "knn --resize-px 18",
            {"resize_px": 18},
            {"test_transform": "short side to 18 px, centre crop 16 px"},
        ),
        (
            "knn --dataset demo",
            {"dataset": "demo"},
            {"test_transform": "short side to 32 px, centre crop 32 px"},
        ),
        (
            "knn --dataset demo --resize-px native",
            {"dataset": "demo", "resize_px": "native"},
            {"test_transform": "centre crop 32 px"},
        ),
        ("linear", {}, {"linear_protocol": "linear-fast/1"}),
        (
            "linear --protocol rsa-small --epochs 2 --bn recalibrate --no-nesterov",
            {"variant": "rsa-small", "epochs": 2, "bn": "recalibrate", "nesterov": False},
            {
                "linear_protocol": "linear-rsa-small/1",
                "linear_bn": "recalibrate",
                "linear_nesterov": False,
            },
        ),
        (
            "linear --protocol rsa-large --epochs 1",
            {"variant": "rsa-large", "epochs": 1},
            {"linear_protocol": "linear-rsa-large/1", "linear_epochs": 1},
        ),
    ],
)
def test_the_command_and_the_function_give_the_same_scores(
    folder, untrained, command, options, expected
):
    done = run_eval(command, untrained, folder)
    scores, protocol = result_of(done), command.split()[0]
    assert expected.items() <= scores.items() and 0 <= scores[f"{protocol}_top1"] <= 100
    assert scores.get("linear_best_top1", 100) >= scores.get("linear_top1", 0)
    assert rsa_fast.evaluate(untrained, folder, protocol, **options) == scores


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("knn --epochs 3", {"epochs": 3}, "knn has no --epochs"),
        ("knn --protocol rsa-small", {"variant": "rsa-small"}, "knn has no --protocol"),
        (
            "linear --protocol rsa-large --bn eval",
            {"variant": "rsa-large", "bn": "eval"},
            "linear-rsa-large has no --bn",
        ),
        (
            "knn --resize-px small",
            {"resize_px": "small"},
            "eval_resize_px = 'small': Input should be a valid integer",
        ),
    ],
)
def test_the_command_and_the_function_refuse_the_same_options(
    folder, untrained, command, options, message
):
    done = run_eval(command, untrained, folder)
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output
    with pytest.raises(ValueError, match=message):
        rsa_fast.evaluate(untrained, folder, command.split()[0], **options)


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("linaer", {}, "no protocol linaer-fast: choose from knn, linear-fast"),
        ("linear", {"variant": "slow"}, "no protocol linear-slow: choose from"),
        ("linear", {"variant": "rsa-small", "bn": "sync"}, "no bn 'sync': choose from eval"),
    ],
)
def test_the_function_refuses_names_that_do_not_exist(
    folder, untrained, protocol, options, message
):
    with pytest.raises(ValueError, match=message):
        rsa_fast.evaluate(untrained, folder, protocol, **options)


@pytest.fixture
def run(untrained, folder, tmp_path) -> Path:
    """The folder of a run, with two checkpoints of which the newer is damaged."""
    place = tmp_path / "run"
    shutil.copytree(folder, tmp_path / "images")
    (place / "checkpoints").mkdir(parents=True)
    shutil.copy(untrained, place / "checkpoints" / "step_00000009.pt")
    (place / "checkpoints" / "step_00000010.pt").write_bytes(b"cut off")
    shutil.copy(untrained, place / "checkpoints" / "best.pt")
    (place / "env.json").write_text(json.dumps([{"data": [str(tmp_path / "images")]}]))
    return place


def test_a_run_s_folder_is_its_newest_whole_checkpoint_and_its_images(run, folder, caplog):
    caplog.set_level("INFO", "rsa_fast")
    path = run / "checkpoints" / "step_00000009.pt"
    expected = rsa_fast.evaluate(path, folder, "knn")
    place = run.parent / "images"
    for given in (run, run / "checkpoints", path):
        done = invoke(main, "eval", "knn", "--checkpoint", given)
        scores = result_of(done)
        assert scores == expected | {"data": str(place)}
        assert f"images of the run in {run}: {place}" in caplog.text
        assert ("newest undamaged checkpoint is step_00000009.pt" in caplog.text) == (given != path)
        caplog.clear()
    recipe = rsa_fast.load_encoder(run)[1]
    assert recipe == rsa_fast.load_encoder(path)[1]
    shutil.rmtree(place)
    with pytest.raises(FileNotFoundError, match="give their new place with --data"):
        rsa_fast.evaluate(run)
    (run / "env.json").unlink()
    with pytest.raises(ValueError, match="does not record where its images are: give --data"):
        rsa_fast.evaluate(run)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no undamaged checkpoint in"):
        rsa_fast.load_encoder(run)


def test_the_number_of_neighbours_and_their_temperature_are_options(folder, untrained):
    scores = rsa_fast.evaluate(untrained, folder, "knn", k=5, temperature=0.2)
    assert (scores["knn_k"], scores["knn_temperature"]) == (5, 0.2)
    assert "knn20_top1" not in scores
    done = run_eval("knn --k 5 --temperature .2", untrained, folder)
    assert json.loads(done.stdout.splitlines()[-1]) == scores
    evaluation = Evaluation(folder, tiny(precision="fp32"), CPU, torch.float32)
    network = rsa_fast.load_encoder(untrained)[0]
    bank, queries = (
        extract_features(network, images) for images in (evaluation.train, evaluation.test)
    )
    assert scores["knn_top1"] == pytest.approx(naive_knn(*bank, *queries, 2, 5, 0.2))
    assert "linear-fast has no --k" in run_eval("linear --k 5", untrained, folder).output
    with pytest.raises(ValueError, match="both must be positive"):
        rsa_fast.evaluate(untrained, folder, "knn", k=0)


def test_fields_say_how_images_are_sized_and_normalised(folder, untrained, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Evaluation, "score", lambda self, *_, **__: seen.append(self.test) or {})
    sets = "--set views.size_px=24 --set views.mean=[0,0,0] --set views.std=[1,.5,1]"
    foreign = tmp_path / "foreign.pth"
    torch.save(Encoder("resnet18", "cifar", width=4).state_dict(), foreign)
    for path, resize_px in ((untrained, None), (foreign, 27)):  # 256 to 224 px
        done = run_eval(f"knn {sets}", path, folder)
        assert done.exit_code == 0, done.output
        test = seen.pop()
        assert (test.size_px, test.resize_px) == (24, resize_px)
        assert test.mean.flatten().tolist() == [0, 0, 0]
        assert test.std.flatten().tolist() == [1, 0.5, 1]
    assert "fields that are not set are those of ImageNet-1K" in done.output
    done = run_eval(f"knn {sets} --set eval_resize_px=30", foreign, folder)
    assert seen.pop().resize_px == 30
    done = run_eval("knn --set views.mean=[0,0,0]", foreign, folder)
    assert done.exit_code == 1 and "or --set views.size_px=PX" in done.output
    done = run_eval("knn --set views.size=3", untrained, folder)
    assert "does not read views.size (did you mean 'views.size_px'?)" in done.output
    done = run_eval("knn --set base_lr=3", untrained, folder)
    assert done.exit_code == 1 and "evaluation does not read base_lr" in done.output


def test_train_and_test_folders_are_given_apart(folder, untrained):
    expected = rsa_fast.evaluate(untrained, folder, "linear")
    words = ["--train", str(folder / "train"), "--test", str(folder / "test")]
    done = invoke(main, "eval", "linear", "--checkpoint", untrained, *words)
    scores = result_of(done)
    assert expected.pop("data") == str(folder)
    assert (scores.pop("train"), scores.pop("test")) == (words[1], words[3])
    assert scores == expected
    # Of a dataset, the split of that name is taken.
    scores = rsa_fast.evaluate(untrained, train=folder, test=folder, protocol="linear")
    assert expected.items() <= scores.items()
    for wrong in (["--train", str(folder)], [*words, "--data", str(folder)]):
        done = invoke(main, "eval", "knn", "--checkpoint", untrained, *wrong)
        assert done.exit_code == 1 and "--train and --test must be given together" in done.output
    done = invoke(main, "eval", "knn", "--checkpoint", untrained, *words[:3], words[1])
    assert done.exit_code == 1 and "are among the training and the test images" in done.output


def test_a_fraction_of_the_labels_is_the_same_of_each_class(folder, untrained):
    recipe = tiny(precision="fp32")
    evaluation = Evaluation(folder, recipe, CPU, torch.float32, labels=0.3)
    whole = open_source(folder, "train").manifest
    manifest = evaluation.train.source.manifest
    assert np.bincount(manifest.labels).tolist() == [6, 6]  # of 20
    number = {path: label for path, label in zip(whole.paths, whole.labels, strict=True)}
    assert [number[path] for path in manifest.paths] == manifest.labels.tolist()
    other = Evaluation(folder, tiny(seed=1), CPU, torch.float32, labels=0.3)
    assert set(other.train.source.manifest.paths) != set(manifest.paths)
    scores = rsa_fast.evaluate(untrained, folder, "linear", labels=0.3)
    assert (scores["labels"], scores["train_images"], scores["test_images"]) == (0.3, 12, 20)
    assert scores["linear_per_class"].keys() == {"class_0", "class_1"}
    assert np.mean(list(scores["linear_per_class"].values())) == scores["linear_top1"]
    done = run_eval("linear --labels 0.3", untrained, folder)
    assert json.loads(done.stdout.splitlines()[-1]) == scores
    assert rsa_fast.evaluate(untrained, folder, "linear", labels="30%") == scores
    with pytest.raises(ValueError, match="labels = 150: wanted a percentage"):
        rsa_fast.evaluate(untrained, folder, "linear", labels=150)


def test_several_folders_are_scored_one_by_one_and_their_features_once(
    folder, untrained, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "rsa_fast")
    other = write_folder(tmp_path / "other", {"train": 3, "test": 2}, classes=12)
    calls = []
    compute = evaluate.extract_features
    monkeypatch.setattr(
        evaluate, "extract_features", lambda *args: calls.append(args[1]) or compute(*args)
    )
    alone = [rsa_fast.evaluate(untrained, data, "linear") for data in (folder, other)]
    assert len(calls) == 4 and ": cached in " not in caplog.text
    done = run_eval(f"linear --data {other}", untrained, folder)
    assert done.exit_code == 0, done.output
    # Not computed again, also for the other protocol.
    assert len(calls) == 4 and caplog.text.count(": cached in ") == 4
    rsa_fast.evaluate(untrained, folder, "knn")
    assert len(calls) == 4
    result = json.loads(done.stdout.splitlines()[-1])
    assert result.pop("checkpoint") == str(untrained)
    expected = [{k: v for k, v in one.items() if k != "checkpoint"} for one in alone]
    by_place = {one["data"]: one for one in expected}
    assert [one["data"] for one in result["folders"]] == [str(other), str(folder)]
    assert all(one == by_place[one["data"]] for one in result["folders"])
    assert (
        f"{by_place[str(other)]['linear_top5']:.2f}" in done.stdout
        and "linear_top5" not in (by_place[str(folder)])
    )
    assert (
        rsa_fast.evaluate(untrained, [other, folder], "linear", each=True)["folders"]
        == (result["folders"])
    )

    # Other weights, another transform, and other images have features of their own.
    state = torch.load(untrained, weights_only=True)
    key = next(key for key in state["method"] if key.endswith("encoder.conv1.weight"))
    state["method"][key] = state["method"][key] * 1.5
    changed = checkpoint.save(tmp_path / "changed", state, 1)
    rsa_fast.evaluate(changed, folder, "knn")
    assert len(calls) == 6
    rsa_fast.evaluate(untrained, folder, "knn", resize_px=18)
    assert len(calls) == 8
    rsa_fast.evaluate(untrained, folder, "knn", labels=0.5)
    assert len(calls) == 9  # the test images are the same
    # A damaged file is computed again.
    caplog.clear()
    for path in (features.user_cache() / "features").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:100])
    assert rsa_fast.evaluate(untrained, folder, "linear") == alone[0]
    assert len(calls) == 11 and "are damaged" in caplog.text


def test_the_oldest_features_leave_the_cache(tmp_path, monkeypatch):
    for age in range(4):
        path = tmp_path / f"{age}.pt"
        path.write_bytes(bytes(10))
        os.utime(path, (1000 - age, 1000 - age))
    monkeypatch.setattr(features, "CACHE_BYTES", 25)
    features.remove_oldest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.pt", "1.pt"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a machine without a GPU")
def test_the_encoder_of_a_gpu_s_run_is_scored_and_exported_on_a_cpu(folder, untrained, tmp_path):
    state = torch.load(untrained, weights_only=True)
    path = checkpoint.save(
        tmp_path / "gpu", state | {"recipe": state["recipe"] | {"device": "cuda"}}, 1
    )
    done, expected = (run_eval("knn", place, folder) for place in (path, untrained))
    assert done.exit_code == 0, done.output
    scores, others = (json.loads(one.stdout.splitlines()[-1]) for one in (done, expected))
    assert scores == others | {"checkpoint": str(path)}
    exported = ["--format", "safetensors", "--out", str(tmp_path / "encoder.safetensors")]
    done = invoke(main, "export", "--checkpoint", path, *exported)
    assert done.exit_code == 0, done.output


def test_two_processes_score_together_and_one_of_them_prints(folder, untrained):
    words = ["eval", "linear", "--checkpoint", str(untrained), "--data", str(folder)]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    env |= {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "rsa_fast", *words],
            env=env | {"RANK": str(number), "LOCAL_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    printed = [process.communicate(timeout=200) for process in processes]
    assert not any(process.returncode for process in processes), printed
    assert "{" not in printed[1][0]  # gloo itself prints that the ranks are connected
    alone = run_eval("linear", untrained, folder)
    assert json.loads(printed[0][0].splitlines()[-1]) == json.loads(alone.stdout.splitlines()[-1])
