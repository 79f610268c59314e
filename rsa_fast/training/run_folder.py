"""The folder of a run: its checks, its lock and its preparation.

A run folder contains `recipe.yaml`, `env.json`, `metrics.jsonl`, `result.json`, `report.html` and
`checkpoints/`; `RUN_FILES` lists all names. It belongs to one process at a time, which holds its
lock (`hold_folder`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rsa_fast import terminal
from rsa_fast.pipelines.files import json_text, partial_name, write_text

log = logging.getLogger("rsa_fast")

RUN_FILES = (
    "recipe.yaml",
    "env.json",
    "metrics.jsonl",
    "result.json",
    "confusion.json",
    "nonfinite.json",
    "checkpoints",
    "report.html",
    "tensorboard",
    "wandb",
)
# The files that a start writes before its first step.
START_FILES = {"recipe.yaml", "env.json", "metrics.jsonl", "checkpoints", "tensorboard", "wandb"}
LOCK = "run.lock"
# These do not count as content: the cache of the data's manifest, the lock, and files that a killed
# process was still writing.
NO_CONTENT = {".rsa-fast", LOCK, *map(partial_name, RUN_FILES)}
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # errors of a file system without locks
held_locks: set[int] = set()  # the file descriptors of this process's locks


def close_locks() -> None:
    """Close the locks that a forked process, such as a loader's worker, shares with its parent.

    Otherwise a process that survives its parent would still hold the locks.
    """
    for lock in held_locks:
        os.close(lock)
    held_locks.clear()


os.register_at_fork(after_in_child=close_locks)


@contextmanager
def hold_folder(out: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Create the folder `out` and hold its lock until the context ends.

    The lock is `flock` on the file `run.lock`. The system releases it when this process ends for
    any reason. The lock works between all processes of a machine. It also works between machines on
    NFS, where Linux turns it into a lock on the server. On Lustre it works between machines if the
    file system is mounted with the option `flock`. With `localflock` it only works within each
    machine. If the file system has no locks, there is a warning and the run starts. If a machine
    crashes, NFS and Lustre release its lock only when it is back, or after a timeout.

    Raises BlockingIOError, which names the holder, if another process holds the lock, and the
    errors of `check_folder`. A folder that is refused is not changed.
    """
    with ExitStack() as stack:
        # If a run is still alive, the error names it, even if the folder would be refused for
        # another reason. In a refused folder, no lock is created.
        if in_use := (out / LOCK).is_file():
            stack.enter_context(hold_lock(out))
        check_folder(out, resume, overwrite)
        if not in_use:
            stack.enter_context(hold_lock(out))
        yield


@contextmanager
def hold_lock(out: Path) -> Iterator[None]:
    """Hold the lock of the folder `out`. Meanwhile, the lock's file names this process."""
    lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    held_locks.add(lock)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                f"{out} is in use by {holder(os.pread(lock, 65536, 0))}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                f"the file system of {out} has no locks ({error.strerror}): do not start a second "
                "run in this folder, because nothing would refuse it"
            )
        os.ftruncate(lock, 0)
        try:
            os.pwrite(lock, json.dumps(this_process()).encode(), 0)
            yield
        finally:
            os.ftruncate(lock, 0)
    finally:
        held_locks.remove(lock)
        os.close(lock)


def holder(content: bytes) -> str:
    """A message that names the process which wrote this content of a lock, with advice."""
    try:
        process = json.loads(content)
        command = " ".join(process["command"])
        name = "process {pid} on {host} since {started} ".format_map(process) + f"({command})"
    except (ValueError, KeyError, TypeError):  # the process is just starting or ending
        name = "another process"
    return f"{name}: wait until it ends, stop it, or choose another --out"


def this_process() -> dict[str, Any]:
    """The host, id, start and command line of this process, for the lock and `env.json`."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": sys.argv,
    }


def read_starts(out: Path) -> list[dict[str, Any]]:
    """The records of all starts of the run in `out`, from `env.json`, the newest last.

    The list is empty without that file. Earlier versions recorded only the newest start.
    """
    try:
        content = json.loads((out / "env.json").read_text())
    except (OSError, ValueError):
        return []
    return content if isinstance(content, list) else [content]


def add_start(out: Path, start: dict[str, Any]) -> None:
    """Append the record of a start to `env.json`."""
    write_text(out / "env.json", json_text([*read_starts(out), start], indent=1))


def stored_places(out: Path) -> list[Path]:
    """The paths of the images at the newest start of the run in `out`. Empty if not recorded.

    Raises FileNotFoundError for a path that no longer exists.
    """
    places = [Path(place) for start in read_starts(out)[-1:] for place in start.get("data", [])]
    if missing := [place for place in places if not place.exists()]:
        raise FileNotFoundError(
            f"the run in {out} was started with images in {missing[0]}, which does not exist: give "
            "their new place with --data"
        )
    return places


def stored_threads(out: Path) -> int | None:
    """The number of torch's threads at the newest start of the run in `out`, if recorded."""
    return next((start.get("torch_threads") for start in read_starts(out)[-1:]), None)


def places_of_checkpoint(checkpoint: str | Path) -> list[Path]:
    """The paths of a run's images. `checkpoint` is the run's folder or one of its checkpoints.

    The log names them. Raises ValueError if they are not recorded, and FileNotFoundError if one of
    them no longer exists.
    """
    path = Path(checkpoint).absolute()
    folder = path if path.is_dir() else path.parent
    run = folder.parent if folder.name == "checkpoints" else folder
    if not (places := stored_places(run)):
        raise ValueError(f"{checkpoint} does not record where its images are: give --data")
    if terminal.speaks():
        log.info(f"images of the run in {run}: {', '.join(map(str, places))}")
    return places


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """All records of a run, in order. A last line that is incomplete, after a kill, is ignored.

    Raises FileNotFoundError if `folder` does not belong to a run.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise FileNotFoundError(
            f"no metrics.jsonl in {folder}: give the folder of a run (--out of rsa-fast train)"
        )
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def launcher_job_id() -> str | None:
    """The id of torchrun's job, which restarts do not change, or None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def started_by_this_job(out: Path) -> bool:
    """Whether the run in `out` was started by this torchrun job, before torchrun restarted it."""
    starts = read_starts(out)
    return bool(starts) and starts[-1].get("job", "") == launcher_job_id()


def content_of(out: Path) -> set[str]:
    """The names in the folder `out`, without those that do not count as content."""
    return {path.name for path in out.iterdir()} - NO_CONTENT if out.is_dir() else set()


def never_began(out: Path, names: set[str]) -> bool:
    """Whether `names`, the content of `out`, come from a start that failed before any record.

    Then there is no checkpoint and no record. Every start writes `env.json` first.
    """
    metrics = out / "metrics.jsonl"
    has_records = metrics.is_file() and metrics.stat().st_size > 0
    has_checkpoints = any((out / "checkpoints").glob("step_*.pt"))
    only_starts_files = "env.json" in names and names <= START_FILES
    return only_starts_files and not (has_records or has_checkpoints)


def check_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Create the folder `out`. Raises FileExistsError if it is unsuitable.

    A folder in which an earlier start failed before its first record counts as empty.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: --out must be a folder")
    names = content_of(out)
    if names and not (resume or overwrite or never_began(out, names)):
        raise FileExistsError(
            f"{out} is not empty: continue with --resume, start again with --overwrite, or choose "
            "another --out"
        )
    if resume and names and not names & set(RUN_FILES):
        raise FileExistsError(
            f"{out} contains no run but {', '.join(sorted(names)[:5])}: point --out at the run's "
            "folder"
        )
    out.mkdir(parents=True, exist_ok=True)


def prepare_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Check the folder as `check_folder` does and, unless resuming, delete an old run's files.

    Files that do not belong to a run are never deleted.
    """
    check_folder(out, resume, overwrite)
    if resume:
        return
    if not overwrite and content_of(out):
        log.info(
            f"{out} contains only the files of an earlier start that failed before training: "
            "they are replaced"
        )
    for name in RUN_FILES:
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(out: Path) -> Iterator[None]:
    """Add the folder and the remedy to the OSError of a full disk, which names no path."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or error.filename:
            raise
        raise OSError(
            f"{out} was not written to: {error.strerror}. Once it has room, continue with --resume"
        ) from error


def try_to_report(folder: Path) -> None:
    """Write the report of a complete run. An error is only logged: the run itself is fine."""
    try:
        # Imported here, because it imports this module.
        from rsa_fast.insight.report import report

        report([folder])
    except Exception as error:
        log.warning(f"no report ({error}); when this is fixed, run: rsa-fast report {folder}")
