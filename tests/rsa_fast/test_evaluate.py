from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner, Result
from conftest import natural_image, write_folder
from PIL import Image
from torchvision import transforms

import rsa_fast
from pipelines.beton import BetonWriter
from pipelines.draws import draw
from pipelines.layouts import open_source
from pipelines.order import epoch_order
from pipelines.packed import ENTRY
from pipelines.plain import PlainImages, plain_image
from pipelines.torchvision_views import weak_view
from pipelines.views import ViewSpec
from rsa_fast.cli import main
from rsa_fast.distributed import rank, world_size
from rsa_fast.evaluation import evaluate, features, linear
from rsa_fast.evaluation.evaluate import Evaluation, extract_features, gather_rows, knn
from rsa_fast.methods.method import build_method
from rsa_fast.networks import Encoder
from rsa_fast.recipes import build_recipe
from rsa_fast.training import checkpoint

CPU = torch.device("cpu")


def clusters(
    count: int, spread: float, seed: int, classes: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.eye(8)[:classes] * 2
    return centres[labels] + spread * torch.randn(count, 8, generator=generator), labels


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
    write_folder(tmp_path / "b", {"train": 2}, classes=3)
    write_folder(tmp_path / "b", {"test": 2}, classes=2)
    with pytest.raises(ValueError, match="only one has class_2"):
        Evaluation(tmp_path / "b", recipe, CPU, torch.float32)


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
    with pytest.raises(ValueError, match="only one has 12"):
        Evaluation(tmp_path, tiny(), CPU, torch.float32)


def test_a_crop_larger_than_the_resized_image_is_refused(folder):
    with pytest.raises(ValueError, match="resized to 16 px do not fill the centre crop of 32 px"):
        Evaluation(
            folder,
            build_recipe("cifar10", "rsa", overrides={"eval_resize_px": 16}),
            CPU,
            torch.float32,
        )


def tiny(**overrides):
    return build_recipe(
        "cifar10",
        "rsa",
        overrides={"width": 4, "hidden_dim": 16, "out_dim": 8, "views.size_px": 16, **overrides},
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


def results(data) -> dict:
    """Return what one of any number of ranks gets.

    The features are the pixels, so no bit of them depends on the size of a batch.
    """
    evaluate.KNN_CHUNK, linear.BATCH_SIZE, linear.FAST_EPOCHS = 7, 8, 5
    bank, queries = clusters(301, 1.6, 0), clusters(41, 1.6, 1)
    mine = [part[rank() :: world_size()] for part in (*bank, *queries)]
    assert torch.equal(gather_rows(mine[0]), bank[0])
    evaluation = Evaluation(data, tiny(precision="fp32"), CPU, torch.float32)
    scores = [evaluation.score(torch.nn.Flatten(), ("knn", "linear-fast"))]
    scores += [
        evaluation.score(torch.nn.Flatten(), (f"linear-rsa-{size}",), epochs=2)
        for size in ("small", "large")
    ]
    if world_size() > 1:
        with pytest.raises(ValueError, match="takes one process, found 2"):
            evaluation.score(torch.nn.Flatten(), ("linear-rsa-small",), recalibrate=True)
    return {"clusters": knn(*mine, 3), "images": scores}


def one_of_two(number: int, data, place) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meet", rank=number, world_size=2)
    (place / f"{number}.json").write_text(json.dumps(results(data)))
    dist.destroy_process_group()


def test_two_ranks_get_the_results_of_one(tmp_path, monkeypatch):
    for module, name in ((evaluate, "KNN_CHUNK"), (linear, "BATCH_SIZE"), (linear, "FAST_EPOCHS")):
        monkeypatch.setattr(module, name, None)  # `results` sets it; the test restores it.
    # 21 and 15 images do not divide evenly over two ranks.
    data = write_folder(tmp_path / "data", {"train": 7, "test": 5}, classes=3)
    torch.multiprocessing.spawn(one_of_two, (data, tmp_path), nprocs=2)
    alone = results(data)
    assert alone["clusters"]["knn_top1"] == pytest.approx(
        naive_knn(*clusters(301, 1.6, 0), *clusters(41, 1.6, 1), 3, 200, 0.1)
    )
    assert len({json.dumps(scores) for scores in alone["images"]}) == 3
    for number in (0, 1):
        assert json.loads((tmp_path / f"{number}.json").read_text()) == alone


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
    return CliRunner().invoke(main, ["eval", *words])


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
    assert done.exit_code == 0, done.output
    scores, protocol = json.loads(done.stdout.splitlines()[-1]), command.split()[0]
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
    done = CliRunner().invoke(main, ["export", "--checkpoint", str(path), *exported])
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
