"""Methods of somebody else: a file at a path, or an entry point of another package."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from rsa_fast import methods
from rsa_fast.cli import main
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.evaluate import evaluate
from rsa_fast.evaluation.export import export
from rsa_fast.insight.report import report
from rsa_fast.methods import METHODS, method_class, short_name
from rsa_fast.methods.byol import Byol
from rsa_fast.recipes import build_recipe
from rsa_fast.training import checkpoint
from rsa_fast.training.engine import train
from tests.helpers import ROOT, invoke
from tests.tiny_runs import TINY, same, weights

# Pulls both views of an image together, by the share that the recipe says.
CODE = """
from pydantic import Field

from rsa_fast.methods.method import Loss, Method, mlp, unit
from rsa_fast.networks import Projected
from rsa_fast.recipes import Recipe
from rsa_fast.sourced import cite


class PullRecipe(Recipe):
    share: float = Field(ge=0, le=1)


class PullTogether(Method):
    recipe_type = PullRecipe
    rows = {"all": cite("chosen", share=0.5)}
    reads = frozenset({"weak_1", "weak_2"})

    def __init__(self, recipe, encoder):
        super().__init__(recipe, encoder)
        self.online = Projected(encoder, mlp(encoder.feature_dim, 8, 8))
        self.share = recipe.share

    def forward(self, batch, now):
        one, two = unit(self.online(batch.weak_1)), unit(self.online(batch.weak_2))
        return Loss(self.share * (one - two).square().sum(1).mean(), one, {})
"""
FIELDS = {key: value for key, value in TINY.items() if key not in ("hidden_dim", "out_dim")}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "mine" / "pull_together.py"
    path.parent.mkdir()
    path.write_text(CODE)
    return path


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Install a package with the entry points `pull` (a class) and `pull-module` (its module)."""
    site = tmp_path / "site"
    (site / "pulling").mkdir(parents=True)
    (site / "pulling" / "__init__.py").write_text("")
    (site / "pulling" / "together.py").write_text(CODE)
    info = site / "pulling-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pulling\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[rsa_fast.methods]\npull = pulling.together:PullTogether\npull-module = pulling.together\n"
        "gone = pulling.gone\nbyol = pulling.together\n"
    )
    monkeypatch.syspath_prepend(site)
    yield
    method_class.cache_clear()
    for name in ("pulling", "pulling.together"):
        sys.modules.pop(name, None)


def test_a_file_outside_the_package_trains_and_is_found_from_another_folder(
    folder, file, tmp_path, monkeypatch
):
    monkeypatch.chdir(file.parent)
    recipe = build_recipe("cifar10", "pull_together.py", overrides={**FIELDS, "share": 0.25})
    assert (recipe.method, recipe.share) == (str(file), 0.25)
    train(recipe, folder, tmp_path / "whole")
    train(recipe, folder, tmp_path / "run", stop_at_step=7)

    monkeypatch.chdir("/")
    again = build_recipe("cifar10", str(file), tmp_path / "run" / "recipe.yaml")
    assert again == recipe
    result = train(again, folder, tmp_path / "run", resume=True)
    assert (result["step"], result["method"]) == (15, "pull-together")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    page = report([str(tmp_path / "run")], str(tmp_path / "page.html")).read_text()
    assert ">pull-together<" in page and str(file) not in page


@pytest.mark.parametrize("name", ["pull", "pull-module"])
def test_an_entry_point_is_a_method_by_its_name(installed, folder, tmp_path, name):
    recipe = build_recipe("cifar10", name, overrides=FIELDS)
    result = train(recipe, folder, tmp_path / "run", stop_at_step=1)
    assert (result["method"], recipe.method, recipe.share) == (name, name, 0.5)


def test_entry_points_are_listed_and_leave_the_names_of_this_package_alone(installed):
    assert method_class("byol") is Byol
    listed = invoke(main, "recipes")
    names = json.loads(listed.stdout.splitlines()[-1])["methods"]
    assert names == [*METHODS, "pull", "pull-module", "gone"]
    with pytest.raises(ValueError, match=r"no method 'pul' \(did you mean 'pull'\?\)"):
        method_class("pul")
    with pytest.raises(ValueError, match=r"method gone: no module named 'pulling\.gone'"):
        method_class("gone")


def test_a_name_of_this_package_looks_at_no_entry_points(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda **_: pytest.fail("entry points were read"))
    method_class.cache_clear()
    assert method_class("byol") is Byol
    assert invoke(main, "train", "--help").exit_code == 0
    methods.check_name("rsa")
    methods.check_name("not/there.py")


def test_a_method_is_called_by_a_short_name():
    names = {"rsa": "rsa", "/a/b/barlow_twins.py": "barlow-twins", "x.py": "x", "pull": "pull"}
    assert {name: short_name(name) for name in names} == names


OTHER = CODE[CODE.index("class PullTogether") :].replace("PullTogether", "Other")
BROKEN = {
    "none": (CODE.replace("rows =", "numbers ="), "found none.* exactly one class with `rows`"),
    "several": (CODE + OTHER, "found PullTogether, Other"),
    "no recipe_type": (CODE.replace("recipe_type =", "kind ="), "PullTogether has no recipe_type"),
    "not a recipe": (CODE.replace("(Recipe)", "").replace(": float", ""), "has no recipe_type"),
    "not a method": ("class A:\n    rows = {}\n", "A is not a subclass of rsa_fast.methods"),
    "scale": (CODE.replace('"all"', '"33px"'), "has rows for 33px: the scales are .*32px"),
    "no source": (CODE.replace('cite("chosen", share=0.5)', '{"share": 0.5}'), "without a source"),
    "import": ("import torch\nimport not_there\n", r"not_there.*line 2"),
    "syntax": ("a = 1\nb = = 2\n", r"SyntaxError.*line 2"),
    "number": (CODE.replace("share=0.5", "share=2"), "share = 2: .*less than or equal to 1"),
    "field": (CODE.replace("share=0.5", "shore=2"), r"no field 'shore' \(did you mean 'share'"),
    "missing": (None, r"method pull-together: there is no file .*pull_together\.py"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_faulty_file_is_refused_with_its_fault(tmp_path, fault):
    code, message = BROKEN[fault]
    path = tmp_path / "pull_together.py"
    if code:
        path.write_text(code)
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", str(path), overrides=FIELDS)
    command = ["train", "--dataset", "cifar10", "--method", str(path), "--data", "x", "--out", "y"]
    done = invoke(main, *command)
    assert done.exit_code == 1 and done.output.startswith("Error: ")


def test_fields_of_an_own_method_are_refused_for_others_and_in_words(file):
    with pytest.raises(ValueError, match=r"share = 3: Input should be less than or equal to 1"):
        build_recipe("cifar10", str(file), share=3)
    message = r"it belongs to .* moco, ressl, swav, not to pull-together"
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", str(file), queue_size=64)


def test_the_command_line_shows_and_completes_an_own_method(file, monkeypatch):
    monkeypatch.chdir(file.parent)
    done = invoke(main, "recipes", "cifar10/pull_together.py")
    assert done.exit_code == 0 and "cifar10/pull-together" in done.output
    assert json.loads(done.output.splitlines()[-1])["method"] == str(file)
    (option,) = [param for param in main.commands["train"].params if param.name == "method"]

    def completions(typed: str) -> set:
        items = option.type.shell_complete(None, option, typed)
        return {(item.value, item.type) for item in items}

    assert completions("sim") == {(name, "plain") for name in METHODS if name.startswith("sim")}
    assert completions("mine/pu") == {("mine/pu", "file")}  # the shell completes the path


def test_the_encoder_is_read_where_the_method_is_gone(folder, file, tmp_path, caplog):
    caplog.set_level(logging.INFO, "rsa_fast")
    recipe = build_recipe("cifar10", str(file), overrides={**FIELDS, "share": 0.25})
    train(recipe, folder, tmp_path / "run", stop_at_step=5)
    (path,) = checkpoint.paths_in(tmp_path / "run" / "checkpoints")
    file.write_text("raise SystemExit('a checkpoint must not execute this')")
    sys_modules = set(sys.modules)

    encoder, read = load_encoder(str(path))
    assert f"{file} is not a method of this package" in caplog.text
    assert set(sys.modules) == sys_modules
    assert read.model_dump() == recipe.model_dump()  # with the method's own field, unchecked
    assert str(read).startswith("pull-together on ")
    trained = weights(tmp_path / "run")
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, trained[f"online.encoder.{key}"])

    file.unlink()
    first = evaluate(str(path), str(folder), "knn")
    assert evaluate(path, folder, "knn", resize_px=16)["knn_top1"] is not None
    assert first["checkpoint"] == str(path)
    out = tmp_path / "release" / "encoder.safetensors"
    export(str(path), "safetensors", str(out))
    card = (out.parent / "README.md").read_text()
    assert "encoder: pull-together on " in card and "method: pull-together\n" in card
    assert "share: 0.25" in card and str(file.parent) not in card


def test_resuming_a_run_whose_method_is_gone_names_the_missing_file(folder, file, tmp_path):
    out = tmp_path / "run"
    train(build_recipe("cifar10", str(file), overrides=FIELDS), folder, out, stop_at_step=1)
    file.unlink()
    words = ["--config", out / "recipe.yaml", "--data", folder, "--out", out]
    done = subprocess.run(
        [sys.executable, "-m", "rsa_fast", "train", "--resume", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 1
    assert f"method pull-together: there is no file {file}" in done.stderr


def test_a_checkpoint_of_another_method_s_file_is_not_continued(folder, file, tmp_path):
    out = tmp_path / "run"
    train(build_recipe("cifar10", str(file), overrides=FIELDS), folder, out, stop_at_step=1)
    copy = file.with_name("pull_apart.py")
    copy.write_text(CODE)
    with pytest.raises(ValueError, match=rf"method: '{file}' in the checkpoint, '{copy}' now"):
        train(build_recipe("cifar10", str(copy), overrides=FIELDS), folder, out, resume=True)
