"""Runs that must not continue.

The reasons are a loss that is not a number, a changed recipe or dataset, and a folder that contains
something else.
"""

from __future__ import annotations

import json
import math
import re
from functools import partial

import pytest
from torch.amp.grad_scaler import GradScaler

from rsa_fast import schedules
from rsa_fast.pipelines import Order
from rsa_fast.training import checkpoint
from rsa_fast.training import step as step_module
from rsa_fast.training.engine import train
from rsa_fast.training.metrics import read_metrics
from tests import tiny_runs
from tests.helpers import write_folder
from tests.tiny_runs import same, weights

tiny = partial(tiny_runs.tiny, log_every_steps=100)


def saved(out) -> list[int]:
    return [checkpoint.load(path)["step"] for path in checkpoint.paths_in(out / "checkpoints")]


@pytest.mark.parametrize(
    ("explodes_at", "step", "fault"),
    [
        (6, 7, "the loss of step 7 is not finite"),
        # Step 9 is the last one before the checkpoint of step 10.
        (9, 9, "the weights or statistics after step 9 are not finite"),
    ],
)
def test_training_that_explodes_stops_before_a_bad_checkpoint_and_names_the_batch(
    data, tmp_path, monkeypatch, explodes_at, step, fault
):
    rate = schedules.learning_rate
    monkeypatch.setattr(
        schedules,
        "learning_rate",
        lambda now, *plan: math.inf if now == explodes_at else rate(now, *plan),
    )
    good = tmp_path / "checkpoints" / "step_00000005.pt"
    with pytest.raises(
        FloatingPointError, match=f"{fault}: lower the learning rate .*Last good checkpoint: {good}"
    ):
        train(tiny(), data, tmp_path)
    assert saved(tmp_path) == [5]
    assert all(x.isfinite().all() for x in checkpoint.load(good)["method"].values())
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert (found["step"], found["epoch"], found["checkpoint"]) == (step, 1, str(good))
    assert found["sample_ids"] == Order(40, 8, tiny().seed).ids(1, step - 5).tolist()


@pytest.mark.parametrize(
    ("fields", "sides", "part"),
    [
        (
            {"width": 8},
            "width 4 in the checkpoint, 8 now",
            "online.encoder.conv1.weight (4, 3, 3, 3)",
        ),
        ({"out_dim": 9}, "out_dim 8 in the checkpoint, 9 now", "online.projector.3.weight (8, 16)"),
        ({"arch": "resnet34"}, "arch resnet10 in the checkpoint, resnet34 now", "missing in the"),
        ({"method": "simsiam"}, "method rsa in the checkpoint, simsiam now", " now)"),
        ({"optimizer": "adamw"}, "optimizer sgd in the checkpoint, adamw now", "optimiser's state"),
    ],
)
def test_force_refuses_in_a_line_what_cannot_fit(data, tmp_path, fields, sides, part):
    train(tiny(), data, tmp_path, stop_at_step=1)
    method = fields.pop("method", "rsa")
    changed = tiny(method, **fields)
    with pytest.raises(ValueError, match=re.escape(sides)) as error:
        train(changed, data, tmp_path, resume=True, force=True)
    message = str(error.value)
    assert part in message and message.endswith("start a new run in another --out")
    assert "\n" not in message and len(message) < 500
    with pytest.raises(ValueError, match="--force does not help, because the"):
        train(changed, data, tmp_path, resume=True)
    assert saved(tmp_path) == [1]


def test_force_changes_the_settings_of_the_optimiser(data, tmp_path):
    train(tiny(), data, tmp_path, stop_at_step=1)
    changed = {"weight_decay": 0.0, "momentum": 0.5}
    train(tiny(**changed), data, tmp_path, resume=True, force=True, stop_at_step=2)
    (path,) = checkpoint.paths_in(tmp_path / "checkpoints")[1:]
    (group,) = checkpoint.load(path)["optimizer"]["param_groups"]
    assert {name: group[name] for name in changed} == changed


def test_a_checkpoint_whose_weights_are_not_finite_is_passed_over(data, tmp_path):
    train(tiny(), data, tmp_path, stop_at_step=1)
    (path,) = checkpoint.paths_in(tmp_path / "checkpoints")
    state = checkpoint.load(path)
    state["method"]["predictor.0.weight"][0, 0] = math.inf
    bad = checkpoint.save(tmp_path / "checkpoints", state | {"step": 2}, 2)
    with pytest.raises(
        ValueError, match=r"predictor\.0\.weight has values that are NaN or infinite"
    ):
        checkpoint.load(bad)
    with pytest.warns(UserWarning, match=r"predictor.*; trying the previous one"):
        assert checkpoint.load_latest(tmp_path / "checkpoints")["step"] == 1


def test_one_image_for_batchnorm_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(
        ValueError, match="batch_size = 1, which is global gives BatchNorm fewer than"
    ):
        train(tiny(batch_size=1), tmp_path / "nowhere", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fp16_that_overflows_in_every_step_stops_after_max_skips(data, tmp_path, monkeypatch):
    monkeypatch.setattr(step_module, "GradScaler", partial(GradScaler, init_scale=2.0**120))
    with pytest.raises(
        FloatingPointError,
        match=r"fp16 overflowed in 4 steps in a row, up to step 3: .*checkpoint: None",
    ):
        train(tiny(precision="fp16", max_skips=3, log_every_steps=2), data, tmp_path)
    found = json.loads((tmp_path / "nonfinite.json").read_text())
    assert found["sample_ids"] == Order(40, 8, tiny().seed).ids(0, 3).tolist()
    assert [record["skipped_steps"] for record in read_metrics(tmp_path)] == [2]


def test_a_changed_recipe_and_dataset_are_refused_and_force_says_what_it_overrides(
    data, tmp_path, caplog
):
    train(tiny(), data, tmp_path / "run", stop_at_step=4)
    others = write_folder(tmp_path / "others", {"train": 21})
    changed = tiny(beta_base=0.4, tau_base=0.9, threads=1)
    rows = (
        "  beta_base: 0.3 in the checkpoint, 0.4 now\n  tau_base: 0.99 in the checkpoint, 0.9 now\n"
    )
    rows += "  the training images are not the ones this run was started with"
    with pytest.raises(ValueError, match=re.escape("--force continues anyway:\n" + rows)):
        train(changed, others, tmp_path / "run", resume=True)
    assert saved(tmp_path / "run") == [4]
    train(changed, others, tmp_path / "run", resume=True, force=True)
    assert "continuing with another run's checkpoint:\n" + rows in caplog.text
    assert saved(tmp_path / "run")[-1] == 15


def test_resuming_where_there_is_no_checkpoint_yet_starts_and_says_so(data, tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    train(tiny(epochs=1, seed=1), data, tmp_path / "first")
    (first,) = checkpoint.paths_in(tmp_path / "first" / "checkpoints")
    (tmp_path / "run").mkdir()
    train(tiny(), data, tmp_path / "run", resume=True, init_from=first, stop_at_step=5)
    assert "has no checkpoint yet: starting at step 0" in caplog.text
    # The same command now continues the run instead of starting from the weights again.
    train(tiny(), data, tmp_path / "run", resume=True, init_from=first)
    train(tiny(), data, tmp_path / "plain", init_from=first)
    assert same(weights(tmp_path / "run"), weights(tmp_path / "plain"))


def test_resuming_in_a_folder_that_holds_no_run_is_refused(data, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "summer.jpg").write_bytes(b"")
    with pytest.raises(FileExistsError, match=r"photos contains no run but summer\.jpg"):
        train(tiny(), data, tmp_path / "photos", resume=True)
    assert [path.name for path in (tmp_path / "photos").iterdir()] == ["summer.jpg"]


def test_a_run_stopped_between_epochs_is_evaluated_there_once_it_is_resumed(folder, tmp_path):
    train(tiny(epochs=2, knn_every_epochs=1), folder, tmp_path, stop_at_step=5)
    train(tiny(epochs=2, knn_every_epochs=1), folder, tmp_path, resume=True)
    assert [record["epoch"] for record in read_metrics(tmp_path) if "knn_top1" in record] == [
        0,
        1,
        2,
    ]
