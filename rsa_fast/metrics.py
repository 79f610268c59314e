"""What a run writes while it goes: `metrics.jsonl`, `env.json`, and a progress line on stderr."""

from __future__ import annotations

import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rsa_fast.distributed import rank

PACKAGES = ("torch", "torchvision", "numpy", "numba", "pillow")


class Metrics:
    """Appends one JSON object per line to `metrics.jsonl` and shows the run's progress; a context manager.

    On a terminal a bar with ETA, elsewhere one plain line per record, both on stderr. Only rank 0 writes.
    """

    def __init__(self, folder: Path, total_steps: int, step: int) -> None:
        self.path = folder / "metrics.jsonl" if rank() == 0 else Path(os.devnull)
        drop_after(self.path, step)
        self.file = self.path.open("a")
        console = Console(stderr=True)
        self.total_steps = total_steps
        columns = (TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Progress(
            *columns, TextColumn("{task.description}"), console=console, disable=rank() > 0 or not console.is_terminal
        )
        self.task = self.bar.add_task("", total=total_steps, completed=step)

    def __enter__(self) -> Metrics:
        self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record with its `step`, and show it."""
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        numbers = {key: value for key, value in record.items() if key != "step" and isinstance(value, int | float)}
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        self.bar.update(self.task, completed=record["step"], description=shown)
        if self.bar.disable and rank() == 0:
            print(f"step {record['step']}/{self.total_steps}  {shown}", file=sys.stderr)


def drop_after(path: Path, step: int) -> None:
    """Forget what a killed run recorded after the step it resumes from, and a last line cut short."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (json.JSONDecodeError, KeyError):
            continue
    path.write_text("".join(kept))


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in order."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


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
