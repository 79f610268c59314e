"""Passes one after the other on one rank teach what as many ranks learn at once."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch.amp.grad_scaler import GradScaler

from rsa_fast import networks
from rsa_fast.archs import ResNetLayers
from rsa_fast.distributed import world_size
from rsa_fast.methods import METHODS, method_class
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.recipes import Recipe, build_recipe
from rsa_fast.training.engine import checkpoint_state, restore, train
from rsa_fast.training.metrics import read_metrics
from rsa_fast.training.step import Run, build_run, train_step
from tests.rsa_fast.ranks import mean, mine, run_ranks
from tests.rsa_fast.small_methods import FIELDS
from tests.tiny_runs import check_resumption, tiny

PARTS, PART_IMAGES, STEPS = 4, 4, 2  # a step has so many parts, of so many images
MEANS = ("rsa", "byol", "simsiam", "simsiam-rsa", "supervised")
# By name: the method, and what differs from its row. All are computed in float64 but the case of
# fp16, because autocast leaves float64 as it is. Its scaler starts so high that the first step
# overflows, and no other.
CASES = {
    "LARS": ("rsa", {"optimizer": "lars", "peak_lr": 0.1}),
    "SGD": ("byol", {"optimizer": "sgd", "clip_grad_norm": 0.5}),
    "AdamW": ("simsiam", {"optimizer": "adamw", "decay_exclude": "norm_and_bias"}),
    "split": ("supervised", {"optimizer": "sgd", "bn": "split:8"}),
    "LARS, fp16": ("rsa", {"optimizer": "lars", "precision": "fp16", "clip_grad_norm": 0.5}),
}
FP16 = {"rtol": 1e-3, "atol": 1e-5}
EXACT = {"rtol": 1e-6, "atol": 1e-9}


def recipe_of(case: str, **overrides) -> Recipe:
    method, fields = CASES[case]
    fields = FIELDS | {
        "batch_size": PARTS * PART_IMAGES,
        "zero_init_residual": False,
        "peak_lr": 0.01,
        "precision": "fp32",
        "device": "cpu",
        **fields,
    }
    known = method_class(method).recipe_type.model_fields
    fields = {key: value for key, value in fields.items() if key in known}
    return build_recipe("cifar10", method, overrides=fields | overrides)


def some_batch(seed: int, dtype: torch.dtype) -> Batch:
    generator, count = torch.Generator().manual_seed(seed), PARTS * PART_IMAGES
    views = {
        name: torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64).to(dtype)
        for name in VIEWS
    }
    return Batch(torch.arange(count) % 3, views)


def parts_of(batch: Batch, parts: int) -> list[Batch]:
    """Cut a batch into consecutive parts."""
    views = {name: view.chunk(parts) for name, view in batch.views.items()}
    labels = batch.label.chunk(parts)
    return [
        Batch(label, {name: chunks[i] for name, chunks in views.items()})
        for i, label in enumerate(labels)
    ]


def statistics_of(run: Run) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in run.method.state_dict().items() if "running" in k}


def take_steps(case: str, accumulate: int) -> dict:
    """Take the engine's steps on this rank's part of the batches, in so many passes.

    Return the losses, averaged over the ranks, which steps the scaler skipped, the state after the
    steps, and BatchNorm's statistics at the start and after each step.
    """
    dtype = torch.float32 if "fp16" in case else torch.float64
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.RESNETS, "resnet18", ResNetLayers(False, (1, 1, 1, 1)))
        torch.set_default_dtype(dtype)
        run = build_run(recipe_of(case, accumulate=accumulate), 10 * PARTS * PART_IMAGES)
    torch.set_default_dtype(torch.float32)
    if run.scaler.is_enabled():
        run.scaler = GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-36)
    losses, skipped, statistics = [], [], [statistics_of(run)]
    for step in range(STEPS):
        whole = some_batch(step, dtype)
        here = Batch(mine(whole.label), {key: mine(view) for key, view in whole.views.items()})
        loss = train_step(run, *parts_of(here, accumulate))
        losses.append(torch.stack([loss.total, *loss.parts.values()]))
        skipped.append(run.skipped is not None and bool(run.skipped))
        statistics.append(statistics_of(run))
        assert loss.embeddings.shape[0] == len(here.label) // accumulate
    return {
        "losses": mean(torch.stack(losses)),
        "skipped": skipped,
        "state": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict()["state"],
        "statistics": statistics,
        "step": run.step,
    }


def steps_in_every_case() -> dict[str, dict]:
    """Take the steps of every case. The ranks and their passes are always four together."""
    return {case: take_steps(case, PARTS // world_size()) for case in CASES}


def updated_in_turn(ranks: list[dict]) -> list[dict]:
    """Return BatchNorm's statistics if the batches of these ranks passed one after the other.

    A network with several views a step updates its statistics as often. What it keeps of them is
    0.9 to the power of this number, and what it adds depends on the batch alone.
    """
    found = [ranks[0]["statistics"][0]]
    for step in range(STEPS):
        now = dict(found[-1])
        for rank in ranks:
            before, after = rank["statistics"][step : step + 2]
            for key in now:
                count = rank["state"][key.rpartition("running")[0] + "num_batches_tracked"]
                kept = 0.9 ** (count.item() / STEPS)
                now[key] = kept * now[key] + (after[key] - kept * before[key])
        found.append(now)
    return found


def test_four_passes_on_one_rank_or_two_on_two_equal_four_ranks(tmp_path):
    """Weights, target, momenta and losses are the same, but for rounding.

    BatchNorm's running statistics are not: every rank has those of its own batches, and a rank that
    accumulates has seen the batches of all of its passes in turn.
    """
    ranks = run_ranks(steps_in_every_case, PARTS, tmp_path)
    (tmp_path / "two").mkdir()
    two = run_ranks(steps_in_every_case, 2, tmp_path / "two")
    for found, replaced in (
        (steps_in_every_case(), ranks),
        (two[0], ranks[:2]),
        (two[1], ranks[2:]),
    ):
        for case in CASES:
            expected, got = ranks[0][case], found[case]
            tolerance = FP16 if "fp16" in case else EXACT
            for name in ("losses", "optimizer"):
                torch.testing.assert_close(got[name], expected[name], **tolerance)
            assert got["step"] == STEPS
            assert got["skipped"] == ["fp16" in case, False]
            for key, value in got["state"].items():
                if "running" not in key and "tracked" not in key:
                    torch.testing.assert_close(value, expected["state"][key], **tolerance)
                elif "tracked" in key:
                    assert value == len(replaced) * expected["state"][key]
            in_turn = updated_in_turn([rank[case] for rank in replaced])
            torch.testing.assert_close(got["statistics"], in_turn, **tolerance)


def test_passes_split_a_batch_into_the_same_parts_as_one_pass():
    at_once, in_turn = take_steps("split", 1), take_steps("split", 4)
    torch.testing.assert_close(in_turn["losses"], at_once["losses"], **EXACT)
    for key, value in at_once["state"].items():
        if "running" not in key and "tracked" not in key:
            torch.testing.assert_close(in_turn["state"][key], value, **EXACT)


def test_a_step_wants_as_many_batches_as_its_recipe_says():
    run = build_run(recipe_of("SGD", accumulate=2), 100)
    one, two, _, _ = parts_of(some_batch(0, torch.float32), 4)
    for batches in ((), (one,), (one, two, one)):
        with pytest.raises(ValueError, match=f"takes 2 batches, found {len(batches)}"):
            train_step(run, *batches)
    assert train_step(run, one, two).total.isfinite() and run.step == 1


@pytest.mark.parametrize("fields", [{"optimizer": "adamw", "peak_lr": 0.01}, {"precision": "fp16"}])
def test_a_run_resumed_within_an_epoch_is_exact(folder, tmp_path, fields):
    check_resumption(tiny(accumulate=2, epochs=2, clip_grad_norm=1.0, **fields), folder, tmp_path)


def test_a_run_counts_steps_and_images_of_whole_batches(folder, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "rsa_fast"):
        result = train(tiny(accumulate=4, epochs=1), folder, tmp_path / "run")
    assert "batch_per_gpu 4 x 2" in caplog.text and "steps_per_epoch 5" in caplog.text
    assert result["step"] == 5
    steps = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert [record["step"] for record in steps] == [2, 4, 5]
    for record in steps:
        assert record["images_per_s"] == pytest.approx(8e3 / record["step_ms"])


def test_losses_that_are_no_means_over_images_are_refused_with_the_reason():
    assert [name for name in METHODS if method_class(name).mean_over_images] == sorted(
        MEANS, key=METHODS.index
    )
    for name in METHODS:
        if name in MEANS:
            build_recipe("cifar10", name, overrides={"accumulate": 2, "bn": "local"})
            continue
        with pytest.raises(ValueError, match=f"{name} compares the images of a batch with each"):
            build_recipe("cifar10", name, overrides={"accumulate": 2, "bn": "local"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bn": "sync"}, "bn = sync needs all images of a step at once, but they pass in 3 turns"),
        ({"batch_size": 8}, "accumulate = 3 does not cut a batch of 8 into equal parts"),
        ({"batch_size": 3}, "accumulate = 3 does not cut a batch of 3 into equal parts of 2"),
        ({"min_lr": 1.0}, r"min_lr = 1.0 is above the peak learning rate 0\.0"),
        (
            {"warmup_start_lr": 1.0},
            r"warmup_start_lr = 1.0 is above the peak learning rate 0\.0\d+: lower it, or set peak",
        ),
        ({"clip_each_grad_norm": 0}, "clip_each_grad_norm = 0: Input should be greater than 0"),
        ({"clip_grad_norm": 0}, "clip_grad_norm = 0: Input should be greater than 0"),
        ({"decay_exclude": "bias"}, "decay_exclude = 'bias'"),
    ],
)
def test_fields_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", "rsa", overrides={"accumulate": 3, "batch_size": 12} | fields)


def test_batchnorm_s_parts_have_to_divide_among_the_passes():
    build_run(tiny(accumulate=2, bn="split:4"), 40)
    with pytest.raises(ValueError, match=r"split:2 does not divide among 1 ranks times 4 passes"):
        build_run(tiny(accumulate=4, bn="split:2"), 40)


def test_a_checkpoint_from_before_these_fields_is_resumed_and_another_accumulation_is_not():
    state = copy.deepcopy(checkpoint_state(build_run(tiny(), 40), "images"))
    for name in ("accumulate", "clip_grad_norm", "decay_exclude", "min_lr"):
        del state["recipe"][name]
    restore(build_run(tiny(), 40), state, "images")
    with pytest.raises(ValueError, match="accumulate: 1 in the checkpoint, 2 now"):
        restore(build_run(tiny(accumulate=2), 40), state, "images")
