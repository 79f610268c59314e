"""What the README and the documents show works.

The commands in their blocks run on a few small images. Commands within a sentence, and those of
generated pages, are parsed. The blocks of Python run too, here or in the tests of their subjects.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import click
import pytest
import torch
from click.testing import Result

import rsa_fast
from rsa_fast import build_recipe, cli, datasets
from rsa_fast.evaluation import detection
from rsa_fast.pipelines import VIEWS, Loading, Order, backends, layouts, open_source, open_views
from rsa_fast.training import checkpoint
from tests.documents import FENCE, METHOD, PAGES, PYTHON, WRITTEN, make_context, python_with
from tests.helpers import ROOT, invoke, result_of, write_folder
from tests.rsa_fast.tiny_detection import MODEL_OPTIONS, write_coco
from tests.tiny_runs import NARROW, NETWORK, set_options

TOOL = r"(?:rsa-fast|python -m tools\.\w+)"


def commands_in(text: str) -> list[str]:
    """The lines of a shell that start with a command of this project, without the comments."""
    return re.findall(rf"^(?:srun +)?(?:\.venv/bin/)?({TOOL}(?: .*?)?) *(?:#.*)?$", text, re.M)


def shell_of(text: str) -> str:
    blocks = [code for language, code in FENCE.findall(text) if language in ("", "bash")]
    return "".join(blocks).replace(" \\\n", " ")


SHELL = shell_of(WRITTEN)
COMMANDS = list(dict.fromkeys(commands_in(SHELL)))


NOTEBOOK = python_with(">>>")
TEN_LINES = python_with("embed, evaluate, load_encoder, train")
ROW = python_with('DATASETS["birds"]')
BACKEND = python_with("class PlainViews")
OTHER_TESTS = ("def small()", "def noise(", 'BACKENDS["plain"]')

EVERYTHING = "\n".join(PAGES.values())
INLINE = [
    line
    for line in re.findall(rf"`({TOOL}(?: [^`]*)?)`", FENCE.sub("", EVERYTHING))
    if "COMMAND" not in line
]
CONTAINER = [
    f"rsa-fast {line}" for line in re.findall(r"^docker run .* rsa-fast +(.*)$", SHELL, re.M)
]
PARSED = sorted({*INLINE, *CONTAINER, *commands_in(shell_of(EVERYTHING))} - set(COMMANDS))

# Options that make a command short. The rest of the command is unchanged.
SMALLER = shlex.join(set_options(NARROW))
RECIPE = (
    "--batch-size 8 --set precision=fp32 --set views.size_px=32 --set hidden_dim=16 --set out_dim=8"
)
SMALL = {
    "train my_photos": SMALLER,
    "train --dataset cifar10": SMALLER,  # Detection needs ImageNet's whole network.
    "train": f"{RECIPE} --epochs 1 --set eval_resize_px=32 --set knn_every_epochs=0",
    "eval linear --protocol": "--epochs 1",
    "finetune": "--epochs 1",
    "detect": "--steps 1 --batch-size 2 --workers 0",
    "profile": f"{RECIPE} {SMALLER} --repeats 1 --seconds 0 --budget-s 0",
}
CONVERTERS = tuple(f"rsa-fast {name}" for name in ("convert", "verify", "subset", "stage"))
PLACES = {
    "DATA": "data/cifar10",
    "FOLDER": "data/imagenet",
    "OUT": "runs/out",
    "runs/a": "runs/cifar10",
    "runs/b": "runs/imagenet",
}


def ready(line: str) -> list[str]:
    """Return the words of a command as it runs here, with a small run."""
    words = [PLACES.get(word, word) for word in shlex.split(line)]
    for start, options in SMALL.items():
        if line.startswith(f"rsa-fast {start}"):
            words += shlex.split(options)
    return words + ["--dry-run"] * ("train" in words and ("--gpus" in words or "OUT" in line))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Result]]:
    """Run every command in a folder with the documents' data, and return the results.

    Commands that convert and train run first, because others read their files.
    """
    place, ran = tmp_path_factory.mktemp("readme"), {}
    write_folder(place / "data" / "imagenet", {"train": 6, "val": 4}, size=(40, 48))
    write_folder(place, {"my_photos": 20}, size=(40, 48))
    (place / "data" / "imagenet-wds").mkdir()
    with tarfile.open(place / "data" / "imagenet-wds" / "shard-0.tar", "w") as tar:
        tar.add(place / "data" / "imagenet" / "train")
    (place / "LIST").write_text("class_0\n")
    (place / "my_twins.py").write_text(METHOD)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        write_coco(place / "data" / "coco")
        fetch = {"train": 20, "test": 10}
        patch.setattr(
            layouts,
            "download",
            lambda data, name: write_folder(data, fetch, size=(32, 32)),
        )
        patch.setattr(detection, "MODEL_OPTIONS", MODEL_OPTIONS)
        patch.setattr(detection, "PRECISE_BN_STEPS", 1)
        for line in sorted(
            COMMANDS,
            key=lambda line: (
                2 - line.startswith("rsa-fast train") - 2 * line.startswith(CONVERTERS),
                "--download" not in line,
            ),
        ):
            words = ready(line)
            command = cli.main if words[0] == "rsa-fast" else importlib.import_module(words[2]).main
            ran[line] = invoke(command, *words[1 if words[0] == "rsa-fast" else 3 :])
        yield ran
    shutil.rmtree(place)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_run(outcomes, line):
    result = outcomes[line]
    assert result.exit_code == 0, result.output
    if line.startswith("rsa-fast"):
        assert isinstance(json.loads(result.stdout.splitlines()[-1]), dict)


@pytest.mark.parametrize("line", PARSED)
def test_the_other_commands_have_only_options_that_exist(outcomes, line):
    words = [PLACES.get(word, word) for word in shlex.split(line)]
    # A sentence may name a command without what it requires.
    with contextlib.suppress(click.MissingParameter, click.exceptions.NoArgsIsHelpError):
        make_context(words)


def test_there_are_commands_to_try():
    assert len(COMMANDS) > 25 and len(PARSED) > 25
    assert len(CONTAINER) == 1 and CONTAINER[0].startswith("rsa-fast train --dataset imagenet1k")
    assert sum("tools.bench" in line for line in PARSED) >= 5


def test_the_targets_of_make_exist():
    targets = set(re.findall(r"^make ([\w-]+)", SHELL, re.M))
    targets |= set(re.findall(r"`make ([\w-]+)`", WRITTEN))
    assert len(targets) > 6
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_every_block_of_python_is_run_by_a_test():
    others = [python_with(text) for text in OTHER_TESTS]
    assert set(PYTHON) == {METHOD, NOTEBOOK, TEN_LINES, ROW, BACKEND, *others}


def test_the_lines_for_a_notebook_are_those_that_are_run():
    assert NOTEBOOK in rsa_fast.__doc__  # tests/rsa_fast/test_surface.py runs it.


def test_the_ten_lines_of_the_readme_run(outcomes):
    assert TEN_LINES in PAGES["README.md"] and TEN_LINES.count("\n") <= 10
    scope: dict = {}
    exec(TEN_LINES.replace("epochs=2", "epochs=2, arch='resnet10', width=4"), scope)
    assert scope["result"]["step"] > 0 and 0 <= scope["scores"]["linear_top1"] <= 100
    assert Path("features.npz").is_file()
    assert isinstance(scope["encoder"], torch.nn.Module)


def test_the_row_of_a_dataset_is_one(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "birds", None)  # what the row adds is removed again
    exec(ROW, dict(vars(datasets)))
    recipe = build_recipe("birds", "rsa")
    assert (recipe.arch, recipe.views.size_px, recipe.epochs) == ("resnet18", 224, 400)


def test_the_crops_in_the_documents_are_those_of_swav(tmp_path):
    (code,) = [code for language, code in FENCE.findall(WRITTEN) if language == "yaml"]
    (tmp_path / "crops.yaml").write_text(code)
    recipe = build_recipe("imagenet100", "swav", tmp_path / "crops.yaml")
    assert [crop.size_px for crop in recipe.views.crops] == [224] * 2 + [96] * 6


def test_the_backend_in_the_documents_makes_the_views_of_torchvision(folder, monkeypatch):
    module = ModuleType("rsa_fast.pipelines.plain_views")
    exec(BACKEND, vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(backends.BACKENDS, "plain", None)
    exec(python_with('BACKENDS["plain"]'), vars(backends))
    source = open_source(folder, "pretrain")
    spec, order = build_recipe("cifar10", "rsa").views, Order(len(source.manifest), 8, seed=0)

    def batches(backend: str) -> list:
        loading = Loading(backend=backend, threads=1)
        with open_views(source, spec, frozenset(VIEWS), order, loading=loading) as loader:
            return list(loader.batches(epoch=1, step=2))

    plain, usual = batches("plain"), batches("torchvision")
    assert len(plain) == len(usual) == len(order) - 2
    for one, other in zip(plain, usual, strict=True):
        assert torch.equal(one.ids, other.ids) and torch.equal(one.label, other.label)
        assert all(torch.equal(one.views[name], other.views[name]) for name in VIEWS)


def test_the_method_in_the_documents_trains_and_is_barlow_twins():
    space: dict = {}
    exec(METHOD, space)
    from rsa_fast.networks import Encoder
    from rsa_fast.pipelines.views import Batch

    torch.manual_seed(0)
    recipe = SimpleNamespace(hidden_dim=16, out_dim=3, off_diagonal=0.005)
    method = space["BarlowTwins"](recipe, Encoder("resnet18", "cifar", 8))
    views = {f"aggressive_{i}": torch.randn(6, 3, 8, 8) for i in (1, 2)}
    batch = Batch(torch.zeros(6, dtype=torch.int64), views)
    optimizer = torch.optim.SGD(method.parameters(), 0.1)
    losses = []
    for step in range(20):
        loss = method(batch, {"beta": 0.0})
        if step == 0:
            z = [method.online(view) for view in views.values()]
            z = [((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()).tolist() for x in z]
            total = 0.0
            for i in range(3):
                for j in range(3):
                    c = sum(z[0][n][i] * z[1][n][j] for n in range(6)) / 6
                    total += (c - 1) ** 2 if i == j else 0.005 * c**2
            assert loss.total.item() == pytest.approx(total, rel=1e-4)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.total.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.fixture
def my_twins(tmp_path) -> Path:
    """The method of the documents, saved outside of this project."""
    path = tmp_path / "mine" / "my_twins.py"
    path.parent.mkdir()
    path.write_text(METHOD)
    return path


def test_the_method_s_file_trains_is_killed_resumed_and_used_from_outside_the_tree(
    folder, my_twins, tmp_path, monkeypatch
):
    fields = NETWORK | {"precision": "fp32", "knn_every_epochs": 0}
    options = ["--dataset", "cifar10", "--data", str(folder), "--epochs", "20", "--batch-size", "8"]
    options += set_options(fields)

    def rsa_fast(*words: object) -> dict:
        return result_of(invoke(cli.main, *words))

    # The uninterrupted run, and one that is killed once it has a checkpoint.
    monkeypatch.chdir(my_twins.parent)
    whole = rsa_fast("train", "--method", "my_twins.py", *options, "--out", tmp_path / "whole")
    assert (whole["method"], whole["step"]) == ("my-twins", 20 * 5)
    run = tmp_path / "run"
    command = [sys.executable, "-m", "rsa_fast", "train", "--method", "my_twins.py", *options]
    process = subprocess.Popen(
        [*command, "--out", str(run)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    while process.poll() is None and not checkpoint.paths_in(run / "checkpoints"):
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (run / "result.json").exists()

    # Resumed from another folder: the recipe has the absolute path.
    monkeypatch.chdir("/")
    config = ["--config", run / "recipe.yaml", "--data", folder, "--out", run]
    assert rsa_fast("train", "--resume", *config)["step"] == 20 * 5
    states = [checkpoint.load_latest(out / "checkpoints") for out in (tmp_path / "whole", run)]
    for part in ("method", "optimizer"):
        first, second = (flat(state[part]) for state in states)
        assert first.keys() == second.keys() and len(first) > 10
        assert all(torch.equal(first[key], second[key]) for key in first)
    records = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert any(record.get("diagonal", 0) > 0 for record in records)

    # Used where the file is gone.
    my_twins.unlink()
    (path,) = checkpoint.paths_in(run / "checkpoints")[-1:]
    scores = rsa_fast("eval", "knn", "--checkpoint", path, "--data", folder)
    assert scores["knn_top1"] == whole["knn_top1"]
    out = tmp_path / "release" / "encoder.safetensors"
    rsa_fast("export", "--checkpoint", path, "--format", "safetensors", "--out", out)
    assert "my-twins on cifar10" in (out.parent / "README.md").read_text()


def flat(state: object, name: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a nested state."""
    if isinstance(state, torch.Tensor):
        return {name: state}
    items = state.items() if isinstance(state, dict) else []
    return {k: v for key, value in items for k, v in flat(value, f"{name}/{key}").items()}
