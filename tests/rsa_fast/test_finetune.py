"""Fine-tuning: its rates, its labels, and that it is a run like those of pre-training."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from rsa_fast.cli import main
from rsa_fast.evaluation import linear
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.evaluate import evaluate
from rsa_fast.evaluation.finetune import PRESETS, finetune, fraction_of
from rsa_fast.pipelines import Batch, open_source
from rsa_fast.pipelines.combined import listed_ids, stratified_ids
from rsa_fast.recipes import build_recipe, resolve
from rsa_fast.training.callbacks import Callback
from rsa_fast.training.engine import train
from rsa_fast.training.metrics import read_metrics
from rsa_fast.training.step import build_run, train_step
from tests.helpers import invoke, result_of, write_folder
from tests.rsa_fast.ranks import run_ranks
from tests.tiny_runs import NARROW, same, tiny, weights

SHORT = {"epochs": 2, "batch_size": 8, "log_every_steps": 1, "knn_every_epochs": 1}


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> Path:
    """A pre-trained run."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    train(tiny(epochs=1, evaluate=False, zero_init_residual=False), folder, out)
    return out


def fields(preset: dict) -> dict:
    return {name: sourced.value for name, sourced in preset.items()}


def a_run(**changes):
    recipe = NARROW | {"classes": 2, "views.size_px": 16, "batch_size": 8, "precision": "fp32"}
    recipe |= {"zero_init_residual": False, "peak_lr": 0.01, "head_peak_lr": 0.5}
    return build_run(build_recipe("cifar10", "finetune", overrides=recipe | changes), 40)


def a_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.arange(8) % 2, {"weak_1": torch.randn(8, 3, 16, 16, generator=generator)})


def test_a_step_moves_every_parameter_of_the_encoder_and_the_head_at_its_own_rate():
    run = a_run()
    before, batch = copy.deepcopy(run.method), a_batch()
    logits = before.classifier(before.encoder(batch.weak_1))
    torch.nn.functional.cross_entropy(logits, batch.label).backward()
    train_step(run, batch)
    for (name, old), new in zip(before.named_parameters(), run.method.parameters(), strict=True):
        assert old.grad.abs().max() > 0, name
        lr = 0.5 if name.startswith("classifier") else 0.01
        # The first step of Nesterov's momentum: g + .9 g.
        torch.testing.assert_close(new, old - lr * 1.9 * old.grad, rtol=1e-4, atol=1e-6)
    # The second one is at another point of the schedule, which both rates follow.
    train_step(run, batch)
    now = run.schedule(1)
    rates = {len(group["params"]): group["lr"] for group in run.optimizer.param_groups}
    assert rates[2] == pytest.approx(now["head_lr"]) == pytest.approx(50 * now["lr"])
    assert rates[len(list(run.method.encoder.parameters()))] == pytest.approx(now["lr"])


def test_a_frozen_encoder_stays_in_eval_mode_and_as_it_is():
    run = a_run(freeze_encoder=True)
    encoder = copy.deepcopy(run.method.encoder.state_dict())
    head = run.method.classifier.weight.detach().clone()
    train_step(run, a_batch())
    assert run.method.training and not run.method.encoder.training
    assert same(run.method.encoder.state_dict(), encoder)
    assert not torch.equal(run.method.classifier.weight, head)
    assert all(p.grad is None for p in run.method.encoder.parameters())


def test_with_a_frozen_encoder_it_is_the_linear_protocol_rsa_small(
    run, folder, tmp_path, monkeypatch
):
    heads, layer, epochs = [], linear.linear_layer, 4
    monkeypatch.setattr(linear, "linear_layer", lambda *a: heads.append(layer(*a)) or heads[-1])
    # The numbers of `linear.rsa_small`; it drops the rate after 60% and 80% of the epochs.
    numbers = {"epochs": epochs, "batch_size": 40, "head_peak_lr": 30, "lr_drop_epochs": [2, 3]}
    numbers |= {"lr_drop": 0.1, "nesterov": True, "head_init_std": 0.01, "knn_every_epochs": 1}
    found = finetune(run, None, tmp_path / "out", freeze_encoder=True, overrides=numbers)
    wanted = evaluate(run, folder, "linear", variant="rsa-small", epochs=epochs)
    assert found["finetune_top1"] == wanted["linear_top1"]
    scores = [
        record["finetune_top1"]
        for record in read_metrics(tmp_path / "out")
        if record.get("epoch", 0) and "finetune_top1" in record
    ]
    assert len(scores) == epochs and max(scores) == wanted["linear_best_top1"]
    for name, value in heads[0].state_dict().items():
        found = weights(tmp_path / "out")[f"classifier.{name}"]
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-4)
    assert same(load_encoder(tmp_path / "out")[0].state_dict(), load_encoder(run)[0].state_dict())


def test_labels_are_drawn_from_each_class_by_the_seed():
    labels = np.repeat([0, 1, 2, -1], [200, 31, 3, 10])
    np.random.default_rng(0).shuffle(labels)
    drawn = stratified_ids(labels, 0.1, seed=3)
    assert np.bincount(labels[drawn]).tolist() == [20, 3, 1] and (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, stratified_ids(labels, 0.1, seed=3))
    assert not np.array_equal(drawn, stratified_ids(labels, 0.1, seed=4))
    assert set(stratified_ids(labels, 0.01, seed=3)) < set(drawn)
    assert np.array_equal(stratified_ids(labels, 1, seed=3), np.flatnonzero(labels >= 0))


@pytest.mark.parametrize(
    ("labels", "fraction"),
    [(1, 0.01), (10, 0.1), ("10%", 0.1), ("100", 1), (0.1, 0.1), ("0.5%", 0.005), ("0.25", 0.25)],
)
def test_labels_are_a_percentage_or_a_fraction(labels, fraction):
    assert fraction_of(labels) == pytest.approx(fraction)


@pytest.mark.parametrize("labels", [0, 101, -1, "many", "nan"])
def test_other_labels_are_refused(labels):
    with pytest.raises(ValueError, match=f"labels = {labels}: wanted a percentage"):
        fraction_of(labels)


def test_a_list_chooses_images_by_their_names(folder):
    source = open_source(folder, "train")
    names = ["class_1/003.jpg", "train/class_0/017.jpg"]
    chosen = [source.manifest.paths[i] for i in listed_ids(source, names)]
    assert chosen == ["train/class_0/017.jpg", "train/class_1/003.jpg"]
    with pytest.raises(ValueError) as caught:
        listed_ids(source, [*names, names[0], "class_1/3.jpg", "017.jpg"])
    for fault in (
        "of 5 names for 40 images in",
        "1 are given twice: class_1/003.jpg",
        "1 are not among the images: class_1/3.jpg",
        "1 are names of several images (put the folder before them): 017.jpg",
    ):
        assert fault in str(caught.value)


def test_a_list_of_nothing_but_file_names_is_trained_on(run, tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    data = write_folder(tmp_path / "data", {"train": 6, "val": 2})
    for path in (data / "train").rglob("*.jpg"):  # as ImageNet's names
        path.rename(path.with_name(f"{path.parent.name}_{path.name}"))
    chosen = tmp_path / "few.txt"
    chosen.write_text("".join(f"class_{c}_00{i}.jpg\n" for c in (0, 1) for i in (0, 2, 5)))
    found = finetune(run, data, tmp_path / "out", images_list=chosen, overrides={"epochs": 1})
    assert "labels: 6 of 12 images, 3 of each class, those in" in caplog.text
    assert (found["step"], found["dataset"]) == (3, "data")
    chosen.write_text("class_0_000.jpg\nclass_0_009.jpg\n")
    with pytest.raises(ValueError, match=r"1 are not among the images: class_0_009\.jpg"):
        finetune(run, data, tmp_path / "none", images_list=chosen)


class StopAt(Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_record(self, run, record):
        return record["step"] == self.step


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(run, tmp_path):
    whole = finetune(run, None, tmp_path / "whole", labels=50, overrides=SHORT)
    stop = [StopAt(3)]
    part = finetune(run, None, tmp_path / "parts", labels=50, overrides=SHORT, callbacks=stop)
    assert (part["step"], whole["step"]) == (3, 4) and "finetune_top1" not in part
    # The recipe is that of the run, and so is the place of the images.
    result = finetune(None, None, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    scores = [key for key in whole if key.startswith("finetune")]
    assert {"finetune_top1", "finetune_best_top1", "finetune_best_epoch"} <= set(scores)
    assert {key: result[key] for key in scores} == {key: whole[key] for key in scores}
    assert {"classifier.weight", "classifier.bias"} <= weights(tmp_path / "whole").keys()
    # The same command with --resume goes on with the same recipe, and one on other labels does not.
    finetune(run, None, tmp_path / "parts", labels=50, overrides=SHORT, resume=True)
    with pytest.raises(ValueError, match=r"labels: 0\.5 in the checkpoint, 0\.25 now"):
        finetune(run, None, tmp_path / "parts", labels=25, overrides=SHORT, resume=True)


def finetuned(work: Path) -> tuple:
    """Fine-tune on this number of ranks; the weights, and the result of rank 0."""
    from rsa_fast.distributed import world_size

    out = work / f"of_{world_size()}"
    result = finetune(work / "run", None, out, labels=50, overrides=SHORT | {"epochs": 1})
    return weights(out), result and result["finetune_top1"]


def test_two_ranks_train_what_one_does(folder, tmp_path):
    train(tiny(epochs=1, evaluate=False), folder, tmp_path / "run")
    alone = finetuned(tmp_path)
    first, second = run_ranks(finetuned, 2, tmp_path)
    assert first[1] == alone[1] and second[1] is None
    for name, value in alone[0].items():
        torch.testing.assert_close(first[0][name], value, rtol=1e-3, atol=1e-5, msg=name)


# Learning rates of encoder and classifier at the published batch size, and its epochs.
PUBLISHED = {
    ("simclr", 1): (4096, 0.8, 0.8, 60),
    ("simclr", 10): (4096, 0.8, 0.8, 30),
    ("swav", 1): (256, 0.02, 5, 20),
    ("swav", 10): (256, 0.01, 0.2, 20),
    ("barlow-twins", 1): (256, 0.005, 0.5, 20),
    ("barlow-twins", 10): (256, 0.005, 0.5, 20),
    ("vicreg", 1): (256, 0.03, 0.08, 20),
    ("vicreg", 10): (256, 0.01, 0.1, 20),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("percent", [1, 10, 100])
def test_presets_are_the_published_numbers(preset, percent):
    numbers = fields(PRESETS[preset][percent])
    recipe = build_recipe("imagenet1k", "finetune", overrides=numbers)
    start = recipe.schedule(0, resolve(recipe, 128_116))
    if (preset, percent) in PUBLISHED:
        batch_size, lr, head_lr, epochs = PUBLISHED[preset, percent]
        assert (recipe.batch_size, recipe.epochs) == (batch_size, epochs)
        assert start == pytest.approx({"lr": lr, "head_lr": head_lr})
    assert recipe.optimizer == "sgd" and recipe.weight_decay == 0
    assert recipe.views.crop_area == (0.08, 1)


def test_few_images_get_smaller_batches_and_more_epochs(run, tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    stop = [StopAt(1)]
    given = {"log_every_steps": 1, "evaluate": False}
    options = {"preset": "swav", "overrides": given, "callbacks": stop}
    finetune(run, None, tmp_path / "out", **options)
    assert "few images for the preset's batch, so the run has batch 8 and 100 epochs" in caplog.text
    recipe = load_encoder(tmp_path / "out")[1]
    assert (recipe.batch_size, recipe.epochs) == (8, 100)  # 5 steps an epoch, 500 in all
    assert recipe.lr_drop_epochs == (60, 80)  # for SwAV's 12 and 16 of 20


def test_what_cannot_be_fine_tuned_is_refused(run, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate((folder / "train").rglob("*.jpg")):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="has no labels for fine-tuning"):
        finetune(run, flat, tmp_path / "out")
    with pytest.raises(ValueError, match=r"no preset 'swavv'.*did you mean 'swav'"):
        finetune(run, None, tmp_path / "out", preset="swavv")
    with pytest.raises(ValueError, match="there is no run to resume in"):
        finetune(None, None, tmp_path / "out", resume=True)
    assert not (tmp_path / "out").exists()


def test_an_encoder_from_elsewhere_is_fine_tuned_from_the_command_line(run, folder, tmp_path):
    foreign = tmp_path / "encoder.pth"
    torch.save(load_encoder(run)[0].state_dict(), foreign)
    command = ["finetune", "--checkpoint", foreign, "--data", folder, "--out", tmp_path / "out"]
    command += ["--dataset", "cifar10", "--epochs", 1, "--batch-size", 8, "--head-lr", 0.5]
    command += ["--set", "views.size_px=16", "--set", "eval_resize_px=null"]
    done = invoke(main, *command)
    result = result_of(done)
    assert result["method"] == "finetune" and result["finetune_top1"] is not None
    recipe = load_encoder(tmp_path / "out")[1]
    assert (recipe.arch, recipe.width, recipe.stem) == ("resnet10", 4, "cifar")
    assert recipe.head_peak_lr == 0.5 and recipe.views.size_px == 16


def test_pre_training_does_not_offer_it(folder):
    asked = ["train", "--method", "finetune", "--dataset", "cifar10", "--data", str(folder)]
    refused = invoke(main, *asked)
    assert refused.exit_code == 1 and "no method 'finetune'" in refused.output
