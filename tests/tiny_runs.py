"""Runs of small networks that take a second, and what their folders contain."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.methods.method import build_method
from rsa_fast.pipelines.plain import plain_image
from rsa_fast.recipes import Recipe, build_recipe
from rsa_fast.training import checkpoint
from rsa_fast.training.engine import train

NARROW = {"arch": "resnet10", "width": 4}  # a step takes half of that of a ResNet-18
NETWORK = NARROW | {"hidden_dim": 16, "out_dim": 8, "views.size_px": 16}
TINY = NETWORK | {
    "batch_size": 8,
    "epochs": 3,
    "precision": "fp32",
    "base_lr": 0.5,
    "log_every_steps": 2,
    "knn_every_epochs": 0,
}


def tiny(method: str = "rsa", **overrides) -> Recipe:
    return build_recipe("cifar10", method, overrides=TINY | overrides)


def set_options(fields: dict) -> list[str]:
    """Return the options `--set FIELD=VALUE` of a command."""
    return [word for key, value in fields.items() for word in ("--set", f"{key}={value}")]


def weights(out) -> dict:
    return checkpoint.load_latest(out / "checkpoints")["method"]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def check_resumption(recipe, folder, tmp_path, stop=3):
    train(recipe, folder, tmp_path / "whole")
    train(recipe, folder, tmp_path / "parts", stop_at_step=stop)
    train(recipe, folder, tmp_path / "parts", resume=True)
    one, other = (
        checkpoint.load_latest(tmp_path / out / "checkpoints") for out in ("whole", "parts")
    )
    assert same(one["method"], other["method"]) and one["scaler"] == other["scaler"]
    moments = (state["optimizer"]["state"] for state in (one, other))
    assert all(same(a, b) for a, b in zip(*(state.values() for state in moments), strict=True))


def write_untrained_run(run: Path, data: Path | None = None, **fields: object) -> Path:
    """Write a run's folder with two checkpoints of networks with random weights."""
    recipe = build_recipe("cifar10", "rsa", overrides=NETWORK | {"precision": "fp32"} | fields)
    for step in (1, 2):
        torch.manual_seed(step)
        weights = build_method(recipe).state_dict()
        state = {"step": step, "recipe": recipe.model_dump(mode="json"), "method": weights}
        checkpoint.save(run / "checkpoints", state, 2)
    if data:
        (run / "env.json").write_text(json.dumps([{"data": [str(data)]}]))
    return run


def expected_features(run: Path, source) -> torch.Tensor:
    """What the newest encoder makes of each image, one at a time."""
    encoder, recipe = load_encoder(run / "checkpoints" / "step_00000002.pt")
    views, rows = recipe.views, []
    for i in range(len(source.manifest)):
        pixels = plain_image(source.read(i), views.size_px, recipe.eval_resize_px)
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (views.mean, views.std))
        with torch.no_grad():
            rows.append(encoder.eval()((image - mean) / std))
    return torch.cat(rows)
