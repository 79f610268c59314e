"""ResNet encoders, and an encoder with a projector.

    features = Encoder("resnet18", stem="cifar")(images)  # (B, 3, 32, 32) -> (B, 512)

The encoders are torchvision's ResNets without the classifier. At 32 and 64 px they have the CIFAR
stem: a 3x3 convolution without max-pool. As in the reference code (methods/BYOL.py in
github.com/tmllab/RSA), this convolution keeps PyTorch's default initialisation.
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
    """From images `(B, 3, H, W)` to features `(B, feature_dim)`.

    The keys of the state dict are torchvision's, without `fc`. `width` is the number of channels of
    the first stage and scales all stages (64 is the standard network). With `zero_init_residual`
    the last BatchNorm gain of every block starts at 0, so that the block starts as the identity.

    Two settings change the cost of training. The first `recompute_stages` stages store no
    activations; the backward pass computes them again (Chen et al. 2016, arXiv:1604.06174). With
    `compiled`, torch.compile fuses the operations between the convolutions, which changes the
    results by rounding.

    Raises ValueError for an unknown `arch` or `stem`.
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
        # The number of channels doubles in stages 2, 3 and 4.
        self.feature_dim: int = 8 * width * block.expansion
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
        """Build a stage of torchvision's ResNet with `width` channels for its 64."""
        if planes == STANDARD_WIDTH:
            self.inplanes = self.width
        planes = planes * self.width // STANDARD_WIDTH
        layer: nn.Sequential = super()._make_layer(block, planes, blocks, stride, dilate)
        return layer

    def forward(self, images: Tensor) -> Tensor:
        return (compiled_features() if self.compiled and self.training else features)(self, images)


def features(encoder: Encoder, images: Tensor) -> Tensor:
    """The forward pass of `encoder`, in four stages; the first includes the stem."""
    e, x = encoder, images
    stages = [[e.conv1, e.bn1, e.relu, e.maxpool, e.layer1], [e.layer2], [e.layer3], [e.layer4]]
    for number, stage in enumerate(stages):
        recompute = number < e.recompute_stages and torch.is_grad_enabled()
        x = run_recomputed(stage, x) if recompute else run_layers(stage, x)  # (B, channels, h, w)
    return torch.flatten(e.avgpool(x), 1)  # (B, feature_dim)


@cache
def compiled_features() -> Callable[[Encoder, Tensor], Tensor]:
    """`features`, compiled to a single graph for batches of one shape.

    A graph break is an error, because it would undo the gain.
    """
    return torch.compile(features, fullgraph=True, dynamic=False)


def run_layers(layers: list[nn.Module], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def run_recomputed(layers: list[nn.Module], x: Tensor) -> Tensor:
    """`run_layers`, but only `x` is stored, and the backward pass runs the layers again.

    The running statistics of BatchNorm are updated in the first run only.
    """
    output: Tensor
    if torch.compiler.is_compiling():  # a compiled second run does not update the statistics
        output = checkpoint(run_layers, layers, x, use_reentrant=False, preserve_rng_state=False)
    else:
        output = checkpoint(
            run_layers,
            layers,
            x,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), statistics_discarded(layers)),
        )
    return output


@contextmanager
def statistics_discarded(layers: list[nn.Module]) -> Iterator[None]:
    """Discard what the BatchNorms in `layers` would add to their running statistics."""
    buffers = [
        (module, name, buffer)
        for layer in layers
        for module in layer.modules()
        if isinstance(module, _BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for module, name, buffer in buffers:
        setattr(module, name, torch.empty_like(buffer))
    try:
        yield
    finally:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


class Projected(nn.Module):
    """An encoder and its projector, from `(B, 3, H, W)` to `(B, D)`.

    A target network is a copy of such a network.
    """

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> Tensor:
        projections: Tensor = self.projector(self.encoder(images))
        return projections
