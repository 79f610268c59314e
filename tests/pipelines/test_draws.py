from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from rsa_fast.pipelines.draws import DRAWS, ORDERS, batch_seed, draw, mirrors, uniforms
from rsa_fast.pipelines.views import ViewSpec

SPEC = ViewSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
AERIAL = replace(SPEC, vertical_flip_p=0.5, quarter_turns=True)


def drawn(
    count: int,
    spec: ViewSpec = SPEC,
    size: tuple[int, int] = (32, 32),
    seed: int = 0,
    epoch: int = 0,
) -> np.ndarray:
    return draw(seed, epoch, np.arange(count), spec, np.tile(size, (count, 1)))


def test_operations_fire_at_the_stated_rates():
    params = drawn(20_000).ravel()  # Four standard errors of 40,000 views are at most .01.
    assert abs(params["flip"].mean() - 0.5) < 0.01
    assert abs(params["jitter"].mean() - 0.8) < 0.008
    assert abs(params["grayscale"].mean() - 0.2) < 0.008
    assert abs((params["blur_sigma_px"] > 0).mean() - 0.5) < 0.01


def test_each_choice_is_independent_of_the_others_and_of_the_other_crop():
    params = drawn(20_000)
    columns = [
        params["flip"],
        params["jitter"],
        params["grayscale"],
        params["blur_sigma_px"] > 0,
        params["top"],
        params["height"],
    ]
    columns += [params["factor"][..., k] for k in range(4)]
    table = np.concatenate([np.stack([c[:, crop] for c in columns]) for crop in (0, 1)]).astype(
        float
    )
    correlation = np.corrcoef(table)
    # A taller window leaves less room, so these depend on each other by design.
    top_height = [(4, 5), (5, 4), (14, 15), (15, 14)]
    for i, j in top_height:
        correlation[i, j] = 0
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 0.03


def test_vertical_flips_and_quarter_turns_come_as_often_as_stated():
    params = drawn(20_000, replace(SPEC, vertical_flip_p=0.3, quarter_turns=True)).ravel()
    assert abs(params["vertical_flip"].mean() - 0.3) < 0.01
    for turns in range(4):
        assert abs((params["quarter_turns"] == turns).mean() - 0.25) < 0.009
    assert not drawn(2_000, replace(SPEC, vertical_flip_p=0.3))["quarter_turns"].any()
    assert not drawn(2_000, replace(SPEC, quarter_turns=True))["vertical_flip"].any()
    assert drawn(2_000, replace(SPEC, vertical_flip_p=1))["vertical_flip"].all()


def test_vertical_flips_and_quarter_turns_leave_every_other_draw_as_it_is():
    plain, aerial = drawn(500), drawn(500, AERIAL)
    for name in plain.dtype.names:
        same = (plain[name] == aerial[name]).all()
        assert same == (name not in ("vertical_flip", "quarter_turns")), name
    assert not plain["vertical_flip"].any() and not plain["quarter_turns"].any()


def test_vertical_flips_and_quarter_turns_are_independent_of_all_else():
    params = drawn(20_000, AERIAL)
    columns = [
        *(params[name] for name in ("vertical_flip", "flip", "jitter", "grayscale", "top")),
        *(params["quarter_turns"] == turns for turns in (0, 1, 2)),
        *(params["factor"][..., k] for k in range(4)),
    ]
    table = np.concatenate([np.stack([c[:, crop] for c in columns]) for crop in (0, 1)])
    correlation = np.corrcoef(table.astype(float))
    np.fill_diagonal(correlation, 0)
    for crop in (0, len(columns)):  # A view has one number of turns.
        correlation[crop + 5 : crop + 8, crop + 5 : crop + 8] = 0
    assert np.abs(correlation).max() < 0.03


def test_flips_and_turns_are_mirrors_and_a_transposition():
    square = np.arange(25).reshape(5, 5)
    params = np.zeros(16, drawn(1).dtype)
    choices = np.array([(x, y, t) for x in (0, 1) for y in (0, 1) for t in range(4)])
    params["flip"], params["vertical_flip"], params["quarter_turns"] = choices.T
    for (x, y, turns), along_x, along_y, transpose in zip(choices, *mirrors(params), strict=True):
        wanted = square[:: -1 if y else 1, :: -1 if x else 1]
        found = square[:: -1 if along_y else 1, :: -1 if along_x else 1]
        assert (np.rot90(wanted, turns) == (found.T if transpose else found)).all()


def test_factors_are_uniform_in_their_ranges():
    params = drawn(20_000).ravel()
    uniform = np.linspace(0, 1, 2001)
    for k in range(3):
        assert ks_2samp(params["factor"][:, k], 0.6 + 0.8 * uniform).pvalue > 0.01
    assert ks_2samp(params["factor"][:, 3], -0.1 + 0.2 * uniform).pvalue > 0.01
    sigma = params["blur_sigma_px"][params["blur_sigma_px"] > 0]
    assert ks_2samp(sigma, 0.1 + 1.9 * uniform).pvalue > 0.01


def test_all_24_orders_of_the_jitter_are_equally_likely():
    order = drawn(24_000).ravel()["order"]
    counts = [(order == wanted).all(1).sum() for wanted in ORDERS]
    assert sum(counts) == len(order)
    assert np.abs(np.array(counts) / 2000 - 1).max() < 0.1  # 4.5 standard errors


@pytest.mark.parametrize("size", [(32, 32), (375, 500), (64, 200), (30, 400), (400, 30)])
def test_windows_are_distributed_as_torchvision_draws_them(size):
    height, width = size
    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.2, 1], [3 / 4, 4 / 3]) for _ in range(4000)]
    )
    ours = drawn(4000, size=size)[:, 0]
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(ours[name], theirs[:, column]).pvalue > 0.001, name
    area = ours["height"] * ours["width"], theirs[:, 2] * theirs[:, 3]
    assert ks_2samp(*area).pvalue > 0.001
    assert (ours["top"] >= 0).all() and (ours["top"] + ours["height"] <= height).all()
    assert (ours["left"] >= 0).all() and (ours["left"] + ours["width"] <= width).all()


def test_no_window_fits_falls_back_to_the_centre():
    params = drawn(50, size=(10, 1000)).ravel()
    assert (params["height"] == 10).all() and (params["width"] == 13).all()  # aspect 4/3
    assert (params["left"] == 493).all() and (params["top"] == 0).all()


def test_a_sample_s_views_do_not_depend_on_the_batch_it_is_in():
    whole = drawn(64)
    ids = np.array([63, 5, 40])
    assert (draw(0, 0, ids, SPEC, np.tile((32, 32), (3, 1))) == whole[ids]).all()


def test_seed_epoch_sample_and_crop_each_change_the_dice():
    flat = [
        drawn(100, seed=seed, epoch=epoch)["factor"].ravel()
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    values = np.concatenate(flat)
    assert len(np.unique(values)) > 0.999 * len(values)


def test_the_hash_is_splitmix64_in_whole_numbers():
    """The numpy arithmetic equals that of Python's unbounded integers."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
        return x ^ (x >> 31)

    seed, epoch, sample, crop, number, draws = 11, 4, 1_281_166, 1, 5, 42
    key = mix((seed + golden) & mask)
    key = mix((key + (epoch + 1) * golden) & mask)
    key = mix((key + (sample + 1) * golden) & mask)
    bits = mix((key + (crop * draws + number + 1) * golden) & mask)
    assert uniforms(seed, epoch, np.array([sample]), draws)[0, crop, number] == (bits >> 11) / 2**53


def test_every_batch_of_every_rank_has_a_generator_s_seed_of_its_own():
    seeds = [
        batch_seed(seed, epoch, step, rank)
        for seed in range(3)
        for epoch in range(4)
        for step in range(5)
        for rank in range(6)
    ]
    assert len({seed % 2**32 for seed in seeds}) == len(seeds)
    for seed in seeds:
        torch.Generator().manual_seed(seed)


def test_the_dice_never_change():
    """A resumed run must see the same views: a change here would break resuming older runs."""
    assert DRAWS == 42, "the second crop's numbers start there"
    assert batch_seed(7, 3, 12, 1) == 611972964785708016
    aerial = draw(7, 3, np.arange(4), AERIAL, np.full((4, 2), 32))
    assert aerial["vertical_flip"].astype(int).tolist() == [[1, 1], [0, 0], [1, 0], [1, 0]]
    assert aerial["quarter_turns"].tolist() == [[0, 0], [0, 2], [0, 0], [3, 1]]
    row = draw(7, 3, np.array([12345]), SPEC, np.array([[375, 500]]))[0, 1]
    assert [row[name] for name in ("top", "left", "height", "width", "flip", "jitter")] == [
        117,
        103,
        217,
        194,
        1,
        1,
    ]
    assert row["order"].tolist() == [2, 1, 0, 3]
    assert row["factor"].tolist() == pytest.approx([0.94237, 1.24021, 0.98708, -0.05778], abs=1e-5)
    assert row["blur_sigma_px"] == pytest.approx(1.89663, abs=1e-5)
