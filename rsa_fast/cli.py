"""The command line, which is a thin table of commands.

Results go to stdout. The last line is one JSON object, but on a terminal it is replaced by a table
or a few lines. Progress and messages go to stderr.
"""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any, Literal

import click
from click.shell_completion import CompletionItem

from rsa_fast import terminal
from rsa_fast.datasets import DATASETS, name_of, own_rules
from rsa_fast.expected import expectations
from rsa_fast.methods import ABLATIONS, METHODS, check_name, installed_methods, short_name
from rsa_fast.pipelines.backends import BACKENDS
from rsa_fast.pipelines.files import json_text
from rsa_fast.pipelines.named import nearest

if TYPE_CHECKING:
    from rsa_fast.pipelines.layouts import Data
    from rsa_fast.pipelines.sources import Source
    from rsa_fast.recipes import Recipe

PredictSplit = Literal["all", "train", "test"]
Function = Callable[..., None]  # the function below click's decorators

FOLDER = click.Path(path_type=Path, file_okay=False)
PLACE = click.Path(path_type=Path)  # a folder, or a text file of paths
FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
NEW_FILE = click.Path(path_type=Path, dir_okay=False)
CHECKPOINT = click.Path(path_type=Path, exists=True)  # a file, or the folder of a run

# Copies of the names in tables of other modules. Those modules import torch, which would make help
# and the shell's completion slow.
FORMATS = ("torchvision", "timm", "detectron2", "safetensors", "onnx", "torch-export", "hf-timm")
FINETUNE_PRESETS = ("simclr", "swav", "barlow-twins", "vicreg")
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
    """One of a few names, which the shell completes. The error suggests the nearest name."""

    def __init__(self, noun: str, *names: str) -> None:
        super().__init__(names)
        self.name = noun

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in self.choices:
            raise ValueError(
                f"no {self.name} {value!r}{nearest(value, self.choices)}: "
                f"choose from {', '.join(self.choices)}"
            )
        return str(value)


class MethodName(Name):
    """The name of a method, or the path of a method's file."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        check_name(str(value))
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        names = super().shell_complete(ctx, param, incomplete)
        return names or [CompletionItem(incomplete, type="file")]


class GpuCount(click.IntRange):
    """A number of GPUs, or `auto` for all GPUs of this machine."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value != "auto":
            return int(super().convert(value, param, ctx))
        from torch.cuda import device_count

        if visible := device_count():
            return visible
        raise ValueError(
            "--gpus auto: torch finds no GPU; leave it out to train on the CPU, or see "
            "rsa-fast doctor"
        )


ONLY_JSON = "rsa_fast.only_json"  # the key of --json among click's values for an invocation


class Command(click.Command):
    """A command with --json, whose help shows its options in sections and ends with examples."""

    def __init__(
        self, name: str, *, examples: Sequence[str] = (), imports_torch: bool = True, **attrs: Any
    ) -> None:
        super().__init__(name, **attrs)
        # Below \b, click does not wrap lines.
        self.epilog = "\n  ".join(["\b\nFor example:", *examples])
        self.imports_torch = imports_torch
        self.params.append(
            click.Option(
                ["--json"],
                is_flag=True,
                expose_value=False,
                callback=lambda ctx, _, value: ctx.meta.update({ONLY_JSON: value}),
                help="Print only the result, as one JSON object.",
            )
        )

    def invoke(self, ctx: click.Context) -> Any:
        # Importing torch takes seconds. Until then, this line is the only sign of life. The
        # processes of a job do not write it, because the command that started them has written it.
        job = "TORCHELASTIC_RUN_ID" in os.environ
        person = sys.stderr.isatty()  # nobody waits for a log or a pipe
        if self.imports_torch and self.params and person and terminal.speaks() and not job:
            logging.getLogger("rsa_fast").info(header(ctx))
        if self.imports_torch:
            import_torch()
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def import_torch() -> None:
    """Import torch, and keep its objects out of the garbage collection.

    There are 400,000 of them, and they live until the process ends. A collection that looks through
    them takes 0.3 s. It would happen during the import, in training, and at the end of the process.
    """
    if "torch" not in sys.modules:
        gc.disable()
        import_module("torchvision")
        gc.freeze()
        gc.enable()


def header(ctx: click.Context) -> str:
    """A line about a command's work, its inputs and its output, from its options."""
    given = ctx.params
    parts = [f"rsa-fast {ctx.info_name}"]
    if "protocol" in given:
        parts[0] += f" {given['protocol']}"
    if "method" in given:
        method = given["method"] or given.get("ablation")
        parts.append(f"method {short_name(method) if method else method_unsaid(given)}")
    if given.get("checkpoint"):
        parts.append(f"encoder {given['checkpoint']}")
    images = given.get("folders") or given.get("data")
    if images := [images] if isinstance(images, Path) else list(images or ()):
        parts.append(f"images {', '.join(map(str, images))}")
    if given.get("out"):
        parts.append(f"out {given['out']}")
    elif images and "folders" in given and not (given["config"] or given["resume"]):
        data = images[0] if len(images) == 1 else images
        dataset, method, _ = chosen_names(
            given["dataset"], given["method"], None, given["ablation"]
        )
        out = default_out(given["name"], data, dataset, method, resume=False)
        parts.append(f"out {out}")
    if given.get("gpus"):
        parts.append(f"{given['gpus']} {given.get('gpu', 'GPU')}")
    elif given.get("nproc"):
        parts.append(f"device cpu, {given['nproc']} processes")
    else:
        parts.append(f"device {given.get('device') or 'auto'}")
    return "   ".join(parts)


def method_unsaid(given: dict[str, Any]) -> str:
    """The method of a command line that does not name one."""
    if given.get("config"):
        return f"from {given['config']}"
    return "of the run" if given.get("resume") else "rsa"


def section(title: str, *options: Callable[[Function], Function]) -> Callable[[Function], Function]:
    """A decorator that adds these options of click to a command, under a title in its help."""

    def add(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
            newest = vars(function)["__click_params__"][-1]  # click collects the options here
            newest.section = title
        return function

    return add


class Group(click.Group):
    """The commands. An error ends a command with exit code 1 and a message without a traceback.

    For an unexpected error, the traceback is saved to a file, and the message gives its path.
    """

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # click handles its own
        except Exception as error:
            if ctx.params["debug"]:
                raise
            if isinstance(error, ValueError | OSError | FloatingPointError):
                raise click.ClickException(str(error)) from error
            with NamedTemporaryFile("w", prefix="rsa-fast-", suffix=".txt", delete=False) as file:
                traceback.print_exc(file=file)
            raise click.ClickException(
                f"{type(error).__name__}: {error}\nThis error is unexpected. Its traceback is in "
                f"{file.name}; rsa-fast --debug COMMAND ... prints it instead."
            ) from error


@contextmanager
def exit_if_stopped(ctx: click.Context) -> Iterator[None]:
    """End the command with its own exit code if a signal stops the run in this block."""
    from rsa_fast.distributed import STOPPED_EXIT_CODE
    from rsa_fast.training.engine import StoppedError

    try:
        yield
    except StoppedError as stopped:
        logging.getLogger("rsa_fast").warning(str(stopped))
        ctx.exit(STOPPED_EXIT_CODE)


class StderrHandler(logging.Handler):
    """Writes log messages to sys.stderr, with the rank in front if there are several.

    Both are looked up for every message, because test runners replace sys.stderr, and a SLURM step
    sets WORLD_SIZE only when the ranks meet.
    """

    def emit(self, record: logging.LogRecord) -> None:
        several_ranks = int(os.environ.get("WORLD_SIZE", 1)) > 1
        rank = f"[rank {os.environ.get('RANK')}] " if several_ranks else ""
        text = self.format(record)
        # If the terminal was closed, the message is lost, but the run continues.
        with suppress(OSError):
            if sys.stderr.isatty():
                text = terminal.wrapped(text)
            click.echo(f"{rank}{text}", err=True)


STDERR_HANDLER = StderrHandler()  # one for all invocations, so that no message is printed twice


DATA = click.option(
    "--data",
    required=True,
    multiple=True,
    type=PLACE,
    help="Folder with the images, or a text file with one path per line. Can be repeated.",
)
VAL_FRACTION = click.option(
    "--val-fraction",
    type=float,
    help="If there is no val/ or test/, hold out this fraction of the labelled training images "
    "for scores.",
)
OUT = click.option("--out", required=True, type=FOLDER, help="Run folder to write.")
DATASET = click.option(
    "--dataset",
    type=Name("dataset", *DATASETS),
    metavar="NAME",
    help=f"Dataset of the recipe: {', '.join(DATASETS)}. Without it and --config, auto chooses "
    "from the images.",
)
METHOD = click.option(
    "--method",
    type=MethodName("method", *METHODS),
    metavar="NAME",
    help=f"Method of the recipe: {', '.join(METHODS)}, or the path of a method's .py file.",
)
CONFIG = click.option(
    "--config", type=FILE, help="YAML file with recipe fields, such as a run's recipe.yaml."
)
SET = click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe field. Can be repeated.",
)
EPOCHS = click.option("--epochs", type=int, help="Override the recipe's epochs.")
BATCH_SIZE = click.option("--batch-size", type=int, help="Override the recipe's global batch size.")
THREADS = click.option(
    "--threads",
    "--workers",
    type=int,
    help="Number of the loader's threads. By default a rank's share of the cores, at most 16.",
)
BACKEND = click.option(
    "--backend",
    type=Name("backend", "auto", *BACKENDS),
    metavar="NAME",
    help=f"Backend that loads the images: auto, {', '.join(BACKENDS)}.",
)
KEY = click.option(
    "--key",
    metavar="NAME",
    help="Network to use if the file has several, named by a part of its keys, such as teacher. "
    "Default: the one that is trained by gradient.",
)


def answer(result: Any, show: Callable[[], None] | None = None) -> None:
    """Print the result of the current command. In a job, only the first process prints it.

    On a terminal, this prints `show()` or, without it, a few lines. Elsewhere it prints `show()`
    and then the result as one JSON object on the last line. With --json it prints only the object.
    """
    if not terminal.speaks():
        return
    context = click.get_current_context()
    only_json, person = context.meta.get(ONLY_JSON, False), sys.stdout.isatty()
    if show and not only_json:
        show()
    if only_json or not person:
        click.echo(json_text(result))
    elif not show and context.info_name:
        click.echo(terminal.result_lines(context.info_name, result))


class Tool(click.Command):
    """A command of tools/. Only its summary is here, so that the list of commands is quick."""

    def __init__(self, name: str, module: str, summary: str) -> None:
        super().__init__(name, help=summary)
        self.module = module

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        command: click.Command = import_module(f"rsa_fast.tools.{self.module}").main
        return command.make_context(info_name, args, parent, **extra)


@click.group(
    cls=Group,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "show_default": True,
        "max_content_width": sys.maxsize,  # help is as wide as the terminal
    },
    epilog='For completion in bash: eval "$(_RSA_FAST_COMPLETE=bash_source rsa-fast)". '
    "Other shells: zsh_source, fish_source.",
)
@click.option("--debug", is_flag=True, help="Print the traceback of an error.")
@click.version_option(package_name="rsa-fast")
def main(debug: bool) -> None:
    """Pre-train ResNets fast, with RSA and other self-supervised methods."""
    log = logging.getLogger("rsa_fast")
    log.setLevel(logging.INFO)
    log.addHandler(STDERR_HANDLER)  # does nothing if it was already added
    # Hide warnings of torch that do not help the user. They repeat the settings of the loader, or
    # name addresses that were tried before the right one.
    for message in ("This DataLoader will create", "'pin_memory' argument is set as true"):
        warnings.filterwarnings("ignore", message, UserWarning)
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # torch reads this when it is imported


@main.command(
    examples=(
        "rsa-fast train my_photos",
        "rsa-fast train data/cifar10 --dataset cifar10 --method byol --epochs 100",
        "rsa-fast train my_photos --gpus auto --out runs/photos",
        "rsa-fast train --resume --out runs/photos",
    )
)
@click.argument("folders", nargs=-1, type=PLACE, metavar="[DATA]...")
@section(
    "Recipe",
    DATASET,
    METHOD,
    click.option(
        "--ablation",
        type=Name("ablation", *ABLATIONS),
        help="Row of the RSA paper's Table 1, instead of a method.",
    ),
    CONFIG,
    SET,
    EPOCHS,
    BATCH_SIZE,
    click.option("--size", type=int, metavar="PX", help="Override the side of the views."),
    click.option(
        "--arch",
        metavar="NAME",
        help="Override the network with a ResNet, timm/NAME, or FILE.py:FUNCTION.",
    ),
    click.option(
        "--lr",
        type=float,
        help="Peak learning rate (the field peak_lr), instead of base_lr * batch size / 256.",
    ),
    click.option(
        "--seed",
        type=int,
        help="Seed of the initialisation, the sample order and the augmentations.",
    ),
)
@section(
    "Images",
    click.option("--data", multiple=True, type=PLACE, help="The same as DATA."),
    click.option(
        "--name", help="Name of the data in results. Default: the dataset; for auto, the folder."
    ),
    VAL_FRACTION,
    click.option(
        "--download", is_flag=True, help="First download CIFAR-10, CIFAR-100 or STL-10 to DATA."
    ),
    BACKEND,
    THREADS,
    click.option(
        "--on-bad-image",
        type=Name("policy", "stop", "skip"),
        help="What to do with an image that cannot be read: stop (default) or skip.",
    ),
    click.option(
        "--unlabelled",
        is_flag=True,
        default=None,
        help="Train on all images below DATA as one set without classes.",
    ),
    click.option("--no-eval", is_flag=True, help="Train without scores."),
)
@section(
    "Run",
    click.option(
        "--out",
        type=FOLDER,
        help="Run folder to write. Default: runs/NAME-METHOD with the next free number, or with "
        "--resume the newest one.",
    ),
    click.option(
        "--dry-run",
        is_flag=True,
        help="Only print the resolved recipe and the numbers derived from it.",
    ),
    click.option(
        "--resume",
        is_flag=True,
        help="Continue exactly from the newest checkpoint in --out, or start if there is none. "
        "Without --dataset and --config, the recipe is that of the run. Without DATA, the images "
        "are those of the run. A larger --epochs lengthens the run.",
    ),
    click.option(
        "--resume-from",
        type=click.Path(path_type=Path, dir_okay=False),
        metavar="CHECKPOINT",
        help="Continue from this checkpoint. If it is the name of a checkpoint in --out, later "
        "ones are deleted. A checkpoint of another run needs a new --out.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Resume even if recipe or data differ. The differences are printed.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the run in --out."),
    click.option(
        "--init-from",
        type=CHECKPOINT,
        help="Start from the encoder in a file or a run's folder. It can be any file that eval "
        "reads. The heads are also loaded from a checkpoint of the same method and shapes. "
        "Ignored when a run is resumed.",
    ),
    KEY,
    click.option(
        "--wandb", is_flag=True, default=None, help="Also send the records to Weights & Biases."
    ),
)
@section(
    "Processes",
    click.option(
        "--gpus",
        type=GpuCount(1),
        metavar="N|auto",
        help="Number of this machine's GPUs to use, with one process each; auto: all of them.",
    ),
    click.option(
        "--nproc", type=click.IntRange(1), help="Train on the CPU with this number of processes."
    ),
    click.option(
        "--max-restarts",
        type=click.IntRange(0),
        default=0,
        help="How many times to restart from the newest checkpoint after a process died.",
    ),
)
@click.pass_context
def train(
    ctx: click.Context,
    folders: tuple[Path, ...],
    dataset: str | None,
    method: str | None,
    ablation: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    size: int | None,
    arch: str | None,
    lr: float | None,
    seed: int | None,
    data: tuple[Path, ...],
    name: str | None,
    val_fraction: float | None,
    download: bool,
    backend: str | None,
    threads: int | None,
    on_bad_image: str | None,
    unlabelled: bool | None,
    no_eval: bool,
    out: Path | None,
    dry_run: bool,
    resume: bool,
    resume_from: Path | None,
    force: bool,
    overwrite: bool,
    init_from: Path | None,
    key: str | None,
    wandb: bool | None,
    gpus: int | None,
    nproc: int | None,
    max_restarts: int,
) -> None:
    """Pre-train an encoder on the images in DATA and score it.

    `rsa-fast train my_photos` is enough. `rsa-fast recipes auto` explains which settings it
    chooses. DATA is a folder or a text file of paths, or several of them. The encoder is scored by
    kNN during training, and by kNN and a linear classifier at the end.

    Exit code 75: a signal (TERM, USR1, INT) stopped the run, which --resume continues exactly.
    """
    refuse_both("--resume", resume, "--overwrite", overwrite)
    refuse_both("--resume-from", resume_from, "--overwrite", overwrite)
    refuse_both("--gpus", gpus, "--nproc", nproc)
    refuse_both("DATA", folders, "--data", data)
    resume = resume or resume_from is not None
    if force and not resume:
        raise click.UsageError("--force is only valid with --resume")
    if key and not init_from:
        raise click.UsageError("--key is only valid with --init-from")
    if overwrite and not out:
        raise click.UsageError("--overwrite needs --out, the run to replace")
    arguments = sys.argv[1:]
    origin = out  # the run from which a resumed one takes its recipe and images
    if resume_from and resume_from.is_file() and not (out and (out / "recipe.yaml").is_file()):
        origin = resume_from.absolute().parent.parent
        if not out:
            out = origin
            arguments += ["--out", str(out)]
    places = folders or data
    if resume and origin and not places:
        from rsa_fast.training.run_folder import stored_places

        places = tuple(stored_places(origin))
    if not places:
        raise click.UsageError("give the folder with the images: rsa-fast train my_photos")
    if download and len(places) > 1:
        raise click.UsageError("--download needs one folder for the images")
    images: Data = places[0] if len(places) == 1 else places
    from rsa_fast.distributed import (
        check_gpus,
        is_launched,
        launch,
        launcher_variables,
    )
    from rsa_fast.pipelines import layouts

    processes = gpus or nproc
    to_launch = processes and not dry_run and not is_launched(os.environ, processes)
    if gpus and to_launch:
        check_gpus(gpus)
    chosen_dataset, chosen_method, _ = chosen_names(dataset, method, config, ablation)
    layout = binary_layout(chosen_dataset, places[0]) if download else ""
    if out is None:
        if int(launcher_variables(os.environ).get("WORLD_SIZE", 1)) > 1:
            raise click.UsageError("several processes need --out: they write to one folder")
        out = default_out(name, images, chosen_dataset, chosen_method, resume=resume)
        arguments += ["--out", str(out)]
        origin = out
    stored = None
    if resume and not (dataset or config) and origin and (origin / "recipe.yaml").is_file():
        stored = origin / "recipe.yaml"
    overrides = {
        "epochs": epochs,
        "batch_size": batch_size,
        "views.size_px": size,
        "arch": arch,
        "peak_lr": lr,
        "seed": seed,
        "name": name,
        "val_fraction": val_fraction,
        "backend": backend,
        "threads": threads,
        "on_bad_image": on_bad_image,
        "unlabelled": unlabelled,
        "evaluate": False if no_eval else None,
        "wandb": wandb,
        "device": "cuda" if gpus else "cpu" if nproc else None,
    }
    recipe = recipe_of(
        dataset=dataset,
        method=method,
        config=config,
        sets=sets,
        overrides=overrides,
        ablation=ablation,
        data=images,
        stored=stored,
    )
    if download:
        layouts.download(places[0], layout)
    if dry_run:
        source = recipe.open_source(images, "pretrain")
        logging.getLogger("rsa_fast").info(layouts.inventory(source))
        print_dry_run(recipe, source, processes or 1)
        return
    if processes and to_launch:
        recipe.check_batch(processes)
        ctx.exit(launch(processes, max_restarts, arguments))
    from rsa_fast.training import engine

    with exit_if_stopped(ctx):
        result = engine.train(
            recipe,
            images,
            out,
            resume=resume,
            resume_from=resume_from,
            overwrite=overwrite,
            init_from=init_from,
            key=key,
            force=force,
        )
    if result:
        answer(result)


def default_out(name: str | None, data: Data, dataset: str, method: str, *, resume: bool) -> Path:
    """The folder runs/NAME-METHOD with the next free number or, to resume, the newest one."""
    name = name or (name_of(data) if dataset == "auto" else dataset)
    base = Path("runs") / f"{name}-{short_name(method)}"
    runs = base.parent.iterdir() if base.parent.is_dir() else ()
    counted = re.compile(re.escape(base.name) + r"(?:-(\d+))?")
    matches = [match for match in map(counted.fullmatch, (run.name for run in runs)) if match]
    newest = max((int(match[1] or 1) for match in matches), default=0)
    number = max(1, newest) if resume else newest + 1
    return base if number == 1 else base.with_name(f"{base.name}-{number}")


def binary_layout(dataset: str, data: Path) -> str:
    """torchvision's name of a dataset to download. Raises ValueError if it has no download."""
    if not (layout := DATASETS[dataset].binary_layout):
        known = ", ".join(name for name, row in DATASETS.items() if row.binary_layout)
        raise ValueError(
            f"--download supports {known}; put the images of {dataset} under {data} yourself"
        )
    return layout


def refuse_both(option: str, value: object, other: str, other_value: object) -> None:
    if value and other_value:
        raise click.UsageError(f"{option} and {other} cannot be combined")


def print_dry_run(recipe: Recipe, source: Source, processes: int) -> None:
    """Print the recipe as YAML, and the numbers derived from it as JSON.

    Raises ValueError if the run could not start with its network, labels, batch size or order.
    """
    from dataclasses import asdict

    from rsa_fast.networks import check_arch
    from rsa_fast.recipes import dump_yaml, resolve

    manifest = source.manifest
    images = len(manifest)
    check_arch(recipe)
    recipe.check_labels(manifest.labelled, len(manifest.classes))
    recipe.order_of(source, world_size=processes)
    numbers = {"images": images, **asdict(resolve(recipe, images, processes))}

    def show() -> None:
        click.echo(dump_yaml(recipe))
        if sys.stdout.isatty():
            for name, number in numbers.items():
                click.echo(f"{name:16} {terminal.digits(number)}")

    answer(numbers, show)


def recipe_of(
    *,
    dataset: str | None,
    method: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    overrides: Mapping[str, object],
    ablation: str | None = None,
    data: Data | None = None,
    stored: Path | None = None,
) -> Recipe:
    """The recipe of a command line.

    It comes from dataset and method, --config, --ablation, --set, and options such as --epochs.
    Later ones replace earlier ones. `overrides` maps the names of recipe fields to the values of
    those options, or to None if an option is not given. The dataset auto chooses its numbers from
    `data`. `stored` is a run's recipe.yaml, which is read instead of dataset, method and --config.
    """
    from rsa_fast.recipes import build_recipe, flatten, parse_set, read_yaml, stored_recipe

    dataset, method, ablation_fields = chosen_names(dataset, method, config or stored, ablation)
    fields: dict[str, Any] = {}
    if stored:
        fields = dict(flatten(stored_recipe(read_yaml(stored), str(stored)).model_dump()))
    fields |= {"dataset": dataset, "method": method, **ablation_fields, **parse_set(sets)}
    fields |= {key: value for key, value in overrides.items() if value is not None}
    return build_recipe(dataset, method, config, fields, data=data)


def chosen_names(
    dataset: str | None, method: str | None, config: Path | None, ablation: str | None
) -> tuple[str, str, dict[str, Any]]:
    """The dataset and the method of a command line, and the fields of the ablation."""
    config_fields = {}
    if config:
        from rsa_fast.recipes import read_yaml

        config_fields = read_yaml(config)
    ablation_fields: dict[str, Any] = {}
    if ablation:
        ablated_method, ablation_fields = ABLATIONS[ablation]
        if method and method != ablated_method:
            raise click.UsageError(f"--ablation {ablation} is for {ablated_method}, not {method}")
        method = ablated_method
    dataset = dataset or config_fields.get("dataset") or "auto"
    method = method or config_fields.get("method") or "rsa"
    return dataset, method, ablation_fields


def complete_recipe(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
    names = [*DATASETS, *(f"{dataset}/{method}" for dataset in DATASETS for method in METHODS)]
    return [name for name in names if name.startswith(incomplete)]


@main.command(
    examples=(
        "rsa-fast recipes cifar100/byol",
        "rsa-fast recipes auto --data my_photos",
    ),
    imports_torch=False,
)
@click.argument("name", required=False, shell_complete=complete_recipe)
@click.option("--data", type=PLACE, help="Images for which to show the recipe of auto.")
def recipes(name: str | None, data: Path | None) -> None:
    """List the recipes, or show one with the source of every number.

    `rsa-fast recipes cifar100` shows RSA's recipe, `rsa-fast recipes cifar100/byol` that of BYOL.
    `rsa-fast recipes auto` shows the rules for your own images, and with --data their choices.
    """
    if data and (not name or name.partition("/")[0] != "auto"):
        raise click.UsageError("--data is only valid for the recipe auto")
    if not name:
        list_recipes()
        return
    import_torch()
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rsa_fast.recipes import build_recipe, flatten, meanings, own_row, recipe_type, row

    dataset, _, method = name.partition("/")
    if dataset == "auto" and not data:
        rules = own_rules()
        table = Table("field", "rule", "reason", title="auto, for your own images")
        for rule in rules:
            table.add_row(*rule)
        answer({"auto": {field: rule for field, rule, _ in rules}}, partial(Console().print, table))
        return
    recipe = build_recipe(dataset, method or "rsa", data=data)
    sources = row(dataset, recipe.method, own_row(data) if data else None)
    meaning = meanings(recipe_type(recipe.method))
    table = Table(
        *("field", "value", "meaning and source"),
        title=f"{dataset}/{short_name(recipe.method)}",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.columns[0].no_wrap, table.columns[1].max_width = True, 16
    for field, value in flatten(recipe.model_dump()):
        head, _, tail = field.partition(".")
        explained = Text(meaning.get(field, ""))
        # The row contains only some of the numbers of the views.
        if head in sources and (not tail or tail in sources[head].value):
            explained.append(f"\nsource: {sources[head].source}", "dim")
        table.add_row(Text(field), Text(plain(value)), explained)
    answer(recipe.model_dump(mode="json"), partial(Console().print, table))


def list_recipes() -> None:
    """List the expected accuracy and cost of each recipe, and the command that trains it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    methods = [*METHODS, *installed_methods()]
    rows = expectations()
    table = Table("recipe", "top-1 %", "GPU-hours", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = table.columns[2].no_wrap = True
    for row in rows:
        top1 = f"{row.top1.value} ({row.top1.source})" if row.top1 else "not measured"
        several = f" on {row.gpus} GPUs" if row.gpus > 1 else ""
        table.add_row(row.name, top1, f"{row.gpu_hours:g}{several}")
    notes = (
        "To train one: rsa-fast train --dataset DATASET --method METHOD --data DATA --gpus GPUS\n"
        "Top-1 is that of a linear classifier, as published for runs of this length. GPU-hours are "
        "predicted for V100s of 32 GB (rsa-fast plan).\n"
        f"datasets: {', '.join(DATASETS)}\nmethods: {', '.join(methods)}"
    )
    listed = [
        {
            "recipe": row.name,
            "top1": row.top1 and row.top1.value,
            "source": row.top1 and row.top1.source,
            "gpus": row.gpus,
            "gpu_hours": row.gpu_hours,
            "command": row.command,
        }
        for row in rows
    ]

    def show() -> None:
        Console().print(table)
        click.echo(notes)

    answer({"datasets": list(DATASETS), "methods": methods, "recipes": listed}, show)


def plain(value: Any) -> str:
    """The text of a recipe's value, such as `0.2, 1` for a pair."""
    if isinstance(value, tuple | list):
        return ", ".join(map(plain, value)) or "none"
    if isinstance(value, dict):
        return " ".join(plain(item) for item in value.values() if item is not None)
    if value is None or value == "":
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@main.command(
    "eval",
    examples=(
        "rsa-fast eval knn --checkpoint runs/photos",
        "rsa-fast eval linear --checkpoint runs/photos --data more_photos --labels 10",
    ),
)
@click.argument("protocol", type=Name("protocol", "knn", "linear"))
@click.option(
    "--checkpoint",
    required=True,
    type=CHECKPOINT,
    help="A run's folder or checkpoints/step_*.pt, or another project's encoder.",
)
@KEY
@click.option(
    "--data",
    multiple=True,
    type=PLACE,
    help="Folder with labelled train and test images, or a text file of paths. Default: the "
    "images of the run. Can be repeated, and then each is scored separately.",
)
@click.option(
    "--train",
    "train_data",
    multiple=True,
    type=PLACE,
    help="Class folders of the training images, instead of --data. Can be repeated.",
)
@click.option(
    "--test",
    "test_data",
    multiple=True,
    type=PLACE,
    help="Class folders of the test images. Can be repeated.",
)
@VAL_FRACTION
@click.option(
    "--labels",
    metavar="PERCENT",
    help="Training images of each class to use: 1 to 100 percent, or a fraction below 1. "
    "Default: all.",
)
@click.option(
    "--dataset",
    type=Name("dataset", *DATASETS),
    metavar="NAME",
    help="Size and normalise images as for this dataset, not as in the run.",
)
@click.option(
    "--resize-px",
    metavar="PX",
    help="Resize the short side of test images to this before the centre crop; native: do not "
    "resize.",
)
@click.option(
    "--set",
    "sets",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a recipe field, such as views.size_px, views.mean and views.std for another "
    "project's encoder. Can be repeated.",
)
@section(
    "kNN",
    click.option(
        "--k", type=click.IntRange(1), help="Number of neighbours, instead of 200 and 20."
    ),
    click.option(
        "--temperature",
        type=click.FloatRange(0, min_open=True),
        help="Temperature of the neighbours' votes, instead of .1 and .07.",
    ),
)
@section(
    "Linear classifier",
    click.option(
        "--protocol",
        "variant",
        type=Name("protocol", "fast", "rsa-small", "rsa-large"),
        help="Protocol of the classifier. Default: fast.",
    ),
    click.option(
        "--epochs",
        type=click.IntRange(1),
        help="Epochs of rsa-small (default 100) or rsa-large (40). "
        "The learning rate drops after the same fractions.",
    ),
    click.option(
        "--bn",
        type=Name("mode", "eval", "recalibrate"),
        help="BatchNorm in rsa-small: frozen (eval, the default), or with statistics of the "
        "training images (recalibrate, as in the RSA code).",
    ),
    click.option(
        "--nesterov/--no-nesterov",
        default=None,
        help="Nesterov momentum in rsa-small. It is on by default, as in the RSA code.",
    ),
)
def evaluate(
    protocol: Literal["knn", "linear"],
    checkpoint: Path,
    key: str | None,
    data: tuple[Path, ...],
    train_data: tuple[Path, ...],
    test_data: tuple[Path, ...],
    val_fraction: float | None,
    labels: str | None,
    dataset: str | None,
    resize_px: str | None,
    sets: tuple[str, ...],
    k: int | None,
    temperature: float | None,
    variant: Literal["fast", "rsa-small", "rsa-large"] | None,
    epochs: int | None,
    bn: Literal["eval", "recalibrate"] | None,
    nesterov: bool | None,
) -> None:
    """Score an encoder by kNN or by a linear classifier.

    kNN is measured twice, with k=200 T=.1 and k=20 T=.07. The fast linear classifier is trained on
    features that are computed once. rsa-small and rsa-large are trained on augmented images. They
    are the RSA paper's protocols for small datasets and for ImageNet.
    """
    from rsa_fast.evaluation.evaluate import evaluate as run
    from rsa_fast.evaluation.evaluate import show
    from rsa_fast.recipes import parse_set

    scores = run(
        checkpoint,
        (data if len(data) > 1 else data[0]) if data else None,
        protocol,
        train=train_data or None,
        test=test_data or None,
        each=len(data) > 1,
        k=k,
        temperature=temperature,
        labels=labels,
        overrides=parse_set(sets),
        variant=variant,
        dataset=dataset,
        resize_px=resize_px,
        epochs=epochs,
        bn=bn,
        nesterov=nesterov,
        val_fraction=val_fraction,
        key=key,
    )
    answer(scores, partial(show, scores["folders"]) if "folders" in scores else None)


@main.command(examples=("rsa-fast detect --checkpoint runs/imagenet --data coco --out runs/coco",))
@click.option(
    "--checkpoint",
    required=True,
    type=CHECKPOINT,
    help="A ResNet-50: a run's folder or checkpoints/step_*.pt, or another project's encoder.",
)
@KEY
@click.option(
    "--data",
    required=True,
    type=FOLDER,
    help="COCO folder: train2017/, val2017/, annotations/instances_*2017.json.",
)
@OUT
@click.option(
    "--schedule",
    type=Name("schedule", "1x", "2x"),
    default="1x",
    help="90,000 steps at a learning rate of .02 (1x), or 180,000 at .03 (2x).",
)
@click.option(
    "--steps",
    type=click.IntRange(1),
    help="Shorten the schedule. The learning rate drops after the same fractions.",
)
@click.option(
    "--batch-size",
    type=click.IntRange(1),
    default=16,
    help="Images per step. The learning rate is proportional to it.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Seed of the new layers, the order, flips, image sizes and proposals.",
)
@click.option(
    "--workers", type=click.IntRange(0), default=4, help="Number of processes that read images."
)
@click.option(
    "--device",
    type=Name("device", "auto", "cpu", "cuda"),
    default="auto",
    help="Where to train; auto: the GPU if there is one.",
)
@click.option(
    "--precision",
    type=Name("precision", "auto", "fp32", "bf16", "fp16"),
    default="auto",
    help="Precision of the computation.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue from the newest checkpoint in --out, or start if there is none.",
)
@click.option("--overwrite", is_flag=True, help="Replace the run in --out.")
@click.pass_context
def detect(
    ctx: click.Context,
    checkpoint: Path,
    key: str | None,
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
    """Fine-tune an encoder on COCO as Mask R-CNN R50-FPN.

    The result is AP, AP50 and AP75 of boxes and masks, in percent.
    """
    refuse_both("--resume", resume, "--overwrite", overwrite)
    from rsa_fast.evaluation.detection import detect as run

    with exit_if_stopped(ctx):
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
            key=key,
        )
    answer(result)


@main.command(
    examples=(
        "rsa-fast finetune --checkpoint runs/photos --labels 10 --out runs/tuned",
        "rsa-fast finetune --resume --out runs/tuned",
    )
)
@section(
    "Encoder and images",
    click.option(
        "--checkpoint",
        type=CHECKPOINT,
        help="Run folder, whose newest checkpoint is read, or a file with an encoder of this or "
        "another project. Not needed to resume.",
    ),
    KEY,
    click.option(
        "--data",
        multiple=True,
        type=PLACE,
        help="Folder with labelled images, or a text file of paths. Can be repeated. Default: the "
        "images of the checkpoint's run.",
    ),
    VAL_FRACTION,
    click.option(
        "--dataset",
        type=Name("dataset", *DATASETS),
        metavar="NAME",
        help="Size and normalise images as for this dataset, not as in the run.",
    ),
)
@section(
    "Recipe",
    click.option(
        "--labels",
        metavar="PERCENT",
        help="Labels of each class to use: 1 to 100 percent, or a fraction below 1. Default: all.",
    ),
    click.option(
        "--images-list",
        type=FILE,
        help="Text file with the names of the images to use, one per line, instead of --labels.",
    ),
    click.option(
        "--preset",
        type=Name("preset", *FINETUNE_PRESETS),
        default="simclr",
        help="Published numbers to use.",
    ),
    click.option(
        "--freeze", is_flag=True, help="Train only the classifier, on the encoder in eval mode."
    ),
    EPOCHS,
    BATCH_SIZE,
    click.option("--lr", type=float, help="Peak learning rate of the encoder (peak_lr)."),
    click.option(
        "--head-lr", type=float, help="Peak learning rate of the classifier (head_peak_lr)."
    ),
    click.option("--seed", type=int, help="Seed of the labels, the order and the augmentations."),
    SET,
)
@section(
    "Run",
    OUT,
    click.option(
        "--resume",
        is_flag=True,
        help="Continue exactly from the newest checkpoint in --out, or start if there is none. "
        "Without --checkpoint, the recipe is that of the run.",
    ),
    click.option(
        "--force",
        is_flag=True,
        help="Resume even if recipe or data differ. The differences are printed.",
    ),
    click.option("--overwrite", is_flag=True, help="Replace the run in --out."),
)
@section(
    "Processes",
    click.option(
        "--gpus",
        type=GpuCount(1),
        metavar="N|auto",
        help="Number of this machine's GPUs to use, with one process each; auto: all of them.",
    ),
    click.option(
        "--nproc", type=click.IntRange(1), help="Train on the CPU with this number of processes."
    ),
)
@click.pass_context
def finetune(
    ctx: click.Context,
    checkpoint: Path | None,
    key: str | None,
    data: tuple[Path, ...],
    val_fraction: float | None,
    dataset: str | None,
    labels: str | None,
    images_list: Path | None,
    preset: str,
    freeze: bool,
    epochs: int | None,
    batch_size: int | None,
    lr: float | None,
    head_lr: float | None,
    seed: int | None,
    sets: tuple[str, ...],
    out: Path,
    resume: bool,
    force: bool,
    overwrite: bool,
    gpus: int | None,
    nproc: int | None,
) -> None:
    """Train an encoder and a linear classifier on labelled images.

    The run works like those of `train`: folder, --resume and signals are the same. The result is
    the accuracy of the classifier on the test images. `rsa-fast predict` uses the classifier.
    """
    refuse_both("--resume", resume, "--overwrite", overwrite)
    refuse_both("--gpus", gpus, "--nproc", nproc)
    refuse_both("--labels", labels, "--images-list", images_list)
    if force and not resume:
        raise click.UsageError("--force is only valid with --resume")
    if not (checkpoint or resume):
        raise click.UsageError("give the encoder to start from: --checkpoint RUN")
    from rsa_fast.distributed import check_gpus, is_launched, launch

    processes = gpus or nproc
    if processes and not is_launched(os.environ, processes):
        if gpus:
            check_gpus(gpus)
        ctx.exit(launch(processes, 0, sys.argv[1:]))
    from rsa_fast.evaluation.finetune import finetune as run
    from rsa_fast.recipes import parse_set

    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "peak_lr": lr,
        "head_peak_lr": head_lr,
        "seed": seed,
        "val_fraction": val_fraction,
        "device": "cuda" if gpus else "cpu" if nproc else None,
    }
    with exit_if_stopped(ctx):
        result = run(
            checkpoint,
            data or None,
            out,
            labels=labels,
            images_list=images_list,
            preset=preset,
            freeze_encoder=freeze,
            dataset=dataset,
            overrides=parse_set(sets) | {k: v for k, v in options.items() if v is not None},
            resume=resume,
            overwrite=overwrite,
            force=force,
            key=key,
        )
    if result:
        answer(result)


@main.command(
    examples=("rsa-fast predict --checkpoint runs/tuned --data new_photos --out classes.csv",)
)
@click.option(
    "--checkpoint",
    required=True,
    type=CHECKPOINT,
    help="Run folder of finetune, whose newest checkpoint is read, or one of its checkpoints.",
)
@DATA
@click.option("--out", required=True, type=NEW_FILE, help="The .csv file to write.")
@click.option(
    "--top", type=click.IntRange(1), default=1, help="Number of most probable classes to write."
)
@click.option(
    "--split",
    type=Name("split", "all", "train", "test"),
    default="all",
    help="Images to use: all below the folder, or those for training or testing. For packed "
    "images, all is not possible.",
)
def predict(
    checkpoint: Path, data: tuple[Path, ...], out: Path, top: int, split: PredictSplit
) -> None:
    """Write the class of every image, with its probability, to a csv file."""
    from rsa_fast.evaluation.predict import predict as run

    result = run(checkpoint, data, out, top=top, split=split)
    answer(result)


EMBEDDED = section(
    "Images",
    click.option(
        "--data",
        multiple=True,
        type=PLACE,
        help="Folder with the images, or a text file of paths. Can be repeated. Default: the "
        "images of the checkpoint's run.",
    ),
    click.option(
        "--split",
        type=Name("split", "pretrain", "train", "test"),
        default="pretrain",
        help="Images to use: all except those for testing, only the labelled ones among them, or "
        "those for testing.",
    ),
    click.option(
        "--unlabelled",
        is_flag=True,
        default=None,
        help="Use all images below DATA as one set without classes. Default: as in the run.",
    ),
    click.option(
        "--dataset",
        type=Name("dataset", *DATASETS),
        metavar="NAME",
        help="Size and normalise images as for this dataset, not as in the run.",
    ),
    click.option(
        "--resize-px",
        metavar="PX",
        help="Resize the short side to this before the centre crop; native: do not resize.",
    ),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a recipe field that eval reads, such as views.mean. Can be repeated.",
    ),
)


@main.command(
    examples=(
        "rsa-fast embed --checkpoint runs/photos --out embeddings.csv",
        "rsa-fast embed --checkpoint runs/photos --data new_photos --out new.npz",
    )
)
@click.option(
    "--checkpoint",
    required=True,
    type=CHECKPOINT,
    help="A run's folder or checkpoints/step_*.pt, or another project's encoder.",
)
@KEY
@EMBEDDED
@click.option(
    "--out",
    required=True,
    type=NEW_FILE,
    help="The file to write. Its name must end in .npz, .npy, .parquet or .csv.",
)
def embed(
    checkpoint: Path, data: tuple[Path, ...], out: Path, sets: tuple[str, ...], **options: Any
) -> None:
    """Write the features of all images to a file, with one row per image.

    A row contains the image's path, its class if there is one, and the encoder's features as
    float32. The rows are in the order of the paths, whatever the number of processes.
    """
    from rsa_fast.evaluation.embed import embed as run
    from rsa_fast.recipes import parse_set

    result = run(checkpoint, data or None, out, overrides=parse_set(sets), **options)
    answer(result)


@main.command(
    examples=(
        "rsa-fast neighbours --checkpoint runs/photos --out neighbours.html",
        "rsa-fast neighbours --embeddings embeddings.npz --out neighbours.html",
    )
)
@click.option(
    "--checkpoint",
    type=CHECKPOINT,
    help="A run's folder or checkpoints/step_*.pt, or another project's encoder.",
)
@KEY
@click.option(
    "--embeddings", type=FILE, help="A file that rsa-fast embed wrote, instead of --checkpoint."
)
@EMBEDDED
@click.option("--out", required=True, type=NEW_FILE, help="The .html page to write.")
@click.option(
    "--queries",
    type=click.IntRange(1),
    default=16,
    help="Number of images whose neighbours are shown.",
)
@click.option(
    "--nearest", type=click.IntRange(1), default=8, help="Number of neighbours of each image."
)
@click.option(
    "--points",
    type=click.IntRange(0),
    default=2000,
    help="Largest number of images in the map; 0: no map.",
)
@click.option("--seed", type=click.IntRange(0), default=0, help="Seed of the images and the map.")
def neighbours(
    checkpoint: Path | None,
    data: tuple[Path, ...],
    out: Path,
    sets: tuple[str, ...],
    **options: Any,
) -> None:
    """Show images next to those that an encoder finds most similar, and a map of all images.

    The page is one file that contains the images. The map needs scikit-learn.
    """
    from rsa_fast.insight.neighbours import neighbours as run
    from rsa_fast.recipes import parse_set

    result = run(checkpoint, data or None, out, overrides=parse_set(sets), **options)
    answer(result)


@main.command(
    examples=(
        "rsa-fast preview --data my_photos --out views.png",
        "rsa-fast preview --data my_photos --set views.blur_p=0 --out views.png",
    )
)
@DATA
@click.option("--out", required=True, type=NEW_FILE, help="The PNG to write.")
@DATASET
@METHOD
@CONFIG
@SET
@click.option(
    "--images",
    type=click.IntRange(1),
    default=4,
    help="Number of images. They are the first ones that training reads.",
)
@BACKEND
@click.option(
    "--compare",
    type=Name("backend", "auto", *BACKENDS),
    metavar="NAME",
    help="Also show this backend's views and the differences.",
)
@click.option("--epoch", type=click.IntRange(0), default=0, help="Epoch whose views are drawn.")
@click.option("--seed", type=int, help="Seed of the sample order and the augmentations.")
def preview(
    data: tuple[Path, ...],
    out: Path,
    dataset: str | None,
    method: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    images: int,
    backend: str | None,
    compare: str | None,
    epoch: int,
    seed: int | None,
) -> None:
    """Draw the inputs of training on a sheet.

    The sheet shows each image with its crops, and all views with their random parameters. The views
    are the four of RSA, unless a method, file or setting has other groups of crops.
    """
    overrides = {"backend": backend, "seed": seed}
    if not config and not method:
        overrides["batch_size"] = images  # otherwise auto would refuse a folder with few images
    recipe = recipe_of(
        dataset=dataset, method=method, config=config, sets=sets, overrides=overrides, data=data
    )
    from rsa_fast.insight.preview import preview as run
    from rsa_fast.pipelines.layouts import inventory

    source = recipe.open_source(data, "pretrain")
    logging.getLogger("rsa_fast").info(inventory(source))
    answer(run(recipe, source, out, images=images, epoch=epoch, compare=compare))


@main.command(
    examples=("rsa-fast export --checkpoint runs/photos --format timm --out encoder.pth",)
)
@click.option(
    "--checkpoint",
    required=True,
    type=CHECKPOINT,
    help="A run's folder or checkpoints/step_*.pt, or another project's encoder.",
)
@KEY
@click.option(
    "--format",
    required=True,
    type=Name("format", *FORMATS),
    help="Format of the file. torchvision, timm, detectron2 and hf-timm only support standard "
    "ResNets: 7x7 stem, 64 channels.",
)
@click.option(
    "--out",
    required=True,
    type=PLACE,
    help="The file to write, or the folder for hf-timm. A README.md is written next to the file "
    "or into the folder.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the file, and a README.md that is not this checkpoint's model card.",
)
def export(checkpoint: Path, key: str | None, format: str, out: Path, overwrite: bool) -> None:
    """Write an encoder for another library, with a model card."""
    from rsa_fast.evaluation.export import export as run

    answer(run(checkpoint, format, out, overwrite, key=key))


@main.command(
    examples=(
        "rsa-fast doctor",
        "rsa-fast doctor --data /scratch/images --json",
    ),
    imports_torch=False,
)
@click.option("--data", default="data", type=FOLDER, help="Folder of the images, now or later.")
@click.option("--out", default="runs", type=FOLDER, help="Folder of the runs, now or later.")
@click.pass_context
def doctor(ctx: click.Context, data: Path, out: Path) -> None:
    """Check this machine, and print how to fix faults.

    It checks versions, GPUs, limits and disks. The exit code is 1 if a check fails.
    """
    import_torch()
    from rsa_fast.insight import doctor

    checks = doctor.diagnose(data, out)
    result = doctor.summary(checks)
    answer(result, partial(doctor.show, checks))
    ctx.exit(0 if result["ok"] else 1)


@main.command(examples=("rsa-fast runs", "rsa-fast runs /scratch/runs"), imports_torch=False)
@click.argument("folder", default="runs", type=FOLDER)
def runs(folder: Path) -> None:
    """List the runs in FOLDER and below. The default folder is runs.

    The state is running, finished, stopped (--resume continues it) or failed. The age is the time
    since the last record.
    """
    from rsa_fast.insight import runs

    found = runs.find_runs(folder)
    answer(runs.as_json(found), partial(runs.show, found))


@main.command(examples=("rsa-fast watch runs/photos",), imports_torch=False)
@click.argument("run", type=FOLDER)
def watch(run: Path) -> None:
    """Follow a run until it ends: show its progress and scores, and update its report.html.

    A browser that shows the page reloads it automatically.
    """
    from dataclasses import asdict

    from rsa_fast.insight import runs

    last = runs.watch(run)
    answer(asdict(last), lambda: runs.print_plain(f"{run} is {runs.in_words(last)}"))


@main.command(
    examples=(
        "rsa-fast report runs/photos",
        "rsa-fast report runs/rsa runs/byol --out both.html",
    ),
    imports_torch=False,
)
@click.argument("runs", nargs=-1, required=True, type=FOLDER)
@click.option(
    "--out",
    type=NEW_FILE,
    help="The page to write. For a single run, the default is report.html in its folder.",
)
def report(runs: tuple[Path, ...], out: Path | None) -> None:
    """Draw the curves of one or more runs on a web page.

    The page of a running run shows its progress and reloads itself. rsa-fast watch keeps it up to
    date.
    """
    from rsa_fast.insight.report import report as run

    answer({"out": str(run(list(runs), out))})


@main.command(
    examples=(
        "rsa-fast profile --data my_photos --methods rsa",
        "rsa-fast profile --data my_photos --tune --out tuned.yaml",
    )
)
@section(
    "Recipe",
    DATASET,
    CONFIG,
    SET,
    click.option("--batch-size", type=int, help="Batch size on the measured device."),
)
@section(
    "Images",
    DATA,
    BACKEND,
    THREADS,
)
@section(
    "Measurement",
    click.option(
        "--methods",
        default="rsa,byol",
        metavar="NAME,...",
        help="Methods to measure in turn, or all. --tune uses the first one.",
    ),
    click.option(
        "--repeats",
        type=click.IntRange(1),
        default=5,
        help="Number of turns, after a warm-up turn.",
    ),
    click.option(
        "--seconds",
        type=click.FloatRange(0),
        default=1.0,
        help="Duration of each measurement in a turn.",
    ),
    click.option(
        "--html", type=NEW_FILE, help="Also write the report as a page with stacked bars."
    ),
    click.option("--trace", type=NEW_FILE, help="Also write a Chrome trace of a few iterations."),
)
@section(
    "Tuning",
    click.option(
        "--tune",
        is_flag=True,
        help="Instead of measuring, try loading settings and write the fastest ones to --out.",
    ),
    click.option(
        "--budget-s",
        type=click.FloatRange(0),
        default=300.0,
        help="Duration of --tune in seconds.",
    ),
    click.option(
        "--out",
        type=NEW_FILE,
        default=Path("tuned.yaml"),
        help="File for the settings of --tune. `train --config` reads it.",
    ),
)
def profile(
    dataset: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    batch_size: int | None,
    data: tuple[Path, ...],
    backend: str | None,
    threads: int | None,
    methods: str,
    repeats: int,
    seconds: float,
    html: Path | None,
    trace: Path | None,
    tune: bool,
    budget_s: float,
    out: Path,
) -> None:
    """Measure where an iteration spends its time.

    It measures the training step on a batch in memory, the loading of the views, both together, and
    the parts of each. The result names the bottleneck and the setting that helps.
    """
    overrides = {"batch_size": batch_size, "backend": backend, "threads": threads}
    everything = methods.strip() == "all"
    recipes = {}
    for name in METHODS if everything else (name.strip() for name in methods.split(",")):
        try:
            recipes[short_name(name)] = recipe_of(
                dataset=dataset,
                method=name,
                config=config,
                sets=sets,
                overrides=overrides,
                data=data,
            )
        except ValueError as error:
            if not everything:
                raise
            logging.getLogger("rsa_fast").warning(f"{name} is left out: {error}")
    if tune:
        from rsa_fast.insight import tuning

        answer(tuning.tune(next(iter(recipes.values())), data, out, budget_s))
        return
    from rsa_fast.insight import profiling
    from rsa_fast.insight.profile_page import page, text_table
    from rsa_fast.pipelines.files import write_text

    report = profiling.profile(recipes, data, repeats=repeats, seconds=seconds, trace=trace)
    if html:
        html.parent.mkdir(parents=True, exist_ok=True)
        write_text(html, page(report))
    from rich.console import Console

    answer(report, lambda: Console().print(text_table(report)))


@main.command(
    examples=(
        "rsa-fast plan --dataset imagenet1k --gpu a100-80g --gpus 8",
        "rsa-fast plan --data my_photos --gpu rtx-4090",
    )
)
@section(
    "Recipe",
    DATASET,
    METHOD,
    CONFIG,
    SET,
    EPOCHS,
    BATCH_SIZE,
    click.option(
        "--data",
        multiple=True,
        type=PLACE,
        help="Folder with the images, or a text file of paths. Can be repeated. Default: the "
        "published numbers of the dataset.",
    ),
)
@section(
    "Machine",
    click.option(
        "--gpu",
        required=True,
        type=Name("GPU", *GPUS),
        metavar="NAME",
        help=f"The node's GPU: {', '.join(GPUS)}.",
    ),
    click.option("--gpus", type=click.IntRange(1), default=1, help="Number of GPUs in a node."),
    click.option("--nodes", type=click.IntRange(1), default=1, help="Number of nodes."),
    click.option(
        "--cores", type=click.IntRange(1), help="Number of CPU cores in a node. Default: 4 per GPU."
    ),
    click.option(
        "--network-gbps",
        type=click.FloatRange(0, min_open=True),
        default=100.0,
        help="Speed of the network between nodes.",
    ),
)
def plan(
    dataset: str | None,
    method: str | None,
    config: Path | None,
    sets: tuple[str, ...],
    epochs: int | None,
    batch_size: int | None,
    data: tuple[Path, ...],
    gpu: str,
    gpus: int,
    nodes: int,
    cores: int | None,
    network_gbps: float,
) -> None:
    """Predict memory, time and decoding speed of a run on other GPUs."""
    overrides = {"epochs": epochs, "batch_size": batch_size}
    images = data or None
    recipe = recipe_of(
        dataset=dataset, method=method, config=config, sets=sets, overrides=overrides, data=images
    )
    from rsa_fast.insight import planning

    prediction = planning.plan(
        recipe, gpu, gpus=gpus, nodes=nodes, cores=cores, network_gbps=network_gbps, data=images
    )
    answer(prediction, partial(planning.show, prediction))


@main.group()
def convert() -> None:
    """Convert images to a few large files, or index such files."""


convert.add_command(Tool("ffcv", "to_ffcv", "Convert the images in SRC to .beton files in DST."))
convert.add_command(Tool("dali", "to_dali", "Convert the images in SRC to tar shards in DST."))
convert.add_command(
    Tool(
        "index",
        "index",
        "Write the index of the tar shards in SHARDS, or in the folders in SHARDS.",
    )
)
main.add_command(
    Tool(
        "verify",
        "verify",
        "Decode every image below PATH, or every sample of a converted dataset.",
    )
)
main.add_command(
    Tool("stage", "stage", "Copy packed images in SRC to DST, which training can already read.")
)
main.add_command(
    Tool(
        "subset",
        "imagenet100",
        "Make DST, a subset of the image folder SRC (train/, val/), from a list of classes.",
    )
)


if __name__ == "__main__":
    main()
