from __future__ import annotations

import json

import pytest

from rsa_fast.recipes import build_recipe
from rsa_fast.tools import demo
from rsa_fast.tools.make_demo import make_demo
from tests.helpers import invoke, result_of

SMALL = {"width": 4, "hidden_dim": 16, "out_dim": 8, "batch_size": 40, "epochs": 2}


def test_the_demo_trains_both_methods_beside_its_baselines(tmp_path, monkeypatch):
    overrides = SMALL | {"precision": "fp32"}
    monkeypatch.setattr(demo, "make_demo", lambda data: make_demo(data, per_class=15))
    monkeypatch.setattr(
        demo, "build_recipe", lambda *names: build_recipe(*names, overrides=overrides)
    )
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--data", str(tmp_path / "data")]
    done = invoke(demo.main, *arguments)
    scores = result_of(done)
    assert list(scores) == ["chance", "raw pixels", "random network", "rsa", "byol"]
    assert set(scores["chance"].values()) == {10}
    for method in ("rsa", "byol"):
        result = json.loads((out / method / "result.json").read_text())
        assert scores[method] == {name: result[name] for name in scores["chance"]}
    page = (out / "report.html").read_text()
    assert all(f"{scores[method]['knn_top1']:.1f}" in page for method in ("rsa", "byol"))
    assert (out / "views.png").is_file()
    assert str(out / "report.html") in done.stdout


@pytest.mark.parametrize(("seconds", "epochs"), [(0, 1), (1e6, 2)])
def test_the_demo_is_shortened_to_its_time_and_says_so(tmp_path, caplog, seconds, epochs):
    make_demo(tmp_path / "data", per_class=15)
    recipe = build_recipe("demo", "rsa", overrides=SMALL | {"precision": "fp32"})
    assert demo.epochs_within(seconds, recipe, tmp_path / "data") == epochs
    shortened = "both methods are trained for 1 of 2 epochs" in caplog.text
    assert shortened == (epochs == 1)
