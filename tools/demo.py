"""`make demo`: from no data to a table of accuracies, a sheet of views, curves and a report, on two CPU cores.

    python -m tools.demo --out runs/demo

Trains RSA and BYOL with the `demo` recipe at the same budget on tools/make_demo.py's images and scores both beside a
randomly initialised network and raw pixels.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from pipelines import open_source
from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.insight.preview import preview
from rsa_fast.insight.report import KNN, LOSS, draw, read_runs, report
from rsa_fast.recipes import Recipe, build_recipe
from rsa_fast.training.engine import train
from rsa_fast.training.step import build_run
from tools.make_demo import make_demo

METHODS = ("rsa", "byol")


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True
)
@click.option(
    "--data", type=click.Path(path_type=Path), default=Path("data/demo"), show_default=True
)
def main(out: Path, data: Path) -> None:
    """Make the data, train, evaluate, draw."""
    began = time.perf_counter()
    make_demo(data)
    recipes = {method: build_recipe("demo", method) for method in METHODS}
    scores = baselines(recipes["rsa"], data)
    preview(recipes["rsa"], open_source(data, "pretrain"), out / "views.png", images=8)
    for method in METHODS:
        train(recipes[method], data, out / method, overwrite=True)
        scores[method] = json.loads((out / method / "result.json").read_text())
    draw_curves(out, scores, out / "curves.png")
    report([out / method for method in METHODS], out / "report.html")
    show(scores, out, time.perf_counter() - began)


def baselines(recipe: Recipe, data: Path) -> dict[str, dict[str, Any]]:
    """Scores of raw pixels and of the network before training."""
    run = build_run(recipe, len(open_source(data, "pretrain").manifest))
    evaluation = Evaluation(data, recipe, run.device, run.dtype)
    chance = 100 / evaluation.classes
    return {
        "chance": dict.fromkeys(("knn_top1", "knn20_top1", "linear_top1"), chance),
        "raw pixels": evaluation.score(torch.nn.Flatten()),
        "random network": evaluation.score(run.method.encoder),
    }


def show(scores: dict[str, dict[str, Any]], out: Path, seconds: float) -> None:
    table = Table(
        "top-1 %", "kNN k=200", "kNN k=20", "linear", title="10 classes of shape and texture"
    )
    columns = ("knn_top1", "knn20_top1", "linear_top1")
    for name, score in scores.items():
        table.add_row(name, *(f"{score[column]:.1f}" for column in columns))
    Console().print(table)
    files = "   ".join(str(out / name) for name in ("curves.png", "views.png", "report.html"))
    click.echo(f"{files}   {seconds / 60:.1f} minutes")
    click.echo(
        json.dumps(
            {name: {column: score[column] for column in columns} for name, score in scores.items()}
        )
    )


def draw_curves(out: Path, scores: dict[str, dict[str, Any]], path: Path) -> None:
    """The losses, each on its method's own scale, and the accuracies beside those that need no training."""
    figure = draw(read_runs([out / method for method in METHODS]), (LOSS, KNN))
    knn = figure.axes[1]
    for name, colour in (("raw pixels", "gray"), ("chance", "black")):
        knn.axhline(scores[name]["knn_top1"], color=colour, linestyle="--", label=name)
    knn.set_ylim(bottom=0)
    knn.legend(fontsize=7)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
