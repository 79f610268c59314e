from __future__ import annotations

import pytest
import torch

import rsa_fast.training.meter as meter_module
from rsa_fast.methods.method import Loss
from rsa_fast.training.meter import Meter, embedding_std, warn_of_collapse

CPU = torch.device("cpu")


def loss(value: float, **parts: float) -> Loss:
    return Loss(
        torch.tensor(value),
        torch.eye(2),
        {name: torch.tensor(part) for name, part in parts.items()},
    )


def test_the_meter_counts_the_wait_and_averages_the_parts():
    meter = Meter(8, CPU)
    for step, value in enumerate(meter.waiting(iter([1.0, 3.0]))):
        meter.add(step, loss(value, weak=2 * value))
    read = meter.read()
    assert (read["loss"], read["weak"]) == (2, 4) and 0 <= read["wait_pct"] <= 100
    assert read["images_per_s"] == pytest.approx(8 / read["step_ms"] * 1e3)
    assert meter.first_bad is None and "skipped_steps" not in read


def test_the_time_of_a_step_includes_what_the_device_still_has_in_its_queue(monkeypatch):
    """The loop only enqueues its steps. Reading the losses waits until the device has done them."""
    clock = [0.0]
    monkeypatch.setattr(meter_module.time, "perf_counter", lambda: clock[0])

    def wait_and_read(values: torch.Tensor, tolist=torch.Tensor.tolist) -> list:
        clock[0] = max(clock[0], 3.0)  # the device needs 3 s for what is enqueued
        return tolist(values)

    meter = Meter(8, CPU)
    meter.add(0, loss(1.0))
    meter.add(1, loss(1.0))
    monkeypatch.setattr(torch.Tensor, "tolist", wait_and_read)
    assert meter.read()["step_ms"] == 1500


def test_the_first_step_whose_loss_is_not_finite_is_remembered_and_the_others_averaged():
    meter = Meter(8, CPU)
    for step, value in enumerate([1.0, float("nan"), float("inf"), 2.0], start=40):
        meter.add(step, loss(value))
    assert meter.read()["loss"] == 1.5 and meter.first_bad == 41
    meter.add(44, loss(1.0))
    meter.read()
    assert meter.first_bad == 41


def test_skipped_steps_are_counted_in_all_and_in_a_row():
    meter = Meter(8, CPU)
    for step, skipped in enumerate([True, True, False, True, True, True, False]):
        meter.add(step, loss(1.0), torch.tensor(skipped))
    assert meter.read()["skipped_steps"] == 5 and meter.worst_skips == 3
    meter.add(7, loss(1.0), torch.tensor(True))
    assert meter.read()["skipped_steps"] == 6 and meter.worst_skips == 3


def test_collapse_is_seen_and_said(caplog):
    """Rows that spread in all directions have a deviation of 1, and equal rows one of 0.

    Two opposite rows in one dimension have a deviation of sqrt(2).
    """
    rows = torch.nn.functional.normalize(
        torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)), dim=1
    )
    assert embedding_std(rows).item() == pytest.approx(1, abs=0.02)
    assert embedding_std(rows[:1].repeat(8, 1)).item() == pytest.approx(0, abs=1e-6)
    assert embedding_std(torch.tensor([[1.0], [-1.0]])).item() == pytest.approx(2**0.5)
    warn_of_collapse({"step": 500, "embedding_std": 0.3})
    warn_of_collapse({"step": 10, "embedding_std": 0.0})
    assert caplog.text == ""
    warn_of_collapse({"step": 500, "embedding_std": 0.001})
    assert "all images are embedded alike at step 500" in caplog.text
