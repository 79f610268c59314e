"""Load Python objects that a text names: `path/to/file.py:name` or `package.module:name`.

    blur = load_object("my_views.py:motion_blur")

Users add their own augmentation, network or method in this way. A file is executed once in a
process. Its module is in `sys.modules` under a name made from the absolute path. Its classes can
therefore be pickled, and worker processes that are forked later find it.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

ONE_AT_A_TIME = threading.RLock()  # two threads must not execute the same file


def load_object(spec: str) -> Any:
    """The object that `spec` names: `path/to/file.py:name` or `package.module:name`.

    Raises ValueError as `load_module` does, and if the module has no such name.
    """
    where, colon, name = spec.rpartition(":")
    if not (where and name.isidentifier()):
        what = "nothing after the colon" if colon and not name else "no name after a colon"
        raise ValueError(f"{spec!r} has {what}: wanted path/to/file.py:name or package.module:name")
    module = load_module(where)
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")]
        near = get_close_matches(name, public, n=3) or public[:8]
        has = f"it has {', '.join(near)}" if near else "it has no public names"
        raise ValueError(f"{where} has no {name!r}: {has}")
    return getattr(module, name)


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint with the most similar known word, or an empty string if none is similar."""
    matches = get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def load_module(where: str | Path) -> ModuleType:
    """The module of a path to a Python file, or of a dotted name such as `package.module`.

    A file is executed once in a process, whatever path leads to it. Raises ValueError if there is
    no such file or module, and if it cannot be imported (with the error and its line).
    """
    if is_file(where):
        return module_of_file(absolute(where))
    try:
        return import_module(str(where))
    except ModuleNotFoundError as error:
        if error.name and f"{where}.".startswith(f"{error.name}."):
            raise ValueError(
                f"no module named {error.name!r} is installed: for a file, give its path with .py"
            ) from error
        raise ValueError(f"{where} cannot be imported: {fault(error)}") from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{where} cannot be imported: {fault(error)}") from error


def is_file(where: str | Path) -> bool:
    """Whether `where` means a file rather than a dotted name. The file need not exist."""
    return isinstance(where, Path) or os.sep in where or where.endswith(".py")


def absolute(where: str | Path) -> Path:
    """The absolute path of a file, which is valid in every working directory."""
    try:
        return Path(where).expanduser().resolve()
    except RuntimeError as error:  # the user of ~user is unknown, or links form a circle
        raise ValueError(f"{str(where)!r} is not a path to a file: {error}") from error


def absolute_spec(spec: str) -> str:
    """`spec` with an absolute path if it names an object of a file, otherwise unchanged."""
    where, colon, name = spec.rpartition(":")
    return f"{absolute(where)}{colon}{name}" if is_file(where) else spec


def module_of_file(path: Path) -> ModuleType:
    """The module of the file at the absolute `path`, executed now if it is not loaded yet."""
    if path.suffix != ".py":
        raise ValueError(f"{path} is not a Python file: its name must end in .py")
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    stem = re.sub(r"\W", "_", path.stem)
    name = f"file_{stem}_{sha256(str(path).encode()).hexdigest()[:12]}"
    with ONE_AT_A_TIME:
        if name in sys.modules:
            return sys.modules[name]
        spec = spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None, "a .py file has a loader"
        module = module_from_spec(spec)
        sys.modules[name] = module  # before it is executed, because dataclasses look it up
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if isinstance(error, Exception | SystemExit):
                raise ValueError(f"{path} cannot be loaded: {fault(error, path)}") from error
            raise
        return module


def fault(error: BaseException, path: Path | None = None) -> str:
    """The type, message and line of `error`. The line is the last one in `path`, or of any file."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if path is not None and frame.filename == str(path)]
    where = (own or frames)[-1]
    file, line = where.filename, where.lineno
    if isinstance(error, SyntaxError) and error.filename:
        file, line = error.filename, error.lineno
    place = f"line {line}" if file == str(path) else f"line {line} of {file}"
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {message} ({place})"
