"""Write the generated pages of `docs`: commands, Python API, recipes and methods.

    python -m tools.docs docs

The pages are part of the repository, so that they can be read without building anything. A test
compares them with what this command writes. `make docs` also builds the site, with mkdocs.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

import rsa_fast
from rsa_fast import cli, pipelines
from rsa_fast.datasets import DATASETS, SHORT_STEPS, own_rules
from rsa_fast.methods import METHODS, method_class
from rsa_fast.pipelines.files import write_text
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import Fields

GENERATED = "<!-- python -m tools.docs writes this page. Change the code, not the page. -->"
TOOLS = ("demo", "make_demo", "bench", "compare", "docs")  # they have no command of rsa-fast
# A method's rows in the table of docs/results.md.
MEASURED = {
    "barlow-twins": ("Barlow Twins",),
    "byol": ("BYOL, AA", "BYOL, AW"),
    "dino": ("DINO",),
    "infomin": ("InfoMin",),
    "inst-dis": ("InstDis",),
    "jcl": ("JCL",),
    "moco": ("MoCo v2",),
    "pirl": ("PIRL",),
    "ressl": ("ReSSL",),
    "rsa": ("RSA", "RSA, fixed beta"),
    "simclr": ("SimCLR",),
    "simsiam": ("SimSiam",),
    "simsiam-rsa": ("SimSiam + RSA",),
    "supervised": ("supervised",),
    "swav": ("SwAV", "SwAV, multi-crop"),
    "vicreg": ("VICReg",),
    "w-mse": ("W-MSE, 2 crops", "W-MSE, 4 crops"),
}
SOURCES = (
    "PAPER is the [RSA paper](https://github.com/tmllab/RSA) (NeurIPS 2022) with the section, CODE "
    'is github.com/tmllab/RSA, and "chosen" marks our own choice.'
)

NOT_MEASURED = "**Not measured** yet at the small budget of [Results](../results.md).\n"


@dataclass(frozen=True)
class About:
    """Facts about a method that are not in its code. `views` describes the views that it reads."""

    title: str
    paper: str  # the address of the paper; for RSA the address of its code, which links the paper
    views: str


ABOUT = {
    "rsa": About("RSA", "https://github.com/tmllab/RSA", "all four"),
    "byol": About("BYOL", "https://arxiv.org/abs/2006.07733", "two aggressive, or one weak (AW)"),
    "simsiam": About("SimSiam", "https://arxiv.org/abs/2011.10566", "two aggressive"),
    "simsiam-rsa": About("SimSiam with RSA", "https://github.com/tmllab/RSA", "all four"),
    "simclr": About("SimCLR", "https://arxiv.org/abs/2002.05709", "two aggressive"),
    "moco": About("MoCo v2", "https://arxiv.org/abs/2003.04297", "two aggressive"),
    "ressl": About("ReSSL", "https://arxiv.org/abs/2107.09282", "one aggressive, one weak"),
    "inst-dis": About("InstDis", "https://arxiv.org/abs/1805.01978", "one aggressive"),
    "pirl": About("PIRL", "https://arxiv.org/abs/1912.01991", "one aggressive and a jigsaw"),
    "jcl": About("JCL", "https://arxiv.org/abs/2009.14776", "five aggressive"),
    "infomin": About(
        "InfoMin Aug.",
        "https://arxiv.org/abs/2005.10243",
        "two aggressive with RandAugment, and a jigsaw",
    ),
    "w-mse": About("W-MSE", "https://arxiv.org/abs/2007.06346", "two aggressive or more"),
    "swav": About("SwAV", "https://arxiv.org/abs/2006.09882", "two aggressive, or multi-crop"),
    "dino": About(
        "DINO", "https://arxiv.org/abs/2104.14294", "two large and eight small aggressive"
    ),
    "barlow-twins": About(
        "Barlow Twins", "https://arxiv.org/abs/2103.03230", "two aggressive that differ"
    ),
    "vicreg": About("VICReg", "https://arxiv.org/abs/2105.04906", "two aggressive that differ"),
    "supervised": About("Supervised training", "", "one weak"),
}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def main(folder: Path) -> None:
    """Write the generated pages to FOLDER, usually docs."""
    for name, text in pages((folder / "results.md").read_text()).items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        write_text(path, text)


def pages(results: str) -> dict[str, str]:
    """The text of every generated page, by its path in `docs`. `results` is the results page."""
    texts = {"cli.md": commands(), "api.md": api(), "recipes.md": recipes()}
    texts["methods/index.md"] = methods()
    texts |= {f"methods/{name}.md": method(name, results) for name in METHODS}
    return {name: f"{GENERATED}\n\n{text.strip()}\n" for name, text in texts.items()}


# ---- Commands


def commands() -> str:
    text = "# Commands\n\nThis is what `--help` prints.\n"
    for path, command in every_command("rsa-fast", cli.main):
        text += f"\n## {path}\n\n{fenced(help_of(path, command))}\n"
    text += "\nThese tools are for a clone of the repository.\n"
    for name in TOOLS:
        main = importlib.import_module(f"rsa_fast.tools.{name}").main
        for path, command in every_command(f"python -m tools.{name}", main):
            text += f"\n## {path}\n\n{fenced(help_of(path, command))}\n"
    return text


def every_command(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """A command and those below it."""
    if isinstance(command, cli.Tool):
        command = importlib.import_module(f"rsa_fast.tools.{command.module}").main
    yield path, command
    if isinstance(command, click.Group):
        for name, part in sorted(command.commands.items()):
            yield from every_command(f"{path} {name}", part)


def help_of(path: str, command: click.Command) -> str:
    settings = {**cli.main.context_settings, "terminal_width": 80}
    # click caches the help option of a command's first context, which may have had no -h.
    command._help_option = None
    return command.get_help(click.Context(command, info_name=path, **settings))


def fenced(text: str) -> str:
    return f"```text\n{text}\n```"


# ---- Python API


def api() -> str:
    text = (
        "# Python API\n\nThe names on this page are public. Everything else may change without "
        "notice. [Python](python.md) shows them in use.\n"
    )
    for package in (rsa_fast, pipelines):
        for name in package.__all__:
            value = getattr(package, name)
            if inspect.isclass(value) or inspect.isfunction(value):
                text += f"\n## {package.__name__}.{name}\n\n{described(value)}"
    return text


def described(value: Any) -> str:
    """The head and the docstring of a function, or of a class and its public methods."""
    lines = inspect.getsource(value).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    text = f"{code(head(lines, node))}\n\n{markdown(ast.get_docstring(node) or '')}\n"
    for part in methods if isinstance(node, ast.ClassDef) else ():
        doc = ast.get_docstring(part)
        if part.name == "__init__" or (doc and not part.name.startswith("_")):
            text += f"\n{code(head(lines, part))}\n\n{markdown(doc or '')}\n"
    return text


def head(lines: list[str], node: ast.FunctionDef | ast.ClassDef) -> str:
    """The code of a definition without its docstring. For a class it includes the fields."""
    first = node.body[0]
    if isinstance(node, ast.FunctionDef):
        inside = lines[node.lineno - 1 : first.lineno - 1]
    else:
        functions = [part.lineno - 1 for part in node.body if isinstance(part, ast.FunctionDef)]
        skipped = range(first.lineno - 1, first.end_lineno or 0) if ast.get_docstring(node) else ()
        inside = [
            line
            for number, line in enumerate(lines[: min(functions, default=len(lines))])
            if number >= node.lineno - 1 and number not in skipped
            if line.strip() and not line.strip().startswith(("@", "__", "model_config"))
        ]
    return textwrap.dedent("\n".join(inside)).rstrip(":")


def code(text: str) -> str:
    return f"```python\n{text}\n```"


def markdown(doc: str) -> str:
    """A docstring as Markdown. Its indented list of arguments or errors becomes a Markdown list."""

    def entries(match: re.Match[str]) -> str:
        items = re.split(r"\n(?=\S)", textwrap.dedent(match[2]).strip("\n"))
        listed = (re.sub(r"^(\w+): ", r"- `\1`: ", re.sub(r"\n\s+", " ", item)) for item in items)
        return f"{match[1]}:\n\n" + "\n".join(listed) + "\n"

    return re.sub(r"^(Args|Raises):\n((?:    .*\n?|\n(?=    ))+)", entries, doc, flags=re.M)


# ---- Recipes and methods


def recipes() -> str:
    text = (
        "# Recipes\n\nA recipe combines the row of a dataset with the row of a method: see "
        f"[Settings](settings.md). {SOURCES} `rsa-fast recipes DATASET/METHOD` shows a complete "
        "recipe. The rows of the methods are on [their pages](methods/index.md).\n"
        "\n## Fields\n\nThese are the fields of every recipe. A method may have more.\n\n"
        f"{code(head_of(Recipe))}\n"
    )
    for name, dataset in DATASETS.items():
        text += f"\n## {name}\n\n"
        if name == "auto":
            text += "This dataset is for your own images. Its fields follow from these rules:\n\n"
            text += table(("field", "rule", "reason"), own_rules())
            continue
        text += f"{dataset.images:,} images for pre-training, {dataset.test_images:,} test images, "
        text += f"{dataset.classes:,} classes.\n\n{sourced(dataset.fields)}"
    return text


def sourced(fields: Fields) -> str:
    rows = [(f"`{name}`", shown(one.value), one.source) for name, one in fields.items()]
    return table(("field", "value", "source"), rows)


def shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return f"({', '.join(map(shown, value))})"
    return str(value)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    cells = [[cell.replace("|", "\\|") for cell in row] for row in (header, *rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]]) + "\n"


def methods() -> str:
    rows = [
        (
            f"[{about.title}]({name}.md)",
            f"`{name}`",
            about.views,
            linked(about).strip(),
        )
        for name, about in ABOUT.items()
    ]
    return (
        "# Methods\n\n`--method NAME` chooses a method. All methods run on the same engine, with "
        "the same loading, networks and evaluation. [Your own method]"
        "(../add-a-method.md) is one file. Each page describes what follows the paper, what "
        "follows its code, and what is our own choice.\n\n"
        f"{table(('method', 'name', 'views', 'source'), rows)}\n"
        "`--ablation aa|aw|ma-fixed|ma-decay` are the four rows of Table 1 of the RSA paper.\n"
    )


def method(name: str, results: str) -> str:
    loaded = method_class(name)
    about = ABOUT[name]
    doc = inspect.getdoc(importlib.import_module(loaded.__module__)) or ""
    doc = re.sub(r"github\.com/[\w-]+/[\w-]+", r"[\g<0>](https://\g<0>)", doc)
    text = f"# {about.title}\n\n{linked(about)}{doc}\n"
    text += f"\n```bash\nrsa-fast train --method {name} my_photos\n```\n"
    text += f"{own_fields(loaded.recipe_type)}\n## Numbers\n\n{SOURCES}\n"
    for scale, fields in loaded.rows.items():
        text += f"\n{where(scale)}:\n\n{sourced(fields)}"
    text += "\n## Measured\n\n"
    if name not in MEASURED:
        return f"{text}{NOT_MEASURED}"
    header, rows = small_budget(results)
    text += (
        "With [1% of the paper's training steps](../results.md#every-method-at-one-small-budget), "
        "which gives neither the paper's accuracies nor its ranking of the methods:\n\n"
    )
    labels = ("random initialisation", *MEASURED[name])
    return text + table(header, [rows[label] for label in labels])


def linked(about: About) -> str:
    kind = "Code" if "github" in about.paper else "Paper"
    return f"[{kind}]({about.paper})\n\n" if about.paper else ""


def own_fields(recipe: type[Recipe]) -> str:
    """The fields that only a method's recipes have, with their comments."""
    kinds = recipe.__mro__[: recipe.__mro__.index(Recipe)]
    heads = [head_of(kind) for kind in reversed(kinds)]
    heads = [text for text in heads if "\n" in text]  # the others have no fields
    if not heads:
        return ""
    return "\n## Fields\n\nA field without a value gets it from the tables below.\n\n" + (
        code("\n\n\n".join(heads)) + "\n"
    )


def head_of(kind: type) -> str:
    lines = inspect.getsource(kind).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    assert isinstance(node, ast.ClassDef)
    return head(lines, node)


def where(scale: str) -> str:
    """The recipes that the row of a scale is for."""
    if scale == "all":
        return "For all datasets"
    names = [name for name, dataset in DATASETS.items() if scale in dataset.scales]
    own = {"32px", "64px", "224px"} & {scale}
    listed = ", ".join(f"`{name}`" for name in [*names, *(["auto"] if own else [])])
    if scale == "short":
        return f"For {listed}, and for `auto` with fewer than {SHORT_STEPS:,} steps"
    return f"For {listed}{f' with views of {scale[:-2]} px' * bool(own)}"


def small_budget(results: str) -> tuple[list[str], dict[str, list[str]]]:
    """The header of the table that compares all methods, and its rows by their first cell."""
    (table_text,) = re.findall(
        r"^\| top-1 % \| kNN k=200 \|.*\n(?:\|.*\n)+", results[: results.index("## The demo")], re.M
    )
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table_text.splitlines()
    ]
    return header, {row[0]: row for row in rows}


if __name__ == "__main__":
    main()
