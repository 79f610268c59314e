"""`make demo`: a complete small experiment on two CPU cores, data included.

    python -m tools.demo --out runs/demo

This draws the images of tools/make_demo.py. RSA and BYOL are trained on them with the `demo` recipe
and the same budget, and compared with a randomly initialised network and with raw pixels. The
results are a table of accuracies, a sheet of views and a report with the curves.

If the demo would take longer than `--minutes` on a machine, both methods are trained for fewer
epochs.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
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
from rsa_fast.training.engine import train
from rsa_fast.training.run_folder import read_metrics
from rsa_fast.training.step import build_run

log = logging.getLogger("rsa_fast")

METHODS = ("rsa", "byol")
TRAINING_SHARE = 0.8  # This share of the time is for training, the rest for all other work.
TRIAL_STEPS = 30  # The second half of these steps is timed.
INTRODUCTION = """\
This draws 3,000 images of 10 classes, trains RSA and BYOL on them without labels, and compares both
with raw pixels and with an untrained network. It takes 5 minutes on two cores with bf16 (Zen 4)."""


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
    make_demo(data)
    recipes = {method: build_recipe("demo", method) for method in METHODS}
    scores = baselines(recipes["rsa"], data)
    preview(recipes["rsa"], open_source(data, "pretrain"), out / "views.png", images=8)
    epochs = epochs_within(60 * minutes * TRAINING_SHARE / len(METHODS), recipes["rsa"], data)
    log.setLevel("INFO")
    for method, recipe in recipes.items():
        train(recipe.model_copy(update={"epochs": epochs}), data, out / method, overwrite=True)
        scores[method] = json.loads((out / method / "result.json").read_text())
    report([out / method for method in METHODS], out / "report.html")
    show(scores, out, time.perf_counter() - began)


def epochs_within(seconds: float, recipe: Recipe, data: Path) -> int:
    """The recipe's epochs, or fewer if a short trial shows that they take longer than `seconds`."""
    trial = recipe.model_copy(update={"log_every_steps": TRIAL_STEPS // 2, "knn_every_epochs": 0})
    with TemporaryDirectory() as folder:
        train(trial, data, folder, stop_at_step=TRIAL_STEPS)
        records = [record for record in read_metrics(Path(folder)) if "step_ms" in record]
    step_s = records[-1]["step_ms"] / 1e3
    count = len(recipe.open_source(data, "pretrain").manifest)
    steps_per_epoch = resolve(recipe, count).steps_per_epoch
    epochs = min(max(int(seconds / (step_s * steps_per_epoch)), 1), recipe.epochs)
    if epochs < recipe.epochs:
        log.warning(
            f"a step takes {1e3 * step_s:.0f} ms here: both methods are trained for {epochs} of "
            f"{recipe.epochs} epochs, and their accuracies will be lower"
        )
    return epochs


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
