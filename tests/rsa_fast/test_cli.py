from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import pytest
import torch

from rsa_fast import distributed
from rsa_fast.cli import main
from rsa_fast.datasets import DATASETS
from rsa_fast.methods import METHODS
from rsa_fast.training import checkpoint
from tests.helpers import invoke, result_of
from tests.tiny_runs import NETWORK, set_options

TINY = NETWORK | {"precision": "fp32"}


run = partial(invoke, main)


def train(folder, out, *more):
    names = ("--dataset", "cifar10", "--method", "rsa", "--epochs", 2, "--batch-size", 8)
    return run("train", "--data", folder, "--out", out, *names, *set_options(TINY), *more)


def test_train_ends_with_one_json_line_and_eval_reads_its_checkpoint(folder, tmp_path):
    result = train(folder, tmp_path / "run")
    last = result_of(result)
    assert {"images_per_s", "step_ms", "wait_pct", "knn_top1", "linear_top1"} <= last.keys()
    assert result.stdout.count("\n") == 1 and "peak_lr" in result.stderr
    newest = checkpoint.paths_in(tmp_path / "run" / "checkpoints")[-1]
    for protocol, key in (("knn", "knn_top1"), ("linear", "linear_top1")):
        scored = run("eval", protocol, "--checkpoint", newest, "--data", folder)
        assert scored.exit_code == 0, scored.output
        scores = json.loads(scored.stdout)
        assert scores[key] == pytest.approx(last[key])
        assert scores[f"{protocol}_per_class"] == pytest.approx(last[f"{protocol}_per_class"])
        # The run's folder is its newest checkpoint, and says where its images are.
        named = run("eval", protocol, "--checkpoint", tmp_path / "run")
        assert json.loads(named.stdout) == scores | {"data": str(folder)}
    confusion = json.loads((tmp_path / "run" / "confusion.json").read_text())
    assert confusion["classes"] == ["class_0", "class_1"] and confusion["score"] == "linear"
    right = sum(count for label, predicted, count in confusion["counts"] if label == predicted)
    total = sum(count for *_, count in confusion["counts"])
    assert (total, 100 * right / total) == (20, last["linear_top1"])
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Classes by linear, run" in page and '<table class="cells">' in page
    assert "<h2>Views</h2>" in page and "<h2>Nearest images</h2>" in page
    assert "linear_per_class" not in page


def test_a_run_s_folder_is_a_checkpoint_in_every_command(folder, tmp_path):
    load_file = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed: pip install rsa-fast[export]"
    ).load_file
    train(folder, tmp_path / "run")
    newest = checkpoint.paths_in(tmp_path / "run" / "checkpoints")[-1]
    for place in (tmp_path / "run", newest):
        out = tmp_path / f"{place.name}.safetensors"
        done = run("export", "--checkpoint", place, "--format", "safetensors", "--out", out)
        assert done.exit_code == 0, done.output
    one, other = map(load_file, (tmp_path / "run.safetensors", out))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    started = train(folder, tmp_path / "second", "--init-from", tmp_path / "run", "--epochs", 1)
    assert started.exit_code == 0 and f"{newest.name}" in started.stderr, started.output


def test_a_run_s_recipe_starts_the_same_run(folder, tmp_path):
    train(folder, tmp_path / "one")
    again = run(
        "train",
        "--data",
        folder,
        "--out",
        tmp_path / "two",
        "--config",
        tmp_path / "one" / "recipe.yaml",
    )
    assert again.exit_code == 0, again.output
    one, two = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two")
    )
    assert one["linear_top1"] == two["linear_top1"] and one["knn_top1"] == two["knn_top1"]


def test_dry_run_prints_the_plan_and_trains_nothing(folder, tmp_path):
    result = train(folder, tmp_path / "run", "--dry-run", "--gpus", 4)
    plan = json.loads(result.stdout.splitlines()[-1])
    assert (plan["images"], plan["total_steps"], plan["batch_per_gpu"]) == (40, 10, 2)
    assert "beta_base: 0.3" in result.stdout and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--batch-size", 1000), "do not fill one batch of 1000"),
        (("--gpus", 3), "batch_size 8 is global and cannot be divided among 3 ranks"),
        (("--method", "supervised"), "supervised training on 10 classes found labels of 2 classes"),
    ],
)
def test_dry_run_refuses_what_training_does(folder, tmp_path, arguments, message):
    names = (
        "--dataset",
        "cifar10",
        "--method",
        "rsa",
        "--batch-size",
        8,
        "--data",
        folder,
        "--out",
        tmp_path / "run",
    )
    result = run("train", *names, *arguments, "--dry-run")
    assert result.exit_code == 1 and message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "bata_base=1"), "did you mean 'beta_base'?"),
        (("--backend", "dahli"), "no backend 'dahli'"),
        (("--batch-size", 1000), "do not fill one batch of 1000"),
        (("--resume", "--overwrite"), "--resume and --overwrite cannot be combined"),
        (("--gpus", 2, "--nproc", 2), "--gpus and --nproc cannot be combined"),
        (("--force",), "--force is only valid with --resume"),
        (("--key", "teacher"), "--key is only valid with --init-from"),
        (("--nproc", 2, "--batch-size", 2), "gives BatchNorm fewer than 2 images at a time"),
        (("--arch", "timm/nosuch", "--set", "width=64", "--dry-run"), "no model 'nosuch'"),
        (("--method", "boyl"), "did you mean 'byol'?"),
        (("--data", "/nowhere"), "no folder /nowhere"),
        (
            ("--download", "--dataset", "tinyimagenet"),
            "--download supports cifar10, cifar100, stl10",
        ),
    ],
)
def test_bad_input_is_one_line_and_a_failure(folder, tmp_path, arguments, message):
    result = train(folder, tmp_path / "run", *arguments)
    assert result.exit_code != 0 and message in result.output and "Traceback" not in result.output


def test_recipes_are_listed_and_shown_with_sources():
    listed = invoke(main, "recipes")
    names = json.loads(listed.output.splitlines()[-1])
    rows = names.pop("recipes")
    assert listed.exit_code == 0 and names == {"datasets": list(DATASETS), "methods": list(METHODS)}
    (rsa,) = [row for row in rows if row["recipe"] == "imagenet100/rsa"]
    assert (rsa["top1"], rsa["source"]) == (85.5, "PAPER Table 3")
    assert (
        rsa["command"] == "rsa-fast train --dataset imagenet100 --method rsa --data DATA --gpus 4"
    )
    (line,) = [line for line in listed.output.splitlines() if line.strip().startswith("stl10/dino")]
    assert "not measured" in line
    shown = invoke(main, "recipes", "imagenet100/moco")
    fields = json.loads(shown.output.splitlines()[-1])
    assert (
        fields["queue_size"] == 65536 and "MoCo v2" in shown.output and "PAPER 4.1" in shown.output
    )
    assert "did you mean 'cifar10'?" in invoke(main, "recipes", "cifar11").output


def test_an_ablation_is_a_method_with_its_fields(folder, tmp_path):
    result = train(
        folder, tmp_path / "run", "--method", "rsa", "--ablation", "ma-fixed", "--dry-run"
    )
    assert (
        result.exit_code == 0
        and "beta_base: 0.5" in result.output
        and "beta_schedule: fixed" in result.output
    )
    assert (
        "is for byol, not rsa"
        in train(folder, tmp_path / "run", "--method", "rsa", "--ablation", "aa").output
    )
    assert (
        "did you mean 'ma-fixed'?" in train(folder, tmp_path / "run", "--ablation", "ma-fix").output
    )


def test_the_module_runs_as_the_command():
    out = subprocess.run(
        [sys.executable, "-m", "rsa_fast", "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert "train" in out and "eval" in out


def test_a_tool_is_imported_only_when_it_is_used():
    code = (
        "import sys; from rsa_fast.cli import main; main(['--help'], standalone_mode=False); "
        "print(*sorted({'numpy', 'PIL', 'torch', 'rsa_fast.tools'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *_, last = done.stdout.splitlines()
    assert last == "" and " verify " in done.stdout


TOOLS = [
    main.commands["verify"],
    main.commands["subset"],
    *main.commands["convert"].commands.values(),
]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.name)
def test_the_help_and_the_errors_of_a_tool_are_those_of_its_module(tool):
    words = ("convert", tool.name) if tool not in main.commands.values() else (tool.name,)
    done = run(*words, "--help")
    assert done.exit_code == 0 and f"Usage: main {' '.join(words)} [OPTIONS]" in done.output
    assert " ".join(tool.help.split()) in " ".join(done.output.split())
    done = run(*words, "--no-such-option")
    assert done.exit_code == 2 and "No such option" in done.output


def test_more_gpus_than_there_are_are_refused_before_anything_starts(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed, "launch", lambda *_: pytest.fail("nothing may start"))
    for visible, advice in ((2, "finds 2 GPUs; use at most --gpus 2"), (0, "finds no GPUs")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda visible=visible: visible)
        result = train(folder, tmp_path / "run", "--gpus", 8)
        assert result.exit_code == 1 and f"Error: --gpus 8: torch {advice}" in result.stderr
    result = train(folder, tmp_path / "run", "--gpus", "auto")
    assert result.exit_code == 1 and "--gpus auto: torch finds no GPU" in result.stderr
    result = train(folder, tmp_path / "run", "--gpus", "all")
    assert result.exit_code == 2 and "'all' is not a valid" in result.stderr


def test_gpus_auto_starts_a_process_for_each_gpu_also_with_a_rank_that_a_platform_sets(
    folder, tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(distributed, "launch", lambda count, *_: started.append(count) or 0)
    assert train(folder, tmp_path / "run", "--gpus", "auto").exit_code == 0
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
    assert train(folder, tmp_path / "run", "--gpus", 2).exit_code == 0
    assert started == [4, 2]
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    result = train(folder, tmp_path / "run", "--gpus", 2)
    assert result.exit_code == 1 and "already one of 2 processes (WORLD_SIZE=2)" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about a machine without a GPU")
def test_a_recipe_of_a_gpu_is_previewed_and_profiled_on_a_cpu_and_not_trained(folder, tmp_path):
    train(folder, tmp_path / "run", "--dry-run")
    recipe = tmp_path / "recipe.yaml"
    done = train(folder, tmp_path / "run", "--dry-run", "--gpus", 4)
    recipe.write_text(done.stdout.rpartition("{")[0])
    assert "device: cuda" in recipe.read_text()
    named = ("--config", recipe, "--data", folder)
    sheet = run("preview", *named, "--out", tmp_path / "sheet.png")
    assert sheet.exit_code == 0, sheet.output
    short = ("--repeats", 1, "--seconds", 0, "--methods", "rsa", "--json")
    profiled = run("profile", *named, *short)
    assert profiled.exit_code == 0, profiled.output
    assert json.loads(profiled.stdout)["device"] == "cpu"
    trained = run("train", *named, "--out", tmp_path / "run")
    assert trained.exit_code == 1 and "device = cuda, but torch finds no GPU" in trained.stderr


def test_a_profile_of_all_methods_says_which_of_them_it_leaves_out(folder, monkeypatch):
    measured = []
    monkeypatch.setattr(
        "rsa_fast.insight.profiling.profile", lambda recipes, *_, **__: measured.extend(recipes)
    )
    options = ("--dataset", "cifar10", "--data", folder, "--batch-size", 96, "--json")
    done = run("profile", "--methods", "all", *options)
    assert done.exit_code == 0, done.output
    assert set(measured) == set(METHODS) - {"w-mse"}
    assert "w-mse is left out: " in done.stderr and "batch_size = 96 is not a multiple of 128" in (
        done.stderr
    )
    assert run("profile", "--methods", "rsa,w-mse", *options).exit_code == 1
