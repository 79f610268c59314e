from __future__ import annotations

import json

import click
import pytest
import yaml

from rsa_fast.recipes import build_recipe
from rsa_fast.tools import demo
from rsa_fast.tools.make_demo import make_demo
from rsa_fast.training.run_folder import hold_folder
from tests.helpers import invoke, result_of

SMALL = {"width": 4, "hidden_dim": 16, "out_dim": 8, "batch_size": 40, "epochs": 2}
SMALL |= {"log_every_steps": 1}


@pytest.fixture
def small_recipe(monkeypatch):
    """The demo's recipe of both methods with a tiny network. Its first two steps are timed."""
    options = [f"--set={name}={value}" for name, value in SMALL.items() if name != "epochs"]
    monkeypatch.setattr(demo, "RECIPE", (*demo.RECIPE, *options))
    monkeypatch.setattr(demo, "TIMED_STEP", 2)
    monkeypatch.setattr(demo, "build_recipe", lambda *names: build_recipe(*names, overrides=SMALL))
    return demo.build_recipe("demo", "rsa")


def test_the_demo_trains_both_methods_beside_its_baselines(tmp_path, monkeypatch, small_recipe):
    monkeypatch.setattr(demo, "make_demo", lambda data: make_demo(data, per_class=15))
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--data", str(tmp_path / "data")]
    done = invoke(demo.main, *arguments)
    scores = result_of(done)
    assert list(scores) == ["chance", "raw pixels", "random network", "rsa", "byol"]
    assert set(scores["chance"].values()) == {10}
    for method in ("rsa", "byol"):
        recipe = yaml.safe_load((out / method / "recipe.yaml").read_text())
        expected = build_recipe("demo", method, overrides=SMALL).model_dump(mode="json")
        assert recipe == expected
        result = json.loads((out / method / "result.json").read_text())
        assert scores[method] == {name: result[name] for name in scores["chance"]}
    page = (out / "report.html").read_text()
    assert all(f"{scores[method]['knn_top1']:.1f}" in page for method in ("rsa", "byol"))
    assert (out / "views.png").is_file()
    assert str(out / "report.html") in done.stdout


@pytest.mark.slow
def test_the_demo_is_shortened_to_its_time_and_says_so(tmp_path, caplog, small_recipe):
    make_demo(tmp_path / "data", per_class=15)
    demo.train_within(0, small_recipe, tmp_path / "data", tmp_path)
    for method in ("rsa", "byol"):
        recipe = yaml.safe_load((tmp_path / method / "recipe.yaml").read_text())
        assert recipe["epochs"] == 1
        assert (tmp_path / method / "result.json").is_file()
    assert "both methods are trained for 1 of 2 epochs" in caplog.text


def test_a_training_that_fails_ends_the_demo_and_the_other_training(
    tmp_path, monkeypatch, small_recipe
):
    make_demo(tmp_path / "data", per_class=15)
    message = r"byol has failed: .*byol\.log says why"
    endless = small_recipe.model_copy(update={"epochs": 100_000})
    with (
        hold_folder(tmp_path / "byol", resume=False, overwrite=True),  # as another demo does
        pytest.raises(click.ClickException, match=message),
    ):
        demo.train_within(1e9, endless, tmp_path / "data", tmp_path)
    assert "in use" in (tmp_path / "byol.log").read_text()
    stopped = json.loads((tmp_path / "rsa" / "result.json").read_text())
    assert stopped["step"] < 300_000 and stopped["knn_top1"] is None
