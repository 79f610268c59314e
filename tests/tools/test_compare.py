"""The comparison of all methods: what its rows are, and that a stopped one goes on."""

from __future__ import annotations

import json

import numpy as np
import pytest

from rsa_fast.methods import METHODS
from rsa_fast.tools import compare
from tests.helpers import invoke, write_folder


def test_every_method_has_a_row_whose_recipe_is_sound():
    assert {row.method for row in compare.ROWS.values()} == set(METHODS)
    for row in compare.ROWS.values():
        for seed in row.seeds:
            recipe = compare.recipe_of(row, seed, 12, 64)
            assert (recipe.seed, recipe.epochs, recipe.width) == (seed, 12, 8)
            assert recipe.peak_lr == 0.06 or recipe.optimizer != "sgd"
    assert {name for name, row in compare.ROWS.items() if len(row.seeds) == 3} == {"rsa", "byol-aa"}
    assert len(compare.recipe_of(compare.ROWS["w-mse-4"], 0, 12, 64).views.crops) == 4
    assert len(compare.recipe_of(compare.ROWS["swav-multi-crop"], 0, 12, 64).views.crops) == 8


def test_scores_of_several_seeds_are_their_mean_and_standard_deviation():
    values = [40.0, 41.0, 45.0]
    figures = compare.over_seeds([{"knn_top1": value, "linear_top1": None} for value in values])
    assert figures["seeds"] == 3 and figures["linear_top1"] is None
    assert figures["knn_top1"] == np.mean(values)
    assert figures["knn_top1_std"] == pytest.approx(np.std(values, ddof=1))
    assert compare.cell(figures, "knn_top1") == "42.00 ± 2.6"
    assert "knn_top1_std" not in compare.over_seeds([{"knn_top1": 40.0}])


def test_a_stopped_comparison_trains_only_what_is_left(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    write_folder(data, {"train": 12, "test": 6}, size=(32, 32))
    monkeypatch.setitem(compare.BUDGET, "width", 4)
    arguments = ["--data", str(data), "--out", str(out), "--epochs", "1", "--batch-size", "8"]
    arguments += ["--only", "simclr", "--only", "rsa"]
    trained, train = [], compare.train

    def once(recipe, data, out, resume):
        trained.append(out.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return train(recipe, data, out, resume=resume)

    monkeypatch.setattr(compare, "train", once)
    assert invoke(compare.main, *arguments).exit_code == 1
    assert trained == ["simclr-seed0", "rsa-seed0", "rsa-seed1"]
    result = invoke(compare.main, *arguments)
    assert result.exit_code == 0, result.output
    assert trained[3:] == ["rsa-seed1", "rsa-seed2"]
    figures = json.loads(result.stdout.splitlines()[-1])
    assert list(figures) == ["random init", "simclr", "rsa"]
    means = [json.loads((out / f"rsa-seed{i}" / "result.json").read_text()) for i in range(3)]
    for name in ("knn_top1", "linear_top1"):
        assert figures["rsa"][name] == pytest.approx(np.mean([mean[name] for mean in means]))
