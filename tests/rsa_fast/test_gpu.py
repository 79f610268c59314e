"""The CUDA path. On a GPU: its numbers. Without one: the same code under a fake CUDA runtime that finds host syncs.

The fake runtime is a launcher `ghost PYTHON script` named by RSA_FAST_GHOST; its kernels compute nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from pipelines import VIEWS, Order, open_source, open_views
from rsa_fast.engine import build_run, train_step
from rsa_fast.recipes import build_recipe
from rsa_fast.syncbn import SyncBatchNorm

GHOST = Path(os.environ.get("RSA_FAST_GHOST", ROOT.parent / "shared" / "tools" / "gpuless" / "ghost" / "ghost"))

FFCV = pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV is not installed: make setup says what it needs")

STEPS_WITHOUT_SYNC = """
import ctypes, sys
import torch
from pipelines import Order, open_source, open_views
from rsa_fast.engine import build_run, train_step
from rsa_fast.recipes import build_recipe

method, optimizer, precision, backend, folder = sys.argv[1:]
fields = {"optimizer": optimizer, "precision": precision, "batch_size": 8, "width": 8, "views.size_px": 16, "device": "cuda"}
source = open_source(folder, "pretrain")
run = build_run(build_recipe("cifar10", method, overrides=fields), 40)
order = Order(40, 8, 0)
options = {"device": run.device, "dtype": run.dtype, "backend": backend}
with open_views(source, run.recipe.views, run.method.reads, order, **options) as loader:
    batches = loader.batches(0)
    train_step(run, next(batches))
    torch.cuda.set_sync_debug_mode("error")
    total = torch.zeros((), device=run.device)
    for batch in batches:
        total += train_step(run, batch).total.detach()
    torch.cuda.set_sync_debug_mode("default")
views = [getattr(batch, name) for name in run.method.reads]
assert all(v.is_cuda and v.dtype == run.dtype and v.is_contiguous(memory_format=torch.channels_last) for v in views)
assert run.step == 5
print("no sync", ctypes.CDLL(None).ghost_count(0), "kernels")
"""


ALL_METHODS_WITHOUT_SYNC = """
import sys
import torch
from pipelines.views import VIEWS, Batch
from rsa_fast.engine import build_run, train_step
from rsa_fast.meter import Meter
from rsa_fast.recipes import METHODS, build_recipe
from rsa_fast.syncbn import SyncBatchNorm

torch.distributed.all_reduce = lambda tensor, *_: None  # a world of one
for method in METHODS:
    fields = {"precision": "fp16", "batch_size": 16, "width": 8, "views.size_px": 16, "device": "cuda"}
    run = build_run(build_recipe("cifar10", method, overrides=fields), 16)
    if sys.argv[1] == "sync":
        for module in run.method.modules():
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                module.__class__ = SyncBatchNorm
    views = {name: torch.zeros(16, 3, 16, 16, device="cuda").to(memory_format=torch.channels_last) for name in VIEWS}
    batch, meter = Batch(torch.zeros(16, dtype=torch.int64, device="cuda"), **views), Meter(16, run.device)
    meter.add(0, train_step(run, batch), run.skipped)
    torch.cuda.set_sync_debug_mode("error")
    for step in (1, 2):
        meter.add(step, train_step(run, batch), run.skipped)
    torch.cuda.set_sync_debug_mode("default")
    assert run.step == 3
print("no sync", len(METHODS), "methods")
"""


@pytest.mark.parametrize("bn", ["plain", "sync"])
def test_no_method_and_no_batchnorm_waits_for_the_device(bn):
    run_under_ghost(ALL_METHODS_WITHOUT_SYNC, bn)


@pytest.mark.parametrize("method", ["rsa", "byol"])
@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "fp16"), ("lars", "fp16"), ("lars", "bf16"), ("sgd", "fp32")])
def test_views_and_step_never_wait_for_the_device(folder, method, optimizer, precision):
    run_without_sync(method, optimizer, precision, "resident", folder)


@pytest.mark.parametrize("backend", ["native", pytest.param("ffcv", marks=FFCV)])
def test_pinned_buffers_and_the_side_stream_never_make_the_host_wait(folder, beton, backend):
    run_without_sync("rsa", "lars", "fp16", backend, beton if backend == "ffcv" else folder)


def run_without_sync(*arguments: object) -> None:
    run_under_ghost(STEPS_WITHOUT_SYNC, *arguments)


def run_under_ghost(script: str, *arguments: object) -> None:
    if not GHOST.is_file():
        pytest.skip("no fake CUDA runtime: set RSA_FAST_GHOST to its launcher")
    command = [str(GHOST), sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "2"})
    assert done.returncode == 0 and "no sync" in done.stdout, done.stderr[-3000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_views_on_a_gpu_equal_those_of_a_cpu(folder):
    source = open_source(folder, "pretrain")
    spec = build_recipe("cifar10", "rsa").views
    batches = []
    for device in ("cpu", "cuda"):
        with open_views(source, spec, frozenset(VIEWS), Order(40, 8, 0), device=device, aggressive_on="device") as loader:
            batches.append(next(loader.batches(0)))
    for name in VIEWS:
        gap = (getattr(batches[0], name) - getattr(batches[1], name).cpu()).abs() * 0.2 * 255
        assert gap.mean() < 0.05, name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_float32_step_on_a_gpu_equals_one_on_a_cpu(folder):
    source = open_source(folder, "pretrain")
    losses = []
    for device in ("cpu", "cuda"):
        fields = {"device": device, "precision": "fp32", "batch_size": 8, "width": 8}
        run = build_run(build_recipe("cifar10", "rsa", overrides=fields), 40)
        views = {"device": run.device, "dtype": run.dtype, "aggressive_on": "device"}
        with open_views(source, run.recipe.views, run.method.reads, Order(40, 8, 0), **views) as loader:
            losses.append([train_step(run, batch).total.item() for batch in loader.batches(0)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("affine", [True, False])
def test_synchronised_batchnorm_on_a_gpu_equals_batchnorm(monkeypatch, affine):
    """In a world of one, where both normalise the same images: the kernels and the formulas around them."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    results = []
    for kind in (torch.nn.BatchNorm2d, SyncBatchNorm):
        layer = torch.nn.BatchNorm2d(8, affine=affine, device="cuda")
        layer.__class__ = kind
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(16, 8, 5, 5, generator=generator).cuda() + 10 for _ in range(2))
        x = x.to(memory_format=torch.channels_last).requires_grad_()
        out = layer(x)
        (out * weight).sum().backward()
        results.append([out, x.grad, layer.running_mean, layer.running_var, *(p.grad for p in layer.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
