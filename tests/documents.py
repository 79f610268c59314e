"""The commands and the code that the documents show."""

from __future__ import annotations

import importlib
import re

import click

from rsa_fast import cli
from rsa_fast.tools.docs import GENERATED
from tests.helpers import ROOT

PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
}
WRITTEN = "\n".join(text for text in PAGES.values() if GENERATED not in text)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
PYTHON = [code for language, code in FENCE.findall(WRITTEN) if language == "python"]


def python_with(text: str) -> str:
    """The one block of Python that contains `text`."""
    (code,) = [code for code in PYTHON if text in code]
    return code


METHOD = python_with("class BarlowTwins")


def make_context(words: list[str]) -> None:
    """Parse a command. Raises click's errors for unknown options and missing files."""
    if words[0] == "rsa-fast":
        command, rest = cli.main, words[1:]
    elif words[2] == "tools.gpu_report":
        importlib.import_module("rsa_fast.tools.gpu_report.__main__").make_parser().parse_args(
            words[3:]
        )
        return
    else:
        command, rest = importlib.import_module(words[2]).main, words[3:]
    while isinstance(command, click.Group) and rest:
        assert rest[0] in command.commands, rest
        command, rest = command.commands[rest[0]], rest[1:]
    # A command keeps the help option of its first context: with the group's settings it has -h too.
    settings = cli.main.context_settings if words[0] == "rsa-fast" else {}
    command.make_context(command.name, rest, **settings)
