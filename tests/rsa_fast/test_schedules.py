from __future__ import annotations

import math

import pytest

from rsa_fast.schedules import beta, cosine_ramp, learning_rate, tau


def test_tau_at_literals():
    """CIFAR at 200 epochs has K = 39,000."""
    assert tau(1, 39_000, 0.99) == pytest.approx(0.99 + 1.6e-11, abs=1e-12)
    assert tau(19_500, 39_000, 0.99) == pytest.approx(0.995)
    assert tau(39_000, 39_000, 0.99) == 1


def test_beta_at_literals():
    assert beta(0, 100, 0.3, "cosine") == pytest.approx(0.3)
    assert beta(50, 100, 0.3, "cosine") == pytest.approx(0.15)
    assert beta(25, 100, 0.3, "cosine") == pytest.approx(0.3 * 0.8535533906)
    assert beta(100, 100, 0.3, "cosine") == 0
    assert {beta(k, 100, 0.5, "fixed") for k in (0, 50, 100)} == {0.5}


def test_learning_rate_at_literals():
    """ImageNet-1K at 200 epochs has 625 steps per epoch, ten warm-up epochs and a peak of 4.8."""
    total, warmup = 125_000, 6_250
    assert learning_rate(0, total, warmup, 4.8) == 0
    assert learning_rate(3_125, total, warmup, 4.8) == pytest.approx(2.4)
    assert learning_rate(6_250, total, warmup, 4.8) == pytest.approx(4.8)
    assert learning_rate(6_250 + 59_375, total, warmup, 4.8) == pytest.approx(2.4)
    assert learning_rate(125_000, total, warmup, 4.8) == pytest.approx(0)
    assert learning_rate(0, 100, 0, 0.1) == pytest.approx(0.1)
    # This run ends while it is warming up.
    rates = [learning_rate(step, 20, 200, 4.8) for step in (0, 10, 20)]
    assert rates == pytest.approx([0, 0.24, 0.48])
    assert learning_rate(20, 20, 20, 4.8) == pytest.approx(4.8)


def test_the_warm_up_starts_at_its_own_rate():
    """SwAV: from .3 to 4.8 in ten epochs of 312 steps, then a cosine to .0048."""
    rates = [
        learning_rate(step, 124_800, 3_120, 4.8, 0.0048, start_lr=0.3)
        for step in (0, 1_560, 3_120, 63_960, 124_800)
    ]
    assert rates == pytest.approx([0.3, 2.55, 4.8, 2.4024, 0.0048])


def test_the_learning_rate_ends_at_its_minimum():
    rates = [learning_rate(step, 110, 10, 0.5, min_lr=0.1) for step in (0, 5, 10, 60, 110, 200)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.3, 0.1, 0.1])
    for step in range(10, 111, 20):
        ramp = (1 + math.cos(math.pi * (step - 10) / 100)) / 2
        expected = 0.1 + 0.4 * ramp
        assert learning_rate(step, 110, 10, 0.5, 0.1) == pytest.approx(expected)
        assert learning_rate(step, 110, 10, 0.5) == 0.5 * cosine_ramp(step - 10, 100)


def test_a_held_cosine_moves_at_the_start_of_every_epoch():
    """CIFAR at 200 epochs of 195 steps, as in the loop over epochs of RSA's train_single.py."""
    peak_lr, epochs, steps = 0.1, 200, 195
    total = epochs * steps
    held = [learning_rate(step, total, 0, peak_lr, held_steps=steps) for step in range(total)]
    for epoch in range(epochs):
        rate = peak_lr * (1 + math.cos(math.pi * epoch / epochs)) / 2
        assert held[epoch * steps : (epoch + 1) * steps] == pytest.approx([rate] * steps)
    assert held[-1] == pytest.approx(6.17e-6, rel=1e-3)
    moving = [learning_rate(step, total, 0, peak_lr) for step in range(total)]
    assert moving[::steps] == held[::steps]
    gaps = [one - other for one, other in zip(held, moving, strict=True)]
    assert max(gaps) / peak_lr == pytest.approx(0.0078, abs=1e-4)
    assert sum(gaps) / sum(held) == pytest.approx(0.005, abs=1e-4)
    assert learning_rate(total, total, 0, peak_lr, held_steps=steps) == 0


def test_the_warm_up_moves_at_every_step_also_before_a_held_cosine():
    rates = [learning_rate(step, 40, 10, 0.5, 0.1, held_steps=10) for step in range(41)]
    assert rates[:10] == pytest.approx([0.05 * step for step in range(10)])
    for epoch in range(3):
        rate = 0.1 + 0.4 * (1 + math.cos(math.pi * epoch / 3)) / 2
        assert rates[10 + 10 * epoch : 20 + 10 * epoch] == pytest.approx([rate] * 10)
    assert rates[40] == pytest.approx(0.1)


def test_drops_replace_the_cosine_after_the_warm_up():
    """InstDis: by 10 at the epochs 120 and 160 of 200, here of 195 steps."""
    drops = [120 * 195, 160 * 195]
    rates = [
        learning_rate(step, 39_000, 0, 0.03, 0, 195, drops, 0.1)
        for step in (0, 23_399, 23_400, 31_199, 31_200, 38_999, 50_000)
    ]
    assert rates == pytest.approx([0.03, 0.03, 0.003, 0.003, 0.0003, 0.0003, 0.0003])
    # The warm-up is the usual one, and what does not come after it drops nothing.
    rates = [learning_rate(step, 100, 10, 0.5, 0, 1, [-5, 7, 10, 50], 0.2) for step in range(101)]
    assert rates[:11] == [learning_rate(step, 100, 10, 0.5) for step in range(11)]
    assert rates[11:50] == [0.5] * 39 and rates[50:] == [0.5 * 0.2] * 51


def test_ramps_stay_at_their_end():
    assert cosine_ramp(150, 100) == 0
    assert tau(101, 100, 0.99) == 1 and beta(200, 100, 0.4, "cosine") == 0
