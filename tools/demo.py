"""`make demo`: a complete small experiment on two CPU cores, data included.

    python -m tools.demo --out runs/demo

This draws the images of tools/make_demo.py. RSA and BYOL are trained on them with the `demo` recipe
and the same budget, and compared with a randomly initialised network and with raw pixels. The
results are a table of accuracies, a sheet of views and a report with the curves.

Both methods are trained at the same time, each by one core. If the demo would take longer than
`--minutes` on a machine, they are trained for fewer epochs.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from multiprocessing import get_context
from pathlib import Path
from subprocess import DEVNULL, Popen
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.insight.preview import preview
from rsa_fast.insight.report import report
from rsa_fast.pipelines import open_source
from rsa_fast.recipes import Recipe, build_recipe, resolve
from rsa_fast.tools.make_demo import make_demo
from rsa_fast.training.run_folder import read_metrics
from rsa_fast.training.step import build_run

log = logging.getLogger("rsa_fast")

METHODS = ("rsa", "byol")
RECIPE = ("--dataset", "demo")  # the options of `rsa-fast train` that both methods have
TRAINING_SHARE = 0.8  # This share of the time is for training, the rest for all other work.
TIMED_STEP = 40  # The second record of a run times the steps up to this one.
INTRODUCTION = """\
This draws 3,000 images of 10 classes, trains RSA and BYOL on them without labels, and compares both
with raw pixels and with an untrained network. It takes 2.7 minutes on two cores (Zen 4).
Both methods are trained at the same time, and the progress is that of RSA."""


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True
)
@click.option(
    "--data", type=click.Path(path_type=Path), default=Path("data/demo"), show_default=True
)
@click.option(
    "--minutes",
    default=10.0,
    show_default=True,
    help="If the demo would take longer on this machine, it trains for fewer epochs.",
)
def main(out: Path, data: Path, minutes: float) -> None:
    """Make the data, train and evaluate the methods, and draw the results."""
    began = time.perf_counter()
    click.echo(INTRODUCTION, err=True)
    logging.basicConfig(format="%(message)s")
    # A second thread gains little for such small tensors. Beside a busy program, two threads take
    # many times as long as one, because each operator waits for the thread that has no core.
    torch.set_num_threads(1)
    make_demo(data)
    recipe = build_recipe("demo", "rsa")
    # The first views wait until their kernels are compiled, which takes one core. Another process
    # computes the baselines meanwhile.
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = pool.submit(baselines, recipe, data)
        preview(recipe, open_source(data, "pretrain"), out / "views.png", images=8)
        scores = found.result()
    train_within(60 * minutes * TRAINING_SHARE, recipe, data, out)
    for method in METHODS:
        scores[method] = json.loads((out / method / "result.json").read_text())
    report([out / method for method in METHODS], out / "report.html")
    show(scores, out, time.perf_counter() - began)


def train_within(seconds: float, recipe: Recipe, data: Path, out: Path) -> None:
    """Train both methods, for fewer epochs if their first steps show that this takes longer.

    Raises click.ClickException if a run fails.
    """
    began = time.perf_counter()
    count = len(recipe.open_source(data, "pretrain").manifest)
    with runs_of(recipe.epochs, data, out) as runs:
        epoch_s = first_step_s(runs, out) * resolve(recipe, count).steps_per_epoch
        if recipe.epochs * epoch_s <= seconds:
            wait_for(runs, out)
            return
    left_s = seconds - (time.perf_counter() - began)
    epochs = max(int(left_s / epoch_s), 1)
    log.warning(
        f"an epoch takes {epoch_s:.0f} s here: both methods are trained for {epochs} of "
        f"{recipe.epochs} epochs, and their accuracies will be lower"
    )
    with runs_of(epochs, data, out) as runs:
        wait_for(runs, out)


@contextmanager
def runs_of(epochs: int, data: Path, out: Path) -> Iterator[dict[str, Popen[bytes]]]:
    """`rsa-fast train` of both methods at the same time. What still runs at the end is stopped.

    Each run has one thread, because a second one makes such small steps only 1.07 times as fast
    (fp32, Emerald Rapids). One run shows its progress, and the other writes it to a file.
    """
    runs: dict[str, Popen[bytes]] = {}
    with ExitStack() as stack:
        for method in METHODS:
            log_file = stack.enter_context((out / f"{method}.log").open("w")) if runs else None
            command = [sys.executable, "-m", "rsa_fast", "train", str(data), *RECIPE, "--overwrite"]
            command += ["--method", method, "--epochs", str(epochs), "--out", str(out / method)]
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            runs[method] = Popen(command, env=env, stdout=DEVNULL, stderr=log_file)
            stack.callback(runs[method].wait)
            stack.callback(runs[method].terminate)
        yield runs


def first_step_s(runs: dict[str, Popen[bytes]], out: Path) -> float:
    """The seconds of a step of the slower run, as soon as both have recorded them.

    0 if a run ends earlier.
    """
    began = time.time()
    while all(run.poll() is None for run in runs.values()):
        time.sleep(0.5)
        files = [out / method / "metrics.jsonl" for method in runs]
        # An older file belongs to an earlier demo. The run will replace it.
        fresh = [file for file in files if file.is_file() and file.stat().st_mtime > began]
        step_ms: list[float] = [
            record["step_ms"]
            for file in fresh
            for record in read_metrics(file.parent)
            if record["step"] == TIMED_STEP and "step_ms" in record
        ]
        if len(step_ms) == len(runs):
            return max(step_ms) / 1e3
    return 0.0


def wait_for(runs: dict[str, Popen[bytes]], out: Path) -> None:
    """Wait until all runs have ended, or one of them has failed.

    Raises click.ClickException if one has failed.
    """
    while None in [run.poll() for run in runs.values()]:
        if any(run.returncode for run in runs.values()):
            break
        time.sleep(0.2)
    for method, run in runs.items():
        if run.returncode:
            file = out / f"{method}.log"
            where = f": {file} says why" if file.exists() else ""
            raise click.ClickException(f"the training of {method} has failed{where}")


def baselines(recipe: Recipe, data: Path) -> dict[str, dict[str, Any]]:
    """Scores of raw pixels and of the network before training."""
    source = recipe.open_source(data, "pretrain")
    run = build_run(recipe, len(source.manifest))
    evaluation = Evaluation(data, recipe, run.device, run.dtype)
    chance = 100 / evaluation.classes
    return {
        "chance": dict.fromkeys(("knn_top1", "knn20_top1", "linear_top1"), chance),
        "raw pixels": evaluation.score(torch.nn.Flatten()),
        "random network": evaluation.score(run.method.encoder),
    }


def show(scores: dict[str, dict[str, Any]], out: Path, seconds: float) -> None:
    """Print a table of the scores and the files; to a pipe also the scores as one JSON line."""
    title = "10 classes of shape and texture"
    table = Table("top-1 %", "kNN k=200", "kNN k=20", "linear", title=title)
    columns = ("knn_top1", "knn20_top1", "linear_top1")
    for name, score in scores.items():
        table.add_row(name, *(f"{score[column]:.1f}" for column in columns))
    Console().print(table)
    click.echo(
        f"took   {seconds / 60:.1f} minutes\n"
        f"files  {out / 'views.png'}: the views of some images\n"
        f"       {out / 'report.html'}: the curves of both runs\n"
        f"next   {Path(sys.executable).with_name('rsa-fast')} train FOLDER_OF_YOUR_IMAGES"
    )
    if not sys.stdout.isatty():
        result = {name: {key: score[key] for key in columns} for name, score in scores.items()}
        click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
