"""ResNet encoders, and the way a projector sits on one.

Encoders are torchvision's ResNets without the classifier; the CIFAR stem (3x3 convolution, no max-pool) is used at 32 and
64 px. Initialisation follows the reference code: the CIFAR stem's convolution keeps PyTorch's default initialisation
(methods.BYOL in github.com/tmllab/RSA).
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

LAYERS = {"resnet18": (BasicBlock, [2, 2, 2, 2]), "resnet50": (Bottleneck, [3, 4, 6, 3])}
STANDARD_WIDTH = 64  # channels of the first stage


class Encoder(ResNet):
    """`(B, 3, H, W)` to features `(B, feature_dim)`; keys as in torchvision, without `fc`.

    `width` scales every stage (64 is the standard network); `zero_init_residual` starts every block as the identity, the
    last BatchNorm gain being zero. Raises ValueError for an unknown `arch` or `stem`.
    """

    def __init__(self, arch: str, stem: str = "imagenet", width: int = STANDARD_WIDTH, zero_init_residual: bool = True) -> None:
        if arch not in LAYERS:
            raise ValueError(f"no arch {arch!r}: choose from {', '.join(LAYERS)}")
        if stem not in ("cifar", "imagenet"):
            raise ValueError(f"no stem {stem!r}: choose cifar (3x3, no max-pool) or imagenet (7x7, max-pool)")
        self.width = width
        super().__init__(*LAYERS[arch], zero_init_residual=zero_init_residual)
        self.feature_dim = self.fc.in_features * width // STANDARD_WIDTH
        self.fc = nn.Identity()
        if stem == "cifar":
            self.conv1 = nn.Conv2d(3, width, kernel_size=3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.maxpool = nn.Identity()
        elif width != STANDARD_WIDTH:
            self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
            self.bn1 = nn.BatchNorm2d(width)

    def _make_layer(self, block: type, planes: int, blocks: int, stride: int = 1, dilate: bool = False) -> nn.Sequential:
        if planes == STANDARD_WIDTH:
            self.inplanes = self.width
        return super()._make_layer(block, planes * self.width // STANDARD_WIDTH, blocks, stride, dilate)


class Projected(nn.Module):
    """An encoder and its projector, `(B, 3, H, W)` to `(B, out_dim)`: what a target network is a copy of."""

    def __init__(self, encoder: Encoder, projector: nn.Module) -> None:
        super().__init__()
        self.encoder, self.projector = encoder, projector

    def forward(self, images: Tensor) -> Tensor:
        return self.projector(self.encoder(images))
