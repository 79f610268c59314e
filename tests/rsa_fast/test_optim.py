from __future__ import annotations

import pytest
import torch
from torch import nn

from rsa_fast.training.optim import Lars, Sgd

SHAPES = [(8, 3, 3, 3), (8,), (5, 8), (5,)]


def parameters(
    seed: int = 0, layout: torch.memory_format = torch.contiguous_format
) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=generator) for shape in SHAPES]
    return [nn.Parameter(t.to(memory_format=layout) if t.ndim == 4 else t) for t in tensors]


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def by_hand(
    weight: list, momentum: list, grads: list, lr: float, decay: float, trust: float | None
) -> None:
    """Take one step on nested floats in double precision: SGD, or LARS if `trust` is given."""
    for p, mu, g in zip(weight, momentum, grads, strict=True):
        g = g.double().clone()
        if trust is None or p.ndim > 1:
            g += decay * p
        if trust is not None and p.ndim > 1:
            p_norm = sum(x * x for x in p.flatten().tolist()) ** 0.5
            g_norm = sum(x * x for x in g.flatten().tolist()) ** 0.5
            g *= trust * p_norm / g_norm if p_norm > 0 and g_norm > 0 else 1
        mu.mul_(0.9).add_(g)
        p.sub_(lr * mu)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_steps_equal_those_by_hand(name, layout):
    params = parameters(layout=layout)
    weight = [p.detach().double().clone(memory_format=torch.contiguous_format) for p in params]
    momentum = [torch.zeros_like(p) for p in weight]
    optimizer = (
        Sgd(params, 0.1, 0.9, 5e-4) if name == "sgd" else Lars(params, 0.1, 0.9, 1e-2, 0.001)
    )
    for step in range(4):
        lr = 4.8 / (step + 1)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(memory_format=layout) if g.ndim == 4 else g.clone()
        optimizer.step()
        by_hand(
            weight,
            momentum,
            gradients(step),
            lr,
            5e-4 if name == "sgd" else 1e-2,
            None if name == "sgd" else 0.001,
        )
    for p, expected in zip(params, weight, strict=True):
        torch.testing.assert_close(p.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("all_double", [True, False])
def test_lars_steps_on_float64_equal_those_by_hand(all_double):
    """All parameters in float64 agree to its precision; the others may be in float32."""
    params = [nn.Parameter(p.detach().double()) for p in parameters()]
    if not all_double:
        params[0] = nn.Parameter(params[0].detach().float())
    weight = [p.detach().double().clone() for p in params]
    momentum = [torch.zeros_like(p) for p in weight]
    optimizer = Lars(params, 4.8, 0.9, 1e-2, 0.001)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        scale = scaler.scale(torch.ones(())).item()
        for p, g in zip(params, gradients(step), strict=True):
            p.grad = g.to(p.dtype) * scale
        scaler.step(optimizer)
        scaler.update()
        by_hand(weight, momentum, gradients(step), 4.8, 1e-2, 0.001)
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


@pytest.mark.parametrize("name", ["sgd", "lars"])
def test_a_scaled_step_equals_the_unscaled_one_and_an_overflow_changes_nothing(name):
    def fresh(params):
        return Sgd(params, 0.1, 0.9, 5e-4) if name == "sgd" else Lars(params, 0.1, 0.9, 1e-2, 0.001)

    plain, scaled = parameters(), parameters()
    one, other = fresh(plain), fresh(scaled)
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
