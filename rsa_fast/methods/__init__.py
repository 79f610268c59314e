"""The training methods, one file each; `method.py` contains what they share.

A method's file contains the fields of its recipe, its numbers for each scale of dataset with their
sources, its networks and its loss. Every file in this folder is found by its name, so a method
needs no registration. A method of your own is a file of the same kind, which is given by its path.
It can also be an entry point of the group `rsa_fast.methods` of an installed package:

    [project.entry-points."rsa_fast.methods"]
    my-method = "my_package.my_method"

This module imports nothing heavy, so `rsa-fast --help` lists the names quickly.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rsa_fast.datasets import DATASETS
from rsa_fast.pipelines.named import absolute, is_file, load_module, load_object, nearest
from rsa_fast.sourced import Sourced

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from rsa_fast.methods.method import Method

# From the name of a method to the name of its module.
FILES = {
    path.stem.replace("_", "-"): path.stem
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in ("__init__", "method")
}
METHODS = tuple(FILES)
# `rsa-fast finetune` trains this one, which starts from a trained encoder. It is not in METHODS.
FILES["finetune"] = ".evaluation.finetune"

# The four rows of PAPER Table 1: a method and the fields it sets. All of them have beta = 0.5.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "aa": ("byol", {"pairs": "AA"}),
    "aw": ("byol", {"pairs": "AW"}),
    "ma-fixed": ("rsa", {"beta_base": 0.5, "beta_schedule": "fixed"}),
    "ma-decay": ("rsa", {"beta_base": 0.5, "beta_schedule": "cosine"}),
}


@cache
def method_class(name: str) -> type[Method]:
    """The class of a method of this package, of an entry point, or of the file at a path.

    A file or module must contain exactly one class that defines `rows`. Raises ValueError when
    there is no such method, when its file cannot be executed, and when its class is not complete.
    """
    if name in FILES:
        return class_in(import_module(f".{FILES[name]}", __name__))
    check_name(name)
    try:
        if is_file(name):
            return class_in(load_module(absolute(name)))
        point = installed_methods()[name]
        if not point.attr:
            return class_in(load_module(point.module))
        return checked(load_object(f"{point.module}:{point.attr}"), point.value)
    except ValueError as error:
        raise ValueError(f"method {short_name(name)}: {error}") from error


def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a method of this package, an entry point, or a path."""
    if name in METHODS or is_file(name) or name in (installed := installed_methods()):
        return
    names = [*METHODS, *installed]
    raise ValueError(
        f"no method {name!r}{nearest(name, names)}: choose from {', '.join(names)}, "
        "or give the path of a .py file"
    )


def installed_methods() -> dict[str, EntryPoint]:
    """The methods of other installed packages, by the names of their entry points."""
    from importlib.metadata import entry_points

    points = entry_points(group="rsa_fast.methods")
    return {point.name: point for point in points if point.name not in FILES}


def short_name(method: str) -> str:
    """The name under which a method is shown, such as `my-method` for `a/my_method.py`."""
    return Path(method).stem.replace("_", "-") if is_file(method) else method


def class_in(module: ModuleType) -> type[Method]:
    """The class of the method in a module: the only one that the module defines with `rows`."""
    methods = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and value.__module__ == module.__name__ and "rows" in vars(value)
    ]
    if len(methods) != 1:
        names = ", ".join(method.__name__ for method in methods) or "none"
        raise ValueError(
            f"{module.__file__}: found {names}; a method needs exactly one class with `rows`"
        )
    return checked(methods[0], str(module.__file__))


def checked(method: Any, where: str) -> type[Method]:
    """The class of a method, unchanged. Raises ValueError with `where` if it lacks something."""
    from rsa_fast.methods.method import Method
    from rsa_fast.recipes import Recipe

    def is_a(value: object, kind: type) -> bool:
        return isinstance(value, type) and issubclass(value, kind)

    scales = {"all", *(scale for dataset in DATASETS.values() for scale in dataset.scales)}
    fault = ""
    if not is_a(method, Method):
        fault = "is not a subclass of rsa_fast.methods.method.Method"
    elif not is_a(getattr(method, "recipe_type", None), Recipe):
        fault = "has no recipe_type: it is the class of the method's recipes, derived from Recipe"
    elif not hasattr(method, "rows"):
        fault = "has no rows: they contain the numbers of its recipe"
    elif unknown := sorted(method.rows.keys() - scales):
        fault = f"has rows for {', '.join(unknown)}: the scales are {', '.join(sorted(scales))}"
    elif not all(is_a(type(x), Sourced) for row in method.rows.values() for x in row.values()):
        fault = "has numbers without a source in its rows: write cite('chosen', hidden_dim=2048)"
    if fault:
        raise ValueError(f"{where}: {getattr(method, '__name__', method)} {fault}")
    complete: type[Method] = method
    return complete
