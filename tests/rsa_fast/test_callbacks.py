"""Callbacks: what they are told, when they stop a run, and what a stop leaves behind."""

from __future__ import annotations

import json
import logging
import shutil
import signal
from pathlib import Path

import pytest
import torch

import rsa_fast
from rsa_fast.cli import main
from rsa_fast.distributed import rank
from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.training import checkpoint
from rsa_fast.training.callbacks import Callback, EarlyStopping
from rsa_fast.training.engine import StoppedError, train
from rsa_fast.training.metrics import read_metrics
from tests.helpers import invoke, result_of
from tests.rsa_fast.ranks import run_ranks
from tests.tiny_runs import same, tiny, weights


class Diary(Callback):
    """Writes down every call, and stops at the steps or epochs it is told."""

    def __init__(self, stop_step: int = -1, stop_epoch: int = -1) -> None:
        self.stop_step, self.stop_epoch = stop_step, stop_epoch
        self.records, self.epochs, self.results = [], [], []

    def on_record(self, run, record):
        assert run.step == record["step"]
        self.records.append(dict(record))
        return run.step == self.stop_step

    def on_epoch(self, run, epoch, scores):
        assert run.step == epoch * run.derived.steps_per_epoch
        self.epochs.append((epoch, scores))
        return epoch == self.stop_epoch

    def on_end(self, run, result):
        self.run = run
        self.results.append((run.step, result))


class Silent(Callback):
    """Uses none of the methods."""


def test_every_record_every_epoch_and_the_end_are_told(folder, tmp_path):
    diary, out = Diary(), tmp_path / "run"
    result = train(
        tiny(knn_every_epochs=2), str(folder), str(out), callbacks=[Silent(), diary, Callback()]
    )
    assert diary.records == [record for record in read_metrics(out) if "loss" in record]
    assert [epoch for epoch, _ in diary.epochs] == [1, 2, 3]
    scores = dict(diary.epochs)
    assert scores[1] == {} and "knn_top1" in scores[2] and "linear_top1" not in scores[2]
    assert scores[3]["linear_top1"] == result["linear_top1"]
    assert scores[3]["knn_top1"] == result["knn_top1"]
    assert diary.results == [(15, result)]
    assert json.loads((out / "result.json").read_text()) == result


def test_callbacks_change_no_number_of_a_run(folder, tmp_path):
    train(tiny(), folder, tmp_path / "alone")
    train(tiny(), folder, tmp_path / "watched", callbacks=[Diary()])
    assert same(weights(tmp_path / "alone"), weights(tmp_path / "watched"))


# An epoch has 5 steps, and every second step is recorded.
@pytest.mark.parametrize(
    ("stop", "step"), [({"stop_step": 8}, 8), ({"stop_epoch": 1}, 5), ({"stop_step": 10}, 10)]
)
def test_a_run_that_a_callback_stopped_is_saved_and_continues_exactly(
    folder, tmp_path, caplog, stop, step
):
    caplog.set_level(logging.INFO, "rsa_fast")
    recipe, out = tiny(checkpoint_every_epochs=3), tmp_path / "parts"
    train(recipe, folder, tmp_path / "whole")
    # The others are still called when the first has asked to stop.
    diary, other = Diary(**stop), Diary()
    result = train(recipe, folder, out, callbacks=[diary, other])
    assert result["step"] == step and result["linear_top1"] is None
    assert checkpoint.load_latest(out / "checkpoints")["step"] == step
    assert f"a callback asked to stop: the run ends after step {step}" in caplog.text
    assert other.records == diary.records and diary.records[-1]["step"] <= step
    assert diary.results == other.results == [(step, result)]

    assert train(recipe, folder, out, resume=True)["step"] == 15
    assert same(weights(tmp_path / "whole"), weights(out))
    steps = [record["step"] for record in read_metrics(out) if "loss" in record]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 15]


def test_the_loss_of_a_planted_record_stops_a_run_early(folder, tmp_path):
    class Patience(Callback):
        """Stops as soon as a loss is not below the one before."""

        losses = ()

        def on_record(self, run, record):
            planted = [0.9, 0.8, 0.85, 0.7][len(self.losses)]
            self.losses += (planted,)
            return len(self.losses) > 1 and planted >= self.losses[-2]

    patience = Patience()
    result = train(tiny(), folder, tmp_path / "run", callbacks=[patience])
    assert result["step"] == 6 and patience.losses == (0.9, 0.8, 0.85)


def test_an_error_in_a_callback_ends_the_run_and_leaves_what_it_takes_to_resume(folder, tmp_path):
    class PrunedError(Exception):
        pass

    class Prune(Callback):
        def on_record(self, run, record):
            if run.step == 8:
                raise PrunedError("the trial is not promising")

    train(tiny(), folder, tmp_path / "whole")
    with pytest.raises(PrunedError, match="not promising"):
        train(tiny(), folder, tmp_path / "parts", callbacks=[Prune()])
    assert checkpoint.load_latest(tmp_path / "parts" / "checkpoints")["step"] == 5
    train(tiny(), folder, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))


def test_a_signal_and_a_callback_together_are_a_signal(folder, tmp_path):
    class Both(Diary):
        def on_record(self, run, record):
            signal.raise_signal(signal.SIGTERM)
            return True

    both = Both()
    with pytest.raises(StoppedError, match="SIGTERM: stopped after step 2, which is saved"):
        train(tiny(), folder, tmp_path / "run", callbacks=[both])
    assert [step for step, _ in both.results] == [2]


def test_only_true_stops_a_run(folder, tmp_path):
    class Talkative(Callback):
        def on_record(self, run, record):
            return record

    result = train(tiny(epochs=1), folder, tmp_path / "run", callbacks=[Talkative()])
    assert result["step"] == 5


@pytest.mark.parametrize("wrong", [Callback, print, "a"])
def test_what_is_no_callback_is_refused_before_anything_happens(folder, tmp_path, wrong):
    with pytest.raises(
        ValueError, match=r"callbacks must be instances of rsa_fast\.Callback, found"
    ):
        train(tiny(), folder, tmp_path / "run", callbacks=[wrong])
    assert not (tmp_path / "run").exists() and rsa_fast.Callback is Callback


def runs_with_callbacks(folder: Path) -> dict[str, dict]:
    """Train twice. A callback of rank 1 asks to stop: once at a record, once after an epoch.

    Return what the callbacks of this rank were told, and where the run ended.
    """
    told = {}
    for place, stop in (("record", {"stop_step": 4}), ("epoch", {"stop_epoch": 1})):
        diary = Diary(**(stop if rank() == 1 else {}))
        recipe = tiny(knn_every_epochs=1, checkpoint_every_epochs=2)
        result = train(recipe, folder / "data", folder / place, callbacks=[diary])
        weight = next(iter(diary.run.method.encoder.parameters())).detach()
        told[place] = {
            "records": diary.records,
            "epochs": diary.epochs,
            "step": diary.run.step,
            "returned": result is not None,
            "weight": weight,
        }
    return told


def test_two_ranks_are_told_the_same_and_stop_together_when_one_is_asked(folder, tmp_path):
    (tmp_path / "data").symlink_to(folder)
    ranks = run_ranks(runs_with_callbacks, 2, tmp_path)
    own = ("step_ms", "images_per_s", "wait_pct")  # times of each rank

    def common(records):
        return [{key: x for key, x in record.items() if key not in own} for record in records]

    for place in ("record", "epoch"):
        first, second = (rank[place] for rank in ranks)
        assert common(first["records"]) == common(second["records"]) != []
        assert first["epochs"] == second["epochs"]
        assert first["step"] == second["step"] == {"record": 4, "epoch": 5}[place]
        assert [first["returned"], second["returned"]] == [True, False]
        saved = checkpoint.load_latest(tmp_path / place / "checkpoints")
        assert saved["step"] == first["step"]
    assert torch.equal(ranks[0]["record"]["weight"], ranks[1]["record"]["weight"])


@pytest.fixture
def planted(monkeypatch) -> list[float]:
    """The kNN accuracies that are measured one after the other, before the first epoch too."""
    scores: list[float] = []
    monkeypatch.setattr(
        Evaluation, "score", lambda *_, **__: {"knn_top1": scores.pop(0), "test_transform": ""}
    )
    return scores


def test_a_run_stops_when_its_best_score_is_too_old(folder, tmp_path, planted):
    planted += [90, 20, 40, 30, 40, 39, 50]
    stop = EarlyStopping("knn_top1", patience_epochs=3)
    recipe = tiny(epochs=6, knn_every_epochs=1)
    result = train(recipe, folder, tmp_path / "run", callbacks=[stop])
    assert result["step"] == 5 * 5 and planted == [50]
    assert (stop.best, stop.best_epoch) == (40, 2)
    assert rsa_fast.EarlyStopping is EarlyStopping


def test_epochs_without_scores_count_and_a_score_that_does_not_exist_is_named(
    folder, tmp_path, planted
):
    planted += [1, 2, 3, 4, 5]
    recipe = tiny(epochs=6, knn_every_epochs=2)
    result = train(recipe, folder, tmp_path / "a", callbacks=[EarlyStopping(patience_epochs=1)])
    assert result["step"] == 5  # nothing is measured after the first epoch
    planted[:] = [1, 2]
    with pytest.raises(ValueError, match="no score knn_top2: choose from knn_top1"):
        train(recipe, folder, tmp_path / "b", callbacks=[EarlyStopping("knn_top2")])


@pytest.mark.parametrize("stop", [None, 10, 12])
def test_the_checkpoint_of_the_best_epoch_is_kept(folder, tmp_path, planted, stop):
    out = tmp_path / "run"
    recipe = tiny(
        epochs=4, knn_every_epochs=1, keep_best="knn_top1", keep_last=1, checkpoint_every_epochs=2
    )
    planted += [90, 20, 40, 40, 30]  # before the first step, and after every epoch
    if stop:
        train(recipe, folder, out, stop_at_step=stop)
        if stop == 10:
            planted.insert(0, 40)  # measured again
    result = train(recipe, folder, out, resume=bool(stop))
    assert (result["best_knn_top1"], result["best_step"]) == (40, 10)
    folder_of = out / "checkpoints"
    assert sorted(path.name for path in folder_of.iterdir()) == ["best.pt", "step_00000020.pt"]
    best = checkpoint.load(folder_of / "best.pt")
    assert (best["step"], best["score"]) == (10, {"knn_top1": 40})
    other = tmp_path / "other"
    planted[:] = [0] * 9
    train(tiny(epochs=4, knn_every_epochs=1), folder, other, stop_at_step=10)
    assert same(best["method"], weights(other))
    assert checkpoint.newest_checkpoint(out).name == "step_00000020.pt"


def test_keep_best_wants_a_score_that_there_is(folder, tmp_path, planted):
    planted += [1, 2]
    with pytest.raises(ValueError, match="keep_best = loss is not a score: choose from knn_top1"):
        train(tiny(knn_every_epochs=1, keep_best="loss"), folder, tmp_path / "a")
    with pytest.raises(ValueError, match="this run has no scores"):
        train(tiny(evaluate=False, keep_best="knn_top1"), folder, tmp_path / "b")


def test_a_damaged_best_checkpoint_is_replaced_and_a_later_one_does_not_count(tmp_path, caplog):
    torch.save({"step": 10, "score": {"knn_top1": 40.0}}, tmp_path / "best.pt")
    assert checkpoint.best_score(tmp_path, "knn_top1", 10) == (40, 10)
    assert checkpoint.best_score(tmp_path, "knn_top1", 9) == (float("-inf"), 0)
    assert checkpoint.best_score(tmp_path / "none", "knn_top1", 9) == (float("-inf"), 0)
    (tmp_path / "best.pt").write_bytes(b"cut off")
    assert checkpoint.best_score(tmp_path, "knn_top1", 10) == (float("-inf"), 0)
    assert "the next scored epoch replaces it" in caplog.text


def test_a_run_starts_again_from_a_chosen_checkpoint(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO, "rsa_fast")
    out, recipe = tmp_path / "run", tiny(keep_last=3)
    result = train(recipe, folder, out)
    whole, records = weights(out), read_metrics(out)
    assert train(recipe, folder, out, resume_from="step_00000005.pt", stop_at_step=8)["step"] == 8
    assert "starting again at step 5: later records are replaced" in caplog.text
    names = [path.name for path in checkpoint.paths_in(out / "checkpoints")]
    assert names == ["step_00000005.pt", "step_00000008.pt"]
    done = invoke(main, "train", "--out", out, "--resume")
    assert done.exit_code == 0, done.output
    assert same(weights(out), whole)

    def losses(these):
        return [(record["step"], record["loss"]) for record in these if "loss" in record]

    assert set(losses(records)) <= set(losses(read_metrics(out)))
    # A finished run starts again too, and another folder may start from it.
    path = out / "checkpoints" / "step_00000010.pt"
    copy = shutil.copytree(out, tmp_path / "copy")
    done = invoke(main, "train", "--resume-from", path)
    assert result_of(done)["out"] == str(out)
    branch = tmp_path / "branch"
    words = ["train", "--resume-from", str(path), "--out", str(branch)]
    done = invoke(main, *words)
    assert done.exit_code == 0, done.output
    for place in (out, branch):
        assert same(weights(place), whole)
    assert json.loads((branch / "result.json").read_text())["step"] == result["step"]
    assert min(record["step"] for record in read_metrics(branch)) >= 10

    with pytest.raises(ValueError, match="belongs to another run than the one in"):
        train(recipe, folder, copy, resume_from=path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint step_9\.pt; in .*step_00000015.pt"):
        train(recipe, folder, out, resume_from="step_9.pt")
    words = ["train", "--out", str(out), "--resume-from", str(path), "--overwrite"]
    done = invoke(main, *words)
    assert done.exit_code == 2 and "--resume-from and --overwrite cannot be combined" in done.output
