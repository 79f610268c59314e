"""What a run writes, and how its folder is made, refused and found again.

A run folder holds `recipe.yaml`, `env.json`, `metrics.jsonl`, `result.json`, `report.html` and
`checkpoints/`.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.files import write_whole

RUN_FILES = (
    "recipe.yaml",
    "env.json",
    "metrics.jsonl",
    "result.json",
    "nonfinite.json",
    "checkpoints",
    "report.html",
    "tensorboard",
    "wandb",
)


def job() -> str | None:
    """What torchrun calls all its starts of this job."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def begun(out: Path) -> bool:
    """Whether the run in `out` is this job's, from before torchrun started it again."""
    try:
        return bool(json.loads((out / "env.json").read_text())["job"] == job())
    except (OSError, ValueError, KeyError):
        return False


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Make `out`, or refuse it."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: --out wants a folder")
    found = (
        [path.name for path in out.iterdir() if path.name != ".rsa-fast"] if out.is_dir() else []
    )
    if found and not (resume or overwrite):
        raise FileExistsError(
            f"{out} is not empty: go on with --resume, start again with --overwrite, or choose another --out"
        )
    if resume and not out.is_dir():
        raise FileNotFoundError(
            f"no whole checkpoint, for there is no folder {out}: start without --resume"
        )
    if resume and found and not set(found) & set(RUN_FILES):
        raise FileExistsError(
            f"{out} holds no run but {', '.join(sorted(found)[:5])}: point --out at the run's folder"
        )
    out.mkdir(parents=True, exist_ok=True)


def prepare_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Make `out`, or refuse it. Overwriting removes a run's own files and nothing else."""
    check_folder(out, resume, overwrite)
    if overwrite:
        for name in RUN_FILES:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def full_disk_named(out: Path) -> Iterator[None]:
    """A write that finds no room raises an OSError without a path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
            raise
        raise OSError(
            f"{out} was not written to: {error.strerror}. Once it has room, go on with --resume"
        ) from error


def report_or_say(folder: Path) -> None:
    """The report of a run that ended; whatever hinders it is said and takes nothing from the run."""
    try:
        from rsa_fast.insight.report import (
            report,
        )  # matplotlib, a seventh of the time to import all of this

        report([folder])
    except Exception as error:
        print(
            f"no report ({error}); once that is mended: rsa-fast report {folder}", file=sys.stderr
        )


def write_text(path: Path, text: str) -> None:
    write_whole(path, lambda file: file.write(text.encode()))
