"""Values that no refactoring may change: losses of every method, views of every backend.

They were recorded before methods, datasets and backends got folders of their own. After a change
that is meant to change them, run RSA_FAST_REWRITE_GOLDEN=1 pytest tests/rsa_fast/test_golden.py and
check the difference in golden.json.
"""

from __future__ import annotations

import hashlib
import json
import os
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rsa_fast.methods import METHODS
from rsa_fast.pipelines import VIEWS, Batch, Loading, Order, ViewSpec, open_source, open_views
from rsa_fast.pipelines.beton import BetonWriter
from rsa_fast.pipelines.packed import ENTRY
from rsa_fast.recipes import build_recipe
from rsa_fast.training.step import build_run, train_step
from tests.helpers import natural_image

PLACE = Path(__file__).with_name("golden.json")
TINY = {"width": 8, "views.size_px": 16, "precision": "fp32", "batch_size": 8, "device": "cpu"}
TINY |= {"lr_per": "step"}  # as it was for every row when the losses were recorded
OWN = {"out_dim": 8, "hidden_dim": 16, "queue_size": 16, "bn": "local", "classes": 3}
OWN |= {"bottleneck_dim": 4, "prototypes": 10, "negatives": 16}
W_MSE = {"out_dim": 4}  # it whitens 2 * out_dim images together
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
COUNT, BATCH = 12, 4
CASES = {  # backend and where its views are made
    "resident host": ("resident", "host"),
    "resident device": ("resident", "device"),
    "native host": ("native", "host"),
    "native device": ("native", "device"),
    "torchvision": ("torchvision", "host"),
    "dali host": ("dali", "host"),
    "dali device": ("dali", "device"),
    "ffcv host": ("ffcv", "host"),
    "ffcv device": ("ffcv", "device"),
}
NEEDS = {"dali": "nvidia.dali", "ffcv": "ffcv"}
# These compute in integers, so their bits are the same on every machine. The others round floating
# point numbers, so only their means are compared.
EXACT = ("resident host", "native host", "torchvision", "ffcv host")


def golden(part: str, name: str, value: object) -> object:
    """Return the recorded value. If a rewrite is requested, record `value` first."""
    if os.environ.get("RSA_FAST_REWRITE_GOLDEN"):
        recorded = json.loads(PLACE.read_text()) if PLACE.is_file() else {}
        recorded.setdefault(part, {})[name] = value
        PLACE.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
    return json.loads(PLACE.read_text())[part][name]


def losses(method: str) -> list[float]:
    """Return the losses of ten steps in float64 from seed 0, on views of white noise."""
    known = type(build_recipe("cifar10", method)).model_fields
    own = OWN | (W_MSE if method == "w-mse" else {})
    overrides = TINY | {name: value for name, value in own.items() if name in known}
    torch.set_default_dtype(torch.float64)
    try:
        run = build_run(build_recipe("cifar10", method, overrides=overrides), 40)
    finally:
        torch.set_default_dtype(torch.float32)
    generator, values = torch.Generator().manual_seed(0), []
    others = sorted(run.method.reads - set(VIEWS))
    for step in range(10):
        noise = torch.randn(4, 8, 3, 16, 16, dtype=torch.float64, generator=generator)
        views = [view.to(memory_format=torch.channels_last) for view in noise]
        views[2:] = [view + 0.1 * other for view, other in zip(views[:2], views[2:], strict=True)]
        label = torch.arange(8) % 3
        batch = Batch(label, dict(zip(VIEWS, views, strict=True)), (torch.arange(8) + step) % 40)
        for name in others:
            shape = (8, 9, 3, 8, 8) if name.startswith("patches") else (8, 3, 16, 16)
            batch.views[name] = torch.randn(shape, dtype=torch.float64, generator=generator)
        values.append(train_step(run, batch).total.item())
    return values


@pytest.mark.parametrize("method", METHODS)
def test_the_losses_of_a_method_stay(method):
    if method == "dino":  # the only one that draws weights from it
        torch.manual_seed(0)
        drawn = torch.nn.init.trunc_normal_(torch.empty(1, dtype=torch.float64)).item()
        if drawn != pytest.approx(1.6320, abs=1e-3):
            pytest.skip(f"trunc_normal_ of torch {torch.__version__} draws other weights")
    values = losses(method)
    assert values == pytest.approx(golden("losses", method, values), rel=1e-9)
    assert len(set(values)) > 1


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[tuple[int, bool], Path]:
    """Map (side in pixels, packed) to a folder of PNG files or of a .beton file of raw pixels."""
    places = {}
    for side_px in (32, 300):
        images = [natural_image(i, side_px, side_px) for i in range(COUNT)]
        folder = tmp_path_factory.mktemp(f"images_{side_px}")
        for i, image in enumerate(images):
            (place := folder / "train" / f"class_{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{i:02}.png")
        packed = tmp_path_factory.mktemp(f"beton_{side_px}")
        entries = np.zeros(COUNT, ENTRY)
        writer = BetonWriter(packed / "train.beton", COUNT, 2**20, entries[:0])
        for i, image in enumerate(images):
            content = image.tobytes()
            place = writer.append(content, i % 2)
            entries[i] = (*place, len(content), i % 2, side_px, side_px, True)
        writer.finish(entries)
        writer.close()
        places |= {(side_px, False): folder, (side_px, True): packed}
    return places


@pytest.mark.parametrize("side_px", [32, 300])
@pytest.mark.parametrize("case", CASES)
def test_the_views_of_a_backend_stay(data, case, side_px):
    backend, aggressive_on = CASES[case]
    if backend in NEEDS and not find_spec(NEEDS[backend]):
        pytest.skip(f"{NEEDS[backend]} is not installed")
    source = open_source(data[side_px, backend == "ffcv"], "pretrain")
    spec = ViewSpec(32 if side_px == 32 else 224, MEAN, STD)
    levels = {name: [] for name in VIEWS}
    loading = Loading(backend, aggressive_on=aggressive_on)
    order = Order(COUNT, BATCH, 7)
    with open_views(source, spec, frozenset(VIEWS), order, loading=loading) as loader:
        for batch in loader.batches(3):
            for name in VIEWS:
                view = batch.views[name] * torch.tensor(STD).view(3, 1, 1)
                levels[name].append(255 * (view + torch.tensor(MEAN).view(3, 1, 1)))
    key = f"{case} {spec.size_px} px"
    if case in EXACT:
        digest = hashlib.sha256()
        for name in VIEWS:
            digest.update(torch.cat(levels[name]).round().to(torch.uint8).numpy().tobytes())
        assert digest.hexdigest() == golden("views", key, digest.hexdigest())
    else:
        means = {}
        for name in VIEWS:
            mean_level = torch.cat(levels[name]).mean((2, 3)).flatten()  # (COUNT * 3,)
            means[name] = [round(level, 3) for level in mean_level.tolist()]
        recorded = golden("views", key, means)
        for name in VIEWS:
            assert means[name] == pytest.approx(recorded[name], abs=0.05), name
