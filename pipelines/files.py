"""Files that are whole or as they were, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make or replace `path` by what `write` puts into the file it is called with: temporary name, fsync, rename.

    On return it is on the disk. An error, be it of `write` or of the disk (OSError), leaves `path` as it was and nothing
    beside it; a killed process leaves `partial_name(path)`, which the next write of `path` replaces.
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


def partial_name(name: str) -> str:
    """Hidden, so that no listing of images or checkpoints finds it."""
    return f".{name}.partial"
