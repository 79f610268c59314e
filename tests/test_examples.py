"""The examples in docstrings are run: code on small stand-ins, and commands as far as their words.

A name that does not exist, a wrong keyword and an option that is not there fail.
"""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rsa_fast import build_recipe, embed, train
from rsa_fast.methods.method import build_method
from rsa_fast.pipelines import open_source
from rsa_fast.training.checkpoint import paths_in
from rsa_fast.training.step import build_run, train_step
from tests.documents import METHOD, make_context
from tests.helpers import ROOT, write_folder
from tests.tiny_runs import NARROW

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in ("rsa_fast", "pipelines", "tools")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.parent.name != "methods" or path.name == "__init__.py"  # these have formulas
]
COMMAND = re.compile(r"rsa-fast |python -m tools\.")
# The modules whose docstrings also indent what is neither: file listings and settings.
OTHER = {
    "pipelines.beton",
    "pipelines.shards",
    "rsa_fast.methods",
    "rsa_fast.training.checkpoint",
}


def is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def indented(module: str) -> Iterator[str]:
    """The indented blocks in the docstrings of a module, in paragraphs if not all are Python."""
    tree = ast.parse(Path(source_of(module)).read_text())
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        text = "\n" + (ast.get_docstring(node) or "")
        for match in re.finditer(r"\n\n((?: {4}.*\n?|\n(?= {4}))+)", text):
            block = textwrap.dedent(match[1]).strip("\n")
            yield from [block] if is_python(block) else re.split(r"\n\n+", block)


def source_of(module: str) -> Path:
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


BLOCKS = [(module, block) for module in MODULES for block in indented(module)]
CODE = [(module, block) for module, block in BLOCKS if is_python(block)]
COMMANDS = [
    (module, line)
    for module, block in BLOCKS
    if not is_python(block) and COMMAND.match(block)
    for line in block.splitlines()
]


def test_all_that_docstrings_indent_is_an_example_or_known_to_be_none():
    found = {
        module
        for module, block in BLOCKS
        if not is_python(block) and not all(map(COMMAND.match, block.splitlines()))
    }
    assert found == OTHER
    assert len(CODE) > 25 and len(COMMANDS) > 15


# ---- Commands


@pytest.mark.parametrize(("module", "line"), COMMANDS, ids=[line for _, line in COMMANDS])
def test_a_command_has_only_options_that_exist(place, module, line):
    words = [word for word in shlex.split(line, comments=True) if word != "..."]
    make_context(words)


# ---- Code

FIELDS = NARROW | {"hidden_dim": 16, "out_dim": 8, "batch_size": 8, "epochs": 1}
FIELDS |= {"precision": "fp32", "knn_every_epochs": 0}


def small(*arguments: Any, **options: Any):
    """What `build_recipe` returns for these arguments, for small networks and one short epoch."""
    recipe = build_recipe(*arguments, **options)
    fields = {name: value for name, value in FIELDS.items() if name in type(recipe).model_fields}
    return recipe.model_copy(update=fields | {"views": replace(recipe.views, size_px=16)})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the examples read, which is the working directory meanwhile."""
    place = tmp_path_factory.mktemp("examples")
    images = write_folder(place / "data", {"train": 20, "test": 10})
    for name in ("imagenet", "birds", "imagenet-wds"):
        write_folder(images / name, {"train": 20, "test": 10})
    write_folder(images / "cifar10", {"train": 128, "test": 10})  # one batch of an example
    (place / "my_photos").symlink_to(images / "imagenet" / "train")
    (place / "my_methods").mkdir()
    (place / "my_methods" / "barlow_twins.py").write_text(METHOD)
    (place / "my_views.py").write_text(
        "def motion_blur(views, generator):\n    return views\n\n\nerase = motion_blur\n"
    )
    (images / "imagenet-ffcv").mkdir()
    (place / "imagenet100.txt").write_text("class_0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        train(small("cifar10", "rsa"), images / "cifar10", Path("runs/a"))
        for name in ("rsa", "byol"):
            shutil.copytree("runs/a", f"runs/{name}")
        train(
            small("cifar10", "supervised", overrides={"classes": 2}),
            images / "cifar10",
            Path("runs/tuned"),
        )
        embed("runs/a", images / "cifar10", "emb.npz")
        (newest,) = paths_in(Path("runs/a/checkpoints"))
        newest.rename(newest.with_name("step_00039000.pt"))
        encoder = build_method(small("cifar10", "rsa")).encoder
        moco = {f"module.encoder_q.{k}": v for k, v in encoder.state_dict().items()}
        torch.save({"state_dict": moco}, "moco_v2_800ep_pretrain.pth.tar")
        yield place


def stand_ins(module: ModuleType) -> dict[str, Any]:
    """What the examples of a module take for granted, and short forms of what takes long."""
    recipe = small("cifar10", "rsa")
    data = Path("data/cifar10")
    run = build_run(recipe, 40)
    names: dict[str, Any] = {
        "build_recipe": small,
        "open_source": open_source,
        "train": train,
        "train_step": train_step,
        "data": data,
        "out": Path("runs/new"),
        "recipe": recipe,
        "other": small("cifar10", "byol"),
        "run": run,
        "source": open_source(data, "pretrain"),
        "spec": recipe.views,
        "images": torch.randn(2, 3, 32, 32),
        "device": run.device,
        "dtype": run.dtype,
        "encoder": run.method.encoder,
        "manifest": SimpleNamespace(sizes=np.full((300, 2), 32)),
        "RUN": Path("runs/written"),
        "state": {"step": 780, "method": {"weight": torch.zeros(2)}},
    }
    match module.__name__:
        case "rsa_fast.evaluation.detection":  # 90,000 steps: only its arguments are checked
            names["detect"] = inspect.signature(module.detect).bind
        case "rsa_fast.insight.profiling":
            names["profile"] = partial(module.profile, repeats=1, seconds=0)
        case "rsa_fast.recipes" | "rsa_fast.insight.planning":
            names["build_recipe"] = build_recipe
    return names


@pytest.mark.parametrize(
    ("module", "code"), CODE, ids=[f"{module}-{i}" for i, (module, _) in enumerate(CODE)]
)
def test_an_example_runs(place, module, code):
    loaded = import_module(module)
    exec(code, vars(loaded) | stand_ins(loaded))
