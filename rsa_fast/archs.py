"""The names of networks, which are the values of a recipe's `arch`.

    RESNETS["resnext50_32x4d"].groups

| arch | the encoder |
|---|---|
| `resnet10` | a ResNet-18 with one block in each stage |
| `resnet18`, ..., `resnext101_64x4d` | a ResNet of this project, as torchvision defines it |
| `timm/NAME` | a model of timm without its classifier |
| `path/to/file.py:name`, `package.module:name` | what this function returns |
| `own` | a module that was passed in Python |

This module imports nothing heavy, so names can be checked before torchvision or timm is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rsa_fast.pipelines.named import absolute_spec, is_file

TIMM = "timm/"
OWN = "own"


@dataclass(frozen=True)
class ResNetLayers:
    """The properties in which ResNets differ."""

    bottleneck: bool  # whether blocks have three convolutions instead of two
    blocks: tuple[int, int, int, int]  # the number of blocks in each stage
    groups: int = 1  # the groups of the 3x3 convolutions in bottlenecks
    width_per_group: int = 64  # the channels of a group in the first stage


RESNETS = {
    "resnet10": ResNetLayers(False, (1, 1, 1, 1)),  # not one of torchvision's
    "resnet18": ResNetLayers(False, (2, 2, 2, 2)),
    "resnet34": ResNetLayers(False, (3, 4, 6, 3)),
    "resnet50": ResNetLayers(True, (3, 4, 6, 3)),
    "resnet101": ResNetLayers(True, (3, 4, 23, 3)),
    "resnet152": ResNetLayers(True, (3, 8, 36, 3)),
    "wide_resnet50_2": ResNetLayers(True, (3, 4, 6, 3), width_per_group=128),
    "wide_resnet101_2": ResNetLayers(True, (3, 4, 23, 3), width_per_group=128),
    "resnext50_32x4d": ResNetLayers(True, (3, 4, 6, 3), groups=32, width_per_group=4),
    "resnext101_32x8d": ResNetLayers(True, (3, 4, 23, 3), groups=32, width_per_group=8),
    "resnext101_64x4d": ResNetLayers(True, (3, 4, 23, 3), groups=64, width_per_group=4),
}
CHOICES = f"{', '.join(RESNETS)}, timm/NAME, path/to/file.py:function"
# The fields of a recipe that change a ResNet and have no meaning for other networks.
RESNET_FIELDS = ("stem", "width", "zero_init_residual", "recompute_stages", "compile")


def full_name(arch: str) -> str | None:
    """The `arch` with the absolute path of its file, or None if it is not valid."""
    if arch in RESNETS or arch == OWN or (arch.startswith(TIMM) and arch != TIMM):
        return arch
    where, _, function = arch.rpartition(":")
    return absolute_spec(arch) if where and function.isidentifier() else None


def short_arch(arch: str) -> str:
    """The name under which an arch is shown: `nets.py:small` for `/home/me/nets.py:small`."""
    where, colon, function = arch.rpartition(":")
    return f"{Path(where).name}{colon}{function}" if is_file(where) else arch
