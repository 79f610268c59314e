from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torchvision.ops import masks_to_boxes

from rsa_fast.cli import main
from rsa_fast.evaluation import detection
from rsa_fast.evaluation.detection import (
    build_model,
    build_sgd,
    coco_scores,
    detect,
    find_objects,
    learning_rate,
    precise_bn,
    restore,
)
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.coco import CocoImages, reading_plan
from rsa_fast.pipelines.order import Order
from rsa_fast.training import checkpoint
from rsa_fast.training.metrics import Metrics, read_metrics
from rsa_fast.training.run_folder import hold_folder
from tests.helpers import invoke
from tests.rsa_fast.tiny_detection import (
    CATEGORIES,
    MODEL_OPTIONS,
    annotations_of,
    write_annotations,
    write_coco,
)

encode = pytest.importorskip("pycocotools.mask", reason="transfer needs pycocotools").encode

CPU = torch.device("cpu")


OPTIONS = {
    "schedule": "2x",
    "steps": 4,
    "batch_size": 2,
    "workers": 0,
    "device": "cpu",
    "precision": "fp32",
}


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    """Its BatchNorm statistics are random: fresh ones would hide that they are not loaded."""
    torch.manual_seed(0)
    network = Encoder("resnet50")
    for name, buffer in network.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    return network


@pytest.fixture(scope="module")
def weights(encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "resnet50.pth"
    torch.save(encoder.state_dict(), path)
    return path


@pytest.fixture(autouse=True, scope="module")
def tiny(one_thread):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(detection, "MODEL_OPTIONS", MODEL_OPTIONS)
        patch.setattr(detection, "LOG_STEPS", 1)
        patch.setattr(detection, "PRECISE_BN_STEPS", 1)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    yield folder
    shutil.rmtree(folder)  # pytest would keep a gigabyte of checkpoints.


@pytest.fixture(scope="module")
def whole_run(weights, coco, runs) -> tuple[Path, dict]:
    return runs / "whole", detect(weights, coco, runs / "whole", **OPTIONS)


@pytest.fixture(scope="module")
def model(encoder) -> nn.Module:
    return build_model(encoder, len(CATEGORIES))


# --- evaluation


def truth(images: CocoImages, shift_px: int = 0) -> list[dict]:
    """Return the annotations as predictions, with boxes and masks moved to the right."""
    rows = []
    for entry in images.coco.anns.values():
        x, y, width, height = entry["bbox"]
        mask = np.asfortranarray(np.roll(images.coco.annToMask(entry), shift_px, axis=1))
        row = {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": 0.9}
        rows.append({**row, "bbox": [x + shift_px, y, width, height], "segmentation": encode(mask)})
    return rows


def test_the_ground_truth_as_predictions_scores_100_and_nothing_scores_0(coco, capsys):
    images = CocoImages(coco, "val2017")
    assert list(coco_scores(images.coco, truth(images)).values()) == pytest.approx([100] * 6)
    assert list(coco_scores(images.coco, []).values()) == [0] * 6
    assert capsys.readouterr().out == ""  # pycocotools' report is not printed.


def test_shifted_objects_score_what_their_overlap_says(coco):
    # The boxes are 24 px wide and moved by 4. Their IoU of 20 / 28 = .714 is a match at .50, .55,
    # .60, .65 and .70, and not at the other five thresholds.
    images = CocoImages(coco, "val2017")
    moved = truth(images, 4)
    scores = coco_scores(images.coco, moved)
    assert [scores["box_ap"], scores["box_ap50"], scores["box_ap75"]] == pytest.approx([50, 100, 0])
    # The masks of the rectangles overlap as their boxes do. Without the discs, one of the two
    # classes scores nothing.
    scores = coco_scores(images.coco, [row for row in moved if row["category_id"] == 3])
    assert list(scores.values()) == pytest.approx([25, 50, 0, 25, 50, 0])


class Clairvoyant(nn.Module):
    """Answers as torchvision's models do, with the annotated objects."""

    def __init__(self, images: CocoImages) -> None:
        super().__init__()
        self.answers = iter([images[index, False] for index in range(len(images))])

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        image, objects = next(self.answers)
        assert torch.equal(images[0], image / 255)
        scores = torch.full((len(objects["labels"]),), 0.9)
        return [
            {
                "boxes": objects["boxes"],
                "labels": objects["labels"],
                "scores": scores,
                "masks": 0.9 * objects["masks"][:, None],
            }
        ]


def test_a_model_that_finds_every_object_scores_100(coco):
    images = CocoImages(coco, "val2017")
    rows = find_objects(Clairvoyant(images), images, CPU, torch.float32, 0)
    assert list(coco_scores(images.coco, rows).values()) == pytest.approx([100] * 6)


# --- the model


def test_the_backbone_is_the_encoder_bit_for_bit_and_all_of_it_learns(encoder, model):
    body = model.backbone.body.state_dict()
    assert body.keys() == encoder.state_dict().keys() and len(body) == 318
    assert all(torch.equal(value, body[key]) for key, value in encoder.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    norms = {
        name: module
        for name, module in model.named_modules()
        if "BatchNorm" in type(module).__name__
    }
    assert all(
        type(norm) is nn.BatchNorm2d and norm.affine and norm.track_running_stats
        for norm in norms.values()
    )
    where = [name.split(".")[1] for name in norms]
    assert {part: where.count(part) for part in where} == {
        "body": 53,
        "fpn": 8,
        "box_head": 4,
        "mask_head": 4,
    }


@pytest.mark.parametrize(
    "form", [("resnet18",), ("resnet50", "cifar"), ("resnet50", "imagenet", 16)]
)
def test_another_encoder_is_refused(form):
    with pytest.raises(ValueError, match="needs a ResNet-50 with the ImageNet stem and width 64"):
        build_model(Encoder(*form), 2)


def test_weight_decay_spares_batchnorm_alone(model):
    norms, rest = build_sgd(model).param_groups
    assert (norms["weight_decay"], rest["weight_decay"]) == (0, 1e-4)
    named = {id(p): name for name, p in model.named_parameters()}
    assert len(norms["params"]) == 2 * 69 and len(norms["params"]) + len(rest["params"]) == len(
        named
    )
    assert {named[id(p)].rsplit(".", 1)[0] for p in norms["params"]} == {
        name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)
    }


def test_boxes_are_decoded_in_float32_under_autocast(model):
    # The coordinates are no multiples of 4, so bf16 cannot represent them.
    anchor = torch.tensor([[1001.0, 1003.0, 1034.0, 1037.0]])
    with torch.autocast("cpu", torch.bfloat16):
        # Without features, the proposal is the anchor itself.
        _, (proposals,) = model.rpn.head([torch.zeros(1, 256, 1, 1)])
        _, boxes = model.roi_heads.box_predictor(torch.zeros(1, 1024))
    assert torch.equal(
        model.rpn.box_coder.decode(proposals[:, :4].reshape(1, 4), [anchor])[0, 0], anchor[0]
    )
    assert boxes.dtype == torch.float32


def test_precise_bn_is_the_mean_over_batches():
    torch.manual_seed(0)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train()
    batches = [torch.randn(4, 3, 5, 5) * (i + 1) + i for i in range(3)]
    network(batches[0] * 100)  # Precise BN must forget this batch.
    precise_bn(network, map(network, batches))
    torch.testing.assert_close(
        network[0].running_mean, torch.stack([x.mean((0, 2, 3)) for x in batches]).mean(0)
    )
    torch.testing.assert_close(
        network[0].running_var, torch.stack([x.var((0, 2, 3)) for x in batches]).mean(0)
    )
    assert network[2].num_batches_tracked == 3 and network[1].weight.grad is None


# --- training


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (
            "1x",
            {
                0: 2e-5,
                500: 0.01001,
                1000: 0.02,
                59_999: 0.02,
                60_000: 2e-3,
                79_999: 2e-3,
                80_000: 2e-4,
                89_999: 2e-4,
            },
        ),
        (
            "2x",
            {
                0: 3e-5,
                500: 0.015015,
                1000: 0.03,
                119_999: 0.03,
                120_000: 3e-3,
                159_999: 3e-3,
                160_000: 3e-4,
            },
        ),
    ],
)
def test_the_learning_rate_warms_up_and_drops_twice(schedule, rates):
    for step, rate in rates.items():
        assert learning_rate(step, *detection.SCHEDULES[schedule]) == pytest.approx(rate)


def test_a_shortened_run_drops_at_the_same_fractions():
    rates = [learning_rate(step, 90, 1.0) for step in range(90)]
    # A tenth of the steps is warm-up.
    assert rates[0] == pytest.approx(1e-3) and rates[9] == rates[59] == 1
    assert rates[60:80] == pytest.approx([0.1] * 20) and rates[80:] == pytest.approx([0.01] * 10)


def test_training_lowers_the_loss_at_the_scaled_rate(whole_run):
    out, result = whole_run
    records = read_metrics(out)
    losses = [record["loss"] for record in records]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.8 * losses[0]
    # The rate is 0.03 * 2 / 16, with the first drop after 2/3 of 4 steps.
    assert [record["lr"] for record in records] == pytest.approx(
        [0.00375, 0.00375, 0.00375, 0.000375]
    )
    assert json.loads((out / "result.json").read_text()) == result
    assert result["step"] == 4 and 0 <= result["box_ap"] <= result["box_ap50"] <= 100


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_never_stopped(whole_run, weights, coco, runs):
    out, result = whole_run
    stopped = detect(weights, coco, runs / "stopped", **OPTIONS, stop_at_step=2)
    assert stopped["step"] == 2 and "box_ap" not in stopped
    with pytest.raises(ValueError, match="schedule: '2x' then, '1x' now"):
        detect(weights, coco, runs / "stopped", **{**OPTIONS, "schedule": "1x"}, resume=True)
    resumed = detect(weights, coco, runs / "stopped", **OPTIONS, resume=True)
    assert resumed == {**result, "out": str(runs / "stopped")}
    whole, again = (
        checkpoint.load_latest(folder / "checkpoints") for folder in (out, runs / "stopped")
    )
    assert whole["step"] == again["step"] == 4
    assert all(torch.equal(value, again["method"][key]) for key, value in whole["method"].items())
    timeless = [
        {key: value for key, value in record.items() if key != "step_ms"}
        for record in read_metrics(runs / "stopped")
    ]
    assert timeless == [
        {key: value for key, value in record.items() if key != "step_ms"}
        for record in read_metrics(out)
    ]


def command_of(weights, coco, out):
    given = {
        "checkpoint": weights,
        "data": coco,
        "out": out,
        "schedule": "2x",
        "steps": 4,
        "batch-size": 2,
        "workers": 0,
    }
    options = [str(part) for key, value in given.items() for part in (f"--{key}", value)]
    return ["detect", *options, "--device", "cpu", "--precision", "fp32"]


def test_a_signal_stops_the_command_which_then_goes_on_to_the_same_result(
    whole_run, weights, coco, runs, monkeypatch
):
    class Signalled(Metrics):
        def write(self, record):
            super().write(record)
            if record["step"] == 2:
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(detection, "LOG_STEPS", 1)
    monkeypatch.setattr(detection, "Metrics", Signalled)
    out = runs / "signalled"
    arguments = command_of(weights, coco, out)
    stopped = invoke(main, *arguments)
    assert stopped.exit_code == 75 and "SIGTERM: stopped after step 3, which is" in stopped.output
    assert [path.name for path in checkpoint.paths_in(out / "checkpoints")] == ["step_00000003.pt"]
    monkeypatch.setattr(detection, "Metrics", Metrics)
    resumed = invoke(main, *arguments, "--resume")
    assert json.loads(resumed.stdout) == {**whole_run[1], "out": str(out)}


def test_the_command_ends_with_one_json_line(whole_run, weights, coco):
    out, result = whole_run
    done = invoke(main, *command_of(weights, coco, out), "--resume")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == result


def test_a_finished_run_that_is_resumed_stays_as_it_is(whole_run, weights, coco):
    out, result = whole_run
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")}
    assert detect(weights, coco, out, **OPTIONS, resume=True) == result
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")}


def test_a_folder_in_use_is_refused(whole_run, weights, coco):
    out, _ = whole_run
    with hold_folder(out, resume=True, overwrite=False):
        before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")}
        with pytest.raises(BlockingIOError, match=f"is in use by process {os.getpid()} on"):
            detect(weights, coco, out, **OPTIONS, overwrite=True)
        assert before == {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in out.rglob("*")}


def parts(dtype: torch.dtype) -> dict:
    """A small model with an optimiser and a scaler for the compute type."""
    model = nn.Linear(2, 2)
    scaler = GradScaler("cpu", enabled=dtype == torch.float16)
    return {"method": model, "optimizer": build_sgd(model), "scaler": scaler}


def test_a_run_may_be_resumed_in_another_precision_and_starts_where_there_is_none(tmp_path, caplog):
    assert restore(parts(torch.float16), {"steps": 4}, tmp_path, torch.float16) == 0
    for step, (first, second) in enumerate([("bfloat16", "float16"), ("float16", "bfloat16")], 1):
        saved, now = getattr(torch, first), getattr(torch, second)
        state = {name: part.state_dict() for name, part in parts(saved).items()}
        state |= {"step": step, "recipe": {"steps": 4}, "dtype": first}
        checkpoint.save(tmp_path / "checkpoints", state, keep_last=1)
        assert restore(parts(now), {"steps": 4}, tmp_path, now) == step
        assert f"computed in {first}, and the run continues in {second}" in caplog.text


# --- data


@pytest.mark.parametrize("flip", [False, True])
def test_boxes_masks_and_pixels_stay_together(coco, flip):
    images = CocoImages(coco, "train2017")
    for index in range(2):
        image, objects = images[index, flip]
        # Boxes extend to the far edge of their last pixel.
        boxes = masks_to_boxes(objects["masks"]) + torch.tensor([0, 0, 1, 1])
        torch.testing.assert_close(objects["boxes"][:1], boxes[:1])
        torch.testing.assert_close(objects["boxes"], boxes, rtol=0, atol=1.0)
        assert objects["labels"].tolist() == [1, 2]  # These are the categories 3 and 7.
        inside = (
            image[:, objects["masks"][0] == 1].float().mean(1),
            image[:, objects["masks"][1] == 1].float().mean(1),
        )
        # The rectangle is red, and the disc is green.
        assert inside[0].argmax() == 0 and inside[1].argmax() == 1


def test_crowds_and_flat_boxes_are_not_learned(coco):
    images = CocoImages(coco, "train2017")
    images.coco.anns[1]["iscrowd"] = 1
    images.coco.anns[2]["bbox"][2] = 0
    _, objects = images[0, False]
    assert (
        objects["boxes"].shape == (0, 4)
        and objects["masks"].shape == (0, 64, 96)
        and len(objects["labels"]) == 0
    )


def test_every_image_is_read_once_an_epoch_beside_images_of_its_orientation():
    order, portrait = Order(60, 4, seed=0), np.arange(60) % 5 < 2
    plan = list(reading_plan(order, portrait, 0, 45))
    for epoch in (plan[:15], plan[15:30], plan[30:]):
        assert sorted(index for batch in epoch for index, _ in batch) == list(range(60))
        mixed = [batch for batch in epoch if len({bool(portrait[index]) for index, _ in batch}) > 1]
        assert len(mixed) <= 1
    # About half of the 180 images are flipped.
    assert plan[:15] != plan[15:30] and 60 < sum(flip for batch in plan for _, flip in batch) < 120
    assert list(reading_plan(order, portrait, 22, 45)) == plan[22:]  # Resuming is a jump.


def damage(root: Path, fault: str) -> None:
    content = annotations_of(root, "val2017")
    match fault:
        case "no folder":
            (root / "train2017").rename(root / "images")
        case "no annotations":
            (root / "annotations" / "instances_val2017.json").unlink()
        case "missing image":
            (root / "val2017" / "000000000001.png").unlink()
        case "no instances":
            write_annotations(root, "val2017", content | {"annotations": []})
        case "no segmentation":
            del content["annotations"][0]["segmentation"]
            write_annotations(root, "val2017", content)
        case "unknown category":
            content["annotations"][0]["category_id"] = 9
            write_annotations(root, "val2017", content)
        case "other categories":
            write_annotations(
                root,
                "val2017",
                content | {"categories": [*CATEGORIES[:1], {"id": 7, "name": "ball"}]},
            )
        case "no categories":
            write_annotations(root, "val2017", {"images": content["images"]})
        case "a list":
            write_annotations(root, "val2017", content["images"])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no folder", "train2017; wanted: train2017/, val2017/ and annotations/"),
        ("no annotations", "instances_val2017.json; wanted"),
        ("missing image", "lists 1 images that are not in .*: 000000000001.png"),
        ("no instances", "contains no instances"),
        ("no segmentation", "annotation 1 has no segmentation"),
        ("unknown category", "annotation 1 belongs to an image or a category that does not exist"),
        ("other categories", "differ in the id or the name of: ball, disc"),
        ("no categories", "has no annotations, categories"),
        ("a list", "is not a COCO annotation file"),
    ],
)
def test_faulty_data_is_named_before_anything_is_written(tmp_path, fault, message):
    damage(write_coco(tmp_path / "coco"), fault)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        detect(tmp_path / "no.pt", tmp_path / "coco", tmp_path / "out", **OPTIONS)
    assert not (tmp_path / "out").exists()


def test_too_few_images_and_a_wrong_size_are_named(coco, weights, tmp_path):
    with pytest.raises(ValueError, match="2 training images do not fill one batch of 16"):
        detect(weights, coco, tmp_path / "out")
    images = CocoImages(coco, "train2017")
    images.coco.imgs[5]["width"] = 97
    with pytest.raises(
        ValueError,
        match=r"000000000000.png is \(64, 96\) px high and wide, but \(64, 97\) in its annotations",
    ):
        images[0, False]


def test_without_pycocotools_the_way_to_get_it_is_named(coco, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools.coco", None)
    with pytest.raises(ValueError, match="pip install pycocotools"):
        CocoImages(coco, "val2017")
