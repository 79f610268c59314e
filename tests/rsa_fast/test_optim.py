from __future__ import annotations

import pytest
import torch
from torch import nn

from rsa_fast.training.optim import Larc, Lars, Sgd, clip_each_grad_norm_
from tests.rsa_fast.small_methods import gradients, parameters

DECAY = {"sgd": 5e-4, "lars": 1e-2, "larc": 1e-2}
NAMES = tuple(DECAY)


def fresh(name: str, params: list[nn.Parameter], lr: float = 0.1) -> Sgd:
    if name == "sgd":
        return Sgd(params, lr, 0.9, DECAY[name])
    return (Lars if name == "lars" else Larc)(params, lr, 0.9, DECAY[name], 0.001)


def norm_of(x: torch.Tensor) -> float:
    return sum(value * value for value in x.flatten().tolist()) ** 0.5


def by_hand(name: str, weight: list, momentum: list, grads: list, lr: float) -> None:
    """Take one step on nested floats in double precision."""
    decay, trust = DECAY[name], 0.001
    for p, mu, g in zip(weight, momentum, grads, strict=True):
        g = g.double().clone()
        if name == "larc":
            p_norm, g_norm = norm_of(p), norm_of(g)
            if p_norm > 0 and g_norm > 0:
                g += decay * p
                g *= trust * p_norm / (g_norm + decay * p_norm + 1e-8)
        elif name == "sgd" or p.ndim > 1:
            g += decay * p
        if name == "lars" and p.ndim > 1:
            p_norm, g_norm = norm_of(p), norm_of(g)
            g *= trust * p_norm / g_norm if p_norm > 0 and g_norm > 0 else 1
        mu.mul_(0.9).add_(g)
        p.sub_(lr * mu)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NAMES)
def test_steps_equal_those_by_hand(name, layout):
    params = parameters(layout=layout)
    weight = [p.detach().double().clone(memory_format=torch.contiguous_format) for p in params]
    momentum = [torch.zeros_like(p) for p in weight]
    optimizer = fresh(name, params)
    for step in range(4):
        lr = 4.8 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(memory_format=layout) if g.ndim == 4 else g.clone()
        optimizer.step()
        by_hand(name, weight, momentum, gradients(step), lr)
    for p, expected in zip(params, weight, strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("all_double", [True, False])
@pytest.mark.parametrize("name", ["lars", "larc"])
def test_layerwise_steps_on_float64_equal_those_by_hand(name, all_double):
    """All parameters in float64 agree to its precision; the others may be in float32."""
    params = [nn.Parameter(p.detach().double()) for p in parameters()]
    if not all_double:
        params[0] = nn.Parameter(params[0].detach().float())
    weight = [p.detach().double().clone() for p in params]
    momentum = [torch.zeros_like(p) for p in weight]
    optimizer = fresh(name, params, lr=4.8)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scale = scaler.scale(torch.ones(())).item()
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(p.dtype) * scale
        scaler.step(optimizer)
        scaler.update()
        by_hand(name, weight, momentum, gradients(step), 4.8)
    for p, expected in zip(params, weight, strict=True):
        rtol = 1e-12 if p.dtype == torch.float64 else 1e-5
        torch.testing.assert_close(p.double(), expected, rtol=rtol, atol=rtol)


def test_lars_leaves_a_weight_without_gradient_or_decay_and_moves_a_bias_at_the_full_rate():
    weight, bias = nn.Parameter(torch.randn(3, 3)), nn.Parameter(torch.zeros(3))
    optimizer = Lars([weight, bias], 4.8, 0.9, 0.0, 0.001)
    weight.grad, bias.grad = torch.zeros(3, 3), torch.ones(3)
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(bias, torch.full((3,), -4.8))


@pytest.mark.parametrize("p_is_0", [True, False])
def test_larc_takes_the_gradient_as_it_is_where_a_norm_is_0_and_does_not_decay(p_is_0):
    """A bias that starts at 0 moves at the full rate, and without a gradient nothing moves."""
    values = torch.zeros(3) if p_is_0 else torch.ones(3)
    one, without = nn.Parameter(values.clone()), nn.Parameter(torch.ones(2, 2))
    optimizer = Larc([one, without], 4.8, 0.9, 1e-2, 0.001)
    one.grad = torch.ones(3) if p_is_0 else torch.zeros(3)  # the other has none: it is frozen
    optimizer.step()
    assert torch.equal(one, torch.full((3,), -4.8) if p_is_0 else torch.ones(3))
    assert torch.equal(without, torch.ones(2, 2))
    assert optimizer.param_groups[0]["weight_decay"] == 1e-2


def test_larc_decays_no_parameter_of_a_group_without_decay():
    moves = []
    for decay in (0.0, 0.5):
        p = nn.Parameter(torch.tensor([3.0, 4.0]))
        optimizer = Larc([{"params": [p], "weight_decay": decay}], 1.0, 0.9, 0.1, 0.001)
        p.grad = torch.tensor([0.0, 2.0])
        optimizer.step()
        moves.append(p.detach() - torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(moves[0], torch.tensor([0.0, -0.005]), rtol=1e-4, atol=1e-7)
    share = 0.005 / (2 + 0.5 * 5)
    expected = torch.tensor([-share * 1.5, -share * 4])
    torch.testing.assert_close(moves[1], expected, rtol=1e-4, atol=1e-7)


def test_each_gradient_is_clipped_to_its_own_norm():
    params = [nn.Parameter(p.detach().double()) for p in parameters()]
    grads = [g.double() * factor for g, factor in zip(gradients(0), (1, 2, 0, 0.1), strict=True)]
    limit = 2.5
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    frozen = nn.Parameter(torch.ones(2))
    clip_each_grad_norm_([*params, frozen], limit)
    assert frozen.grad is None
    shares = [min(1, limit / (norm_of(g) + 1e-6)) for g in grads]
    assert any(share == 1 for share in shares) and any(share < 0.5 for share in shares)
    for p, g, share in zip(params, grads, shares, strict=True):
        torch.testing.assert_close(p.grad, share * g, rtol=1e-12, atol=0)


def test_lars_step_length_does_not_depend_on_the_gradient_s_scale():
    moves = []
    for scale in (1.0, 1e4):
        (weight, *_) = parameters()
        optimizer = Lars([weight], 1.0, 0.9, 0.0, 0.001)
        before = weight.detach().clone()
        weight.grad = gradients(0)[0] * scale
        optimizer.step()
        moves.append(weight.detach() - before)
    torch.testing.assert_close(*moves)
    assert moves[0].norm() == pytest.approx(0.001 * parameters()[0].norm().item(), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_scaled_step_equals_the_unscaled_one_and_an_overflow_changes_nothing(name):
    plain, scaled = parameters(), parameters()
    one, other = fresh(name, plain), fresh(name, scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    # The very first step overflows, as in fp16 runs.
    for step, overflow in enumerate([True, False, True, False]):
        scale = scaler.scale(torch.ones(())).item()
        for p, g in zip(scaled, gradients(step), strict=True):
            p.grad = g * scale
        if overflow:
            scaled[0].grad[0, 0, 0, 0] = float("inf")
            before = [p.detach().clone() for p in scaled]
        else:
            for p, g in zip(plain, gradients(step), strict=True):
                p.grad = g.clone()
            one.step()
        scaler.step(other)
        scaler.update()
        if overflow:
            assert all(torch.equal(p, q) for p, q in zip(scaled, before, strict=True))
    for p, q in zip(plain, scaled, strict=True):
        torch.testing.assert_close(p, q)
    assert scaler.get_scale() == 256.0
