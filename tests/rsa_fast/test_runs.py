"""The table of runs, and following one."""

from __future__ import annotations

import json
import os
import time

import pytest

from rsa_fast.cli import main
from rsa_fast.insight import runs
from rsa_fast.insight.report import report
from rsa_fast.insight.runs import find_runs, state_of, watch
from rsa_fast.training.run_folder import LOCK, hold_lock
from tests.helpers import invoke


def write_run(folder, *, step, result=None, total_steps=40):
    """The files of a run of four epochs that has trained `step` steps."""
    folder.mkdir(parents=True)
    start = {"command": ["rsa-fast"], "step": 0}
    if total_steps:
        start["total_steps"] = total_steps
    (folder / "env.json").write_text(json.dumps([start]))
    (folder / "recipe.yaml").write_text("epochs: 4\nmethod: rsa\n")
    records = [{"step": 0, "epoch": 0, "knn_top1": 10.0}]
    for done in range(10, step + 1, 10):
        speed = {"loss": 1.5, "step_ms": 500.0, "images_per_s": 64.0, "wait_pct": 1.0}
        records.append({"step": done, **speed})
        records.append({"step": done, "epoch": done // 10, "knn_top1": 20.0 + done})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / LOCK).touch()
    if result is not None:
        (folder / "result.json").write_text(json.dumps({"step": result}))
    return folder


@pytest.mark.parametrize(
    ("step", "result", "killed", "state"),
    [
        (40, 40, False, "finished"),
        (20, 20, False, "stopped"),
        (20, None, False, "failed"),  # an error ended it
        (20, None, True, "failed"),
        (20, 10, False, "failed"),  # stopped, resumed, and ended by an error
        (20, 20, True, "failed"),  # stopped, resumed, and killed before its next record
        (40, 40, True, "finished"),
        (0, None, True, "failed"),
    ],
)
def test_the_state_of_a_run_nobody_trains(tmp_path, step, result, killed, state):
    write_run(tmp_path / "run", step=step, result=result)
    if killed:
        (tmp_path / "run" / LOCK).write_text('{"pid": 1}')
    assert state_of(tmp_path / "run").state == state


@pytest.mark.parametrize("total_steps", [40, None])
def test_a_run_is_running_while_its_lock_is_held(tmp_path, total_steps):
    folder = write_run(tmp_path / "run", step=20, result=10, total_steps=total_steps)
    with hold_lock(folder):
        run = state_of(folder)
        assert (run.state, run.epoch, run.epochs, run.step, run.total_steps) == (
            *("running", 2, 4, 20, 40),
        )
        assert (run.eta_s, run.score, run.score_pct, run.images_per_s) == (
            *(10.0, "knn_top1", 40.0, 64.0),
        )
    assert state_of(folder).state == "failed" and state_of(folder).eta_s is None


def test_runs_are_listed_from_the_newest_and_torch_is_not_imported(tmp_path, monkeypatch):
    for name, step, age_s in (("old", 40, 7200), ("deep/new", 20, 180)):
        folder = write_run(tmp_path / name, step=step, result=step)
        for path in folder.iterdir():
            os.utime(path, (time.time() - age_s,) * 2)
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    done = invoke(main, "runs", ".", env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    heading, *rows, last = done.stdout.splitlines()
    assert heading.split() == ["run", "state", "epoch", "last", "score", "images/s", "age"]
    cells = [row.split() for row in rows]
    assert cells[0] == ["deep/new", "stopped", "2/4", "kNN", "40.0", "64", "3", "min"]
    assert cells[1] == ["old", "finished", "4/4", "kNN", "60.0", "64", "2", "h"]
    assert [run["step"] for run in json.loads(last)["runs"]] == [20, 40]


def test_a_folder_without_runs_is_said(tmp_path):
    assert find_runs(tmp_path) == []
    assert "no folder" in invoke(main, "runs", tmp_path / "none").stderr
    (tmp_path / "empty").mkdir()
    done = invoke(main, "watch", tmp_path / "empty")
    assert done.exit_code == 1 and "no run in" in done.stderr


def test_watching_shows_the_records_as_they_come_and_ends_with_the_run(
    tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO", "rsa_fast")
    folder = write_run(tmp_path / "run", step=20)
    lock = hold_lock(folder)
    lock.__enter__()
    turns = []

    def sleep(_):
        """Between two looks, the run goes on by a record, and then ends."""
        turns.append(len(caplog.messages))
        if len(turns) == 1:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write('{"step": 30, "loss": 1.25}\n')
        else:
            (folder / "result.json").write_text('{"step": 30}')
            lock.__exit__(None, None, None)

    monkeypatch.setattr(runs.time, "sleep", sleep)
    last = watch(folder)
    assert caplog.messages == ["step 20/40  epoch 2  knn_top1 40", "step 30/40  loss 1.25"]
    assert turns == [1, 2] and last.state == "stopped"
    assert "is running: epoch 2 of 4" in (folder / "report.html").read_text()  # drawn meanwhile


def test_the_page_of_a_running_run_says_so_and_loads_itself_again(tmp_path):
    folder = write_run(tmp_path / "run", step=20)
    with hold_lock(folder):
        page = report([folder]).read_text()
    assert '<meta http-equiv="refresh"' in page
    assert "run is running: epoch 2 of 4, step 20, ETA 0:10" in page
    page = report([folder]).read_text()
    assert "refresh" not in page and "running" not in page
