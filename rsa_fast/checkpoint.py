"""Checkpoints: complete, atomic, loadable with `weights_only=True`.

    RUN/checkpoints/step_00000780.pt      step, recipe, method (online, target), optimiser, scaler, data fingerprint

The data position is the step itself: order and views are pure functions of it, so no generator state is stored.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

PATTERN = "step_{:08d}.pt"


def save(folder: Path, state: dict[str, Any], keep_last: int) -> Path:
    """Write `state` under its step by temporary name, fsync and rename, then drop all but the newest `keep_last`.

    A process killed at any moment leaves the previous checkpoint whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PATTERN.format(state["step"])
    partial = path.with_suffix(".tmp")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)
    for old in listed(folder)[:-keep_last]:
        old.unlink()
    return path


def listed(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first, by their number."""
    return sorted(folder.glob("step_*.pt"), key=lambda path: int(path.stem.removeprefix("step_")))


def load(path: Path) -> dict[str, Any]:
    """One checkpoint, on the CPU. Raises ValueError when the file is not one, FileNotFoundError when it is missing."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises RuntimeError, EOFError, UnpicklingError, ... for a damaged file
        raise ValueError(f"{path} is damaged or no checkpoint of this project: {error}") from error
    missing = {"step", "recipe", "method"} - set(state if isinstance(state, dict) else ())
    if missing:
        raise ValueError(f"{path} is no checkpoint of this project: it lacks {', '.join(sorted(missing))}")
    return state


def load_latest(folder: Path) -> dict[str, Any]:
    """The newest whole checkpoint; a damaged newer one is named in a warning and passed over.

    Raises FileNotFoundError when there is none.
    """
    for path in reversed(listed(folder)):
        try:
            return load(path)
        except ValueError as error:
            warnings.warn(f"{error}; trying the one before", stacklevel=2)
    raise FileNotFoundError(f"no whole checkpoint in {folder}: start without --resume, or point --out at the run's folder")
