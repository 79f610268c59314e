"""What a run records: `metrics.jsonl`, TensorBoard, Weights & Biases, and progress on stderr."""

from __future__ import annotations

import json
import logging
import os
import platform
import uuid
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from pipelines.files import json_text, write_text
from rsa_fast.distributed import rank

log = logging.getLogger("rsa_fast")

PACKAGES = ("torch", "torchvision", "numpy", "numba", "pillow")
# The ETA is computed from the steps of the last hour. rich's default, the last 30 s, can be less
# than the time between two records.
ETA_WINDOW_S = 3600
# What the progress bar shows, and how.
BAR_FORMATS = {
    "images_per_s": "{:,.0f} images/s",
    "wait_pct": "wait {:.1f}%",
    "loss": "loss {:.4g}",
    "knn_top1": "kNN {:.1f}%",
    "finetune_top1": "top-1 {:.1f}%",
}


class Sink(Protocol):
    """A destination of records. A record is a dict that contains its `step`."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        """Start, or continue after `step`; records of later steps from before are discarded."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes every record to all sinks. A context manager.

    The sinks are `metrics.jsonl`, the progress display, TensorBoard if it is installed and, with
    `wandb`, Weights & Biases. Only rank 0 writes. Raises ValueError if `wandb` is true and the
    package is not installed.
    """

    def __init__(self, folder: Path, total_steps: int, step: int, wandb: bool = False) -> None:
        self.folder, self.total_steps, self.start_step = folder, total_steps, step
        self.names_at_start: list[set[str]] = []
        self.sinks: list[Sink] = [JsonLines(), Screen()]
        if find_spec("tensorboard"):
            self.sinks.append(TensorBoard())
        if wandb:
            self.sinks.append(WeightsAndBiases())
        if rank() > 0:
            self.sinks = []

    def __enter__(self) -> Metrics:
        if (self.folder / "metrics.jsonl").is_file():
            self.names_at_start = [
                set(record)
                for record in read_metrics(self.folder)
                if record["step"] == self.start_step
            ]
        for sink in self.sinks:
            sink.open(self.folder, self.total_steps, self.start_step)
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self.sinks:
            sink.close()

    def write(self, record: dict[str, Any]) -> None:
        """Write a record to all sinks.

        An evaluation after the checkpoint that a resumed run starts from is repeated by that run.
        Its record is then written only once.
        """
        if record["step"] == self.start_step and set(record) in self.names_at_start:
            return
        for sink in self.sinks:
            sink.write(record)


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The numeric values of a record, without its step."""
    return {
        key: value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


class JsonLines:
    """Writes one JSON object per line to `metrics.jsonl`."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        path = folder / "metrics.jsonl"
        if path.is_file():
            earlier = [record for record in read_metrics(folder) if record["step"] <= step]
            write_text(path, "".join(json_text(record) + "\n" for record in earlier))
        self.file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json_text(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Screen:
    """A progress bar with the ETA and the latest numbers, or one log line per record.

    The bar is only shown on a terminal.
    """

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=ETA_WINDOW_S,
        )
        self.total_steps = total_steps
        self.task = self.bar.add_task("", total=total_steps, completed=step)
        self.latest: dict[str, float] = {}
        self.bar.start()

    def write(self, record: dict[str, Any]) -> None:
        if self.bar.disable:
            line = "  ".join(f"{key} {value:.4g}" for key, value in numbers(record).items())
            log.info(f"step {record['step']}/{self.total_steps}  {line}")
        self.latest |= numbers(record)
        description = "  ".join(
            form.format(self.latest[key]) for key, form in BAR_FORMATS.items() if key in self.latest
        )
        self.bar.update(self.task, completed=record["step"], description=description)

    def close(self) -> None:
        with suppress(OSError):  # of a terminal that was closed
            self.bar.stop()


class TensorBoard:
    """Writes the numbers of every record to event files in the folder `tensorboard`."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in numbers(record).items():
            self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


def check_wandb() -> None:
    """Raise ValueError if Weights & Biases cannot be used, before a run touches anything."""
    if find_spec("wandb") is None:
        raise ValueError(
            "wandb is wanted and not installed: "
            "pip install 'rsa-fast[wandb]', or set wandb to false"
        )
    try:
        import wandb  # noqa: F401
    except Exception as error:  # a version that does not fit the other packages can raise anything
        raise ValueError(
            f"wandb is wanted and cannot be imported ({type(error).__name__}: {error}): "
            "pip install -U wandb, or set wandb to false"
        ) from error


class WeightsAndBiases:
    """Sends the numbers of every record to Weights & Biases, as one run of the project `rsa-fast`.

    wandb's own environment variables apply: WANDB_PROJECT replaces the project, for example. A
    resumed run continues under the same id, where wandb ignores the steps that it already has.
    """

    def __init__(self) -> None:
        check_wandb()

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        import wandb

        id_file = folder / "wandb" / "run-id"
        if not id_file.is_file():
            id_file.parent.mkdir(exist_ok=True)
            write_text(id_file, uuid.uuid4().hex[:8])
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "rsa-fast"),
            name=folder.name,
            dir=folder,
            id=id_file.read_text(),
            resume="allow",
            config=yaml.safe_load((folder / "recipe.yaml").read_text()),
        )

    def write(self, record: dict[str, Any]) -> None:
        self.run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        self.run.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in order. A last line cut short by a kill is ignored.

    Raises FileNotFoundError if `folder` does not belong to a run.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics.jsonl in {folder}: wanted the folder of a run (--out of rsa-fast train)"
        )
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def versions_and_hardware() -> dict[str, Any]:
    """Versions and hardware, for `env.json`."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }
