from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rsa_fast.evaluation import linear
from rsa_fast.evaluation.linear import fast, fit, rsa_large, rsa_small, train_head
from rsa_fast.pipelines.order import epoch_order
from tests.helpers import clusters

CLASSES, DIM = 3, 8


def cut(epoch: int):
    """Return other features in every epoch, as augmentation does."""
    rows, labels = clusters(24, 1.0, epoch)
    return zip(rows.split(8), labels.split(8), strict=True)


def numpy_sgd(weight, bias, ready, *, epochs, lr_of, weight_decay=0.0, nesterov=False):
    """Train softmax regression in float64, and yield weight and bias after every epoch."""
    state = [np.asarray(weight, np.float64), np.asarray(bias, np.float64)]
    momenta = [np.zeros_like(value) for value in state]
    for epoch in range(epochs):
        for rows, labels in cut(epoch):
            x = ready(rows.numpy().astype(np.float64))
            logits = x @ state[0].T + state[1]
            p = np.exp(logits - logits.max(1, keepdims=True))
            error = (p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels.numpy()]) / len(x)
            for i, gradient in enumerate((error.T @ x, error.sum(0))):
                gradient = gradient + weight_decay * state[i]
                momenta[i] = 0.9 * momenta[i] + gradient
                state[i] = state[i] - lr_of(epoch) * (
                    gradient + 0.9 * momenta[i] if nesterov else momenta[i]
                )
        yield state[0].copy(), state[1].copy()


@pytest.fixture
def logits(monkeypatch) -> list[torch.Tensor]:
    """Record the classifier's outputs on the test set after every epoch."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(linear, "top1", lambda rows, _: seen.append(rows.clone()) or 0.0)
    return seen


@pytest.mark.parametrize("nesterov", [True, False])
def test_rsa_small_is_sgd_at_lr_30_with_drops_at_60_and_80_percent(logits, nesterov):
    # The outputs for these inputs are the columns of W, and b.
    test = (
        torch.cat([torch.eye(DIM), torch.zeros(1, DIM)]),
        torch.zeros(DIM + 1, dtype=torch.long),
    )
    result = rsa_small(cut, lambda: test, CLASSES, 5, epochs=10, nesterov=nesterov)
    start = torch.empty(CLASSES, DIM).normal_(std=0.01, generator=torch.Generator().manual_seed(5))
    steps = {
        "epochs": 10,
        "lr_of": lambda epoch: 30 * (1, 0.1, 0.01)[(epoch >= 6) + (epoch >= 8)],
        "nesterov": nesterov,
    }
    for found, (weight, bias) in zip(
        logits, numpy_sgd(start, np.zeros(CLASSES), lambda x: x, **steps), strict=True
    ):
        np.testing.assert_allclose(found[-1], bias, rtol=1e-3, atol=1e-3 * abs(bias).max())
        np.testing.assert_allclose(
            (found[:-1] - found[-1]).T, weight, rtol=1e-3, atol=1e-3 * abs(weight).max()
        )
    assert result["linear_epochs"] == 10


def test_rsa_large_standardises_unit_features_and_decays_the_classifier(logits):
    train, test = clusters(50, 1.0, 100), clusters(12, 1.0, 101)
    state = torch.get_rng_state()
    rsa_large(cut, train, test, CLASSES, 5, epochs=8)
    assert torch.equal(torch.get_rng_state(), state)
    unit = train[0].double().numpy() / np.sqrt(
        (train[0].double().numpy() ** 2).sum(1, keepdims=True)
    )
    mean, variance = unit.mean(0), unit.var(0, ddof=1)

    def ready(x):
        return (x / np.sqrt((x**2).sum(1, keepdims=True)) - mean) / np.sqrt(variance + 1e-5)

    generator, bound = torch.Generator().manual_seed(5), 1 / math.sqrt(DIM)
    start = [
        torch.empty(shape).uniform_(-bound, bound, generator=generator)
        for shape in ((CLASSES, DIM), (CLASSES,))
    ]
    steps = {
        "epochs": 8,
        "lr_of": lambda epoch: 0.01 * (1, 0.1, 0.01)[(epoch >= 3) + (epoch >= 6)],
        "weight_decay": 1e-4,
    }
    for found, (weight, bias) in zip(logits, numpy_sgd(*start, ready, **steps), strict=True):
        np.testing.assert_allclose(
            found, ready(test[0].double().numpy()) @ weight.T + bias, rtol=1e-4, atol=1e-5
        )


def test_the_last_epoch_comes_first_and_the_best_second(monkeypatch, caplog):
    caplog.set_level("INFO", "rsa_fast")
    scores = iter([20.0, 70.0, 40.0])
    monkeypatch.setattr(linear, "top1", lambda *_: next(scores))
    head = torch.nn.Linear(DIM, CLASSES)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    result = train_head(head, optimizer, (0.6, 0.8), 3, cut, lambda: clusters(6, 1.0, 0))
    assert result == {"linear_top1": 40.0, "linear_best_top1": 70.0, "linear_epochs": 3}
    assert "linear epoch 2/3  top1 70.00" in caplog.messages


def test_the_fast_probe_learns_what_can_be_learned_and_no_more():
    assert fast(clusters(600, 0.2, 0), clusters(90, 0.2, 1), CLASSES)["linear_top1"] == 100
    x, labels = clusters(600, 1.0, 2)
    noise = labels[torch.randperm(600, generator=torch.Generator().manual_seed(3))]
    assert fast((x, noise), clusters(300, 1.0, 4), CLASSES)["linear_top1"] < 55


def test_side_by_side_fits_equal_torch_s_own_sgd():
    x, labels = clusters(300, 1.0, 0)
    with_bias = torch.cat([x, torch.ones(300, 1)], 1)
    ids = torch.arange(300)
    sweep = fit(lambda rows: (with_bias[rows], labels[rows]), ids, DIM + 1, CLASSES, (0.03, 0.3))
    for weight, lr in zip(sweep, (0.03, 0.3), strict=True):
        layer = torch.nn.Linear(DIM, CLASSES)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
        steps = linear.FAST_EPOCHS * 2  # 300 images in batches of 256
        for step in range(steps):
            order = torch.from_numpy(epoch_order(300, 1, step // 2))
            rows = order[:256] if step % 2 == 0 else order[256:]
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), labels[rows]).backward()
            optimizer.step()
        torch.testing.assert_close(weight[:DIM].T, layer.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weight[DIM], layer.bias, rtol=1e-3, atol=1e-4)
