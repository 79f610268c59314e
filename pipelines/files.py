"""Write files atomically: afterwards each is either completely new or unchanged."""

from __future__ import annotations

import codecs
import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


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


def json_text(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN and no infinity: these become null."""
    return json.dumps(without_nonfinite(value), indent=indent, allow_nan=False)


def without_nonfinite(value: Any) -> Any:
    """The value, with None for numbers that are not finite, also in dictionaries and lists."""
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nonfinite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_list_text(path: Path) -> str:
    """The text of a list of files, in UTF-8, or in UTF-16 if it starts with a byte order mark.

    File names need not be valid UTF-8. Invalid bytes become surrogates, as in Python's file names.
    """
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    return os.fsdecode(content.removeprefix(codecs.BOM_UTF8))


def read_bytes(path: str) -> bytes:
    """The content of a file. `Path.read_bytes` holds Python's lock three times as long."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, os.fstat(descriptor).st_size)
    finally:
        os.close(descriptor)


def partial_name(name: str) -> str:
    """The name of the temporary file: hidden, so no listing of images or checkpoints finds it."""
    return f".{name}.partial"


def user_cache() -> Path:
    """The user's cache folder of this program. It need not exist.

    It is in $XDG_CACHE_HOME or ~/.cache. For a user without a home folder, it is in the folder for
    temporary files.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(home):
        home = f"{tempfile.gettempdir()}/cache-{os.getuid()}"
    return Path(home) / "rsa-fast"
