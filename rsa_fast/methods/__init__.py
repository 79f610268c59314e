"""The training methods, one file each; `method.py` contains what they share.

A method's file contains the fields of its recipe, its numbers for each scale of dataset with their
sources, its networks and its loss. Every file in this folder is found by its name, so a method
needs no registration. This module imports nothing heavy, so `rsa-fast --help` lists the names
quickly.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsa_fast.methods.method import Method

# From the name of a method to the name of its module.
FILES = {
    path.stem.replace("_", "-"): path.stem
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in ("__init__", "method")
}
METHODS = tuple(FILES)

# The four rows of PAPER Table 1: a method and the fields it sets. All of them have beta = 0.5.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "aa": ("byol", {"pairs": "AA"}),
    "aw": ("byol", {"pairs": "AW"}),
    "ma-fixed": ("rsa", {"beta_base": 0.5, "beta_schedule": "fixed"}),
    "ma-decay": ("rsa", {"beta_base": 0.5, "beta_schedule": "cosine"}),
}


@cache
def method_class(name: str) -> type[Method]:
    """The class of the method called `name`: the one in its file that defines `rows`.

    Raises ValueError when the file has no such class, or several.
    """
    module = import_module(f"rsa_fast.methods.{FILES[name]}")
    methods = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and "rows" in vars(value)
    ]
    if len(methods) != 1:
        names = ", ".join(method.__name__ for method in methods) or "none"
        raise ValueError(f"{module.__file__}: one class with `rows` makes a method, found {names}")
    return methods[0]
