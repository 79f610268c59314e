"""Checkpoints: complete, written atomically, and loadable with `weights_only=True`.

    RUN/checkpoints/step_00000780.pt      step, recipe, method (online, target), optimiser, scaler,
                                          compute type, data fingerprint
    RUN/checkpoints/best.pt               the same, and the score by which it is the best

    with Writer(RUN / "checkpoints", keep_last=2) as writer:
        writer.save(state)

Saving stops training only while the state is copied to host memory. A background thread then writes
the file. The step number is also the position in the data: the sample order and all augmentations
are functions of it, so no random generator state is saved.
"""

from __future__ import annotations

import logging
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from rsa_fast import terminal
from rsa_fast.pipelines.files import partial_name, write_whole

log = logging.getLogger("rsa_fast")

PATTERN = "step_{:08d}.pt"
BEST = "best.pt"

KeyPath = tuple[Any, ...]  # the keys and indices that lead to a tensor in a nested state


class Writer:
    """Writes checkpoints to `folder` in a background thread while training continues.

    This is a context manager. Leaving it waits for the last write. Only one checkpoint is written
    at a time. A write that fails does not change earlier checkpoints. The next `save` or `wait`, or
    leaving the context, then raises OSError. If another error is already being raised, the failed
    write is only a warning.
    """

    def __init__(self, folder: Path, keep_last: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Delete the unfinished files of a run that was killed.
        for name in ("step_*.pt", BEST):
            for stale in folder.glob(partial_name(name)):
                stale.unlink()
        self.folder, self.keep_last = folder, keep_last
        self.thread = ThreadPoolExecutor(1, "checkpoint")
        self.writing: Future[None] | None = None
        # The host copies are reused, because allocating fresh pages takes longer than the copy.
        self.buffers: dict[KeyPath, Tensor] = {}
        self.devices: set[torch.device] = set()

    def save(self, state: dict[str, Any], name: str | None = None) -> None:
        """Copy `state` to host memory and start writing the copy to the file of its step.

        With a `name`, the file has that name instead, and no other checkpoint is deleted.

        `state` consists of nested dictionaries and lists of tensors and plain values. The tensors
        may change as soon as this method returns.

        It waits for the previous write, but not for the device. The first call allocates as much
        host memory as the state takes. The memory is pinned for tensors on a GPU.
        """
        self.wait()
        snapshot = self.snapshot(state, ())
        # The copies from a GPU are not finished yet. The thread waits for them with these events.
        streams = [torch.cuda.current_stream(device) for device in self.devices]
        copies_done = [s.record_event() for s in streams]  # type: ignore[no-untyped-call]
        self.writing = self.thread.submit(self.write, snapshot, copies_done, name)

    def snapshot(self, value: Any, key_path: KeyPath) -> Any:
        """A copy of `value`, in which the tensors are host buffers that are still being filled."""
        if isinstance(value, dict):
            return {key: self.snapshot(item, (*key_path, key)) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self.snapshot(item, (*key_path, i)) for i, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        value, buffer = value.detach(), self.buffers.get(key_path)
        if value.is_cuda:
            self.devices.add(value.device)
        if buffer is None or (buffer.shape, buffer.dtype) != (value.shape, value.dtype):
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
            self.buffers[key_path] = buffer
        return buffer.copy_(value, non_blocking=True)

    def write(
        self, state: dict[str, Any], copies_done: list[torch.cuda.Event], name: str | None
    ) -> None:
        for event in copies_done:
            event.synchronize()
        write(self.folder, state, self.keep_last, name)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk. Raises OSError if writing it failed."""
        writing, self.writing = self.writing, None
        if writing:
            writing.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self.thread.shutdown()
        try:
            self.wait()
        except Exception as write_error:
            if error is None:
                raise
            warnings.warn(str(write_error), stacklevel=2)


def save(folder: Path, state: dict[str, Any], keep_last: int) -> Path:
    """Write `state` to the file of its step, and delete all but the newest `keep_last` checkpoints.

    Returns the path. Raises OSError if the file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return write(folder, state, keep_last)


def write(folder: Path, state: dict[str, Any], keep_last: int, name: str | None = None) -> Path:
    """Like `save`, for a folder that has to exist already. With a `name`, nothing is deleted."""
    path = folder / (name or PATTERN.format(state["step"]))
    try:
        write_whole(path, partial(torch.save, state))
    except (OSError, RuntimeError) as error:
        # If a write fails, torch raises a RuntimeError of its own while handling the OSError.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            f"{path} was not written: {cause.strerror or cause}. Once {folder} exists, is writable "
            "and has room, continue with --resume; earlier checkpoints are unchanged"
        ) from error
    if name:
        return path
    # Checkpoints of later steps are damaged, because resuming did not use them. They are deleted
    # too.
    paths = paths_in(folder)
    end = paths.index(path) + 1
    for old in paths[: max(0, end - keep_last)] + paths[end:]:
        old.unlink()
    return path


def paths_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, sorted by their step numbers."""
    numbers = {path: path.stem.removeprefix("step_") for path in folder.glob("step_*.pt")}
    paths = [path for path, number in numbers.items() if number.isdecimal()]
    return sorted(paths, key=lambda path: int(numbers[path]))


def load(path: Path) -> dict[str, Any]:
    """Load a checkpoint to the CPU. Code in the file is never executed.

    Raises FileNotFoundError if the file is missing. Raises ValueError if it is damaged, is not a
    checkpoint, or contains weights that are not finite.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    # torch and zipfile can raise almost any exception for a damaged file.
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a checkpoint of rsa-fast: {error}") from error
    fields: dict[str, Any] = state if isinstance(state, dict) else {}
    if missing := {"step", "recipe", "method"} - fields.keys():
        raise ValueError(
            f"{path} is not a checkpoint of rsa-fast: it lacks {', '.join(sorted(missing))}"
        )
    try:
        check_finite(fields["method"])
    except ValueError as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
    return fields


def check_finite(weights: Any) -> None:
    """Raise ValueError, which names the first one, if weights in a dictionary are not finite."""
    for key, value in weights.items() if isinstance(weights, dict) else ():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise ValueError(
                f"{key} has values that are NaN or infinite: take a checkpoint from before its "
                "training diverged"
            )


def check_archive(path: Path) -> None:
    """Raise ValueError for faults that `torch.load` accepts or explains badly.

    `torch.load` does not compare checksums, and it unpacks compressed parts to any size. For a file
    with code in it, its error message recommends executing the code.
    """
    with ZipFile(path) as archive:
        for part in archive.infolist():
            name = part.filename
            leads_out = name.startswith("/") or ".." in Path(name).parts
            if leads_out or part.compress_type != ZIP_STORED:
                raise ValueError(f"its part {name!r} is compressed or leads out of the file")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of its part {damaged!r} is wrong")
    if code := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        names = ", ".join(sorted(code))
        raise ValueError(f"it contains calls of {names}; only tensors and plain values are allowed")


def load_latest(folder: Path) -> dict[str, Any]:
    """Load the newest undamaged checkpoint. Each newer one that is damaged causes a warning.

    Raises FileNotFoundError if there is none.
    """
    for path in reversed(paths_in(folder)):
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the previous one", stacklevel=2)
    raise FileNotFoundError(
        f"no undamaged checkpoint in {folder}: start again with --overwrite, or point --out at the "
        "run's folder"
    )


def best_score(folder: Path, name: str, step: int) -> tuple[float, int]:
    """The score `name` of `best.pt` and its step, or minus infinity and 0 if there is none.

    A checkpoint of a step after `step`, or of another score, does not count.
    """
    try:
        state = torch.load(folder / BEST, map_location="cpu", weights_only=True, mmap=True)
        if state["step"] <= step:
            return state["score"][name], state["step"]
    except FileNotFoundError:
        pass
    except Exception as error:  # torch can raise almost any exception for a damaged file
        log.warning(f"{folder / BEST} cannot be read ({error}): the next scored epoch replaces it")
    return float("-inf"), 0


def delete_later(folder: Path, step: int) -> None:
    """Delete the checkpoints after `step`, from which the run starts again, and log their names."""
    later = [path for path in paths_in(folder) if int(path.stem.removeprefix("step_")) > step]
    for path in later:
        path.unlink()
    if later:
        log.info(
            f"starting again at step {step:,}: later records are replaced, and later checkpoints "
            f"are deleted: {', '.join(path.name for path in later)}"
        )


def newest_checkpoint(path: str | Path) -> Path:
    """The newest undamaged checkpoint if `path` is a run's folder, or else `path` itself.

    The log names the checkpoint that was chosen. Raises FileNotFoundError for a folder without an
    undamaged checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    is_rank_0 = terminal.speaks()
    for newest in reversed(paths_in(folder)):
        try:
            check_archive(newest)
        except Exception as error:  # torch and zipfile can raise almost any exception
            if is_rank_0:
                log.warning(f"{newest} is damaged ({error}): trying the previous one")
            continue
        if is_rank_0:
            log.info(f"{path}: its newest undamaged checkpoint is {newest.name}")
        return newest
    raise FileNotFoundError(
        f"no undamaged checkpoint in {folder}: give the folder of a run, or a file with an encoder"
    )


def name_of(dtype: torch.dtype) -> str:
    """The compute type as a checkpoint stores it, such as `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def restore_scaler(scaler: GradScaler, state: dict[str, Any], dtype: torch.dtype) -> str:
    """Load a checkpoint's fp16 scaler into a run that continues in the compute type `dtype`.

    Returns a line for the log if the checkpoint was computed in another type, and otherwise "". If
    the checkpoint has no scaler state, a new scaler starts. Earlier versions did not save the type.
    """
    now, saved, scaler_state = name_of(dtype), state.get("dtype"), state["scaler"]
    if saved is None:
        saved = "float16" if scaler_state else "another type than float16"
        changed = bool(scaler_state) != scaler.is_enabled()
    else:
        changed = saved != now
    if scaler.is_enabled() and scaler_state:
        scaler.load_state_dict(scaler_state)
    if not changed:
        return ""
    fresh = ", with a new loss scaler" if scaler.is_enabled() else ""
    return f"this checkpoint was computed in {saved}, and the run continues in {now}{fresh}"
