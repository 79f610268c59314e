"""The runs in a folder: their state, their progress, and how to watch one.

    states = find_runs(Path("runs"))
    watch(Path("runs/a"))

Everything is read from the folders of the runs, so the training processes do not have to answer.
"""

from __future__ import annotations

import fcntl
import json
import logging
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console
from rich.table import Table

from rsa_fast.terminal import RECORDED_SCORES, age, digits, duration
from rsa_fast.training.run_folder import LOCK, read_metrics, read_starts

log = logging.getLogger("rsa_fast")

State = Literal["running", "finished", "stopped", "failed"]
COLOURS = {"running": "green", "finished": "", "stopped": "yellow", "failed": "red"}
POLL_S = 1.0
DRAW_S = 30.0  # the least time between two updates of the report, which take about a second


@dataclass(frozen=True)
class RunState:
    """The state and the progress of the run in a folder.

    A run is `running` while a process holds its lock. It is `finished` if all of its steps are
    trained. It is `stopped` if it ended earlier without an error, for example by a signal.
    Otherwise it `failed`.
    """

    run: str  # the folder
    state: State
    epoch: int
    epochs: int
    step: int
    total_steps: int | None  # None in the first epoch of an earlier version's run
    score: str | None  # the name of the last score, such as knn_top1
    score_pct: float | None
    images_per_s: float | None
    eta_s: float | None  # only while it is running, and without evaluations
    age_s: float  # the time since its last record


def find_runs(folder: Path) -> list[RunState]:
    """The runs in `folder` and below. The most recently active run is the first.

    Raises FileNotFoundError if there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}: give another one with rsa-fast runs FOLDER")
    places = {path.parent for path in folder.rglob("env.json")}
    return sorted((state_of(place) for place in places), key=lambda run: run.age_s)


def state_of(folder: Path) -> RunState:
    """The state of the run in `folder`. Raises FileNotFoundError if there is none."""
    starts = read_starts(folder)
    if not starts:
        raise FileNotFoundError(f"no run in {folder}: give a folder that rsa-fast train wrote")
    records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
    epochs = 0  # unknown
    with suppress(OSError, yaml.YAMLError, KeyError, TypeError):
        epochs = yaml.safe_load((folder / "recipe.yaml").read_text())["epochs"]
    step = records[-1]["step"] if records else 0
    total_steps = starts[-1].get("total_steps") or total_by_records(records, epochs)
    speeds = [record for record in records if record.get("step_ms")]
    scores = [
        (key, record[key])
        for record in records
        for key in RECORDED_SCORES
        if record.get(key) is not None
    ]
    name, score_pct = scores[-1] if scores else (None, None)
    state = state_by_files(folder, step, total_steps)
    eta_s = None
    if state == "running" and speeds and total_steps:
        eta_s = (total_steps - step) * speeds[-1]["step_ms"] / 1000
    written = [folder / file for file in ("metrics.jsonl", "env.json") if (folder / file).is_file()]
    return RunState(
        run=str(folder),
        state=state,
        epoch=step * epochs // total_steps if total_steps else 0,
        epochs=epochs,
        step=step,
        total_steps=total_steps,
        score=name,
        score_pct=score_pct,
        images_per_s=speeds[-1].get("images_per_s") if speeds else None,
        eta_s=eta_s,
        age_s=max(0.0, time.time() - max(file.stat().st_mtime for file in written)),
    )


def total_by_records(records: list[dict[str, Any]], epochs: int) -> int | None:
    """The number of all steps, computed from a record after a complete epoch."""
    ratios = (r["step"] // r["epoch"] for r in records if r.get("epoch") and r["step"])
    steps_per_epoch = next(ratios, None)
    return steps_per_epoch * epochs if steps_per_epoch else None


def state_by_files(folder: Path, step: int, total_steps: int | None) -> State:
    """The state of a run whose last record belongs to `step`.

    The lock's file is empty unless a process holds the lock or was killed while holding it.
    """
    result_step = -1
    with suppress(OSError, ValueError, KeyError):
        result_step = json.loads((folder / "result.json").read_text())["step"]
    if result_step == total_steps:
        return "finished"
    with suppress(FileNotFoundError):
        if (folder / LOCK).stat().st_size:
            return "running" if is_held(folder / LOCK) else "failed"
    return "failed" if result_step < step else "stopped"


def is_held(lock: Path) -> bool:
    """Whether a process holds a lock. If the file system has no locks, the answer is true."""
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


def show(runs: list[RunState]) -> None:
    """Print the runs as a table on stdout."""
    table = Table("run", "state", box=None, pad_edge=False, header_style="bold")
    table.columns[0].overflow = "fold"
    for title in ("epoch", "last score", "images/s", "age"):
        table.add_column(title, justify="right", no_wrap=True)
    for run in runs:
        score = f"{RECORDED_SCORES[run.score]} {run.score_pct:.1f}" if run.score else "-"
        table.add_row(
            run.run,
            f"[{COLOURS[run.state]}]{run.state}[/]" if COLOURS[run.state] else run.state,
            f"{run.epoch}/{run.epochs}",
            score,
            digits(run.images_per_s) if run.images_per_s else "-",
            age(run.age_s),
        )
    if not runs:
        print_plain("no runs here: rsa-fast train my_photos starts one")
    else:
        Console().print(table)


def print_plain(text: str) -> None:
    Console().print(text, highlight=False, markup=False)


def in_words(run: RunState) -> str:
    """A run's state as text, such as `running: epoch 3 of 12, ETA 0:05`."""
    eta = f", ETA {duration(run.eta_s)}" if run.eta_s is not None else ""
    return f"{run.state}: epoch {run.epoch} of {run.epochs}, step {run.step:,}{eta}"


def watch(folder: Path) -> RunState:
    """Show the progress of the run in `folder`, as the run itself does, until it ends.

    Its report.html is written again when there are new scores. Returns the last state. Raises
    FileNotFoundError if there is no run in the folder.
    """
    run = state_of(folder)
    if run.state != "running":
        return run
    # Imported here, because this imports torch. The other functions are quick without it.
    from rsa_fast.training.metrics import Screen

    screen, shown, drawn, draws = Screen(run.epochs), 0, -DRAW_S, True
    screen.open(folder, run.total_steps or 0, run.step)
    try:
        while run.state == "running":
            records = read_metrics(folder) if (folder / "metrics.jsonl").is_file() else []
            new = records[shown:] if shown else records[-1:]
            shown = len(records)
            for record in new:
                screen.write(record)
            if draws and new and time.monotonic() - drawn > DRAW_S:
                draws, drawn = draw(folder), time.monotonic()
            time.sleep(POLL_S)
            run = state_of(folder)
    finally:
        screen.close()
    return run


def live_html(folders: Sequence[Path]) -> tuple[str, str]:
    """The HTML about running runs on the page of these runs, for its head and for its top.

    Both are empty if no run is running. The first makes the browser reload the page.
    """
    states = [state_of(folder) for folder in folders if read_starts(folder)]
    running = [run for run in states if run.state == "running"]
    lines = [f"<p><b>{escape(Path(run.run).name)} is {in_words(run)}</b></p>" for run in running]
    if not running:
        return "", ""
    now = datetime.now().astimezone().isoformat(" ", "seconds")
    lines.append(f"<p>Written at {now}. rsa-fast watch RUN keeps this page up to date.</p>")
    return f'<meta http-equiv="refresh" content="{DRAW_S:.0f}">', "\n".join(lines)


def draw(folder: Path) -> bool:
    """Write the report of a run. Returns whether this was possible."""
    from rsa_fast.insight.report import report

    try:
        report([folder])
    except (OSError, ValueError) as error:
        log.warning(f"the page is not written: {error}")
        return False
    return True


def as_json(runs: list[RunState]) -> dict[str, Any]:
    return {"runs": [asdict(run) for run in runs]}
