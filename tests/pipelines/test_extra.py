"""An augmentation of one's own: what it is called with, and that a resumed run sees the same."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rsa_fast.evaluation.evaluate import evaluate
from rsa_fast.pipelines import VIEWS, Order, open_source, open_views
from rsa_fast.pipelines.draws import batch_seed
from rsa_fast.pipelines.named import load_module
from rsa_fast.recipes import build_recipe
from rsa_fast.training.engine import train
from tests.helpers import ROOT
from tests.pipelines.backends import SPEC, batches, every_backend
from tests.tiny_runs import NARROW, same, weights

OWN = """
import torch
CALLS = []

def noise(views, generator):
    CALLS.append({name: view.clone() for name, view in views.items()})
    return {
        name: view + torch.randn(view.shape, generator=generator).to(view)
        for name, view in views.items()
    }

def in_place(views, generator):
    for view in views.values():
        view.mul_(torch.rand(1, generator=generator).item())
    return views

def one_less(views, generator):
    return {"weak_1": views["weak_1"]}

def doubled(views, generator):
    return {name: view.double() for name, view in views.items()}

def smaller(views, generator):
    return {name: view[..., 1:] for name, view in views.items()}

def contiguous(views, generator):
    return {name: view.contiguous() for name, view in views.items()}

def arrays(views, generator):
    return {name: view.numpy() for name, view in views.items()}

def nothing(views, generator):
    pass

def misshapen(views, generator):
    return {name: view @ torch.ones(3, 3) for name, view in views.items()}

NUMBER = 3
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("own") / "own.py"
    file.write_text(OWN)
    return file


def changed(own: Path, folder: Path, backend: str, *options, name="noise", **more):
    spec = replace(SPEC, extra=f"{own}:{name}")
    return batches(folder, backend, *options, spec=spec, **more)


@every_backend
def test_it_gets_each_batch_at_the_end_with_random_numbers_of_that_batch(
    own, folder, backend, aggressive_on
):
    reads = ("weak_1", "aggressive_2")
    plain = batches(folder, backend, aggressive_on, reads, epoch=2)
    ours = changed(own, folder, backend, aggressive_on, reads=reads, epoch=2)
    assert len(ours) == 5
    for step, (one, other) in enumerate(zip(ours, plain, strict=True)):
        generator = torch.Generator().manual_seed(batch_seed(5, 2, step, rank=0))
        assert torch.equal(one.label, other.label) and list(one.views) == list(other.views)
        for name, view in other.views.items():
            noise = torch.randn(view.shape, generator=generator)
            assert torch.equal(one.views[name], view + noise)
    calls = load_module(own).CALLS[-5:]
    for given, other in zip(calls, plain, strict=True):
        assert all(torch.equal(given[name], view) for name, view in other.views.items())


@every_backend
def test_starting_in_the_middle_of_an_epoch_gives_the_same_bits(
    own, folder, backend, aggressive_on
):
    whole = changed(own, folder, backend, aggressive_on, name="in_place", epoch=1)
    rest = changed(own, folder, backend, aggressive_on, name="in_place", epoch=1, step=3)
    for one, other in zip(whole[3:], rest, strict=True):
        assert all(torch.equal(one.views[name], other.views[name]) for name in VIEWS)
    another = changed(own, folder, backend, aggressive_on, name="in_place", epoch=2)
    assert not torch.equal(whole[0].weak_1, another[0].weak_1)


@pytest.mark.parametrize("backend", ["resident", "native"])
def test_threads_and_batches_ahead_change_nothing_and_ranks_differ(own, folder, backend):
    one = changed(own, folder, backend, threads=1, prefetch_batches=1)
    two = changed(own, folder, backend, threads=2, prefetch_batches=4)
    assert all(torch.equal(a.weak_2, b.weak_2) for a, b in zip(one, two, strict=True))
    noise = []
    for rank in (0, 1):
        options = {"reads": ("weak_1",), "rank": rank, "world_size": 2}
        ours, plain = (
            changed(own, folder, backend, **options)[0].weak_1,
            batches(folder, backend, **options)[0].weak_1,
        )
        noise.append((ours - plain).flatten())
    assert abs(torch.corrcoef(torch.stack(noise))[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nois", r"own\.py has no 'nois': it has noise"),
        ("NUMBER", r"views\.extra: .*own\.py:NUMBER is of type int, wanted a function"),
        ("one_less", r"returned \['weak_1'\], wanted a dict of \['aggressive_1', 'aggr"),
        ("nothing", r"returned NoneType, wanted a dict of"),
        ("arrays", r"returned weak_1 as ndarray, wanted float32 \(8, 3, 16, 16\) on cpu, chan"),
        ("doubled", r"returned weak_1 as float64 \(8, 3, 16, 16\) on cpu, channels_last, wanted f"),
        ("smaller", r"returned weak_1 as float32 \(8, 3, 16, 15\)"),
        ("contiguous", r"returned weak_1 as .*, not channels_last, wanted .*, channels_last"),
        ("misshapen", r"own\.py:misshapen failed: RuntimeError: .*16.*\(line 36\)"),
    ],
)
def test_what_it_must_not_do_is_named(own, folder, name, message):
    with pytest.raises(ValueError, match=message):
        changed(own, folder, "resident", name=name)


def test_a_file_that_is_missing_is_named_when_the_loader_opens(folder, tmp_path):
    source = open_source(folder, "pretrain")
    spec = replace(SPEC, extra=f"{tmp_path}/missing.py:f")
    with pytest.raises(ValueError, match=r"there is no file .*missing\.py"):
        open_views(source, spec, frozenset(VIEWS), Order(40, 8, 0))


def test_a_run_resumed_in_another_folder_equals_an_uninterrupted_one_bit_for_bit(
    own, folder, tmp_path, monkeypatch
):
    (tmp_path / "elsewhere").mkdir()
    fields = NARROW | {"hidden_dim": 16, "out_dim": 8, "batch_size": 8, "epochs": 2}
    fields |= {"precision": "fp32", "knn_every_epochs": 0, "views.size_px": 16}
    monkeypatch.chdir(own.parent)
    recipe = build_recipe("cifar10", "byol", overrides=fields | {"views.extra": "own.py:noise"})
    assert recipe.views.extra == f"{own.resolve()}:noise"
    train(recipe, folder, tmp_path / "whole")
    train(recipe, folder, tmp_path / "parts", stop_at_step=7)
    monkeypatch.chdir(tmp_path / "elsewhere")
    train(recipe, folder, tmp_path / "parts", resume=True)
    train(build_recipe("cifar10", "byol", overrides=fields), folder, tmp_path / "plain")
    whole, parts, plain = (weights(tmp_path / run) for run in ("whole", "parts", "plain"))
    assert same(whole, parts) and not same(whole, plain)


def test_an_evaluation_executes_no_file_that_a_checkpoint_names(folder, tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    fields = NARROW | {"hidden_dim": 16, "out_dim": 8, "batch_size": 8, "epochs": 1}
    fields |= {"precision": "fp32", "knn_every_epochs": 0, "views.size_px": 16}
    recipe = build_recipe("cifar10", "byol", overrides=fields | {"views.extra": f"{file}:noise"})
    train(recipe, folder, tmp_path / "run")
    file.unlink()
    del sys.modules[next(name for name in sys.modules if name.startswith("file_own_"))]
    (path,) = (tmp_path / "run" / "checkpoints").glob("step_*.pt")
    assert evaluate(path, folder, "linear", variant="rsa-small", epochs=1)


def test_the_example_in_the_documents_runs(folder, tmp_path):
    page = (ROOT / "docs" / "views.md").read_text()
    (code,) = re.findall(r"^```python\n(import torch\n\n\ndef noise.*?)^```$", page, re.M | re.S)
    (tmp_path / "my_views.py").write_text(code)
    (ours, *_), (plain, *_) = (
        changed(tmp_path / "my_views.py", folder, "native", dtype=torch.bfloat16),
        batches(folder, "native", dtype=torch.bfloat16),
    )
    for name in VIEWS:
        apart = (ours.views[name] - plain.views[name]).float().flatten(1).std(1)
        assert (apart < 0.21).all() and apart.max() > 0.05 and len(set(apart.tolist())) == 8
