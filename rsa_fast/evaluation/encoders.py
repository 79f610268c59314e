"""Encoders of this project and of others, recognised by the names of their weights.

    encoder, recipe = load_encoder(Path("moco_v2_800ep_pretrain.pth.tar"))
    # recipe is None: the checkpoint is from another project

| from | keys |
|---|---|
| this project | `online.encoder.*` or `encoder.*` under `method` |
| RSA, MoCo | `module.encoder_q.*` |
| SimSiam | `module.encoder.*` |
| solo-learn, lightly | `backbone.*`, in a Sequential `backbone.0.weight` |
| MoCo's CIFAR demo | `encoder_q.net.0.weight` |
| torchvision, timm | `conv1.weight` |

All are torchvision's keys behind a prefix. The file holds them directly, or under `state_dict` or
`model`. A Sequential numbers the layers that torchvision names. A 3x3 first convolution means the
CIFAR stem. Two properties cannot be seen from the keys and are assumed to be as in torchvision: the
max-pool after a 7x7 convolution, and the stride in the 3x3 convolution of a bottleneck.
"""

from __future__ import annotations

import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

from rsa_fast.networks import LAYERS, Encoder
from rsa_fast.recipes import Recipe, validate
from rsa_fast.training import checkpoint

# The first weight of a stage: the prefix, and the name or the number of the stage.
STAGE = re.compile(r"((?:.*\.)?)(layer1|\d+)\.0\.conv1\.weight")
# A word in the prefix of a network that follows another one.
FOLLOWER = re.compile(r"(^|[._])(k|momentum|target|teacher|ema)[._]")
HEADS = (
    "fc",
    "linear",
    "classifier",
    "head",
    "projector",
    "projection_head",
    "predictor",
    "prediction_head",
)
STEMS = {3: "cifar", 7: "imagenet"}  # by the side of the first convolution


def load_encoder(path: Path) -> tuple[Encoder, Recipe | None]:
    """The online encoder of a checkpoint, channels_last on the CPU, and its training recipe.

    The recipe is None if the checkpoint has none. Raises FileNotFoundError if there is no file.
    Raises ValueError if the file contains code, no ResNet or several, or an encoder with missing or
    unknown keys; the message lists these keys.
    """
    content = read_file(path)
    recipe = validate(content["recipe"]) if "recipe" in content else None
    groups = (content.get(key) for key in ("method", "state_dict", "model"))
    state = next((group for group in groups if isinstance(group, dict)), content)
    try:
        return build_encoder(state).to(memory_format=torch.channels_last), recipe
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no encoder that can be used: {error}") from error


def read_file(path: Path) -> dict[str, Any]:
    """The content of a file written by torch.save or by safetensors, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    if path.suffix == ".safetensors" and find_spec("safetensors") is None:
        raise ValueError(f"to read {path}: pip install safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_zipfile(path):  # torch before 1.6 wrote another format
            checkpoint.check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files and files with code raise many types
        advice = "torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)"
        raise ValueError(
            f"{path} is damaged or holds more than tensors; if you trust it, {advice}\n{error}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds {type(state).__name__}, wanted a dictionary of tensors")
    return state


def build_encoder(state: dict[str, Tensor]) -> Encoder:
    """The encoder whose weights are in `state` behind some prefix.

    Raises ValueError if there is none or several, and, from torch, RuntimeError for missing or
    unknown keys.
    """
    stages = defaultdict(list)
    for key in state:
        if match := STAGE.fullmatch(key):
            stages[match[1]].append(match[2])
    prefixes = [prefix for prefix in stages if not FOLLOWER.search(prefix)]
    if len(prefixes) != 1:
        networks = f"ResNets under {', '.join(map(repr, prefixes))}"
        found = networks if prefixes else f"no ResNet among {list(state)[:5]}"
        raise ValueError(
            f"found {found}; wanted one, conv1.weight and layer1.0.conv1.weight, behind any prefix"
        )
    (prefix,) = prefixes
    numbers = [] if "layer1" in stages[prefix] else sorted(map(int, stages[prefix]))
    own_weights = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    weights = torchvision_weights(own_weights, numbers)
    if "conv1.weight" not in weights:
        raise ValueError(f"there is no {prefix}{'0' if numbers else 'conv1'}.weight")
    first = weights["conv1.weight"]
    stem = STEMS.get(first.shape[-1], "imagenet")
    encoder = Encoder(arch_of(weights), stem, width=len(first))
    encoder.load_state_dict(weights)
    # Stages that follow the convolution and BatchNorm at once: lightly's own ResNet loses the ReLU
    # between them when it is put into a Sequential.
    if numbers and numbers[0] == 2:
        encoder.relu = nn.Identity()
    # solo-learn's CIFAR stem pads by 2 (solo/methods/base.py).
    if prefix == "backbone." and "classifier.weight" in state and stem == "cifar":
        encoder.conv1.padding = (2, 2)
    return encoder


def torchvision_weights(weights: dict[str, Tensor], numbers: list[int]) -> dict[str, Tensor]:
    """The weights under torchvision's keys, without heads.

    `numbers` are the positions of the stages in a Sequential; it is empty if the layers have names.
    In a Sequential, the first two layers are conv1 and bn1, and a layer with weights after the
    stages is a classifier.
    """
    names: dict[str, str] = {}
    if numbers:
        names = {"0": "conv1", "1": "bn1"}
        names |= {str(number): f"layer{i}" for i, number in enumerate(numbers, 1)}
    renamed = {}
    for key, value in weights.items():
        # lightly's own ResNet has `shortcut` for `downsample`.
        layer, dot, rest = key.replace(".shortcut.", ".downsample.").partition(".")
        is_classifier = bool(numbers) and layer.isdigit() and int(layer) > numbers[-1]
        name = names.get(layer, "fc" if is_classifier else layer)
        if name not in HEADS:
            renamed[name + dot + rest] = value
    return renamed


def arch_of(weights: dict[str, Tensor]) -> str:
    """The name in `LAYERS` of the network with the same type and number of blocks."""
    blocks = [
        len({key.split(".")[1] for key in weights if key.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    ]
    bottleneck = "layer1.0.conv3.weight" in weights
    for arch, (block, counts) in LAYERS.items():
        if counts == blocks and bottleneck == (block is Bottleneck):
            return arch
    kind = "bottleneck" if bottleneck else "basic"
    raise ValueError(f"{blocks} {kind} blocks are none of {', '.join(LAYERS)}")
