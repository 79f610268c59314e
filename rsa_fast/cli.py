"""The command line: a thin table of commands. Results go to stdout, the last line one JSON object; progress to stderr."""

from __future__ import annotations

import json
from pathlib import Path

import click

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)


class Group(click.Group):
    """Turns errors about input into one line without a traceback; exit code 1."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except (ValueError, FileNotFoundError, FileExistsError, FloatingPointError) as error:
            if ctx.params.get("debug"):
                raise
            raise click.ClickException(str(error)) from error


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="rsa-fast")
def main(debug: bool) -> None:
    """Pre-train ResNets with RSA and BYOL, fast."""


@main.command()
@click.option("--dataset", default=None, help="Recipe row: cifar10, cifar100, stl10, tinyimagenet, imagenet100, imagenet1k.")
@click.option("--method", default=None, help="rsa or byol.")
@click.option("--data", required=True, type=FOLDER, help="Folder with the images.")
@click.option("--out", required=True, type=FOLDER, help="Run folder to write.")
@click.option("--config", type=FILE, default=None, help="YAML of recipe fields, such as a run's recipe.yaml.")
@click.option("--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a recipe field; repeatable.")
@click.option("--epochs", type=int, default=None, help="Override the recipe's epochs.")
@click.option("--batch-size", type=int, default=None, help="Override the recipe's global batch size.")
@click.option("--backend", default=None, help="auto, resident, native or torchvision.")
@click.option("--seed", type=int, default=None, help="Seed of initialisation, order and views.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out, exactly.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.option("--init-from", type=FILE, default=None, help="Start from another run's weights.")
@click.option("--download", is_flag=True, help="Fetch CIFAR-10, CIFAR-100 or STL-10 into --data first.")
@click.option("--dry-run", is_flag=True, help="Print the resolved recipe and plan, and stop.")
def train(data: Path, out: Path, resume: bool, overwrite: bool, init_from: Path | None, download: bool, dry_run: bool, **given):
    """Pre-train, evaluate by kNN while training and by kNN and a linear probe at the end."""
    if sum([resume, overwrite, init_from is not None]) > 1:
        raise click.UsageError("--resume, --overwrite and --init-from exclude each other")
    recipe = recipe_of(**given)
    from pipelines.sources import download as fetch
    from pipelines.sources import open_source

    if download:
        fetch(data, recipe.dataset)
    if dry_run:
        from dataclasses import asdict

        from rsa_fast.recipes import dump_yaml, resolve

        click.echo(dump_yaml(recipe))
        count = len(open_source(data, "pretrain").manifest)
        click.echo(json.dumps({"images": count, **asdict(resolve(recipe, count))}))
        return
    from rsa_fast.engine import train as run

    click.echo(json.dumps(run(recipe, data, out, resume=resume, overwrite=overwrite, init_from=init_from)))


def recipe_of(dataset, method, config, sets, **overrides):
    """The recipe of the command line: row, file, --set, then the options of their own."""
    from rsa_fast.recipes import build_recipe, parse_set, read_yaml

    named = read_yaml(config) if config else {}
    dataset, method = dataset or named.get("dataset"), method or named.get("method")
    if not (dataset and method):
        raise click.UsageError("give --dataset and --method, or a --config that names both")
    named = {"dataset": dataset, "method": method}
    options = {key: value for key, value in overrides.items() if value is not None}
    return build_recipe(dataset, method, config, {**named, **parse_set(sets), **options})


@main.command("eval")
@click.argument("protocol", type=click.Choice(["knn", "linear"]))
@click.option("--checkpoint", required=True, type=FILE, help="A run's checkpoints/step_*.pt.")
@click.option("--data", required=True, type=FOLDER, help="Folder with labelled train and test images.")
@click.option("--protocol", "variant", type=click.Choice(["fast"]), default="fast", help="Of linear: on cached features.")
def evaluate(protocol: str, variant: str, checkpoint: Path, data: Path) -> None:
    """Score a checkpoint's encoder: kNN (k=200 T=.1 and k=20 T=.07) or a linear probe."""
    from rsa_fast.engine import choose_device, choose_dtype
    from rsa_fast.evaluate import Evaluation, load_encoder

    encoder, recipe = load_encoder(checkpoint)
    device = choose_device(recipe.device)
    scores = Evaluation(data, recipe, device, choose_dtype(recipe.precision, device)).score(encoder.to(device), (protocol,))
    click.echo(json.dumps({"checkpoint": str(checkpoint), **scores}))


if __name__ == "__main__":
    main()
