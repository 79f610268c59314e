"""What every backend must do.

It makes the same views as the others, only those that are read, from any step on, and in the
compute dtype and layout.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.pipelines import (
    VIEWS,
    Loading,
    Order,
    Source,
    ViewSpec,
    choose_backend,
    open_source,
    open_views,
)
from rsa_fast.pipelines.manifest import Manifest
from tests.helpers import DALI, natural_image, write_folder
from tests.pipelines.backends import RESIZE_LEVELS, SPEC, batches, every_backend

AERIAL = replace(SPEC, vertical_flip_p=0.5, quarter_turns=True)


@every_backend
@pytest.mark.parametrize("spec", [SPEC, AERIAL], ids=["upright", "aerial"])
def test_views_equal_the_reference(folder, backend, aggressive_on, spec):
    for ours, theirs in zip(
        batches(folder, backend, aggressive_on, spec=spec),
        batches(folder, "torchvision", spec=spec),
        strict=True,
    ):
        assert torch.equal(ours.label, theirs.label)
        for name in VIEWS:
            gap = (ours.views[name] - theirs.views[name]).abs() * 0.2 * 255  # in levels
            allowed = RESIZE_LEVELS.get(backend, 1e-4) + (
                0.4 if aggressive_on == "device" and "aggressive" in name else 0
            )
            assert gap.mean() < allowed + (
                0.1 if backend == "resident" and aggressive_on == "device" else 0
            ), name


@DALI
@pytest.mark.parametrize(("size", "levels"), [((40, 50), 2.5), ((200, 260), 12)])
def test_dali_reads_no_pixel_outside_of_the_crop(tmp_path, size, levels):
    for i in range(16):
        Image.fromarray(natural_image(i, *size)).save(tmp_path / f"{i:02}.png")
    spec = replace(AERIAL, size_px=32)
    for ours, theirs in zip(
        batches(tmp_path, "dali", spec=spec),
        batches(tmp_path, "torchvision", spec=spec),
        strict=True,
    ):
        for name in ("weak_1", "weak_2"):
            gap = (ours.views[name] - theirs.views[name]).abs() * 0.2023 * 255
            assert gap.max() < levels, name  # up to 39 where the pixels around it are read
            assert gap[..., 2:-2, 2:-2].max() < 1.5, name  # rounding


@every_backend
def test_a_weak_view_and_its_aggressive_one_are_flipped_and_turned_alike(
    folder, backend, aggressive_on
):
    spec = replace(AERIAL, jitter_p=0, grayscale_p=0, blur_p=0)
    upright = replace(spec, vertical_flip_p=0, quarter_turns=False)
    batch, plain = (batches(folder, backend, aggressive_on, spec=s)[0] for s in (spec, upright))
    for crop in (1, 2):
        weak = batch.view(f"weak_{crop}")
        assert torch.equal(weak, batch.view(f"aggressive_{crop}"))
        moved = (weak != plain.view(f"weak_{crop}")).flatten(1).any(1)
        assert moved.sum() >= 5  # of 8; 7 on average
    assert not torch.equal(batch.weak_1, batch.weak_2)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_layout_and_rounding(folder, backend, aggressive_on, dtype):
    exact = batches(folder, backend, aggressive_on)[0]
    batch = batches(folder, backend, aggressive_on, dtype=dtype)[0]
    assert batch.label.dtype == torch.int64 and batch.label.shape == (8,)
    for name in VIEWS:
        view = batch.views[name]
        assert view.shape == (8, 3, 16, 16) and view.dtype == dtype
        assert view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, exact.views[name].to(dtype))


@every_backend
@pytest.mark.parametrize(
    "reads", [("aggressive_1", "aggressive_2"), ("aggressive_1", "weak_2"), ("weak_1",)]
)
def test_only_the_views_read_are_made_and_they_are_the_same(folder, backend, aggressive_on, reads):
    every, some = (
        batches(folder, backend, aggressive_on)[1],
        batches(folder, backend, aggressive_on, reads)[1],
    )
    for name in VIEWS:
        if name in reads:
            assert torch.equal(some.views[name], every.views[name])
        else:
            assert name not in some.views
            with pytest.raises(AttributeError, match=f"no {name}, only {', '.join(reads)}: "):
                getattr(some, name)


@every_backend
def test_starting_at_a_step_is_a_jump(folder, backend, aggressive_on):
    whole, rest = (
        batches(folder, backend, aggressive_on, epoch=2),
        batches(folder, backend, aggressive_on, epoch=2, step=3),
    )
    assert len(whole) == 5 and len(rest) == 2
    for one, other in zip(whole[3:], rest, strict=True):
        assert torch.equal(one.aggressive_2, other.aggressive_2) and torch.equal(
            one.label, other.label
        )
    assert not torch.equal(
        whole[0].weak_1, batches(folder, backend, aggressive_on, epoch=3)[0].weak_1
    )


@every_backend
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_see_together_what_one_rank_sees(folder, backend, aggressive_on, world_size):
    whole = batches(folder, backend, aggressive_on)
    ranks = [
        batches(folder, backend, aggressive_on, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    for step, batch in enumerate(whole):
        for name in VIEWS:
            together = torch.cat([rank[step].views[name] for rank in ranks])
            assert torch.equal(batch.views[name], together)


@every_backend
def test_threads_do_not_change_a_view(folder, backend, aggressive_on):
    one, two = (
        batches(folder, backend, aggressive_on, threads=1),
        batches(folder, backend, aggressive_on, threads=2),
    )
    assert all(torch.equal(a.aggressive_1, b.aggressive_1) for a, b in zip(one, two, strict=True))


def test_images_of_many_sizes_are_resident_on_the_host_and_refused_on_the_device(tmp_path):
    write_folder(tmp_path / "a", {"train": 8}, size=(30, 44))
    for path in write_folder(tmp_path / "b", {"train": 8}, size=(61, 25)).rglob("*.jpg"):
        path.rename(tmp_path / "a" / "train" / path.parent.name / f"tall_{path.name}")
    ours, files, theirs = (
        batches(tmp_path / "a", backend) for backend in ("resident", "native", "torchvision")
    )
    for one, another, reference in zip(ours, files, theirs, strict=True):
        assert torch.allclose(one.aggressive_1, reference.aggressive_1, atol=1e-6)
        assert torch.equal(one.aggressive_1, another.aggressive_1)
    with pytest.raises(ValueError, match="30x25 to 61x44 px"):
        batches(tmp_path / "a", "resident", "device")


def test_a_dataset_larger_than_memory_is_refused(folder, monkeypatch):
    monkeypatch.setattr("rsa_fast.pipelines.backends.available_memory_bytes", lambda: 100)
    with pytest.raises(ValueError, match="too large for the resident backend"):
        batches(folder, "resident")


def test_unknown_backends_and_views_are_errors(folder):
    with pytest.raises(ValueError, match="no backend 'dahli'"):
        batches(folder, "dahli")
    with pytest.raises(ValueError, match="no such views"):
        batches(folder, "resident", reads=("strong_1",))


def test_a_resident_loader_joins_its_threads(folder):
    source = open_source(folder, "pretrain")
    with open_views(source, SPEC, frozenset(VIEWS), Order(40, 8, 0)) as loader:
        next(loader.batches(0))
    with pytest.raises(RuntimeError, match="shutdown"):
        loader.make(0, np.arange(8))


@pytest.mark.parametrize("backend", ["native", pytest.param("dali", marks=DALI)])
def test_an_iterator_left_early_leaves_nothing_behind(folder, backend):
    source = open_source(folder, "pretrain")
    with open_views(
        source, SPEC, frozenset(VIEWS), Order(40, 8, 5), loading=Loading(backend)
    ) as loader:
        first = next(iter(loader.batches(0)))
        for _ in zip(range(2), loader.batches(1), strict=False):
            pass
        again = list(loader.batches(0))
    assert len(again) == 5 and torch.equal(again[0].aggressive_1, first.aggressive_1)


@pytest.mark.parametrize("backend", ["resident", "native", pytest.param("dali", marks=DALI)])
def test_a_view_in_use_is_not_written_again_and_memory_of_others_is(folder, backend):
    source = open_source(folder, "pretrain")
    with open_views(
        source, SPEC, frozenset(VIEWS), Order(40, 8, 5), loading=Loading(backend)
    ) as loader:
        kept = next(loader.batches(0)).weak_1[3]
        before, others = kept.clone(), set()
        for epoch in range(1, 9):
            for batch in loader.batches(epoch):
                others |= {batch.views[name].data_ptr() for name in VIEWS}
        assert torch.equal(kept, before)
        assert kept.untyped_storage().data_ptr() not in others
        # There were 40 batches.
        assert len(others) <= len(VIEWS) * (loader.job.loading.prefetch_batches + 3)


@pytest.mark.parametrize("backend", ["native", pytest.param("dali", marks=DALI)])
def test_a_file_damaged_after_the_scan_is_named(tmp_path, backend):
    write_folder(tmp_path, {"train": 4})
    source, order = open_source(tmp_path, "pretrain"), Order(8, 4, 0)
    # This image is in the first of two batches that are being loaded.
    damaged = tmp_path / source.manifest.paths[order.ids(0, 0)[1]]
    damaged.write_bytes(damaged.read_bytes()[:200])
    with (
        open_views(source, SPEC, frozenset(VIEWS), order, loading=Loading(backend)) as loader,
        pytest.raises(ValueError, match=f"cannot read image {re.escape(str(damaged))}"),
    ):
        list(loader.batches(0))


@pytest.mark.parametrize("backend", ["native", pytest.param("dali", marks=DALI)])
def test_images_that_are_no_rgb_jpegs_are_decoded_as_pil_does(tmp_path, backend):
    rgb = Image.fromarray(natural_image(1, 40, 30))
    saved = {
        "a.png": rgb,
        "gray.jpg": rgb.convert("L"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "palette.png": rgb.quantize(32),
    }
    saved |= {"alpha.png": rgb.convert("RGBA"), "b.gif": rgb, "c.webp": rgb, "d.bmp": rgb}
    for name, image in saved.items():
        image.save(tmp_path / name)
    (ours,), (theirs,) = batches(tmp_path, backend), batches(tmp_path, "torchvision")
    for one, other in zip(ours.weak_1, theirs.weak_1, strict=True):
        assert (one - other).abs().mean() * 0.2 * 255 < RESIZE_LEVELS.get(backend, 1e-4)


def test_auto_says_what_it_chose_and_why(folder, caplog, monkeypatch):
    caplog.set_level("INFO", "rsa_fast")
    source = open_source(folder, "pretrain")
    monkeypatch.setattr("rsa_fast.pipelines.backends.free_bytes", lambda device: 2**30)
    with open_views(source, SPEC, frozenset(VIEWS), Order(40, 8, 5)):
        assert "backend resident: the images take 0.00 GiB decoded" in caplog.text


IN_MEMORY = ("resident", "the images take 0.00 GiB decoded and stay in memory")
FFCV = ("ffcv", "train.beton is a file of FFCV")
PIXELS = "the images are stored as pixels, which need no decoder"
FILES = "it decodes files fastest on a CPU"
ON_GPU, NO_DALI, NO_FFCV = (
    "it can decode on the GPU",
    "DALI is not installed; it decodes on the CPU",
    "FFCV is not installed; ",
)
# By (source, device): the choice with both libraries, without FFCV, without DALI, with neither.
CHOICES = {
    ("files", "cpu"): [("native", FILES)] * 4,
    ("files", "cuda"): [
        ("dali", ON_GPU),
        ("dali", ON_GPU),
        ("native", NO_DALI),
        ("native", NO_DALI),
    ],
    ("arrays", "cpu"): [("native", PIXELS)] * 4,
    ("arrays", "cuda"): [("native", PIXELS)] * 4,
    ("beton of JPEGs", "cpu"): [FFCV, ("native", NO_FFCV + FILES)] * 2,
    ("beton of JPEGs", "cuda"): [
        FFCV,
        ("dali", NO_FFCV + ON_GPU),
        FFCV,
        ("native", NO_FFCV + NO_DALI),
    ],
    ("beton of pixels", "cpu"): [FFCV, ("native", NO_FFCV + PIXELS)] * 2,
    ("beton of pixels", "cuda"): [FFCV, ("native", NO_FFCV + PIXELS)] * 2,
    ("small files", "cpu"): [IN_MEMORY] * 4,
    ("small files of one size", "cuda"): [IN_MEMORY] * 4,
    ("small files", "cuda"): [
        ("dali", ON_GPU),
        ("dali", ON_GPU),
        ("native", NO_DALI),
        ("native", NO_DALI),
    ],
}


@pytest.mark.parametrize(("kind", "device"), CHOICES)
def test_every_choice_is_for_the_reason_given(kind, device, monkeypatch):
    monkeypatch.setattr("rsa_fast.pipelines.backends.free_bytes", lambda device: 2**30)
    if "small" not in kind:
        monkeypatch.setattr("rsa_fast.pipelines.backends.RESIDENT_BYTES", 0)
    sizes = np.array([[20, 20], [20, 20 if "one size" in kind else 30]], np.int32)
    source = Source(
        Manifest("train", (), np.zeros(2, np.int64), sizes, ""),
        read=lambda sample: np.zeros((*sizes[sample], 3), np.uint8),
        encoded=None if kind in ("arrays", "beton of pixels") else lambda sample: b"\xff\xd8",
        beton=Path("data/train.beton") if "beton" in kind else None,
    )
    dali = {"nvidia", "nvidia.dali"}
    for installed, choice in zip(
        (dali | {"ffcv"}, dali, {"ffcv"}, set()), CHOICES[kind, device], strict=True
    ):
        monkeypatch.setattr(
            "rsa_fast.pipelines.backends.find_spec",
            lambda name, installed=installed: name in installed or None,
        )
        assert choose_backend(source, torch.device(device)) == choice


@pytest.mark.parametrize("aggressive_on", ["host", "device"])
@pytest.mark.parametrize(
    ("backend", "weak_levels"), [("native", 1e-4), pytest.param("dali", 0.3, marks=DALI)]
)
def test_views_of_photographs_at_224_px_against_pil(imagenet, backend, weak_levels, aggressive_on):
    source = open_source(imagenet, "train")
    spec = ViewSpec(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    loaded = []
    for name, place in ((backend, aggressive_on), ("torchvision", "host")):
        with open_views(
            source,
            spec,
            frozenset(VIEWS),
            Order(320, 32, 0),
            loading=Loading(name, aggressive_on=place),
        ) as loader:
            loaded.append(next(iter(loader.batches(0))))
    ours, theirs = loaded
    for name in VIEWS:
        apart = (ours.views[name] - theirs.views[name]).abs()
        gap = apart * torch.tensor(spec.std).view(3, 1, 1) * 255
        allowed = weak_levels + (0.4 if aggressive_on == "device" and "aggressive" in name else 0)
        assert gap.mean() < allowed, name
