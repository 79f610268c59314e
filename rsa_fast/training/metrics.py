"""The records of a run: `metrics.jsonl`, TensorBoard, Weights & Biases and progress on stderr."""

from __future__ import annotations

import logging
import math
import os
import platform
import uuid
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from rich.console import Console, RenderableType
from rich.progress import Progress, Task
from rich.progress_bar import ProgressBar
from rich.table import Table

from rsa_fast.distributed import rank
from rsa_fast.pipelines.files import json_text, write_text
from rsa_fast.pipelines.machine import PIP
from rsa_fast.terminal import RECORDED_SCORES, duration
from rsa_fast.training.run_folder import read_metrics as read_metrics

log = logging.getLogger("rsa_fast")

PACKAGES = ("torch", "torchvision", "numpy", "numba", "pillow")
# The ETA is computed from the steps of the last hour. rich's default is the last 30 s, which can be
# less than the time between two records.
ETA_WINDOW_S = 3600
# The values at the end of the progress line, the most important first, and their formats.
LATEST_FORMATS = {
    "images_per_s": "{:,.0f} images/s",
    "loss": "loss {:.3g}",
    "knn_top1": "kNN {:.1f}",
    "finetune_top1": "top-1 {:.1f}",
    "wait_pct": "wait {:.0f}%",
}
SHOWN_WAIT_PCT = 5  # waiting for less than this is normal and not shown
LEAST_BAR, LARGEST_BAR = 6, 40  # columns


class Sink(Protocol):
    """A destination of records. A record is a dict that contains its `step`."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        """Start, or continue after `step`. Earlier records of later steps are discarded."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes every record to all sinks. This is a context manager.

    The sinks are `metrics.jsonl`, the progress display, TensorBoard if it is installed and, with
    `wandb`, Weights & Biases. Only rank 0 writes. Raises ValueError if `wandb` is true and the
    package is not installed.
    """

    def __init__(
        self, folder: Path, total_steps: int, step: int, wandb: bool = False, epochs: int = 0
    ) -> None:
        self.folder, self.total_steps, self.start_step = folder, total_steps, step
        self.names_at_start: list[set[str]] = []
        self.sinks: list[Sink] = [JsonLines(), Screen(epochs)]
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

        A resumed run repeats the evaluation that followed its checkpoint. The record of this
        evaluation is still written only once.
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


class ProgressLine(Progress):
    """Progress in one line of the terminal's width.

    The bar shrinks first. If that is not enough, fields are left out, starting from the right.
    """

    def get_renderables(self) -> Iterator[RenderableType]:
        for task in self.tasks:
            done, total = int(task.completed), int(task.total or 0)
            fields = [f"{done:,}/{total:,}", duration(task.elapsed)]
            if done < total:
                fields.append(f"ETA {duration(self.seconds_left(task))}")
            fields += task.fields["latest"]
            start = f"{task.fields['epoch']}  "
            room = self.console.width - len(start) - LEAST_BAR
            while len(fields) > 1 and sum(2 + len(field) for field in fields) > room:
                fields.pop()
            text = "".join(f"  {field}" for field in fields)
            width = min(LARGEST_BAR, self.console.width - len(start) - len(text))
            line = Table.grid()
            line.add_row(start, ProgressBar(total, done, max(width, 1)), text)
            yield line

    def seconds_left(self, task: Task) -> float | None:
        """An estimate from the speed of the last hour, or of the latest record if it is alone."""
        step_ms: float | None = task.fields["step_ms"]
        if task.time_remaining is not None or step_ms is None:
            return task.time_remaining
        return (task.remaining or 0) * step_ms / 1000


class Screen:
    """A line of progress with the latest numbers, or one log line per record.

    The progress is only shown on a terminal, where every score is also printed above it.
    """

    def __init__(self, epochs: int = 0) -> None:
        self.epochs = epochs  # 0 if the number is unknown; it is then not shown

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        console = Console(stderr=True)
        self.bar = ProgressLine(
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=ETA_WINDOW_S,
        )
        self.total_steps = total_steps
        self.latest: dict[str, float] = {}
        self.best: dict[str, float] = {}
        fields: dict[str, Any] = {"epoch": self.epoch(step), "latest": [], "step_ms": None}
        self.task = self.bar.add_task("", total=total_steps, completed=step, **fields)
        for record in read_metrics(folder) if (folder / "metrics.jsonl").is_file() else ():
            self.mark_best(numbers(record), record["step"])
            self.latest |= numbers(record)
        self.bar.start()

    def epoch(self, step: int) -> str:
        """The epoch that the next step belongs to, counted from 1: `epoch 9/12`."""
        if not self.epochs:
            return ""
        number = min(step * self.epochs // max(self.total_steps, 1) + 1, self.epochs)
        return f"epoch {number}/{self.epochs}"

    def mark_best(self, values: dict[str, float], step: int) -> set[str]:
        """Remember the best value of each score since the first step. Returns the new best ones."""
        best = {
            key
            for key in RECORDED_SCORES.keys() & values.keys()
            if step > 0 and values[key] > self.best.get(key, -math.inf)
        }
        self.best |= {key: values[key] for key in best}
        return best

    def write(self, record: dict[str, Any]) -> None:
        values = numbers(record)
        if self.bar.disable:
            line = "  ".join(f"{key} {value:.4g}" for key, value in values.items())
            log.info(f"step {record['step']}/{self.total_steps}  {line}")
        elif RECORDED_SCORES.keys() & values.keys():
            self.bar.console.print(self.score_line(values, record["step"]), highlight=False)
        self.latest |= values
        shown = [
            form.format(self.latest[key])
            for key, form in LATEST_FORMATS.items()
            if key in self.latest and not (key == "wait_pct" and self.latest[key] < SHOWN_WAIT_PCT)
        ]
        self.bar.update(
            self.task,
            completed=record["step"],
            epoch=self.epoch(record["step"]),
            latest=shown,
            step_ms=self.latest.get("step_ms"),
        )

    def score_line(self, values: dict[str, float], step: int) -> str:
        """A line such as `epoch 8 kNN 45.8 (best) effective rank 6.1`."""
        best = self.mark_best(values, step)
        parts = [f"epoch {values['epoch']:.0f}"] if "epoch" in values else []
        for key in (key for key in RECORDED_SCORES if key in values):
            remark = " (before training)" if step == 0 else " (best)" if key in best else ""
            parts.append(f"{RECORDED_SCORES[key]} {values[key]:.1f}{remark}")
        if "effective_rank" in self.latest:
            parts.append(f"effective rank {self.latest['effective_rank']:.1f}")
        return "  ".join(parts)

    def close(self) -> None:
        with suppress(OSError):  # the terminal was closed
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
            f"wandb is true, but the package is not installed: {PIP} install wandb, or set wandb "
            "to false"
        )
    try:
        import wandb  # noqa: F401
    except Exception as error:  # an incompatible version can raise any exception
        raise ValueError(
            f"wandb is true, but the package cannot be imported ({type(error).__name__}: {error}): "
            f"{PIP} install -U wandb, or set wandb to false"
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


def versions_and_hardware() -> dict[str, Any]:
    """The versions and the hardware for `env.json`."""
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }
