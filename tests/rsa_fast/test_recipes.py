from __future__ import annotations

from dataclasses import replace

import pytest

from rsa_fast.datasets import DATASETS
from rsa_fast.methods import ABLATIONS, METHODS
from rsa_fast.pipelines import Loading
from rsa_fast.recipes import (
    LOADING_FIELDS,
    build_recipe,
    dump_yaml,
    parse_set,
    resolve,
    row,
    stored_recipe,
)
from rsa_fast.sourced import cite, merged_rows
from rsa_fast.syncbn import bn_groups

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
    derived = resolve(recipe, images)
    assert (recipe.views.size_px, recipe.batch_size) == (size_px, batch_size)
    assert (recipe.beta_base, recipe.epochs) == (beta, epochs)
    assert derived.steps_per_epoch == steps and derived.total_steps == steps * epochs
    assert derived.peak_lr == pytest.approx(peak_lr)
    large = dataset.startswith("imagenet1k")
    assert derived.warmup_steps == (6250 if large else 0)
    assert recipe.optimizer == ("lars" if large else "sgd")
    assert (recipe.hidden_dim, recipe.out_dim) == ((4096, 256) if size_px == 224 else (1024, 128))


def test_every_row_works_with_every_method_and_survives_its_yaml(tmp_path):
    for dataset in DATASETS.keys() - {"auto"}:  # auto wants images: test_own_images.py
        for method in METHODS:
            recipe = build_recipe(dataset, method)
            (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
            assert build_recipe(dataset, method, tmp_path / "recipe.yaml") == recipe


def test_loading_is_every_loading_field_of_the_recipe():
    given = {
        "backend": "native",
        "threads": 3,
        "prefetch_batches": 5,
        "aggressive_on": "device",
        "decode_on": "cpu",
        "on_bad_image": "skip",
    }
    assert build_recipe("cifar10", "rsa", overrides=given).loading == Loading(**given)
    assert set(LOADING_FIELDS) == given.keys()


# Fields that a method sets, by dataset. They are the default configuration matrix of the methods'
# own papers and codes.
MATRIX = {
    ("byol", "stl10"): {
        "tau_base": 0.99,
        "hidden_dim": 1024,
        "out_dim": 128,
        "pairs": "AA",
        "tau_schedule": "cosine",
    },
    ("byol", "imagenet1k"): {
        "hidden_dim": 4096,
        "out_dim": 256,
        "optimizer": "lars",
        "warmup_epochs": 10,
        "bn": "sync",
        "batch_size": 2048,
    },
    ("simsiam", "cifar10"): {
        "projector_layers": 2,
        "out_dim": 2048,
        "hidden_dim": 512,
        "constant_predictor_lr": True,
    },
    ("simsiam-rsa", "tinyimagenet"): {
        "beta_base": 0.4,
        "projector_layers": 2,
        "aa_target": "pred",
        "base_lr": 0.1,
    },
    ("simsiam-rsa", "cifar100"): {"beta_base": 0.3, "beta_schedule": "cosine"},
    ("simsiam", "imagenet100"): {"projector_layers": 3, "base_lr": 0.2, "bn": "local"},
    ("simsiam", "imagenet1k"): {
        "optimizer": "sgd",
        "base_lr": 0.05,
        "batch_size": 256,
        "weight_decay": 1e-4,
        "bn": "sync",
    },
    ("simsiam-rsa", "imagenet1k"): {"optimizer": "sgd", "batch_size": 256, "beta_base": 0.4},
    ("simclr", "stl10"): {"temperature": 0.5, "out_dim": 128},
    ("simclr", "imagenet1k"): {
        "temperature": 0.1,
        "batch_size": 4096,
        "base_lr": 0.3,
        "optimizer": "lars",
        "warmup_epochs": 10,
    },
    ("moco", "cifar10"): {
        "tau_base": 0.99,
        "tau_schedule": "fixed",
        "queue_size": 4096,
        "temperature": 0.1,
        "bn": "split:8",
    },
    ("moco", "tinyimagenet"): {"queue_size": 16_384, "temperature": 0.1},
    ("moco", "imagenet100"): {
        "queue_size": 65_536,
        "temperature": 0.2,
        "bn": "split:8",
        "tau_base": 0.99,
    },
    ("moco", "imagenet1k"): {
        "optimizer": "sgd",
        "base_lr": 0.03,
        "batch_size": 256,
        "tau_base": 0.999,
    },
    ("ressl", "cifar10"): {
        "tau_base": 0.99,
        "queue_size": 4096,
        "out_dim": 128,
        "hidden_dim": 2048,
        "optimizer": "sgd",
        "base_lr": 0.06,
        "warmup_epochs": 5,
        "bn": "split:8",
        "weight_decay": 5e-4,
        "decay_exclude": "none",
    },
    ("ressl", "stl10"): {
        "tau_base": 0.996,
        "queue_size": 16_384,
        "temperature": 0.1,
        "teacher_temperature": 0.04,
        "base_lr": 0.06,
        "warmup_epochs": 5,
        "bn": "split:8",
    },
    ("ressl", "imagenet100"): {
        "optimizer": "sgd",
        "base_lr": 0.05,
        "warmup_epochs": 5,
        "weight_decay": 1e-4,
        "decay_exclude": "norm_and_bias",
    },
    ("ressl", "imagenet1k"): {
        "tau_base": 0.999,
        "queue_size": 131_072,
        "out_dim": 512,
        "hidden_dim": 4096,
        "optimizer": "sgd",
        "base_lr": 0.05,
        "batch_size": 256,
        "warmup_epochs": 5,
        "weight_decay": 1e-4,
        "decay_exclude": "norm_and_bias",
    },
    ("supervised", "cifar100"): {"classes": 100, "zero_init_residual": False},
    ("supervised", "imagenet1k"): {
        "classes": 1000,
        "optimizer": "sgd",
        "base_lr": 0.1,
        "batch_size": 256,
        "epochs": 100,
    },
}


@pytest.mark.parametrize(("method", "dataset"), MATRIX)
def test_methods_have_their_published_numbers(method, dataset):
    recipe, expected = build_recipe(dataset, method), MATRIX[method, dataset]
    assert {field: getattr(recipe, field) for field in expected} == expected


SIMCLR = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


@pytest.mark.parametrize(
    ("method", "dataset", "changed"),
    [
        ("simclr", "imagenet1k", {"crop_area": (0.08, 1.0)} | SIMCLR),
        ("simclr", "imagenet1k-100ep", {"crop_area": (0.08, 1.0)} | SIMCLR),
        ("supervised", "imagenet1k", {"crop_area": (0.08, 1.0)}),
        # These are RSA's own runs, with one augmentation for all methods.
        ("simclr", "imagenet100", {}),
        ("simclr", "cifar10", {}),
        ("rsa", "imagenet1k", {}),
    ],
)
def test_a_method_s_own_augmentation_replaces_those_numbers_only(method, dataset, changed):
    usual = build_recipe(dataset, "byol").views
    assert build_recipe(dataset, method).views == replace(usual, **changed)
    source = row(dataset, method)["views"].source
    assert source.startswith(row(dataset, "byol")["views"].source)
    assert all(name in source for name in changed)


def test_merged_rows_keep_the_views_that_a_later_table_does_not_name():
    one = {"224px": cite("one", views={"blur_p": 0, "hue": 0.2}, epochs=1)}
    merged = merged_rows(one, {"224px": cite("two", views={"hue": 0.1})})["224px"]
    assert merged["views"].value == {"blur_p": 0, "hue": 0.1}
    assert merged["views"].source == "one; hue: two" and merged["epochs"] == one["224px"]["epochs"]
    assert one["224px"]["views"].value == {"blur_p": 0, "hue": 0.2}


# These keep the optimiser and the schedule of their sources on small images too.
PER_STEP = {"ressl", "barlow-twins", "vicreg", "swav"}
PER_EPOCH = {
    "cifar10": set(METHODS) - PER_STEP,
    "cifar100": set(METHODS) - PER_STEP,
    "stl10": set(METHODS) - PER_STEP,
    "tinyimagenet": set(METHODS) - PER_STEP,
    "imagenet100": {"inst-dis", "pirl"},
    "imagenet1k": {"moco", "simsiam", "simsiam-rsa", "inst-dis", "pirl", "infomin", "jcl"},
    "imagenet1k-100ep": {"moco", "simsiam", "simsiam-rsa", "inst-dis", "pirl", "infomin", "jcl"},
    "demo": {"inst-dis", "pirl"},
}


@pytest.mark.parametrize("dataset", PER_EPOCH)
def test_the_learning_rate_moves_per_epoch_where_the_source_does(dataset):
    for method in METHODS:
        recipe = build_recipe(dataset, method)
        expected = "epoch" if method in PER_EPOCH[dataset] else "step"
        assert recipe.lr_per == expected, method
        assert row(dataset, method)["lr_per"].source
        derived = resolve(recipe, DATASETS[dataset].images)
        steps, first = derived.steps_per_epoch, derived.warmup_steps
        rates = {recipe.schedule(first + step, derived)["lr"] for step in range(steps)}
        constant = expected == "epoch" or recipe.lr_drop_epochs
        assert len(rates) == (1 if constant else steps), method


def test_a_run_stored_before_the_field_moved_its_learning_rate_at_every_step():
    fields = build_recipe("cifar10", "rsa").model_dump()
    assert fields.pop("lr_per") == "epoch"
    assert stored_recipe(fields).lr_per == "step"


def test_a_recipe_that_no_source_trained_is_cited_as_chosen():
    for dataset in ("imagenet1k", "imagenet1k-100ep"):
        assert row(dataset, "byol")["batch_size"].source.startswith("chosen: RSA's")
        assert row(dataset, "simsiam-rsa")["batch_size"].source.startswith("chosen: SimSiam's")
        assert row(dataset, "rsa")["batch_size"].source == "PAPER 4.1"


def test_every_number_of_a_row_has_a_source():
    for dataset in DATASETS:
        for method in METHODS:
            assert all(sourced.source for sourced in row(dataset, method).values())


def test_the_ablations_are_table_1_s_rows():
    built = {
        name: build_recipe("cifar10", method, overrides=fields)
        for name, (method, fields) in ABLATIONS.items()
    }
    for name, pairs in (("aa", "AA"), ("aw", "AW")):
        assert (built[name].method, built[name].pairs) == ("byol", pairs)
    for name, schedule in (("ma-fixed", "fixed"), ("ma-decay", "cosine")):
        assert (built[name].method, built[name].beta_base) == ("rsa", 0.5)
        assert built[name].beta_schedule == schedule


def test_a_method_s_schedule_holds_what_it_has():
    keys = {
        "supervised": {"lr"},
        "simsiam": {"lr"},
        "simclr": {"lr"},
        "barlow-twins": {"lr"},
        "vicreg": {"lr"},
        "w-mse": {"lr", "step"},
        "swav": {"lr", "frozen", "queue"},
        "dino": {"lr", "tau", "frozen"},
        "byol": {"lr", "tau"},
        "moco": {"lr", "tau"},
        "ressl": {"lr", "tau"},
        "jcl": {"lr", "tau", "lambda_"},
        "inst-dis": {"lr", "step"},
        "pirl": {"lr", "step"},
        "infomin": {"lr", "tau", "step"},
        "simsiam-rsa": {"lr", "beta"},
        "rsa": {"lr", "tau", "beta"},
    }
    assert keys.keys() == set(METHODS)
    for method, expected in keys.items():
        recipe = build_recipe("cifar10", method)
        assert recipe.schedule(0, resolve(recipe, 50_000)).keys() == expected


def test_supervised_training_wants_the_labels_it_was_told_of():
    recipe = build_recipe("cifar10", "supervised")
    recipe.check_labels(True, 10)
    build_recipe("cifar10", "rsa").check_labels(False, 0)
    message = "on 10 classes found labels of 7 classes: --set classes=7"
    with pytest.raises(ValueError, match=message):
        recipe.check_labels(True, 7)
    with pytest.raises(ValueError, match="found images without labels"):
        recipe.check_labels(False, 0)


def test_the_learning_rate_scales_by_true_division():
    def peak_lr(**overrides: float) -> float:
        return resolve(build_recipe("cifar10", "rsa", overrides=overrides), 50_000).peak_lr

    assert peak_lr(batch_size=64) == pytest.approx(0.025)
    assert peak_lr(batch_size=384) == pytest.approx(0.15)
    assert peak_lr(peak_lr=0.06) == 0.06


def test_overrides_reach_the_views_and_later_ones_win(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("beta_base: 0.2\nviews:\n  blur_p: 0.25\nweight_decay: 1e-4\n")
    overrides = parse_set(("views.blur_p=0", "beta_schedule=fixed"))
    recipe = build_recipe("cifar10", "rsa", file, overrides)
    assert recipe.views.blur_p == 0 and recipe.views.size_px == 32
    assert (recipe.beta_base, recipe.weight_decay, recipe.beta_schedule) == (0.2, 1e-4, "fixed")
    keywords = {"beta_schedule": "fixed", "views": {"blur_p": 0}}
    assert build_recipe("cifar10", "rsa", str(file), **keywords) == recipe
    assert build_recipe("cifar10", "rsa", overrides={"seed": 1, "epochs": 5}, epochs=3).epochs == 3


def test_a_recipe_prints_what_it_trains_and_what_differs_from_its_rows():
    plain = build_recipe("cifar10", "rsa")
    title = "rsa on cifar10: resnet18, 32 px, batch 256, 200 epochs, lr 0.1"
    assert str(plain) == repr(plain) == title
    recipe = build_recipe(
        "cifar10", "rsa", name="photos", batch_size=64, beta_base=0.5, views={"blur_p": 0}, seed=7
    )
    title, *differences = str(recipe).splitlines()
    assert title == "rsa on photos: resnet18, 32 px, batch 64, 200 epochs, lr 0.025"
    assert " ".join(line.strip() for line in differences) == (
        "batch_size 64 (not 256), seed 7 (not 0), beta_base 0.5 (not 0.3), "
        "views.blur_p 0.0 (not 0.5)"
    )
    assert all(line.startswith("  ") and len(line) <= 100 for line in differences)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bata_base", 0.3, r"no field 'bata_base' \(did you mean 'beta_base'\?\)"),
        ("views.blurp", 0.3, r"no field 'views\.blurp' \(did you mean 'views\.blur_p'\?\)"),
        ("views.blur_p", 1.5, r"blur_p=1\.5: a probability is in \[0, 1\]"),
        ("epochs", 0, r"epochs = 0: .*greater than or equal to 1"),
        ("optimizer", "rmsprop", r"optimizer = 'rmsprop'"),
        ("epochs", "many", r"epochs = 'many'"),
        (
            "temperature",
            0.2,
            r"no field 'temperature': it belongs to dino, infomin, .* simclr, swav, not to rsa",
        ),
        ("recompute_stages", 5, r"recompute_stages = 5: .*less than or equal to 4"),
        ("compile", "inductor", r"compile = 'inductor': .*boolean"),
        ("bn", "split:0", r"bn = 'split:0'"),
        ("bn", "split:7", r"bn = split:7 does not cut a batch of 256 into equal parts"),
        ("bn", "split:256", r"into equal parts of 2 or more"),
    ],
)
def test_faults_are_named(key, value, message):
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", "rsa", overrides={key: value})


def test_all_faults_are_named_at_once():
    with pytest.raises(ValueError, match=r"(?s)epochs.*momentun"):
        build_recipe("cifar10", "rsa", overrides={"epochs": -1, "momentun": 0.9})


def test_the_size_of_test_images_follows_that_of_the_views_in_proportion(tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    assert build_recipe("imagenet1k", "rsa").eval_resize_px == 256
    assert not caplog.messages
    recipe = build_recipe("imagenet1k", "rsa", overrides={"views.size_px": 288})
    assert recipe.eval_resize_px == 329 == round(288 * 256 / 224)
    assert caplog.messages == [
        "eval_resize_px is 329, in proportion to views.size_px = 288 (256 for 224)"
    ]
    assert build_recipe("imagenet1k", "rsa", views={"size_px": 112}).eval_resize_px == 128
    assert build_recipe("cifar10", "rsa", views={"size_px": 64}).eval_resize_px is None
    # What a user has chosen stays, in a file too.
    chosen = {"views.size_px": 288, "eval_resize_px": None}
    assert build_recipe("imagenet1k", "rsa", overrides=chosen).eval_resize_px is None
    (tmp_path / "recipe.yaml").write_text(dump_yaml(recipe))
    assert build_recipe("imagenet1k", "rsa", tmp_path / "recipe.yaml") == recipe


def test_test_images_smaller_than_the_crop_are_refused_before_training():
    fields = {"views.size_px": 288, "eval_resize_px": 256}
    with pytest.raises(ValueError, match=r"eval_resize_px = 256 is less than views.size_px = 288"):
        build_recipe("imagenet1k", "rsa", overrides=fields)
    build_recipe("imagenet1k", "rsa", overrides={**fields, "evaluate": False})  # without scores


@pytest.mark.parametrize(
    ("ranks", "fields", "message"),
    [
        (8, {"batch_size": 8}, r"global, on 8 ranks, .*: it must be at least 16, or bn=sync"),
        (2, {"batch_size": 8, "accumulate": 4}, r"on 2 ranks and accumulate = 4, .*least 16$"),
        (
            1,
            {"batch_size": 1},
            r"which is global gives BatchNorm fewer than 2 .*: it must be at least 2$",
        ),
        (1, {"batch_size": 1, "bn": "sync"}, r"it must be at least 2$"),
        (8, {"batch_size": 8, "bn": "sync"}, ""),
        (8, {"batch_size": 8, "bn": "split:4"}, ""),
        (4, {"batch_size": 8}, ""),
    ],
)
def test_less_than_two_images_for_batchnorm_are_refused(ranks, fields, message):
    recipe = build_recipe("cifar10", "byol", overrides=fields)
    if message:
        with pytest.raises(ValueError, match=message):
            resolve(recipe, 50_000, ranks)
    else:
        assert resolve(recipe, 50_000, ranks).total_steps > 0


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(ValueError, match=r"no dataset 'cifar1000' \(did you mean 'cifar100'\?\)"):
        build_recipe("cifar1000", "rsa")
    with pytest.raises(ValueError, match=r"no method 'boyl' \(did you mean 'byol'\?\)"):
        build_recipe("cifar10", "boyl")
    with pytest.raises(ValueError, match="needs key=value, found beta"):
        parse_set(("beta",))


def test_a_queue_shorter_than_a_step_is_an_error():
    message = "queue_size = 256 is less than the two views of 256 images"
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", "moco", overrides={"queue_size": 256})


@pytest.mark.parametrize("method", ["moco", "ressl"])
@pytest.mark.parametrize("dataset", ["imagenet100", "imagenet1k", "imagenet1k-100ep"])
def test_shuffle_bn_has_the_parts_of_8_gpus_on_any_number_of_them(monkeypatch, dataset, method):
    recipe = build_recipe(dataset, method)
    parts = {}
    for ranks in (1, 2, 4, 8):
        monkeypatch.setattr("rsa_fast.syncbn.world_size", lambda ranks=ranks: ranks)
        parts[ranks] = recipe.batch_size // bn_groups(recipe.bn)
        local = bn_groups("local")
    assert set(parts.values()) == {32} and bn_groups(recipe.bn) == local
    assert "split:4" in row(dataset, method)["bn"].source


def test_imagenet_100_says_how_one_gpu_gets_the_statistics_of_four():
    bn = row("imagenet100", "rsa")["bn"]
    assert bn.value == "local" and "split:4" in bn.source
    assert build_recipe("imagenet100", "rsa", bn="split:4").bn == "split:4"
