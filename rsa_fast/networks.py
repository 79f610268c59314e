"""ResNet encoders, and the way a projector sits on one.

Encoders are torchvision's ResNets without the classifier; the CIFAR stem (3x3 convolution, no max-pool) is used at 32 and
64 px. Initialisation follows the reference code: the CIFAR stem's convolution keeps PyTorch's default initialisation
(methods.BYOL in github.com/tmllab/RSA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

LAYERS = {"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}
STANDARD_WIDTH = 64  # channels of the first stage


class Encoder(ResNet):  # type: ignore[misc]  # torchvision has no types
    """`(B, 3, H, W)` to features `(B, feature_dim)`; keys as in torchvision, without `fc`.

    `width` scales every stage (64 is the standard network); `zero_init_residual` starts every block as the identity, the
    last BatchNorm gain being zero. Raises ValueError for an unknown `arch` or `stem`.

    Two settings change what training costs, and nothing else but, with the second, rounding. Of the first `recompute_stages`
    stages nothing is kept for the backward, which runs them again (Chen et al. 2016, arXiv:1604.06174). If `compiled`,
    torch.compile fuses what lies between the convolutions.
    """

    def __init__(
        self,
        arch: str,
        stem: str = "imagenet",
        width: int = STANDARD_WIDTH,
        zero_init_residual: bool = True,
        recompute_stages: int = 0,
        compiled: bool = False,
    ) -> None:
        if arch not in LAYERS:
            raise ValueError(f"no arch {arch!r}: choose from {', '.join(LAYERS)}")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(
                f"no stem {stem!r}: choose cifar (3x3, no max-pool) or imagenet (7x7, max-pool)"
            )
        self.width = width
        block, blocks = LAYERS[arch]
        super().__init__(block, blocks, zero_init_residual=zero_init_residual)
        self.feature_dim: int = 8 * width * block.expansion  # it doubles in stages 2, 3 and 4
        self.fc = nn.Identity()
        self.recompute_stages, self.compiled = recompute_stages, compiled
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.Identity()
        elif width != STANDARD_WIDTH:
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(
        self,
        block: type[nn.Module],
        planes: int,
        blocks: int,
        stride: int = 1,
        dilate: bool = False,
    ) -> nn.Sequential:
        if planes == STANDARD_WIDTH:
            self.inplanes = self.width
        planes = planes * self.width // STANDARD_WIDTH
        layer: nn.Sequential = super()._make_layer(block, planes, blocks, stride, dilate)
        return layer

    def forward(self, images: Tensor) -> Tensor:
        return (compiled_features() if self.compiled and self.training else features)(self, images)


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """What `encoder` computes, whose stages are the four layers, the first with the stem."""
    e, x = encoder, images
    stages = [[e.conv1, e.bn1, e.relu, e.maxpool, e.layer1], [e.layer2], [e.layer3], [e.layer4]]
    for number, stage in enumerate(stages):
        recompute = number < e.recompute_stages and torch.is_grad_enabled()
        x = recomputed(stage, x) if recompute else in_turn(stage, x)
    return torch.flatten(e.avgpool(x), 1)


@cache
def compiled_features() -> Callable[[Encoder, Tensor], Tensor]:
    """`features` in one graph, for batches that all have one shape; a break is an error, as it would undo the gain."""
    return torch.compile(features, fullgraph=True, dynamic=False)


def in_turn(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def recomputed(layers: list[nn.Module], x: Tensor) -> Tensor:
    """`in_turn` that keeps only `x`: the backward runs it again. BatchNorm's statistics move once all the same."""
    output: Tensor
    if torch.compiler.is_compiling():  # compiled, they move once by themselves
        output = checkpoint(in_turn, layers, x, use_reentrant=False, preserve_rng_state=False)
    else:
        output = checkpoint(
            in_turn,
            layers,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), statistics_apart(layers)),
        )
    return output


@contextmanager
def statistics_apart(layers: list[nn.Module]) -> Iterator[None]:
    """BatchNorm's statistics are written to buffers that nobody reads."""
    batchnorms = [
        module for layer in layers for module in layer.modules() if isinstance(module, _BatchNorm)
    ]
    kept = [
        (module, name, buffer)
        for module in batchnorms
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in kept:
        setattr(module, name, torch.empty_like(buffer))
    try:
        yield
    finally:
        for module, name, buffer in kept:
            setattr(module, name, buffer)


class Projected(nn.Module):
    """An encoder and its projector, `(B, 3, H, W)` to `(B, out_dim)`: what a target network is a copy of."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.projector(self.encoder(images))
        return projections
