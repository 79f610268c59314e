"""Recomputed stages and compiled encoders differ from plain ones in costs, not in results."""

from __future__ import annotations

import os
import shutil

import pytest
import torch

from rsa_fast import networks
from rsa_fast.archs import ResNetLayers
from rsa_fast.methods import method_class
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import build_recipe
from rsa_fast.training.engine import train
from rsa_fast.training.step import build_run, train_step
from tests.rsa_fast.ranks import mine, run_ranks
from tests.rsa_fast.small_methods import BATCH, FIELDS, some_batch
from tests.tiny_runs import tiny, weights

METHODS = ("rsa", "simclr", "moco")
COMPILER = os.environ.get("CXX", "g++")


def two_steps(method: str, dtype: torch.dtype = torch.float32, **fields) -> tuple[list, list, dict]:
    """Take two of the engine's steps on this rank's part, with one block per stage.

    Return the losses and gradients of the steps, and the state after them.
    """
    # The initial gain of zero would stop the gradient of its block's convolutions.
    options = FIELDS | {"zero_init_residual": False, "peak_lr": 0.1}
    options |= {"precision": "fp32", "device": "cpu"} | fields
    known = method_class(method).recipe_type.model_fields
    options = {key: value for key, value in options.items() if key in known}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks.RESNETS, "resnet18", ResNetLayers(False, (1, 1, 1, 1)))
        torch.set_default_dtype(dtype)
        run = build_run(build_recipe("cifar10", method, overrides=options), 10 * BATCH)
    torch.set_default_dtype(torch.float32)
    trained = [p for p in run.method.parameters() if p.requires_grad]
    losses, gradients = [], []
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.extend(p.grad.clone() for p in trained)
    )
    for step in range(2):
        batch = some_batch(step)
        views = {name: mine(view).to(dtype) for name, view in batch.views.items()}
        losses.append(train_step(run, Batch(mine(batch.label), views)).total.detach())
    return losses, gradients, run.method.state_dict()


def steps_in_every_way() -> dict[tuple, tuple]:
    """Take the steps with every method, plain and recomputed, and with RSA compiled as one graph.

    BatchNorm is over all ranks.
    """
    compiled = torch.compile(networks.features, fullgraph=True, dynamic=False, backend="aot_eager")
    networks.compiled_features = lambda: compiled
    ways = [(method, stages, False) for method in METHODS for stages in (0, 4)] + [("rsa", 2, True)]
    return {
        way: two_steps(way[0], bn="sync", recompute_stages=way[1], compile=way[2]) for way in ways
    }


def assert_same(one: tuple, other: tuple) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", METHODS)
def test_recomputed_stages_learn_the_same_bit_for_bit(method, precision):
    plain = two_steps(method, precision=precision)
    for stages in (1, 4):
        assert_same(two_steps(method, precision=precision, recompute_stages=stages), plain)


@pytest.mark.slow
def test_the_same_on_two_ranks_and_compiled_without_a_break(tmp_path):
    """`fullgraph` raises where torch would break the graph, as at an untraceable collective."""
    for steps in run_ranks(steps_in_every_way, 2, tmp_path):
        for (method, *_), result in steps.items():
            assert_same(result, steps[method, 0, False])


def test_only_the_first_stages_run_again_and_only_for_a_backward():
    encoder, runs = Encoder("resnet18", "cifar", 4, recompute_stages=2), []
    for name in ("conv1", "layer1", "layer2", "layer3", "layer4"):
        getattr(encoder, name).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    every = ["conv1", "layer1", "layer2", "layer3", "layer4"]
    with torch.no_grad():
        encoder(torch.zeros(2, 3, 8, 8))
    assert runs == every
    encoder(torch.randn(2, 3, 8, 8)).sum().backward()
    assert runs == 2 * every + ["layer2", "conv1", "layer1"]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which(COMPILER) is None,
    reason=f"no C++ compiler {COMPILER}, which torch.compile needs on a CPU",
)
def test_a_compiled_encoder_learns_the_same_up_to_rounding(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "threads", 1)
    plain, compiled = (
        two_steps("simclr", torch.float64, compile=compiled) for compiled in (False, True)
    )
    # This compares the keys of the state too.
    torch.testing.assert_close(compiled, plain, rtol=1e-9, atol=1e-12)


def test_only_training_is_compiled(monkeypatch):
    monkeypatch.setattr(networks, "compiled_features", lambda: lambda encoder, images: "compiled")
    encoder, images = Encoder("resnet18", "cifar", 4, compiled=True), torch.zeros(2, 3, 8, 8)
    assert encoder(images) == "compiled" and encoder.eval()(images).shape == (2, 32)


def test_a_run_may_recompute_from_a_checkpoint_on_but_not_compile(folder, tmp_path):
    train(tiny(), folder, tmp_path / "whole")
    train(tiny(), folder, tmp_path / "parts", stop_at_step=7)
    with pytest.raises(ValueError, match="compile: False in the checkpoint, True now"):
        train(tiny(compile=True), folder, tmp_path / "parts", resume=True)
    train(tiny(recompute_stages=3), folder, tmp_path / "parts", resume=True)
    assert_same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
