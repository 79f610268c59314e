from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.cli import main
from rsa_fast.insight import preview as module
from rsa_fast.insight.preview import (
    AMPLIFY,
    CROP_INKS,
    heading,
    preview,
    view_labels,
    view_levels,
    windows,
)
from rsa_fast.pipelines import VIEWS, Loading, Order, open_source, open_views
from rsa_fast.pipelines.draws import VIEW_PARAMS, draw
from rsa_fast.recipes import build_recipe
from tests.helpers import DALI, invoke, result_of, write_folder
from tests.pipelines.backends import RESIZE_LEVELS


def recipe(backend="resident", **overrides):
    return build_recipe(
        "cifar10",
        "rsa",
        overrides={"views.size_px": 16, "backend": backend, "batch_size": 8, **overrides},
    )


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return open_source(
        write_folder(tmp_path_factory.mktemp("images"), {"train": 10}, size=(30, 44)), "pretrain"
    )


def holds(sheet: np.ndarray, tile: np.ndarray) -> bool:
    """Return whether `sheet` contains `tile` `(h, w, 3)` somewhere, pixel for pixel."""
    height, width = tile.shape[:2]
    corners = np.argwhere(
        (sheet[: len(sheet) - height + 1, : sheet.shape[1] - width + 1] == tile[0, 0]).all(-1)
    )
    return any(np.array_equal(sheet[y : y + height, x : x + width], tile) for y, x in corners)


def side_by_side(levels: dict[str, np.ndarray]) -> np.ndarray:
    """Return the four views of each image as `(B, 4, S, S, 3)`."""
    return np.stack([levels[name] for name in VIEWS], 1)


def enlarged(levels: np.ndarray) -> np.ndarray:
    # From 16 to 192 px.
    return np.kron(levels.round().astype(np.uint8), np.ones((12, 12, 1), np.uint8))


@pytest.mark.parametrize("backend", ["resident", "native"])
def test_a_weak_view_is_pil_s_crop_and_resize_of_the_drawn_window_bit_for_bit(source, backend):
    order = Order(20, 6, 3)
    ids = order.ids(2, 0)
    made = side_by_side(view_levels(recipe(backend, seed=3), source, order, 2, backend))
    assert np.abs(made - made.round()).max() < 1e-3
    params = draw(3, 2, ids, recipe().views, source.manifest.sizes[ids])
    for sample, pair, views in zip(ids, params, made, strict=True):
        for p, view in zip(pair, views, strict=False):
            left, top, width, height = (int(p[name]) for name in ("left", "top", "width", "height"))
            crop = Image.fromarray(source.read(sample)).crop(
                (left, top, left + width, top + height)
            )
            expected = np.asarray(crop.resize((16, 16), Image.Resampling.BILINEAR))
            assert np.array_equal(view.round(), expected[:, ::-1] if p["flip"] else expected)


def test_the_views_are_those_training_reads_first_whatever_its_batch_size(source):
    chosen, order = recipe(seed=5), Order(20, 8, 5)
    with open_views(
        source, chosen.views, frozenset(VIEWS), order, loading=Loading("resident")
    ) as loader:
        batch = next(loader.batches(4))
    shown = view_levels(chosen, source, Order(20, 3, 5), 4, "resident")
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (chosen.views.mean, chosen.views.std))
    for name in VIEWS:
        normalised = (torch.from_numpy(shown[name]).permute(0, 3, 1, 2) / 255 - mean) / std
        assert torch.allclose(normalised, batch.views[name][:3], atol=1e-5)


def test_the_sheet_holds_every_source_and_view_pixel_for_pixel(source, tmp_path):
    result = preview(
        recipe("auto", seed=1), source, tmp_path / "new" / "views.png", images=3, epoch=2
    )
    assert result == {
        "out": str(tmp_path / "new" / "views.png"),
        "backend": "resident",
        "images": 3,
    }
    sheet = np.asarray(Image.open(result["out"]))
    order = Order(20, 3, 1)
    ids = order.ids(2, 0)
    for sample, pair, views in zip(
        ids,
        draw(1, 2, ids, recipe().views, source.manifest.sizes[ids]),
        side_by_side(view_levels(recipe(), source, order, 2, "native")),
        strict=True,
    ):
        assert holds(sheet, np.asarray(windows(source.read(sample), pair, 192)))
        assert all(holds(sheet, enlarged(view)) for view in views)


def test_windows_are_drawn_where_they_were_cut():
    pair = np.zeros(2, VIEW_PARAMS)
    for name, values in {
        "left": (9, 2),
        "top": (8, 4),
        "width": (20, 40),
        "height": (10, 30),
    }.items():
        pair[name] = values  # The first is inside the second: neither hides the other.
    drawn = np.asarray(windows(np.full((48, 64, 3), 128, np.uint8), pair, 192))
    assert drawn.shape == (192, 256, 3)  # four times the source
    for p, ink in zip(pair, CROP_INKS, strict=False):
        rows, columns = np.nonzero((drawn == tuple(bytes.fromhex(ink[1:]))).all(-1))
        assert (rows.min(), rows.max() + 1) == (4 * p["top"], 4 * (p["top"] + p["height"]))
        assert (columns.min(), columns.max() + 1) == (4 * p["left"], 4 * (p["left"] + p["width"]))


def test_labels_say_what_was_drawn():
    pair = np.zeros(2, VIEW_PARAMS)
    pair["height"], pair["width"], pair["flip"] = (30, 20), (40, 10), (True, False)
    pair["jitter"], pair["grayscale"], pair["blur_sigma_px"] = (
        (True, False),
        (False, True),
        (1.234, 0),
    )
    pair["order"][0], pair["factor"][0] = (3, 1, 0, 2), (0.625, 1.25, 1.375, -0.0625)
    assert view_labels(recipe().views, pair, np.array([60, 80])) == [
        "crop 40x30 px, scale 0.25\nflip",
        "crop 10x20 px, scale 0.04\nno flip",
        "hue -0.062, contrast 1.25,\nbrightness 0.62, saturation 1.38\nno gray, blur 1.23 px",
        "no jitter\ngray, no blur",
    ]


def test_the_labels_on_the_sheet_are_those_of_its_samples(source, tmp_path, monkeypatch):
    written = []

    def block(text, labels, **_):
        written.append((text, labels))
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(module, "block", block)
    monkeypatch.setattr(module, "heading", lambda *_: np.zeros((1, 1, 3), np.uint8))
    preview(recipe(seed=7), source, tmp_path / "views.png", images=6, epoch=1)
    for (text, labels), sample in zip(written, Order(20, 6, 7).ids(1, 0), strict=True):
        assert text == f"sample {sample}, 44x30 px\nclass_{source.manifest.labels[sample]}"
        (pair,) = draw(7, 1, np.array([sample]), recipe().views, np.array([[30, 44]]))
        for p, weak, aggressive in zip(pair, labels[:2], labels[2:], strict=True):
            assert re.match(r"crop (\d+)x(\d+) px", weak).groups() == (
                str(p["width"]),
                str(p["height"]),
            )
            assert (
                weak.endswith("no flip") != p["flip"]
                and ("no gray" in aggressive) != p["grayscale"]
            )
            factors = [
                float(x)
                for x in re.findall(r"(?:brightness|contrast|saturation|hue) (\S+\d)", aggressive)
            ]
            assert np.allclose(factors, p["factor"][p["order"]] if p["jitter"] else [], atol=0.0051)


@pytest.mark.parametrize("backend", ["resident", "native", "torchvision"])
def test_without_its_stage_an_aggressive_view_is_the_weak_one(source, backend):
    off = {"views.jitter_p": 0, "views.grayscale_p": 0, "views.blur_p": 0}
    made = side_by_side(view_levels(recipe(backend, **off), source, Order(20, 4, 0), 0, backend))
    assert np.array_equal(made[:, 2:], made[:, :2])
    on = side_by_side(view_levels(recipe(backend), source, Order(20, 4, 0), 0, backend))
    assert np.array_equal(on[:, :2], made[:, :2]) and not np.array_equal(on[:, 2:], on[:, :2])


def test_a_comparison_states_and_shows_how_far_apart_two_backends_are(
    source, tmp_path, monkeypatch
):
    def apart(recipe, source, order, epoch, backend):
        made = view_levels(recipe, source, order, epoch, "resident")
        gaps = zip(VIEWS, (0, 1.5, 0, 3), strict=True)
        return {name: made[name] + (backend == "native") * np.float32(gap) for name, gap in gaps}

    said = []
    monkeypatch.setattr(module, "view_levels", apart)
    monkeypatch.setattr(module, "heading", lambda *band: said.extend(band[2]) or heading(*band))
    result = preview(recipe(), source, tmp_path / "views.png", images=2, compare="native")
    assert result["compare"] == "native"
    assert result["difference_levels"] == pytest.approx(
        dict(zip(VIEWS, (0, 1.5, 0, 3), strict=True)), abs=1e-4
    )
    levels = ("equal", "1.50 levels apart", "equal", "3.00 levels apart")
    assert said == [f"{view}: {text}" for view, text in zip(VIEWS, levels, strict=True)]
    sheet = np.asarray(Image.open(result["out"]))
    for gap in (0, 1.5, 3):
        assert holds(sheet, np.full((192, 192, 3), round(AMPLIFY * gap), np.uint8))


def command(folder, out, *more: object):
    sets = ("--dataset", "cifar10", "--set", "views.size_px=16")
    return invoke(main, "preview", "--data", folder, "--out", out, *sets, *more)


@pytest.mark.parametrize("other", ["native", "torchvision", pytest.param("dali", marks=DALI)])
def test_the_command_compares_a_backend_with_itself_and_with_another(folder, tmp_path, other):
    for backend, allowed in ((other, 0), ("resident", RESIZE_LEVELS.get(other, 1e-4))):
        done = command(
            folder,
            tmp_path / "views.png",
            "--backend",
            backend,
            "--compare",
            other,
            "--images",
            5,
            "--seed",
            2,
        )
        result = result_of(done)
        assert (result["backend"], result["compare"], result["images"]) == (backend, other, 5)
        assert (
            result["difference_levels"].keys() == set(VIEWS)
            and max(result["difference_levels"].values()) <= allowed
        )


def test_the_command_draws_the_views_of_its_seed_epoch_and_recipe_file(folder, tmp_path):
    config = tmp_path / "recipe.yaml"
    config.write_text(
        "dataset: cifar10\nmethod: byol\n"
        "views: {size_px: 16, mean: [0, 0, 0], std: [1, 1, 1], blur_p: 0}\n"
    )
    arguments = [
        "--data",
        folder,
        "--out",
        tmp_path / "a.png",
        "--config",
        config,
        "--seed",
        4,
        "--epoch",
        3,
        "--images",
        2,
    ]
    done = invoke(main, "preview", *arguments)
    assert done.exit_code == 0, done.output
    again = recipe(seed=4, **{"views.blur_p": 0})
    preview(again, open_source(folder, "pretrain"), tmp_path / "b.png", images=2, epoch=3)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--backend", "dahli"), "no backend 'dahli'"),
        (("--compare", "dahli"), "no backend 'dahli'"),
        (("--images", 41), "the data has 40 images, fewer than --images 41"),
        (("--images", 0), "0 is not in the range"),
        (("--out", "views.jpg"), "the name must end in .png"),
        (("--dataset", "cifar"), "did you mean 'cifar10'?"),
        (("--data", "/nowhere"), "no folder /nowhere"),
        (("--set", "views.blurp=1"), "did you mean 'views.blur_p'?"),
    ],
)
def test_bad_input_is_one_line_and_draws_nothing(folder, tmp_path, arguments, message):
    done = command(folder, tmp_path / "views.png", *arguments)
    assert done.exit_code != 0 and message in done.output and "Traceback" not in done.output
    assert not (tmp_path / "views.png").exists()


def test_the_sheet_of_several_groups_shows_every_view_and_the_jigsaw_s_patches(source, tmp_path):
    groups = [
        {"name": "global", "count": 2},
        {"name": "local", "count": 1, "size_px": 8, "crop_area": [0.1, 0.3], "solarize_p": 1},
        {"name": "jigsaw", "count": 1, "size_px": 24, "jigsaw": True},
    ]
    chosen = recipe("native", **{"views.groups": groups})
    result = preview(chosen, source, tmp_path / "views.png", images=2, compare="torchvision")
    assert result["difference_levels"] == dict.fromkeys(chosen.views.views, 0)
    assert list(result["difference_levels"])[-2:] == ["aggressive_4", "patches_4"]
    preview(chosen, source, tmp_path / "views.png", images=2)
    sheet = np.asarray(Image.open(tmp_path / "views.png"))
    levels = view_levels(chosen, source, Order(20, 2, 0), 0, "native")
    for name, scale in {"weak_2": 12, "aggressive_3": 24, "weak_4": 8, "patches_4": 11}.items():
        view = levels[name][1].round().astype(np.uint8)
        assert holds(sheet, np.kron(view, np.ones((scale, scale, 1), np.uint8))), name
    # The middle patch is the slice of the weak view that was drawn.
    order = Order(20, 2, 0).ids(0, 0)
    params = draw(0, 0, order, chosen.views, source.manifest.sizes[order])
    top, left = 8 + params["patch_offset"][1, 3, 4]
    middle = levels["weak_4"][1, top : top + 6, left : left + 6]
    assert np.array_equal(levels["patches_4"][1, 6:12, 6:12].round(), middle.round())
