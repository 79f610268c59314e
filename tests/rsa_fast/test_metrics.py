from __future__ import annotations

import io
import json
import math
import sys
import time
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from rich.console import Console

from rsa_fast.training import engine, metrics, run_folder
from rsa_fast.training.engine import train
from rsa_fast.training.metrics import Metrics, numbers, read_metrics
from tests.tiny_runs import same, tiny, weights

RECIPE = tiny(knn_every_epochs=1, epochs=2)
TIMES = ("step_ms", "images_per_s", "wait_pct")
RECORDS = [
    {"step": 2, "loss": 1.5, "wait_pct": 3.25},
    {"step": 4, "loss": 0.75},
    {"step": 4, "epoch": 1, "counts": [1, 2]},
]


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    train(RECIPE, folder, out)
    return out


@pytest.fixture(scope="module")
def resumed(folder, tmp_path_factory):
    """The same run with interruptions.

    It stops after an epoch and continues, is killed two steps and half a record later, continues to
    its end, and continues once more.
    """

    def go_on(**options):
        # TensorBoard reads a run's event files by name, and names differ only by the second.
        time.sleep(1 - time.time() % 1)
        train(RECIPE, folder, out, resume=True, **options)

    out = tmp_path_factory.mktemp("parts") / "run"
    train(RECIPE, folder, out, stop_at_step=5)
    go_on(stop_at_step=7)
    for path in (out / "checkpoints").glob("step_00000007*"):
        path.unlink()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    go_on()
    go_on()  # It is finished: nothing is recorded twice.
    return out


def timeless(out):
    return [
        {key: value for key, value in record.items() if key not in TIMES}
        for record in read_metrics(out)
    ]


def test_every_epoch_is_recorded_once_in_a_resumed_run_too(run, resumed):
    of_epochs = [record for record in timeless(run) if "effective_rank" in record]
    assert [(record["epoch"], record["step"]) for record in of_epochs] == [(1, 5), (2, 10)]
    for kind in ("effective_rank", "knn_top1"):
        one, other = (
            [record for record in timeless(out) if kind in record] for out in (run, resumed)
        )
        assert one == other
    # The counts add up to the images of a batch.
    assert all(sum(record["weak_aggressive_counts"]) == 8 for record in of_epochs)
    assert all(1 <= record["effective_rank"] <= 8 for record in of_epochs)


def test_the_statistics_of_an_epoch_do_not_change_training(folder, run, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "feature_stats", lambda encoder, batch: {})
    train(RECIPE, folder, tmp_path / "without")
    assert same(weights(run), weights(tmp_path / "without"))
    new = {"effective_rank", "weak_aggressive_cosine"}
    new |= {"other_image_cosine", "weak_aggressive_counts"}
    stripped = [
        {key: value for key, value in record.items() if key not in new} for record in timeless(run)
    ]
    assert stripped == timeless(tmp_path / "without")


@pytest.mark.parametrize("name", ["run", "resumed"])
def test_tensorboard_reads_back_the_records_each_once(name, request):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard"
    )
    out = request.getfixturevalue(name)
    events = accumulator.EventAccumulator(
        str(out / "tensorboard"), size_guidance={"scalars": 0}
    ).Reload()
    written = {}
    for record in read_metrics(out):
        for key, value in numbers(record).items():
            written.setdefault(key, []).append((record["step"], value))
    assert set(events.Tags()["scalars"]) == written.keys()
    assert written.keys() >= {"loss", "knn_top1", "effective_rank", "linear_top1"}
    for key, points in written.items():
        assert [(event.step, event.value) for event in events.Scalars(key)] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in points
        ]


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in that keeps what is logged, by run id.

    Like the real wandb, it drops steps before the last one.
    """
    module, module.runs, module.starts, module.finished = ModuleType("wandb"), {}, [], 0
    module.__spec__ = ModuleSpec("wandb", None)

    class Run:
        def __init__(self, id):
            self.history = module.runs.setdefault(id, {})

        def log(self, record, step):
            if step >= max(self.history, default=0):
                self.history.setdefault(step, {}).update(record)

        def finish(self):
            module.finished += 1

    def init(**options):
        module.starts.append(options)
        return Run(options["id"])

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_weights_and_biases_gets_the_numbers_and_a_resumed_run_goes_on_there(tmp_path, wandb):
    (tmp_path / "recipe.yaml").write_text("beta_base: 0.3\n")
    # The run begins, continues where it was killed, and continues from its checkpoint again.
    for step, first in ((0, 0), (2, 0), (2, 1)):
        with Metrics(tmp_path, 4, step, wandb=True) as records:
            for record in RECORDS[first:]:
                records.write(record)
    assert len({start["id"] for start in wandb.starts}) == 1
    assert {start["resume"] for start in wandb.starts} == {"allow"}
    start = wandb.starts[0]
    assert (start["project"], start["name"]) == ("rsa-fast", tmp_path.name)
    assert start["config"] == {"beta_base": 0.3}
    assert wandb.runs[start["id"]] == {
        2: {"loss": 1.5, "wait_pct": 3.25},
        4: {"loss": 0.75, "epoch": 1},
    }
    assert wandb.finished == 3


def test_weights_and_biases_follows_its_own_variable_for_the_project(tmp_path, wandb, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "another")
    (tmp_path / "recipe.yaml").write_text("beta_base: 0.3\n")
    with Metrics(tmp_path, 4, 0, wandb=True):
        # wandb itself reads WANDB_MODE.
        assert wandb.starts[0]["project"] == "another" and "mode" not in wandb.starts[0]


def test_weights_and_biases_offline_leaves_its_run_in_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed: pip install rsa-fast[wandb]")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "recipe.yaml").write_text("beta_base: 0.3\n")
    with Metrics(tmp_path, 4, 0, wandb=True) as records:
        for record in RECORDS:
            records.write(record)
    (left,) = (tmp_path / "wandb").glob("offline-run-*")
    assert left.name.endswith((tmp_path / "wandb" / "run-id").read_text())


def test_weights_and_biases_that_are_missing_are_named_before_the_first_step(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"-m pip install wandb, or set"):
        train(tiny(wandb=True), folder, tmp_path / "run")


def test_a_run_that_is_replaced_leaves_no_records_behind(tmp_path):
    (tmp_path / "recipe.yaml").write_text("beta_base: 0.3\n")
    with Metrics(tmp_path, 4, 0) as records:
        records.write(RECORDS[0])
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "run-id").write_text("old")
    (tmp_path / "report.html").write_text("old")
    run_folder.prepare_folder(tmp_path, resume=False, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_numbers_that_are_not_finite_are_null_in_a_record(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n')  # of an older version
    with Metrics(tmp_path, 3, 1) as sink:
        sink.write({"step": 2, "loss": math.nan, "parts": [math.inf, 2.0]})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "parts": [None, 2.0]},
    ]


def test_without_a_terminal_each_record_is_a_line(tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    with Metrics(tmp_path, 4, 0) as records:
        for record in RECORDS:
            records.write(record)
    assert caplog.messages == [
        "step 2/4  loss 1.5  wait_pct 3.25",
        "step 4/4  loss 0.75",
        "step 4/4  epoch 1",
    ]
    assert read_metrics(tmp_path) == RECORDS


def on_a_terminal(monkeypatch, width):
    """A clock, and what is written to a terminal with so many columns."""
    clock, written = [0.0], io.StringIO()
    terminal = partial(
        Console,
        file=written,
        force_terminal=True,
        width=width,
        get_time=lambda: clock[0],
        color_system=None,
    )
    monkeypatch.setattr(metrics, "Console", lambda stderr: terminal())
    return clock, written


def test_on_a_terminal_a_line_shows_epoch_eta_and_the_latest_numbers(tmp_path, monkeypatch):
    """After 40 of 100 steps, the last 20 of which took a minute, three minutes are left."""
    clock, written = on_a_terminal(monkeypatch, 160)
    with Metrics(tmp_path, 100, 0, epochs=10) as records:
        records.write({"step": 0, "epoch": 0, "knn_top1": 12.34})
        for step in (20, 40):
            clock[0] += 60
            records.write({"step": step, "loss": 1.23456, "images_per_s": 1234.5, "wait_pct": 5.6})
    last = written.getvalue().split("\n")[-2].split("\r")[-1].removeprefix("\x1b[2K")
    assert last.startswith("epoch 5/10  ") and "  40/100  2:00  ETA 3:00  " in last
    assert last.rstrip().endswith("1,234 images/s  loss 1.23  kNN 12.3  wait 6%")


FULL = ["epoch 8/10", "79,000/100,000", "3:00:00", "ETA 47:51", "1,234 images/s", "loss 0.123"]
FULL += ["kNN 41.7", "wait 9%"]


@pytest.mark.parametrize(
    ("width", "fields"), [(160, 8), (110, 8), (100, 7), (80, 5), (70, 5), (60, 4), (40, 2), (30, 2)]
)
def test_a_narrow_terminal_drops_fields_from_the_right_and_cuts_none(
    tmp_path, monkeypatch, width, fields
):
    clock, written = on_a_terminal(monkeypatch, width)
    with Metrics(tmp_path, 100_000, 0, epochs=10) as records:
        clock[0] += 3 * 3600
        speed = {"images_per_s": 1234.5, "step_ms": 1000 * 2871 / 21_000, "wait_pct": 9.0}
        records.write({"step": 79_000, "loss": 0.12345, **speed, "knn_top1": 41.66})
    last = written.getvalue().split("\n")[-2].split("\r")[-1].removeprefix("\x1b[2K").rstrip()
    epoch, *others = [part.strip() for part in last.split("  ") if part.strip() and "━" not in part]
    assert [epoch, *others] == FULL[:fields]
    assert len(last) <= width


def test_every_score_leaves_a_line_on_a_terminal(tmp_path, monkeypatch):
    _, written = on_a_terminal(monkeypatch, 80)
    scores = [(0, 33.33), (1, 45.83), (2, 41.66), (3, 50.0)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(
            json.dumps({"step": 10 * epoch, "epoch": epoch, "knn_top1": knn}) + "\n"
            for epoch, knn in scores[:2]
        )
    )  # of the run that is resumed here
    with Metrics(tmp_path, 40, 15, epochs=4) as records:
        records.write({"step": 20, "epoch": 2, "effective_rank": 6.06})
        for epoch, knn in scores[2:]:
            records.write({"step": 10 * epoch, "epoch": epoch, "knn_top1": knn})
    lines = [
        line.split("\r")[-1].removeprefix("\x1b[2K") for line in written.getvalue().split("\n")
    ]
    assert [line.rstrip() for line in lines if line.startswith("epoch") and "━" not in line] == [
        "epoch 2  kNN 41.7  effective rank 6.1",
        "epoch 3  kNN 50.0 (best)  effective rank 6.1",
    ]


def test_only_rank_0_writes(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "rsa_fast")
    monkeypatch.setattr(metrics, "rank", lambda: 1)
    with Metrics(tmp_path, 4, 0) as records:
        records.write(RECORDS[0])
    assert not list(tmp_path.iterdir()) and caplog.text == ""


def test_a_folder_that_is_no_run_is_named(tmp_path):
    message = f"no metrics.jsonl in {tmp_path}: give the folder of a run"
    with pytest.raises(FileNotFoundError, match=message):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(RECORDS[0]) + '\n{"step": 3, "lo')
    assert read_metrics(tmp_path) == RECORDS[:1]
