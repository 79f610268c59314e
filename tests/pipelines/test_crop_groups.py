"""Any number of crops from one decode: groups of crops, and what their views have in common."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from rsa_fast.pipelines import CropGroup, Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.draws import draw
from rsa_fast.pipelines.host_ops import sample_views
from rsa_fast.pipelines.loading import Job
from rsa_fast.pipelines.torchvision_views import aggressive_view, weak_view
from rsa_fast.pipelines.views import VIEWS
from tests.helpers import invoke, natural_image, result_of

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
PAIR = ViewSpec(32, MEAN, STD)
GROUPS = (
    CropGroup("global", 2, crop_area=(0.14, 1), interpolation="bicubic"),
    CropGroup("first", 1, blur_p=1, solarize_p=0),
    CropGroup("second", 1, blur_p=0.1, solarize_p=0.5),
    CropGroup("local", 3, size_px=12, crop_area=(0.05, 0.14), quarter_turns=True),
    CropGroup("jigsaw", 1, size_px=24, jigsaw=True),
)
SPEC = replace(PAIR, groups=GROUPS)
IDS = np.arange(2000)
SIZES = np.random.default_rng(0).integers(20, 500, (2000, 2))


# --- the random parameters


def test_the_parameters_of_a_crop_do_not_depend_on_how_many_there_are():
    few, many = (
        draw(3, 1, IDS, replace(PAIR, groups=(CropGroup("crops", count),)), SIZES)
        for count in (2, 8)
    )
    assert (draw(3, 1, IDS, PAIR, SIZES) == few).all()
    assert (many[:, :2] == few).all()
    flat = many["factor"].reshape(-1)
    assert len(np.unique(flat)) > 0.99 * len(flat)  # float32 has equal ones


def test_other_groups_change_nothing_in_a_crop():
    params = draw(3, 1, IDS, SPEC, SIZES)
    for k, crop in enumerate(SPEC.crops):
        alone = replace(crop, groups=(CropGroup("crops", len(SPEC.crops)),))
        assert (draw(3, 1, IDS, alone, SIZES)[:, k] == params[:, k]).all()


def test_every_crop_has_the_distributions_of_its_group():
    # Windows of every aspect fit into these images.
    sizes = 300 + SIZES % 50
    params, crops = draw(0, 0, IDS, SPEC, sizes), SPEC.crops
    assert [crop.size_px for crop in crops] == [32, 32, 32, 32, 12, 12, 12, 24]
    area = params["height"] * params["width"] / sizes.prod(1)[:, None]
    for k, crop in enumerate(crops):
        p = params[:, k]
        low, high = crop.crop_area
        # The sides are rounded to whole pixels.
        assert (area[:, k] > 0.97 * low).all() and (area[:, k] < 1.03 * high).all()
        # Where the ten tries are refused, which large windows are most, the area is smaller.
        assert abs(area[:, k].mean() - (low + high) / 2) < 0.15 * (high - low)
        rates = {"flip": crop.flip_p, "jitter": crop.jitter_p, "grayscale": crop.grayscale_p}
        rates["solarize"] = crop.solarize_p
        for name, probability in rates.items():
            bound = 4 * (probability * (1 - probability) / len(IDS)) ** 0.5
            assert abs(p[name].mean() - probability) <= bound, (k, name)
        blurred = (p["blur_sigma_px"] > 0).mean()
        assert abs(blurred - crop.blur_p) <= 4 * (crop.blur_p * (1 - crop.blur_p) / len(IDS)) ** 0.5
        assert (p["quarter_turns"] > 0).any() == crop.quarter_turns
        assert (p["bicubic"] == (crop.interpolation == "bicubic")).all()


def test_patches_lie_anywhere_in_their_cells():
    spec = replace(PAIR, groups=(CropGroup("jigsaw", 1, size_px=255, jigsaw=True),))
    offsets = draw(0, 0, np.arange(10_000), spec, np.tile(SIZES, (5, 1)))["patch_offset"][:, 0]
    for one in offsets.reshape(10_000, 18).T:
        counts = np.bincount(one)  # a patch of 64 px has 22 places in a cell of 85 px
        assert len(counts) == 22 and abs(counts - 10_000 / 22).max() < 5 * (10_000 / 22) ** 0.5
    correlations = np.corrcoef(offsets.reshape(10_000, 18).T) - np.eye(18)
    assert abs(correlations).max() < 0.05


# --- the views of every backend against PIL


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for i in range(8):
        (place := folder / "train" / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(natural_image(i, 60, 60)).save(place / f"{i}.png")
    return folder


def beton_of(folder, tmp_path):

    from rsa_fast.tools.to_ffcv import main

    out = tmp_path / "beton"
    result_of(invoke(main, folder, out, "--write-mode", "raw"))
    return out


def levels(view: torch.Tensor) -> np.ndarray:
    """Return the 8-bit levels of a normalised view `(B, 3, S, S)` or `(B, 9, 3, P, P)`."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    return (255 * (view * std + mean)).numpy()


def expected(source, spec: ViewSpec, ids: np.ndarray, epoch: int) -> dict[str, np.ndarray]:
    """Return the views that PIL makes, one after the other; patches are slices of the weak view."""
    made = {name: [] for name in spec.views}
    for sample, params in zip(
        ids, draw(7, epoch, ids, spec, source.manifest.sizes[ids]), strict=True
    ):
        image = Image.fromarray(source.read(int(sample)))
        for k, (p, crop) in enumerate(zip(params, spec.crops, strict=True)):
            weak = weak_view(image, p, crop.size_px)
            pixels = np.asarray(weak).transpose(2, 0, 1)
            made[f"weak_{k + 1}"].append(pixels)
            aggressive = np.asarray(aggressive_view(weak, p)).transpose(2, 0, 1)
            made[f"aggressive_{k + 1}"].append(aggressive)
            if crop.jigsaw:
                cell, side = crop.size_px // 3, crop.size_px // 3 * 64 // 85
                corners = [
                    (cell * (j // 3) + y, cell * (j % 3) + x)
                    for j, (y, x) in enumerate(p["patch_offset"])
                ]
                patches = [pixels[:, y : y + side, x : x + side] for y, x in corners]
                made[f"patches_{k + 1}"].append(np.stack(patches))
    return {name: np.stack(views) for name, views in made.items()}


# The mean and the largest difference from PIL in levels.
BACKENDS = {
    ("torchvision", "host"): (0, 0),
    ("resident", "host"): (0, 0),
    ("native", "host"): (0, 0),
    ("ffcv", "host"): (0, 0),
    ("native", "device"): (0.5, 6),
    ("resident", "device"): (0.5, 6),
    ("dali", "host"): (1, 30),
}


@pytest.mark.parametrize(("backend", "where"), BACKENDS)
def test_views_of_any_groups_are_pil_s(folder, tmp_path, backend, where):
    if backend in ("dali", "ffcv"):
        pytest.importorskip({"dali": "nvidia.dali", "ffcv": "ffcv"}[backend])
    data = beton_of(folder, tmp_path) if backend == "ffcv" else folder
    source, order = open_source(data, "pretrain"), Order(8, 4, 7)
    mean_levels, most = BACKENDS[backend, where]
    loading = Loading(backend, aggressive_on=where)
    with open_views(source, SPEC, frozenset(SPEC.views), order, loading=loading) as loader:
        for step, batch in enumerate(loader.batches(2)):
            ids = order.ids(2, step)
            assert batch.ids.tolist() == ids.tolist()
            assert batch.label.tolist() == source.manifest.labels[ids].tolist()
            theirs = expected(source, SPEC, ids, 2)
            assert batch.views.keys() == theirs.keys()
            for name, view in batch.views.items():
                assert view.shape[1:] == SPEC.shape(name)
                gap = abs(levels(view) - theirs[name])
                assert gap.max() <= most + 1e-3 and gap.mean() <= mean_levels + 1e-3, name


@pytest.mark.parametrize("backend", ["native", "resident", "torchvision"])
def test_views_do_not_depend_on_what_else_is_read(folder, backend):
    source, order = open_source(folder, "pretrain"), Order(8, 4, 7)
    loading = Loading(backend)

    def first(reads):
        with open_views(source, SPEC, frozenset(reads), order, loading=loading) as loader:
            return next(loader.batches(0)).views

    every = first(SPEC.views)
    for reads in ({"aggressive_6"}, {"patches_8"}, {"weak_8", "patches_8", "aggressive_2"}):
        some = first(reads)
        assert some.keys() == reads
        assert all(torch.equal(view, every[name]) for name, view in some.items())


def test_what_is_not_read_is_neither_cropped_nor_sent(folder, monkeypatch):
    import rsa_fast.pipelines.torchvision_views as module

    source, order, sides = open_source(folder, "pretrain"), Order(8, 4, 7), []

    def counted(image, p, size_px):
        sides.append(size_px)
        return weak_view(image, p, size_px)

    monkeypatch.setattr(module, "weak_view", counted)
    reads = frozenset(SPEC.names("aggressive", "local"))
    on_cpu = torch.device("cpu"), torch.float32
    job = Job(source, SPEC, reads, order, *on_cpu, Loading("torchvision"))
    batch = module.TorchvisionViews(job).make(0, order.ids(0, 0))
    assert sides == 4 * 3 * [12]  # three crops of four images
    assert set(batch.views) == {"aggressive_5", "aggressive_6", "aggressive_7"}
    # The host's memory of a batch: the three weak crops, or the three aggressive views.
    from rsa_fast.pipelines.transfer import Transfer

    for where, stage in (("device", "weak"), ("host", "aggressive")):
        loading = Loading("native", aggressive_on=where)
        job = Job(source, SPEC, reads, order, *on_cpu, loading)
        held = Transfer(job).take(4).views
        assert {name: view.shape[1] for name, view in held.items()} == {
            f"{stage}_{k}": 12 for k in (5, 6, 7)
        }


def test_a_batch_has_the_ids_of_the_images_whose_pixels_are_in_it(folder, tmp_path):
    """Where a bad image is replaced by the next, so is its id, and that id can occur twice."""
    for path in (folder / "train").rglob("*.png"):
        (copy := tmp_path / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    source = open_source(tmp_path, "pretrain")
    victim = source.file(2)
    data = bytearray(victim.read_bytes())
    data[60:-20] = bytes(len(data) - 80)
    victim.write_bytes(data)
    for backend in ("native", "resident", "torchvision"):
        loading = Loading(backend, on_bad_image="skip")
        with open_views(source, PAIR, frozenset(VIEWS), Order(8, 8, 7), loading=loading) as loader:
            batch = next(loader.batches(0))
        ids = batch.ids.tolist()
        assert sorted(ids) == [0, 1, 3, 3, 4, 5, 6, 7]
        assert batch.label.tolist() == source.manifest.labels[ids].tolist()
        theirs = expected(source, PAIR, np.array(ids), 0)["weak_2"]
        assert abs(levels(batch.weak_2) - theirs).max() < 1e-3


# --- operations


@pytest.mark.parametrize("size_px", [7, 32, 96])
def test_bicubic_crops_are_pil_s(size_px):
    spec = replace(PAIR, size_px=size_px, interpolation="bicubic", groups=(CropGroup("one", 1),))
    table = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    clipped = 0
    for i in range(40):
        image = natural_image(i, *np.random.default_rng(i).integers(8, 120, 2))
        image[::3, ::2] = 255 * (i % 2)  # hard edges, at which a cubic overshoots
        params = draw(0, 0, np.array([i]), spec, np.array([image.shape[:2]]))[0]
        (weak, aggressive) = (np.empty((1, size_px, size_px, 3), np.uint8) for _ in range(2))
        sample_views(image, params, table, (weak,), (aggressive,), 0)
        theirs = np.asarray(weak_view(Image.fromarray(image), params[0], size_px))
        assert np.array_equal(weak[0], theirs)
        clipped += ((theirs == 0) | (theirs == 255)).sum()
    assert clipped > 10


def test_solarize_is_pil_s():
    spec = replace(PAIR, jitter_p=0, grayscale_p=0, blur_p=0, solarize_p=1)
    table = np.tile(np.arange(256, dtype=np.uint8), (3, 1))
    image = np.arange(256 * 12, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)
    params = draw(0, 0, np.array([0]), spec, np.array([[32, 32]]))[0]
    assert params["solarize"].all()
    weak, aggressive = (tuple(np.empty((1, 32, 32, 3), np.uint8) for _ in "12") for _ in "wa")
    sample_views(image, params, table, weak, aggressive, 0)
    for before, after in zip(weak, aggressive, strict=True):
        assert np.array_equal(after[0], np.asarray(ImageOps.solarize(Image.fromarray(before[0]))))


# --- what is refused


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "at least one, each with its own name"),
        ((CropGroup("a", 1), CropGroup("a", 2)), r"groups=\['a', 'a'\]: at least one, each with"),
        ((CropGroup("a", 0),), "count=0 of the group a: at least 1"),
        ((CropGroup("a", 1, size_px=0),), "the group a: size_px=0: at least 1"),
        ((CropGroup("a", 1, crop_area=(0.5, 0.1)),), "the group a: crop_area"),
        ((CropGroup("a", 1, solarize_p=2),), "the group a: solarize_p=2: a probability"),
        ((CropGroup("a", 1, size_px=32, jigsaw=True),), "size_px=32: a multiple of 3"),
        ((CropGroup("a", 1, size_px=3, jigsaw=True),), "size_px=3: a multiple of 3, at least 6"),
        ((CropGroup("a", 1, interpolation="area"),), "interpolation='area': bilinear or bicubic"),
    ],
)
def test_groups_that_make_no_sense_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        replace(PAIR, groups=groups)


def test_names_of_groups_and_views():
    assert SPEC.names("aggressive", "local") == ("aggressive_5", "aggressive_6", "aggressive_7")
    assert PAIR.views == VIEWS
    assert SPEC.views[-1] == "patches_8" and len(SPEC.views) == 17
    with pytest.raises(ValueError, match="no group 'globl' of crops: choose from global, first"):
        SPEC.names("weak", "globl")
    with pytest.raises(ValueError, match=r"no such views \['aggressive_3'\]: choose from weak_1"):
        open_views(None, PAIR, frozenset({"aggressive_3"}), None)
    one = replace(PAIR, groups=(CropGroup("crops", 1),))
    with pytest.raises(ValueError, match=r"views \['aggressive_2', 'weak_2'\]: .* views\.groups"):
        open_views(None, one, frozenset(VIEWS), None)
