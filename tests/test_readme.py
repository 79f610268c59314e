"""What the README shows works: its commands run on a few small images, its method trains."""

from __future__ import annotations

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
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import ROOT, write_folder

import rsa_fast
import rsa_fast.pipelines.layouts
from rsa_fast import cli
from rsa_fast.evaluation import detection
from rsa_fast.training import checkpoint

README = (ROOT / "README.md").read_text()
TOOL = r"(?:rsa-fast|python -m tools\.\w+)"
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)
SHELL = "".join(text for language, text in FENCED if language in ("", "bash")).replace(" \\\n", " ")
PYTHON = [text for language, text in FENCED if language == "python"]
(METHOD,) = [text for text in PYTHON if "class BarlowTwins" in text]
LINES = re.findall(rf"^(?:srun +)?(?:\.venv/bin/)?({TOOL} .*?) *(?:#.*)?$", SHELL, re.M)
INLINE = [
    line
    for line in re.findall(rf"`({TOOL}(?: [^`]*)?)`", README)
    if not line.startswith(("python -m tools.bench", "python -m tools.compare"))
]
COMMANDS = list(dict.fromkeys([*LINES, *INLINE]))
# tests/tools/test_bench.py runs them, and test_compare.py the comparison.
BENCHMARKS = re.findall(r"`python -m tools\.bench (\w+)", README)

# Options that make a command short. The rest of the command is unchanged.
NARROW = "--set arch=resnet18 --set width=4"
RECIPE = (
    "--batch-size 8 --set precision=fp32 --set views.size_px=32 --set hidden_dim=16 --set out_dim=8"
)
SMALL = {
    "train my_photos": NARROW,
    "train --dataset cifar10": NARROW,  # Detection needs ImageNet's whole network.
    "train": f"{RECIPE} --epochs 1 --set eval_resize_px=32 --set knn_every_epochs=0",
    "eval linear --protocol": "--epochs 1",
    "finetune": "--epochs 1",
    "detect": "--steps 1 --batch-size 2 --workers 0",
    "profile": f"{RECIPE} {NARROW} --repeats 1 --seconds 0 --budget-s 0",
}
PLACES = {
    "DATA": "data/cifar10",
    "OUT": "runs/out",
    "runs/a": "runs/cifar10",
    "runs/b": "runs/imagenet",
}


def ready(line: str) -> list[str]:
    """Return the words of a command as it runs here.

    Its run is small, and an existing checkpoint gets the name that the README uses.
    """
    words = [PLACES.get(word, word) for word in shlex.split(line)]
    for path in (Path(word) for word in words if re.search(r"checkpoints/step_\d+\.pt$", word)):
        for newest in sorted(path.parent.glob("step_*.pt"))[-1:]:
            if newest.name < path.name:
                path.symlink_to(newest.name)
    for start, options in SMALL.items():
        if line.startswith(f"rsa-fast {start}"):
            words += shlex.split(options)
    return words + ["--dry-run"] * ("train" in words and ("--gpus" in words or "OUT" in line))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Run every command in a folder with the README's data, and return the results.

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
        patch.syspath_prepend(ROOT / "tests" / "rsa_fast")
        from test_detection import TINY, write_coco

        write_coco(place / "data" / "coco")
        fetch = {"train": 20, "test": 10}
        patch.setattr(
            rsa_fast.pipelines.layouts,
            "download",
            lambda data, name: write_folder(data, fetch, size=(32, 32)),
        )
        patch.setattr(detection, "MODEL_OPTIONS", TINY)
        patch.setattr(detection, "PRECISE_BN_STEPS", 1)
        for line in sorted(
            COMMANDS,
            key=lambda line: 2 - line.startswith("rsa-fast train") - 2 * line.startswith("python"),
        ):
            words = ready(line)
            command = cli.main if words[0] == "rsa-fast" else importlib.import_module(words[2]).main
            ran[line] = CliRunner().invoke(command, words[1 if words[0] == "rsa-fast" else 3 :])
        yield ran
    shutil.rmtree(place)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_commands_run(outcomes, line):
    result = outcomes[line]
    assert result.exit_code == 0, result.output
    if line.startswith("rsa-fast"):
        assert isinstance(json.loads(result.stdout.splitlines()[-1]), dict)


def test_there_are_commands_to_try():
    assert len(LINES) > 15 and len(COMMANDS) > 18 and len(BENCHMARKS) >= 4


def test_the_targets_of_make_and_the_benchmarks_exist():
    from rsa_fast.tools.bench import main

    assert set(BENCHMARKS) <= main.commands.keys()
    for target in set(re.findall(r"^make ([\w-]+)", SHELL, re.M)):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.parametrize("code", [code for code in PYTHON if ">>>" in code])
def test_the_lines_for_a_notebook_are_those_that_are_run(code):
    assert code in rsa_fast.__doc__  # tests/rsa_fast/test_surface.py runs it.


def test_the_method_in_the_readme_trains_and_is_barlow_twins():
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
    """The README's method, saved outside of this project."""
    path = tmp_path / "mine" / "my_twins.py"
    path.parent.mkdir()
    path.write_text(METHOD)
    return path


def test_the_method_s_file_trains_is_killed_resumed_and_used_from_outside_the_tree(
    folder, my_twins, tmp_path, monkeypatch
):
    sets = ["width=4", "hidden_dim=16", "out_dim=8", "views.size_px=16", "precision=fp32"]
    options = ["--dataset", "cifar10", "--data", str(folder), "--epochs", "20", "--batch-size", "8"]
    options += [word for text in [*sets, "knn_every_epochs=0"] for word in ("--set", text)]

    def rsa_fast(*words: object) -> dict:
        done = CliRunner().invoke(cli.main, list(map(str, words)))
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout.splitlines()[-1])

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
