"""The folder of a run: when it is accepted, how it is prepared, and what is written to it.

A run folder contains `recipe.yaml`, `env.json`, `metrics.jsonl`, `result.json`, `report.html` and
`checkpoints/`; `RUN_FILES` lists all names.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger("rsa_fast")

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


def launcher_job_id() -> str | None:
    """The id that torchrun gives to a job, the same after every restart. None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def started_by_this_job(out: Path) -> bool:
    """Whether the run in `out` was started by this torchrun job, before torchrun restarted it."""
    try:
        return bool(json.loads((out / "env.json").read_text())["job"] == launcher_job_id())
    except (OSError, ValueError, KeyError):
        return False


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Create the folder `out`. Raises FileExistsError or FileNotFoundError if it is unsuitable."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: --out wants a folder")
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    # The cache of the data's manifest does not count as content.
    names.discard(".rsa-fast")
    if names and not (resume or overwrite):
        raise FileExistsError(
            f"{out} is not empty: go on with --resume, start again with --overwrite, "
            "or choose another --out"
        )
    if resume and not out.is_dir():
        raise FileNotFoundError(
            f"no whole checkpoint, for there is no folder {out}: start without --resume"
        )
    if resume and names and not names & set(RUN_FILES):
        raise FileExistsError(
            f"{out} holds no run but {', '.join(sorted(names)[:5])}: "
            "point --out at the run's folder"
        )
    out.mkdir(parents=True, exist_ok=True)


def prepare_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Check the folder as `check_folder` does and, to overwrite, delete the old run's files.

    Files that do not belong to a run are never deleted.
    """
    check_folder(out, resume, overwrite)
    if overwrite:
        for name in RUN_FILES:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(out: Path) -> Iterator[None]:
    """Add the folder and the remedy to the OSError of a full disk, which contains no path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
            raise
        raise OSError(
            f"{out} was not written to: {error.strerror}. Once it has room, go on with --resume"
        ) from error


def try_to_report(folder: Path) -> None:
    """Write the report of a complete run. An error is only logged: the run itself is fine."""
    try:
        # Imported here because of matplotlib, which takes a seventh of the total import time.
        from rsa_fast.insight.report import report

        report([folder])
    except Exception as error:
        log.warning(f"no report ({error}); once that is mended: rsa-fast report {folder}")
