"""The fields that change an optimiser: AdamW, clipping, excluded weight decay, the last rate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.training.optim import build_optimizer, set_learning_rate
from rsa_fast.training.step import Run, build_run, train_step
from tests.rsa_fast.small_methods import SHAPES, gradients, parameters
from tests.tiny_runs import tiny

SIMSIAM = {"projector_layers": 2, "hidden_dim": 8, "out_dim": 8}
NAMES = ("sgd", "lars", "larc", "adam", "adamw")


class Few(nn.Module):
    """The parameters of `SHAPES`, of which the last two keep the peak rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters())

    def constant_lr_parameters(self) -> list[nn.Parameter]:
        return list(self.weights)[2:]


def optimizer_of(few: Few, **fields) -> Optimizer:
    fields = {"weight_decay": 0.05, "momentum": 0.8} | fields
    return build_optimizer(tiny(**fields), few, peak_lr=0.02)


def give(few: Few, step: int, scale: float = 1.0) -> None:
    for p, g in zip(few.weights, gradients(step), strict=True):
        p.grad = g * scale


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("decay_exclude", ["none", "norm_and_bias"])
def test_steps_of_adam_and_adamw_equal_those_by_hand(decay_exclude, name):
    """Adam adds the decay to the gradient (L2), and AdamW shrinks the weights by it."""
    few = Few()
    optimizer = optimizer_of(few, optimizer=name, decay_exclude=decay_exclude)
    weights = [p.detach().double().flatten().tolist() for p in few.weights]
    first, second = ([[0.0] * len(w) for w in weights] for _ in range(2))
    for step in range(4):
        set_learning_rate(optimizer, rate := 0.01 / (step + 1))
        give(few, step)
        optimizer.step()
        for i, grads in enumerate(gradients(step)):
            lr = 0.02 if i >= 2 else rate  # the last two keep the peak
            decay = 0.0 if decay_exclude != "none" and len(SHAPES[i]) == 1 else 0.05
            for j, g in enumerate(grads.double().flatten().tolist()):
                if name == "adam":
                    g += decay * weights[i][j]
                first[i][j] = 0.8 * first[i][j] + 0.2 * g
                second[i][j] = 0.999 * second[i][j] + 0.001 * g * g
                mean = first[i][j] / (1 - 0.8 ** (step + 1))
                square = second[i][j] / (1 - 0.999 ** (step + 1))
                if name == "adamw":
                    weights[i][j] *= 1 - lr * decay
                weights[i][j] -= lr * mean / (math.sqrt(square) + 1e-8)
    for p, expected in zip(few.weights, weights, strict=True):
        assert p.flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["adam", "adamw"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_overflow_leaves_adam_as_new_and_a_scaled_step_equals_the_unscaled_one(layout, name):
    plain, scaled = Few().to(memory_format=layout), Few().to(memory_format=layout)
    one, other = (optimizer_of(few, optimizer=name) for few in (plain, scaled))
    scaler = GradScaler("cpu", init_scale=1024.0)
    for step, overflow in enumerate([True, False, True, False]):
        give(scaled, step, scaler.scale(torch.ones(())).item())
        before = [p.detach().clone() for p in scaled.weights]
        if overflow:
            scaled.weights[0].grad[0, 0, 0, 0] = float("inf")
        else:
            give(plain, step)
            one.step()
        scaler.step(other)
        scaler.update()
        if overflow:
            assert all(map(torch.equal, scaled.weights, before))
        if step == 0:
            for state in other.state.values():
                assert not any(value.any() for value in state.values())
    for p, q in zip(plain.weights, scaled.weights, strict=True):
        torch.testing.assert_close(p, q)
    for p, q in zip(one.state.values(), other.state.values(), strict=True):
        assert p["step"] == q["step"] == 2
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("name", NAMES)
def test_groups_leave_gains_and_biases_without_decay_and_are_the_old_ones_by_default(name):
    method = build_run(tiny("simsiam", **SIMSIAM), 40).method
    constant = set(method.constant_lr_parameters())

    def groups(**fields) -> list[dict]:
        recipe = tiny("simsiam", **SIMSIAM, optimizer=name, weight_decay=0.5, **fields)
        return build_optimizer(recipe, method, 0.1).param_groups

    # The checkpoints of earlier versions have these two groups.
    trained, kept = groups()
    assert set(kept["params"]) == constant and kept["constant_lr"] and not trained["constant_lr"]
    assert trained["weight_decay"] == kept["weight_decay"] == (0 if name == "lars" else 0.5)
    split = groups(decay_exclude="norm_and_bias")
    for group in split:
        for p in group["params"]:
            assert group["weight_decay"] == (0 if name == "lars" or p.ndim <= 1 else 0.5)
            assert group["constant_lr"] == (p in constant)
    members = [p for group in split for p in group["params"]]
    assert len(members) == len(set(members)) == len(trained["params"]) + len(kept["params"])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("decay_exclude", ["none", "norm_and_bias"])
def test_gains_and_biases_have_a_rate_of_their_own(name, decay_exclude):
    """Also where some keep the peak rate, and some have no weight decay."""
    few, ratio = Few(), 0.1
    optimizer = optimizer_of(few, optimizer=name, decay_exclude=decay_exclude, bias_lr_ratio=ratio)
    set_learning_rate(optimizer, 0.01)
    found = {p: group for group in optimizer.param_groups for p in group["params"]}
    constant = set(few.constant_lr_parameters())
    assert found.keys() == set(few.weights)
    for p in few.weights:
        usual = 0.02 if p in constant else 0.01
        assert found[p]["lr"] == pytest.approx(usual * (ratio if p.ndim <= 1 else 1))
        if name in ("sgd", "adam", "adamw"):
            left_out = decay_exclude == "norm_and_bias" and p.ndim <= 1
            assert found[p]["weight_decay"] == (0 if left_out else 0.05)


def test_a_step_of_lars_moves_biases_at_their_own_rate_and_weights_as_before():
    """Barlow Twins: LARS with the rates .2 and .0048."""
    plain, apart = Few(), Few()
    for few, fields in ((plain, {}), (apart, {"bias_lr_ratio": 0.024})):
        optimizer = optimizer_of(few, optimizer="lars", **fields)
        for step in range(3):
            set_learning_rate(optimizer, 0.2)
            give(few, step)
            optimizer.step()
    for start, p, q in zip(Few().weights, plain.weights, apart.weights, strict=True):
        share = 0.024 if p.ndim == 1 else 1
        torch.testing.assert_close(q - start, share * (p - start), rtol=1e-5, atol=1e-7)


def test_the_rate_drops_at_its_epochs_in_place_of_the_cosine():
    """W-MSE: by 5 at 50 and at 25 epochs before the end. Here an epoch has 5 steps."""
    fields = {"peak_lr": 0.5, "lr_drop": 0.2, "warmup_epochs": 2}
    run = build_run(tiny(**fields, epochs=60, lr_drop_epochs=(-50, -25)), 40)
    rates = [run.schedule(step)["lr"] for step in (0, 5, 10, 49, 50, 174, 175, 299, 300)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.5, 0.1, 0.1, 0.02, 0.02, 0.02])
    from_the_start = build_run(tiny(**fields, epochs=60, lr_drop_epochs=(10, 35)), 40)
    for step in range(301):
        assert run.schedule(step) == from_the_start.schedule(step)
    # 40 epochs do not reach the first, and 20 none.
    for epochs, expected in ((40, [0.5, 0.5, 0.1]), (20, [0.5, 0.5, 0.5])):
        short = build_run(tiny(**fields, epochs=epochs, lr_drop_epochs=(-50, -25)), 40)
        assert [short.schedule(step)["lr"] for step in (11, 74, 75)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr_drop_epochs": (0,)}, "epoch 0 is not after the warm-up of 0 epochs"),
        ({"lr_drop_epochs": (9, 10), "warmup_epochs": 9}, "epoch 9 is not after the warm-up of 9"),
        ({"lr_drop_epochs": (20, 20)}, r"\(20, 20\) contains an epoch twice"),
        ({"lr_drop_epochs": (20, -10), "epochs": 30}, "contains an epoch twice, in a run of 30"),
        ({"lr_drop_epochs": (20,), "min_lr": 0.01}, "min_lr = 0.01 is the end of"),
        ({"lr_drop_epochs": (20,), "lr_drop": 1}, "lr_drop = 1: Input should be less than 1"),
        ({"lr_drop": 0}, "lr_drop = 0: Input should be greater than 0"),
        ({"lr_drop_epochs": 20}, "lr_drop_epochs = 20: Input should be a valid tuple"),
        ({"bias_lr_ratio": 0}, "bias_lr_ratio = 0: Input should be greater than 0"),
    ],
)
def test_drops_and_rates_that_make_no_sense_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{"epochs": 60, "peak_lr": 0.5} | fields)


def gradients_of_a_step(batch_seed: int = 0, scale: float | None = None, **fields) -> tuple:
    """Return a run after one step, and the gradients that its optimiser saw."""
    run, seen = build_run(tiny(**fields), 40), []
    if scale:
        run.scaler._init_scale = scale
    trained = [p for p in run.method.parameters() if p.requires_grad]

    def see(*_) -> None:
        if not seen:  # the step of LARS ends with that of SGD, whose hooks are the same
            seen.extend(p.grad.clone() for p in trained)

    run.optimizer.register_step_pre_hook(see)
    train_step(run, noise(batch_seed, run))
    return run, seen


def noise(seed: int, run: Run) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    views = {name: torch.randn(8, 3, 16, 16, generator=generator).to(run.dtype) for name in VIEWS}
    return Batch(torch.zeros(8, dtype=torch.int64), views)


def norm_by_hand(grads: list[torch.Tensor]) -> float:
    return math.sqrt(sum(x * x for g in grads for x in g.double().flatten().tolist()))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_clipped_to_the_norm_of_all_of_them_before_the_optimiser(name):
    _, plain = gradients_of_a_step(optimizer=name)
    norm = norm_by_hand(plain)
    for limit in (norm / 3, 3 * norm):
        _, seen = gradients_of_a_step(optimizer=name, clip_grad_norm=limit)
        share = min(1, limit / norm)
        for g, expected in zip(seen, plain, strict=True):
            torch.testing.assert_close(g, share * expected, rtol=1e-4, atol=1e-8)
        assert norm_by_hand(seen) == pytest.approx(share * norm, rel=1e-4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_each_gradient_is_clipped_to_its_own_norm_before_the_optimiser(precision):
    fields = {"precision": precision, "scale": 1024.0 if precision == "fp16" else None}
    _, plain = gradients_of_a_step()
    norms = [norm_by_hand([g]) for g in plain]
    limit = sorted(norms)[len(norms) // 2]
    run, seen = gradients_of_a_step(clip_each_grad_norm=limit, **fields)
    assert not run.skipped
    for g, expected, norm in zip(seen, plain, norms, strict=True):
        if precision == "fp32":
            share = min(1, limit / (norm + 1e-6))
            torch.testing.assert_close(g, share * expected, rtol=1e-4, atol=1e-8)
        # fp16 rounds the gradients, and those of biases before a BatchNorm are nothing but that.
        assert norm_by_hand([g]) == pytest.approx(min(norm, limit), abs=0.1 * limit)


@pytest.mark.parametrize("name", NAMES)
def test_the_scaler_s_gradients_are_clipped_unscaled_and_an_overflow_still_changes_nothing(name):
    fields = {"optimizer": name, "precision": "fp16", "clip_grad_norm": 1e-3}
    fields |= {"clip_each_grad_norm": 1e3}  # more than the norm of any
    run, seen = gradients_of_a_step(scale=1024.0, **fields)
    assert not run.skipped and norm_by_hand(seen) == pytest.approx(1e-3, rel=1e-3)
    new = build_run(tiny(**fields), 40).method
    run, _ = gradients_of_a_step(scale=2.0**60, **fields)
    assert run.skipped and run.scaler.get_scale() == 2.0**59
    for p, q in zip(run.method.online.parameters(), new.online.parameters(), strict=True):
        assert torch.equal(p, q)
    for state in run.optimizer.state.values():
        assert not any(value.any() for value in state.values())


def test_the_last_steps_of_a_recipe_are_at_its_minimum_and_a_constant_rate_stays():
    recipe = tiny("simsiam", **SIMSIAM, peak_lr=0.5, min_lr=0.1)
    run = build_run(recipe, 40)
    run.step = run.derived.total_steps
    train_step(run, noise(0, run))
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([0.1, 0.5])
