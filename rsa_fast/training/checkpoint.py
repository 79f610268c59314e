"""Checkpoints: complete, atomic, loadable with `weights_only=True`.

    RUN/checkpoints/step_00000780.pt      step, recipe, method (online, target), optimiser, scaler, data fingerprint

    with Writer(RUN / "checkpoints", keep_last=2) as writer:
        writer.save(state)      # holds the caller for a copy in memory; the disk is written meanwhile

The data position is the step itself: order and views are pure functions of it, so no generator state is stored.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor

from pipelines.files import partial_name, write_whole

PATTERN = "step_{:08d}.pt"

Place = tuple[Any, ...]  # the keys and indices that lead to a tensor in the state


class Writer:
    """Writes checkpoints to `folder` on a thread of its own, one at a time, while training goes on; a context manager.

    Leaving it waits for the write in flight. A write that fails leaves the checkpoints before it untouched and is an OSError
    at the next `save` or `wait` or on leaving; a warning where another error is already on its way.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(partial_name("step_*.pt")):  # of a run that was killed
            stale.unlink()
        self.folder, self.keep_last = folder, keep_last
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        self.buffers: dict[
            Place, Tensor
        ] = {}  # by place in the state; used again: fresh pages take longer than the copy
        self.devices: set[torch.device] = set()

    def save(self, state: dict[str, Any]) -> None:
        """Copy `state`, nested dictionaries and lists of tensors and plain values, and write the copy under its step.

        On return the tensors may change. Waits for the write before this one, not for the device; the first save allocates
        the buffers, as much host memory as the state has, on a GPU pinned.
        """
        self.wait()
        snapshot = self.snapshot(state, ())
        streams = [torch.cuda.current_stream(device) for device in self.devices]
        copied = [s.record_event() for s in streams]  # type: ignore[no-untyped-call]  # torch gives no types
        self.writing = self.thread.submit(self.write, snapshot, copied)

    def snapshot(self, value: Any, place: Place) -> Any:
        if isinstance(value, dict):
            return {key: self.snapshot(item, (*place, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.snapshot(item, (*place, i)) for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        value, buffer = value.detach(), self.buffers.get(place)
        if value.is_cuda:
            self.devices.add(value.device)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = self.buffers[place] = torch.empty_like(
                value, device="cpu", pin_memory=value.is_cuda
            )
        return buffer.copy_(value, non_blocking=True)

    def write(self, state: dict[str, Any], copied: list[torch.cuda.Event]) -> None:
        for event in copied:
            event.synchronize()
        write(self.folder, state, self.keep_last)

    def wait(self) -> None:
        """Return when the last `save` is on the disk. Raises OSError when it failed."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.thread.shutdown()
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            warnings.warn(str(failed), stacklevel=2)


def save(folder: Path, state: dict[str, Any], keep_last: int) -> Path:
    """Write `state` under its step, then drop all but the newest `keep_last`; returns the path. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, state, keep_last)


def write(folder: Path, state: dict[str, Any], keep_last: int) -> Path:
    path = folder / PATTERN.format(state["step"])
    try:
        write_whole(path, partial(torch.save, state))
    except (OSError, RuntimeError) as error:
        fault = (
            error if isinstance(error, OSError) else error.__context__
        )  # torch answers a failed write with its own error
        if not isinstance(fault, OSError):
            raise
        raise OSError(
            f"{path} was not written: {fault.strerror or fault}. Once {folder} is there, writable and has room, "
            "go on with --resume; the checkpoints before it are untouched"
        ) from error
    found = listed(folder)
    end = found.index(path) + 1  # those after it are damaged: resuming passed over them
    for old in found[: max(0, end - keep_last)] + found[end:]:
        old.unlink()
    return path


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, by their number."""
    numbers = {path: path.stem.removeprefix("step_") for path in folder.glob("step_*.pt")}
    return sorted(
        (path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path])
    )


def load(path: Path) -> dict[str, Any]:
    """One checkpoint, on the CPU; no code that the file may hold is run.

    Raises ValueError when the file is damaged or no checkpoint, FileNotFoundError when it is missing.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        check(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch and zipfile raise whatever their authors did not think of
        raise ValueError(f"{path} is damaged or no checkpoint of this project: {error}") from error
    fields: dict[str, Any] = state if isinstance(state, dict) else {}
    if missing := {"step", "recipe", "method"} - fields.keys():
        raise ValueError(
            f"{path} is no checkpoint of this project: it lacks {', '.join(sorted(missing))}"
        )
    return fields


def check(path: Path) -> None:
    """Raises ValueError for what `torch.load` would let pass or explain badly: it compares no checksums, unpacks compressed
    parts to any size, and for a file that holds code it advises to run it."""
    with ZipFile(path) as archive:
        for part in archive.infolist():
            if (
                part.compress_type != ZIP_STORED
                or ".." in Path(part.filename).parts
                or part.filename.startswith("/")
            ):
                raise ValueError(
                    f"its part {part.filename!r} is compressed or leads out of the file"
                )
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    if code := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        raise ValueError(
            f"it holds calls of {', '.join(sorted(code))}; wanted tensors and plain values"
        )


def load_latest(folder: Path) -> dict[str, Any]:
    """The newest whole checkpoint; a damaged newer one is named in a warning and passed over.

    Raises FileNotFoundError when there is none.
    """
    for path in reversed(listed(folder)):
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    raise FileNotFoundError(
        f"no whole checkpoint in {folder}: start without --resume, or point --out at the run's folder"
    )
