"""Numbers on a GPU are compared with those on a CPU: `make test-gpu`.

tests/gpuless checks what can be checked of the same code without a GPU.
"""

from __future__ import annotations

import pytest
import torch

from rsa_fast.pipelines import VIEWS, Loading, Order, open_source, open_views
from rsa_fast.recipes import build_recipe
from rsa_fast.syncbn import SyncBatchNorm
from rsa_fast.training.step import build_run, train_step

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def test_views_on_a_gpu_equal_those_of_a_cpu(folder):
    source = open_source(folder, "pretrain")
    spec = build_recipe("cifar10", "rsa").views
    batches = []
    for device in ("cpu", "cuda"):
        with open_views(
            source,
            spec,
            frozenset(VIEWS),
            Order(40, 8, 0),
            device=device,
            loading=Loading(aggressive_on="device"),
        ) as loader:
            batches.append(next(loader.batches(0)))
    for name in VIEWS:
        gap = (batches[0].views[name] - batches[1].views[name].cpu()).abs() * 0.2 * 255
        assert gap.mean() < 0.05, name


def test_a_float32_step_on_a_gpu_equals_one_on_a_cpu(folder):
    source = open_source(folder, "pretrain")
    losses = []
    for device in ("cpu", "cuda"):
        fields = {"device": device, "precision": "fp32", "batch_size": 8, "width": 8}
        run = build_run(build_recipe("cifar10", "rsa", overrides=fields), 40)
        views = {"device": run.device, "dtype": run.dtype}
        with open_views(
            source,
            run.recipe.views,
            run.method.reads,
            Order(40, 8, 0),
            loading=Loading(aggressive_on="device"),
            **views,
        ) as loader:
            losses.append([train_step(run, batch).total.item() for batch in loader.batches(0)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


@pytest.mark.parametrize("affine", [True, False])
def test_synchronised_batchnorm_on_a_gpu_equals_batchnorm(monkeypatch, affine):
    """In a world of one rank, both normalise the same images.

    The test therefore compares the kernels and the formulas around them.
    """
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
        results.append(
            [
                out,
                x.grad,
                layer.running_mean,
                layer.running_var,
                *(p.grad for p in layer.parameters()),
            ]
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
