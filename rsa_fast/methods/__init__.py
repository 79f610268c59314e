"""The methods. Each file of this folder is one, named after it; `method.py` is what they share.

A method's file holds its recipe's fields, its numbers for each scale of dataset with their sources,
its networks and its loss. It is registered by being here. This module imports nothing heavy, so
that `rsa-fast --help` can list the names.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsa_fast.methods.method import Method

FILES = {
    path.stem.replace("_", "-"): path.stem
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in ("__init__", "method")
}
METHODS = tuple(FILES)

# PAPER Table 1: the method and the fields of its four rows; beta is .5 in all of that table.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "aa": ("byol", {"pairs": "AA"}),
    "aw": ("byol", {"pairs": "AW"}),
    "ma-fixed": ("rsa", {"beta_base": 0.5, "beta_schedule": "fixed"}),
    "ma-decay": ("rsa", {"beta_base": 0.5, "beta_schedule": "cosine"}),
}


@cache
def method_class(name: str) -> type[Method]:
    """The method of that name: the class with `rows` in its file.

    Raises ValueError when the file has none, or several.
    """
    module = import_module(f"rsa_fast.methods.{FILES[name]}")
    methods = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and "rows" in vars(value)
    ]
    if len(methods) != 1:
        found = ", ".join(method.__name__ for method in methods) or "none"
        raise ValueError(f"{module.__file__}: one class with `rows` makes a method, found {found}")
    return methods[0]
