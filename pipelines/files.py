"""Atomic file writes: afterwards the file is either completely new or unchanged."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace the file `path` with what `write(file)` writes.

    The content goes to a temporary file, which is flushed to the disk (fsync) and then renamed. On
    return the new file is on the disk. If `write` or the disk fails, the error is raised, `path` is
    unchanged and the temporary file is removed. A killed process leaves the temporary file
    (`partial_name`), which the next write of `path` replaces.
    """
    partial = path.with_name(partial_name(path.name))
    file = partial.open("wb")
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Create or replace a text file atomically, in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def partial_name(name: str) -> str:
    """The name of the temporary file: hidden, so no listing of images or checkpoints finds it."""
    return f".{name}.partial"
