from __future__ import annotations

import numpy as np
from PIL import Image

from rsa_fast.recipes import build_recipe
from rsa_fast.tools.demo import METHODS, baselines, draw_curves
from rsa_fast.tools.make_demo import make_demo
from rsa_fast.training.engine import train


def test_the_demo_scores_its_baselines_and_draws_its_curves(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    make_demo(data, per_class=15)
    overrides = {
        "width": 4,
        "hidden_dim": 16,
        "out_dim": 8,
        "batch_size": 40,
        "epochs": 2,
        "precision": "fp32",
    }
    recipe = build_recipe("demo", "rsa", overrides=overrides)
    scores = baselines(recipe, data)
    assert scores["chance"]["knn_top1"] == 10
    assert scores["raw pixels"].keys() == scores["random network"].keys()
    for method in METHODS:
        train(build_recipe("demo", method, overrides=overrides), data, out / method)
    draw_curves(out, scores, out / "curves.png")
    picture = np.asarray(Image.open(out / "curves.png").convert("RGB"))
    assert picture.shape[0] > 300 and picture.std() > 20  # The picture is not blank.
