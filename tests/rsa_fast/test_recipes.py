from __future__ import annotations

import pytest

from rsa_fast.recipes import DATASETS, build_recipe, dump_yaml, parse_set, resolve

# dataset: images, px, batch, steps per epoch, peak lr, beta, epochs (RSA section 4.1)
PAPER = {
    "cifar10": (50_000, 32, 256, 195, 0.1, 0.3, 200),
    "cifar100": (50_000, 32, 256, 195, 0.1, 0.3, 200),
    "stl10": (105_000, 64, 256, 410, 0.1, 0.4, 200),
    "tinyimagenet": (100_000, 64, 256, 390, 0.1, 0.4, 200),
    "imagenet100": (126_689, 224, 256, 494, 0.2, 0.4, 200),
    "imagenet1k": (1_281_167, 224, 2048, 625, 4.8, 0.4, 200),
    "imagenet1k-100ep": (1_281_167, 224, 2048, 625, 7.2, 0.4, 100),
}


@pytest.mark.parametrize("dataset", PAPER)
def test_rows_hold_the_paper_s_numbers(dataset):
    images, size_px, batch_size, steps, peak_lr, beta, epochs = PAPER[dataset]
    recipe = build_recipe(dataset, "rsa")
    plan = resolve(recipe, images)
    assert (recipe.views.size_px, recipe.batch_size, recipe.beta_base, recipe.epochs) == (size_px, batch_size, beta, epochs)
    assert plan.steps_per_epoch == steps and plan.total_steps == steps * epochs
    assert plan.peak_lr == pytest.approx(peak_lr)
    large = dataset.startswith("imagenet1k")
    assert plan.warmup_steps == (6250 if large else 0)
    assert recipe.optimizer == ("lars" if large else "sgd")
    assert (recipe.hidden_dim, recipe.out_dim) == ((4096, 256) if size_px == 224 else (1024, 128))


def test_every_row_works_with_every_method_and_survives_its_yaml(tmp_path):
    for dataset in DATASETS:
        for method in ("rsa", "byol"):
            recipe = build_recipe(dataset, method)
            (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
            assert build_recipe(dataset, method, tmp_path / "recipe.yaml") == recipe


def test_the_learning_rate_scales_by_true_division():
    peak = [resolve(build_recipe("cifar10", "rsa", overrides={"batch_size": b}), 50_000).peak_lr for b in (64, 384)]
    assert peak == pytest.approx([0.025, 0.15])
    assert resolve(build_recipe("cifar10", "rsa", overrides={"peak_lr": 0.06}), 50_000).peak_lr == 0.06


def test_overrides_reach_the_views_and_later_ones_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("beta_base: 0.2\nviews:\n  blur_p: 0.25\nweight_decay: 1e-4\n")
    recipe = build_recipe("cifar10", "rsa", file, parse_set(("views.blur_p=0", "beta_schedule=fixed")))
    assert recipe.views.blur_p == 0 and recipe.views.size_px == 32
    assert (recipe.beta_base, recipe.weight_decay, recipe.beta_schedule) == (0.2, 1e-4, "fixed")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bata_base", 0.3, r"no field 'bata_base' \(did you mean 'beta_base'\?\)"),
        ("views.blurp", 0.3, r"no field 'views\.blurp' \(did you mean 'views\.blur_p'\?\)"),
        ("views.blur_p", 1.5, r"blur_p=1\.5: a probability lies in \[0, 1\]"),
        ("epochs", 0, r"epochs = 0: .*greater than or equal to 1"),
        ("optimizer", "adam", r"optimizer = 'adam'"),
        ("epochs", "many", r"epochs = 'many'"),
    ],
)
def test_faults_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", "rsa", overrides={key: value})


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)epochs.*momentun"):
        build_recipe("cifar10", "rsa", overrides={"epochs": -1, "momentun": 0.9})


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"no dataset 'cifar1000' \(did you mean 'cifar100'\?\)"):
        build_recipe("cifar1000", "rsa")
    with pytest.raises(ValueError, match=r"no method 'boyl' \(did you mean 'byol'\?\)"):
        build_recipe("cifar10", "boyl")
    with pytest.raises(ValueError, match="takes key=value, found beta"):
        parse_set(("beta",))
