"""Train every method at one small budget on real images, and compare their accuracy.

    python -m tools.compare --data data/cifar10 --out runs/compare
    python -m tools.compare --data data/cifar10 --only rsa --epochs 20 --batch-size 32

The rows are those of RSA's Table 4, and the other methods of this package. All have the same
backbone, images and number of epochs. Each run has about 1% of the paper's training steps. Expect
neither the paper's accuracies nor its ranking of the methods.

If the command was stopped, run it again: it reads finished runs and resumes the unfinished one. The
last line is one JSON object.
"""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.recipes import Recipe, build_recipe, dump_yaml
from rsa_fast.training.engine import train
from rsa_fast.training.step import build_run

# The budget is for a narrow ResNet-18 on two CPU cores.
BUDGET = {"width": 8, "lr_per": "step", "knn_every_epochs": 0}
SGD_PEAK_LR = 0.06  # for methods with SGD; methods with another optimiser use their own rate
# Targets follow faster than in the paper, because there are few steps.
FAST_TARGET = {"tau_base": 0.97}
# BatchNorm gets 16 images, as in the shuffling of MoCo's CIFAR demo, but half as many parts.
SHUFFLED = {"bn": "split:4"}
# SwAV's multi-crop in proportion, with solo-learn's size and area for CIFAR.
MULTI_CROP = [
    {"name": "global", "count": 2},
    {"name": "local", "count": 6, "size_px": 18, "crop_area": (0.08, 0.5)},
]
# The queue is used from the second epoch, because a short run ends before the paper's fifteenth.
SHORT_SWAV: dict[str, Any] = {"queue_start_epoch": 1, "queue_size": 512, "prototypes": 100}
SHORT_SWAV |= {"epsilon": 0.03, "peak_lr": 1.0}
SEEDS = (0, 1, 2)  # for the two rows that the paper compares; the others have one seed


@dataclass(frozen=True)
class Row:
    """One row of the table: a method, its changes to the recipe, and its seeds."""

    method: str
    fields: dict[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)


ROWS = {
    "inst-dis": Row("inst-dis"),
    "pirl": Row("pirl"),
    "simclr": Row("simclr"),
    "moco": Row("moco", SHUFFLED),
    "jcl": Row("jcl", SHUFFLED),
    "infomin": Row("infomin", SHUFFLED),
    "simsiam": Row("simsiam"),
    "simsiam-rsa": Row("simsiam-rsa"),
    "w-mse-2": Row("w-mse", {"out_dim": 16}),
    "w-mse-4": Row("w-mse", {"out_dim": 16, "views.groups": [{"name": "crops", "count": 4}]}),
    "swav": Row("swav", SHORT_SWAV),
    "swav-multi-crop": Row("swav", SHORT_SWAV | {"views.groups": MULTI_CROP}),
    "barlow-twins": Row("barlow-twins"),
    "vicreg": Row("vicreg"),
    "dino": Row("dino", {"tau_base": 0.99}),
    "ressl": Row("ressl"),
    "byol-aw": Row("byol", FAST_TARGET | {"pairs": "AW"}),
    "byol-aa": Row("byol", FAST_TARGET | {"pairs": "AA"}, SEEDS),
    "rsa-fixed": Row("rsa", FAST_TARGET | {"beta_schedule": "fixed"}),
    "rsa": Row("rsa", FAST_TARGET, SEEDS),
    "supervised": Row("supervised"),
}
SCORES = ("knn_top1", "knn20_top1", "linear_top1", "embedding_std", "images_per_s")


def recipe_of(row: Row, seed: int, epochs: int, batch_size: int) -> Recipe:
    budget = BUDGET | {"epochs": epochs, "batch_size": batch_size, "seed": seed}
    if build_recipe("cifar10", row.method).optimizer == "sgd":
        budget["peak_lr"] = SGD_PEAK_LR
    return build_recipe("cifar10", row.method, overrides={**budget, **row.fields})


def result_of(recipe: Recipe, data: Path, out: Path) -> dict[str, Any]:
    """The result of the run in the folder `out`. The run is trained, resumed or only read.

    Raises ValueError when the folder has a run of another recipe.
    """
    result = out / "result.json"
    # For a finished run of another recipe, `train` raises an error with the difference.
    if not (result.is_file() and (out / "recipe.yaml").read_text() == dump_yaml(recipe)):
        train(recipe, data, out, resume=any((out / "checkpoints").glob("*.pt")))
    scores: dict[str, Any] = json.loads(result.read_text())
    return scores


def random_init(recipe: Recipe, data: Path) -> dict[str, Any]:
    """The scores of a network before training."""
    source = recipe.open_source(data, "pretrain")
    run = build_run(recipe, len(source.manifest))
    return Evaluation(data, recipe, run.device, run.dtype).score(run.method.encoder)


def over_seeds(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The mean of each score, and its standard deviation if there are several seeds."""
    figures: dict[str, Any] = {"seeds": len(results)}
    for name in SCORES:
        values = [result[name] for result in results if result.get(name) is not None]
        figures[name] = statistics.mean(values) if values else None
        if len(values) > 1:
            figures[f"{name}_std"] = statistics.stdev(values)
    return figures


def cell(figures: dict[str, Any], name: str) -> str:
    if figures[name] is None:
        return ""
    std = f" ± {figures[f'{name}_std']:.1f}" if f"{name}_std" in figures else ""
    return f"{figures[name]:.2f}{std}"


@click.command()
@click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="Folder with CIFAR-10, or with similar images.",
)
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("runs/compare"), show_default=True
)
@click.option("--epochs", default=12, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option(
    "--only", multiple=True, type=click.Choice(list(ROWS)), help="Train this row; repeatable."
)
def main(data: Path, out: Path, epochs: int, batch_size: int, only: tuple[str, ...]) -> None:
    """Train every method at one small budget, and compare kNN and linear accuracy."""
    rows = {name: row for name, row in ROWS.items() if not only or name in only}
    # All recipes are built before the first run, so that a mistake in one is reported at once.
    recipes = {
        name: [recipe_of(row, seed, epochs, batch_size) for seed in row.seeds]
        for name, row in rows.items()
    }
    first = recipe_of(ROWS["rsa"], 0, epochs, batch_size)
    figures = {"random init": over_seeds([random_init(first, data)])}
    for name, of_seeds in recipes.items():
        results = [
            result_of(recipe, data, out / f"{name}-seed{recipe.seed}") for recipe in of_seeds
        ]
        figures[name] = over_seeds(results)
    title = f"ResNet-18, width {BUDGET['width']}, {epochs} epochs, batch {batch_size}"
    table = Table("top-1 %", *SCORES, title=f"{title}; mean ± standard deviation over seeds")
    for name, row_figures in figures.items():
        table.add_row(name, *(cell(row_figures, score) for score in SCORES))
    Console().print(table)
    click.echo(json.dumps(figures))


if __name__ == "__main__":
    main()
