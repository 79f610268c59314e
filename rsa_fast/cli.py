"""The command line: a thin table of commands. Results go to stdout, the last line one JSON object; progress to stderr."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import click

from rsa_fast.datasets import DATASETS
from rsa_fast.methods import ABLATIONS, METHODS

if TYPE_CHECKING:
    from pipelines import Backend
    from rsa_fast.recipes import Recipe

Function = Callable[..., None]  # a command before click makes it one

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
NEW_FILE = click.Path(path_type=Path, dir_okay=False)

# The names of the tables in other modules, which import torch: help and the shell's completion are quick without.
BACKENDS = ("auto", "resident", "native", "dali", "ffcv", "torchvision")
FORMATS = ("torchvision", "timm", "detectron2", "safetensors", "onnx", "torch-export")
GPUS = (
    "v100-16g",
    "v100-32g",
    "t4",
    "a10",
    "a100-40g",
    "a100-80g",
    "l4",
    "l40s",
    "h100-80g",
    "h200",
    "b200",
    "rtx-3090",
    "rtx-4090",
    "rtx-5090",
)


class Name(click.Choice[str]):
    """One of a few names, which the shell completes; of another the nearest is said."""

    def __init__(self, noun: str, *names: str) -> None:
        super().__init__(names)
        self.name = noun

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            from rsa_fast.recipes import nearest

            raise ValueError(
                f"no {self.name} {value!r}{nearest(value, self.choices)}: choose from {', '.join(self.choices)}"
            )
        return str(value)


class Command(click.Command):
    """Shows its options in the sections that `section` put them in."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def section(title: str, *options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """Gives a command these of click's options, under a title in its help."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
            newest = vars(function)["__click_params__"][-1]  # click collects the options here
            newest.section = title
        return function

    return add


class Group(click.Group):
    """Errors are said without a traceback, exit code 1; that of an error nobody foresaw is kept in a file."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click's own
        except Exception as error:
            if ctx.params["debug"]:
                raise
            if isinstance(error, ValueError | OSError | FloatingPointError):
                raise click.ClickException(str(error)) from error
            with NamedTemporaryFile("w", prefix="rsa-fast-", suffix=".txt", delete=False) as file:
                traceback.print_exc(file=file)
            kept = f"The traceback is in {file.name}; rsa-fast --debug prints it."
            raise click.ClickException(
                f"{type(error).__name__}: {error}\nNobody foresaw this. {kept}"
            ) from error


DATA = click.option("--data", required=True, type=FOLDER, help="Folder with the images.")
OUT = click.option("--out", required=True, type=FOLDER, help="Run folder to write.")
DATASET = click.option(
    "--dataset",
    type=Name("dataset", *DATASETS),
    metavar="NAME",
    help=f"Row: {', '.join(DATASETS)}.",
)
METHOD = click.option(
    "--method", type=Name("method", *METHODS), metavar="NAME", help=f"{', '.join(METHODS)}."
)
CONFIG = click.option(
    "--config", type=FILE, help="YAML of recipe fields, such as a run's recipe.yaml."
)
SET = click.option(
    "--set", "sets", multiple=True, metavar="KEY=VALUE", help="Override a recipe field; repeatable."
)
EPOCHS = click.option("--epochs", type=int, help="Override the recipe's epochs.")
BATCH_SIZE = click.option("--batch-size", type=int, help="Override the recipe's global batch size.")
BACKEND = click.option(
    "--backend", type=Name("backend", *BACKENDS), metavar="NAME", help=f"{', '.join(BACKENDS)}."
)
JSON = click.option("--json", "plain", is_flag=True, help="No table, only the JSON object.")


@click.group(
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
    epilog='Completion: eval "$(_RSA_FAST_COMPLETE=bash_source rsa-fast)"; zsh_source or fish_source in other shells.',
)
@click.option("--debug", is_flag=True, help="Show tracebacks.")
@click.version_option(package_name="rsa-fast")
def main(debug: bool) -> None:
    """Pre-train ResNets with RSA and the methods it is compared with, fast."""


@main.command()
@section(
    "Recipe",
    DATASET,
    METHOD,
    click.option(
        "--ablation",
        type=Name("ablation", *ABLATIONS),
        help="A row of the paper's Table 1 instead of a method.",
    ),
    CONFIG,
    SET,
    EPOCHS,
    BATCH_SIZE,
    click.option("--seed", type=int, help="Of initialisation, order and views."),
)
@section(
    "Images",
    DATA,
    click.option(
        "--download", is_flag=True, help="Fetch CIFAR-10, CIFAR-100 or STL-10 into --data first."
    ),
    BACKEND,
    click.option(
        "--on-bad-image",
        type=Name("policy", "stop", "skip"),
        help="Unreadable since the start (stop).",
    ),
)
@section(
    "Run",
    OUT,
    click.option("--dry-run", is_flag=True, help="Print the resolved recipe and plan, and stop."),
    click.option(
        "--resume",
        is_flag=True,
        help="Go on from the newest checkpoint in --out, exactly, or start.",
    ),
    click.option(
        "--force", is_flag=True, help="Resume although recipe or data differ; says in what."
    ),
    click.option("--overwrite", is_flag=True, help="Replace the run in --out."),
    click.option(
        "--init-from",
        type=FILE,
        help="Start, where nothing is resumed, from another run's weights.",
    ),
    click.option("--wandb", is_flag=True, default=None, help="Records go to Weights & Biases too."),
)
@section(
    "Processes",
    click.option("--gpus", type=click.IntRange(1), help="GPUs of this machine, one process each."),
    click.option("--nproc", type=click.IntRange(1), help="Processes on the CPU instead."),
    click.option(
        "--max-restarts",
        type=click.IntRange(0),
        default=0,
        help="From the newest checkpoint, when one dies.",
    ),
)
@click.pass_context
def train(
    ctx: click.Context,
    dataset: str | None,
    method: str | None,
    ablation: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    seed: int | None,
    data: Path,
    download: bool,
    backend: str | None,
    on_bad_image: str | None,
    out: Path,
    dry_run: bool,
    resume: bool,
    force: bool,
    overwrite: bool,
    init_from: Path | None,
    wandb: bool | None,
    gpus: int | None,
    nproc: int | None,
    max_restarts: int,
) -> None:
    """Pre-train an encoder and score it.

    By kNN meanwhile, and by kNN and a linear classifier at the end.

    Exit code 75: a signal (TERM, USR1, INT) stopped the run after its checkpoint was written; go on with --resume.
    """
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    if force and not resume:
        raise click.UsageError("--force is of --resume")
    if gpus and nproc:
        raise click.UsageError("--gpus and --nproc exclude each other")
    overrides = {
        "epochs": epochs,
        "batch_size": batch_size,
        "seed": seed,
        "backend": backend,
        "on_bad_image": on_bad_image,
        "wandb": wandb,
        "device": "cuda" if gpus else "cpu" if nproc else None,
    }
    recipe = recipe_of(dataset, method, config, sets, overrides, ablation)
    from pipelines.sources import download as fetch
    from pipelines.sources import open_source

    if download:
        fetch(data, recipe.dataset)
    processes = gpus or nproc
    if dry_run:
        from dataclasses import asdict

        from pipelines.order import Order
        from rsa_fast.recipes import dump_yaml, resolve

        manifest = open_source(data, "pretrain").manifest
        recipe.check_labels(manifest.labelled, len(manifest.classes))
        Order(
            len(manifest), recipe.batch_size, recipe.seed, 0, processes or 1
        )  # which refuses what does not divide
        click.echo(dump_yaml(recipe))
        click.echo(
            json.dumps(
                {"images": len(manifest), **asdict(resolve(recipe, len(manifest), processes or 1))}
            )
        )
        return
    if processes and "RANK" not in os.environ:
        from rsa_fast.distributed import launch

        ctx.exit(launch(processes, max_restarts, sys.argv[1:]))
    from rsa_fast.distributed import STOPPED_EXIT_CODE
    from rsa_fast.training import engine

    try:
        result = engine.train(
            recipe, data, out, resume=resume, overwrite=overwrite, init_from=init_from, force=force
        )
    except engine.StoppedError as stopped:
        click.echo(str(stopped), err=True)
        ctx.exit(STOPPED_EXIT_CODE)
    if result:
        click.echo(json.dumps(result))


def recipe_of(
    dataset: str | None,
    method: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    overrides: Mapping[str, object],
    ablation: str | None = None,
) -> Recipe:
    """The recipe of the command line: row, file, ablation, --set, then the options of their own.

    `overrides` holds those options by the names of the recipe's fields, None if not given.
    """
    from rsa_fast.recipes import build_recipe, parse_set, read_yaml

    named = read_yaml(config) if config else {}
    fields: dict[str, Any] = {}
    if ablation:
        if method and method != ABLATIONS[ablation][0]:
            raise click.UsageError(
                f"--ablation {ablation} is of {ABLATIONS[ablation][0]}, not of {method}"
            )
        method, fields = ABLATIONS[ablation]
    dataset, method = dataset or named.get("dataset"), method or named.get("method")
    if not (dataset and method):
        raise click.UsageError("give --dataset and --method, or a --config that names both")
    named = {"dataset": dataset, "method": method}
    options = {key: value for key, value in overrides.items() if value is not None}
    return build_recipe(dataset, method, config, {**named, **fields, **parse_set(sets), **options})


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    names = [*DATASETS, *(f"{dataset}/{method}" for dataset in DATASETS for method in METHODS)]
    return [name for name in names if name.startswith(incomplete)]


@main.command()
@click.argument("name", required=False, shell_complete=complete_recipe)
def recipes(name: str | None) -> None:
    """List the recipes, or show one with the source of every number.

    `rsa-fast recipes cifar100` is RSA's, `rsa-fast recipes cifar100/byol` another method's.
    """
    if not name:
        click.echo(f"datasets: {', '.join(DATASETS)}\nmethods: {', '.join(METHODS)}")
        click.echo(json.dumps({"datasets": list(DATASETS), "methods": METHODS}))
        return
    from rich.console import Console
    from rich.table import Table

    from rsa_fast.recipes import build_recipe, row

    dataset, _, method = name.partition("/")
    recipe = build_recipe(dataset, method or "rsa")
    sources = row(dataset, recipe.method)
    table = Table("field", "value", "source", title=f"{dataset}/{recipe.method}")
    for field, value in recipe:
        value = (
            ", ".join(f"{key} {number}" for key, number in vars(value).items())
            if field == "views"
            else str(value)
        )
        table.add_row(field, value, sources[field].source if field in sources else "")
    Console().print(table)
    click.echo(recipe.model_dump_json())


@main.command("eval")
@click.argument("protocol", type=Name("protocol", "knn", "linear"))
@click.option(
    "--checkpoint",
    required=True,
    type=FILE,
    help="A run's checkpoints/step_*.pt, or another project's encoder.",
)
@click.option(
    "--data", required=True, type=FOLDER, help="Folder with labelled train and test images."
)
@click.option(
    "--dataset",
    type=Name("dataset", *DATASETS),
    metavar="NAME",
    help="Row for size and normalisation, not the run's own.",
)
@click.option(
    "--resize-px", metavar="PX", help="Short side of test images before the centre crop, or native."
)
@section(
    "Linear classifier",
    click.option(
        "--protocol",
        "variant",
        type=Name("protocol", "fast", "rsa-small", "rsa-large"),
        help="Without it: fast.",
    ),
    click.option(
        "--epochs",
        type=click.IntRange(1),
        help="Of rsa-small (100), rsa-large (40); lr drops stay in proportion.",
    ),
    click.option(
        "--bn",
        type=Name("mode", "eval", "recalibrate"),
        help="Of rsa-small (eval); the RSA code recalibrates.",
    ),
    click.option(
        "--nesterov/--no-nesterov", default=None, help="Of rsa-small (on, as in the RSA code)."
    ),
)
def evaluate(
    protocol: str,
    checkpoint: Path,
    data: Path,
    dataset: str | None,
    resize_px: str | None,
    variant: str | None,
    epochs: int | None,
    bn: str | None,
    nesterov: bool | None,
) -> None:
    """Score an encoder by kNN or by a linear classifier.

    kNN is k=200 T=.1 and k=20 T=.07. The linear classifier is fast, on cached features; rsa-small or rsa-large, on augmented
    images as the paper does on small datasets and on ImageNet.
    """
    if protocol == "knn" and variant:
        raise click.UsageError("knn has no --protocol")
    name = "knn" if protocol == "knn" else f"linear-{variant or 'fast'}"
    takes = {"linear-rsa-small": {"epochs", "bn", "nesterov"}, "linear-rsa-large": {"epochs"}}.get(
        name, set()
    )
    options = {"epochs": epochs, "bn": bn, "nesterov": nesterov}
    if extra := {key for key, value in options.items() if value is not None} - takes:
        raise click.UsageError(f"{name} has no --{', --'.join(sorted(extra))}")
    from rsa_fast.evaluation.encoders import load_encoder
    from rsa_fast.evaluation.evaluate import Evaluation
    from rsa_fast.recipes import build_recipe, validate
    from rsa_fast.training.step import choose_device, choose_dtype

    encoder, recipe = load_encoder(checkpoint)
    if dataset:
        recipe = build_recipe(dataset, "rsa")
    if recipe is None:
        raise click.UsageError(
            f"{checkpoint} has no recipe: --dataset says how images are sized and normalised"
        )
    if resize_px:
        recipe = validate(
            recipe.model_dump() | {"eval_resize_px": None if resize_px == "native" else resize_px}
        )
    device = choose_device(recipe.device)
    evaluation = Evaluation(data, recipe, device, choose_dtype(recipe.precision, device))
    scores = evaluation.score(
        encoder.to(device), (name,), bn == "recalibrate", epochs=epochs, nesterov=nesterov
    )
    click.echo(json.dumps({"checkpoint": str(checkpoint), **scores}))


@main.command()
@click.option(
    "--checkpoint",
    required=True,
    type=FILE,
    help="A ResNet-50: a run's checkpoints/step_*.pt or another project's.",
)
@click.option(
    "--data",
    required=True,
    type=FOLDER,
    help="COCO: train2017/, val2017/, annotations/instances_*2017.json.",
)
@OUT
@click.option(
    "--schedule",
    type=Name("schedule", "1x", "2x"),
    default="1x",
    help="90,000 steps at lr .02, or 180,000 at .03.",
)
@click.option(
    "--steps", type=click.IntRange(1), help="Shorten the schedule; its drops stay in proportion."
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    help="Images per step; the learning rate follows it.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Of new layers, order, flips, sizes and proposals.",
)
@click.option("--workers", type=click.IntRange(0), default=4, help="Processes that read images.")
@click.option("--device", type=Name("device", "auto", "cpu", "cuda"), default="auto")
@click.option(
    "--precision",
    type=Name("precision", "auto", "fp32", "bf16", "fp16"),
    default="auto",
    help="Of the computation.",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out.")
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
def detect(
    checkpoint: Path,
    data: Path,
    out: Path,
    schedule: str,
    steps: int | None,
    batch_size: int,
    seed: int,
    workers: int,
    device: str,
    precision: str,
    resume: bool,
    overwrite: bool,
) -> None:
    """Fine-tune an encoder on COCO as Mask R-CNN R50-FPN: AP, AP50, AP75 of boxes and masks, in percent."""
    if resume and overwrite:
        raise click.UsageError("--resume and --overwrite exclude each other")
    from rsa_fast.evaluation.detection import detect as run

    result = run(
        checkpoint,
        data,
        out,
        schedule=schedule,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        workers=workers,
        device=device,
        precision=precision,
        resume=resume,
        overwrite=overwrite,
    )
    click.echo(json.dumps(result))


@main.command()
@DATA
@click.option("--out", required=True, type=NEW_FILE, help="The PNG to write.")
@DATASET
@CONFIG
@SET
@click.option(
    "--images",
    type=click.IntRange(1),
    default=4,
    help="How many, from the first that training reads.",
)
@BACKEND
@click.option(
    "--compare",
    type=Name("backend", *BACKENDS),
    metavar="NAME",
    help="A second backend, and the difference.",
)
@click.option("--epoch", type=click.IntRange(0), default=0, help="Whose views.")
@click.option("--seed", type=int, help="Of order and views.")
def preview(
    data: Path,
    out: Path,
    dataset: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    images: int,
    backend: str | None,
    compare: Backend | None,
    epoch: int,
    seed: int | None,
) -> None:
    """Draw a sheet of what training sees.

    Images of --dataset, imagenet1k where nothing else is said, with both crops, and their four views, labelled with what was
    drawn.
    """
    dataset, method = (dataset, None) if config else (dataset or "imagenet1k", "rsa")
    recipe = recipe_of(dataset, method, config, sets, {"backend": backend, "seed": seed})
    from pipelines import open_source
    from rsa_fast.insight.preview import preview as run

    source = open_source(data, "pretrain")
    click.echo(json.dumps(run(recipe, source, out, images=images, epoch=epoch, compare=compare)))


@main.command()
@click.option(
    "--checkpoint",
    required=True,
    type=FILE,
    help="A run's checkpoints/step_*.pt, or another project's.",
)
@click.option(
    "--format",
    required=True,
    type=Name("format", *FORMATS),
    help="The first three hold the standard network only: 7x7 stem, 64 channels.",
)
@click.option("--out", required=True, type=NEW_FILE, help="File; README.md goes beside it.")
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the file, and a README.md that is not this checkpoint's card.",
)
def export(checkpoint: Path, format: str, out: Path, overwrite: bool) -> None:
    """Write an encoder for another library, with a model card."""
    from rsa_fast.evaluation.export import export as run

    click.echo(json.dumps(run(checkpoint, format, out, overwrite)))


@main.command()
@click.option("--data", default="data", type=FOLDER, help="Folder where the images are or will be.")
@click.option("--out", default="runs", type=FOLDER, help="Folder where runs are or will be.")
@JSON
@click.pass_context
def doctor(ctx: click.Context, data: Path, out: Path, plain: bool) -> None:
    """Examine this machine, and say what to mend.

    Versions, GPUs, limits and disks; exit code 1 if a check fails.
    """
    from rsa_fast.insight import doctor

    checks = doctor.diagnose(data, out)
    if not plain:
        doctor.show(checks)
    found = doctor.report(checks)
    click.echo(json.dumps(found))
    ctx.exit(0 if found["ok"] else 1)


@main.command()
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--out", type=NEW_FILE, help="The page to write; RUN/report.html where there is one RUN."
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Draw a run as a web page, or several over each other."""
    from rsa_fast.insight.report import report as run

    click.echo(json.dumps({"out": str(run(list(runs), out))}))


@main.command()
@section(
    "Recipe",
    DATASET,
    CONFIG,
    SET,
    click.option("--batch-size", type=int, help="Of this one device."),
)
@section("Images", DATA, BACKEND, click.option("--threads", type=int, help="Of the loader."))
@section(
    "Measurement",
    click.option(
        "--methods",
        default="rsa,byol",
        metavar="NAME,...",
        help="In turns; --tune takes the first.",
    ),
    click.option(
        "--repeats", type=click.IntRange(1), default=5, help="Turns that count; one more warms up."
    ),
    click.option(
        "--seconds", type=click.FloatRange(0), default=1.0, help="Of each measurement in a turn."
    ),
    JSON,
    click.option("--html", type=NEW_FILE, help="Write the report as a page with stacked bars."),
    click.option("--trace", type=NEW_FILE, help="Write a Chrome trace of a few iterations."),
)
@section(
    "Tuning",
    click.option(
        "--tune", is_flag=True, help="Try loading settings instead, and write the fastest to --out."
    ),
    click.option("--budget-s", type=click.FloatRange(0), default=300.0, help="Time for that."),
    click.option(
        "--out", type=NEW_FILE, default=Path("tuned.yaml"), help="File that train --config takes."
    ),
)
def profile(
    dataset: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    batch_size: int | None,
    data: Path,
    backend: str | None,
    threads: int | None,
    methods: str,
    repeats: int,
    seconds: float,
    plain: bool,
    html: Path | None,
    trace: Path | None,
    tune: bool,
    budget_s: float,
    out: Path,
) -> None:
    """Measure where the time of an iteration goes.

    Its step on a ready batch, its views alone, both, and their parts; the bottleneck, and the knob to turn.
    """
    overrides = {"batch_size": batch_size, "backend": backend, "threads": threads}
    names = [name.strip() for name in methods.split(",")]
    recipes = {name: recipe_of(dataset, name, config, sets, overrides) for name in names}
    if tune:
        from rsa_fast.insight import tuning

        click.echo(json.dumps(tuning.tune(next(iter(recipes.values())), data, out, budget_s)))
        return
    from rsa_fast.insight import profiling
    from rsa_fast.insight.profile_page import page, table

    report = profiling.profile(recipes, data, repeats=repeats, seconds=seconds, trace=trace)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(report))
    if not plain:
        from rich.console import Console

        Console().print(table(report))
    click.echo(json.dumps(report))


@main.command()
@section(
    "Recipe",
    *(DATASET, METHOD, CONFIG, SET, EPOCHS, BATCH_SIZE),
    click.option(
        "--data", type=FOLDER, help="Folder with the images; without it the dataset as published."
    ),
)
@section(
    "Machine",
    click.option(
        "--gpu", required=True, type=Name("GPU", *GPUS), metavar="NAME", help=f"{', '.join(GPUS)}."
    ),
    click.option("--gpus", type=click.IntRange(1), default=1, help="GPUs of a node."),
    click.option("--nodes", type=click.IntRange(1), default=1),
    click.option(
        "--cores", type=click.IntRange(1), help="CPU cores of a node; 4 a GPU where not given."
    ),
    click.option(
        "--network-gbps",
        type=click.FloatRange(0, min_open=True),
        default=100.0,
        help="Of a node to the others.",
    ),
)
def plan(
    dataset: str | None,
    method: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    data: Path | None,
    gpu: str,
    gpus: int,
    nodes: int,
    cores: int | None,
    network_gbps: float,
) -> None:
    """Predict memory, time and decoding of a run on other GPUs."""
    recipe = recipe_of(dataset, method, config, sets, {"epochs": epochs, "batch_size": batch_size})
    from rsa_fast.insight import planning

    found = planning.plan(
        recipe, gpu, gpus=gpus, nodes=nodes, cores=cores, network_gbps=network_gbps, data=data
    )
    planning.show(found)
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
