"""What a run writes while it goes: `metrics.jsonl`, `env.json`, TensorBoard, Weights & Biases, and progress on stderr."""

from __future__ import annotations

import json
import os
import platform
import sys
import uuid
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

from pipelines.files import write_whole
from rsa_fast.distributed import rank

PACKAGES = ("torch", "torchvision", "numpy", "numba", "pillow")
ETA_FROM_S = 3600  # of the latest steps; rich's 30 s can be less than the time between two records
SHOWN = {
    "images_per_s": "{:,.0f} images/s",
    "wait_pct": "wait {:.1f}%",
    "loss": "loss {:.4g}",
    "knn_top1": "kNN {:.1f}%",
}


class Sink(Protocol):
    """A place for records, each a dict with its `step`."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        """Start, or go on after `step`; what was written of later steps is void."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Gives every record to `metrics.jsonl`, the progress display, TensorBoard where it is installed and, if wanted, Weights &
    Biases; a context manager. Only rank 0 writes. Raises ValueError when `wandb` is wanted and not installed."""

    def __init__(self, folder: Path, total_steps: int, step: int, wandb: bool = False) -> None:
        self.start = folder, total_steps, step
        self.written: list[set[str]] = []
        self.sinks: list[Sink] = [JsonLines(), Screen()]
        if find_spec("tensorboard"):
            self.sinks.append(TensorBoard())
        if wandb:
            self.sinks.append(WeightsAndBiases())
        if rank() > 0:
            self.sinks = []

    def __enter__(self) -> Metrics:
        folder, _, step = self.start
        if (folder / "metrics.jsonl").is_file():
            self.written = [
                set(record) for record in read_metrics(folder) if record["step"] == step
            ]
        for sink in self.sinks:
            sink.open(*self.start)
        return self

    def __exit__(self, *_: object) -> None:
        for sink in self.sinks:
            sink.close()

    def write(self, record: dict[str, Any]) -> None:
        if record["step"] == self.start[2] and set(record) in self.written:
            return  # scored after the checkpoint that a resumed run starts from, and now again
        for sink in self.sinks:
            sink.write(record)


def numbers(record: dict[str, Any]) -> dict[str, float]:
    return {
        key: value
        for key, value in record.items()
        if key != "step" and isinstance(value, int | float)
    }


class JsonLines:
    """One JSON object per line of `metrics.jsonl`."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        path = folder / "metrics.jsonl"
        if path.is_file():
            kept = [record for record in read_metrics(folder) if record["step"] <= step]
            write_whole(
                path,
                lambda file: file.writelines(
                    json.dumps(record).encode() + b"\n" for record in kept
                ),
            )
        self.file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class Screen:
    """On a terminal a bar with ETA and the latest numbers, elsewhere a line per record; on stderr."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        console = Console(stderr=True)
        columns = [
            TextColumn("step"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
        ]
        columns += [TimeRemainingColumn(), TextColumn("{task.description}")]
        self.bar = Progress(
            *columns,
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=ETA_FROM_S,
        )
        self.task, self.total_steps = (
            self.bar.add_task("", total=total_steps, completed=step),
            total_steps,
        )
        self.latest: dict[str, float] = {}
        self.bar.start()

    def write(self, record: dict[str, Any]) -> None:
        if self.bar.disable:
            shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers(record).items())
            print(f"step {record['step']}/{self.total_steps}  {shown}", file=sys.stderr)
        self.latest |= numbers(record)
        shown = "  ".join(
            form.format(self.latest[key]) for key, form in SHOWN.items() if key in self.latest
        )
        self.bar.update(self.task, completed=record["step"], description=shown)

    def close(self) -> None:
        self.bar.stop()


class TensorBoard:
    """The numbers of every record, as event files in the folder `tensorboard`."""

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in numbers(record).items():
            self.writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The numbers of every record, as one run of the project `rsa-fast`; the WANDB_ variables say otherwise, and where.

    A resumed run goes on under its id, and drops the steps it has already.
    """

    def __init__(self) -> None:
        if find_spec("wandb") is None:
            raise ValueError(
                "wandb is wanted and not installed: pip install 'rsa-fast[wandb]', or set wandb to false"
            )

    def open(self, folder: Path, total_steps: int, step: int) -> None:
        import wandb

        name = folder / "wandb" / "run-id"
        if not name.is_file():
            name.parent.mkdir(exist_ok=True)
            name.write_text(uuid.uuid4().hex[:8])
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        project = os.environ.get("WANDB_PROJECT", "rsa-fast")
        self.run = wandb.init(
            project=project,
            name=folder.name,
            dir=folder,
            id=name.read_text(),
            resume="allow",
            config=recipe,
        )

    def write(self, record: dict[str, Any]) -> None:
        self.run.log(numbers(record), step=record["step"])

    def close(self) -> None:
        self.run.finish()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in order, but for a last line cut short by a kill.

    Raises FileNotFoundError when `folder` is no run's.
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


def environment() -> dict[str, Any]:
    """Versions and hardware, for `env.json`."""
    return {
        "command": sys.argv,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "machine": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
    }
