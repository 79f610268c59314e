"""Train your own network, from the command line and from Python.

    rsa-fast train --data my_photos --arch examples/own_backbone.py:small --out runs/small

A network maps images `(B, 3, H, W)` to features `(B, feature_dim)`. It can be any `nn.Module` with
the attribute `feature_dim`.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsa_fast import build_recipe, evaluate, load_encoder, train


class Small(nn.Module):
    """Three convolutions, and the mean of their output over the pixels."""

    def __init__(self, feature_dim: int = 128) -> None:
        super().__init__()
        self.feature_dim = feature_dim
        channels = (3, 32, 64, feature_dim)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(inplace=True),
                )
                for before, after in pairwise(channels)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.layers(images).mean((2, 3))  # (B, feature_dim)
        return features


def small() -> nn.Module:
    """Make the network. `--arch examples/own_backbone.py:small` calls this without arguments."""
    return Small()


def main(data: Path, out: Path, **changes: Any) -> float:
    """Train the network, and return its kNN accuracy in percent."""
    # From Python, pass a module. A copy of it is trained.
    network = Small()
    recipe = build_recipe("auto", "byol", data=data, **changes)
    train(recipe, data, out, encoder=network, resume=True)

    # The checkpoint contains only the weights, so the module is passed again.
    encoder, recipe = load_encoder(out, encoder=network)
    images = torch.zeros(2, 3, recipe.views.size_px, recipe.views.size_px)
    print(f"features of two images: {tuple(encoder.eval()(images).shape)}")
    accuracy: float = evaluate(out, data, encoder=network)["knn_top1"]
    return accuracy


if __name__ == "__main__":
    print(main(Path(sys.argv[1]), Path(sys.argv[2])))
