"""`make demo`: a complete small experiment on two CPU cores, data included.

    python -m tools.demo --out runs/demo

This draws the images of tools/make_demo.py and trains RSA and BYOL on them, both with the `demo`
recipe and the same budget. Both are compared with a randomly initialised network and with raw
pixels. The results are a table of accuracies, a sheet of views and a report with the curves.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.insight.preview import preview
from rsa_fast.insight.report import report
from rsa_fast.pipelines import open_source
from rsa_fast.recipes import Recipe, build_recipe
from rsa_fast.tools.make_demo import make_demo
from rsa_fast.training.engine import train
from rsa_fast.training.step import build_run

METHODS = ("rsa", "byol")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True
)
@click.option(
    "--data", type=click.Path(path_type=Path), default=Path("data/demo"), show_default=True
)
def main(out: Path, data: Path) -> None:
    """Make the data, train and evaluate the methods, and draw the results."""
    began = time.perf_counter()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rsa_fast").setLevel("INFO")
    make_demo(data)
    recipes = {method: build_recipe("demo", method) for method in METHODS}
    scores = baselines(recipes["rsa"], data)
    preview(recipes["rsa"], open_source(data, "pretrain"), out / "views.png", images=8)
    for method in METHODS:
        train(recipes[method], data, out / method, overwrite=True)
        scores[method] = json.loads((out / method / "result.json").read_text())
    report([out / method for method in METHODS], out / "report.html")
    show(scores, out, time.perf_counter() - began)


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
    """Print a table of the scores, the files and, as the last line, the scores as JSON."""
    title = "10 classes of shape and texture"
    table = Table("top-1 %", "kNN k=200", "kNN k=20", "linear", title=title)
    columns = ("knn_top1", "knn20_top1", "linear_top1")
    for name, score in scores.items():
        table.add_row(name, *(f"{score[column]:.1f}" for column in columns))
    Console().print(table)
    files = "   ".join(str(out / name) for name in ("report.html", "views.png"))
    click.echo(f"{files}   {seconds / 60:.1f} minutes")
    result = {name: {key: score[key] for key in columns} for name, score in scores.items()}
    click.echo(json.dumps(result))


if __name__ == "__main__":
    main()
