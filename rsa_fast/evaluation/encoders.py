"""Encoders of this project and of others: ResNets recognised by the names of their weights.

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

Other networks are built by the `arch` in the checkpoint's recipe: by timm, or by the function of a
file or module that it names, which is called. One may also pass a network, which the file's weights
fill: `load_encoder(path, encoder=module)`.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from rsa_fast.archs import OWN, RESNETS
from rsa_fast.networks import Encoder, build_encoder
from rsa_fast.recipes import Recipe, checkpoint_recipe
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


def load_encoder(
    path: str | Path, encoder: nn.Module | None = None
) -> tuple[Encoder, Recipe | None]:
    """The online encoder of a checkpoint, channels_last on the CPU, and its training recipe.

    If `encoder` is given, the encoder is a copy of it with the weights of the checkpoint.

    The recipe is None if the checkpoint has none. Of a method that is not part of this package only
    the recipe's fields are read, without the method. Raises FileNotFoundError if there is no file.
    Raises ValueError if the file contains code, no encoder or several, or one with missing or
    unknown keys; the message lists these keys.
    """
    path = Path(path)
    content = read_file(path)
    recipe = checkpoint_recipe(content["recipe"]) if "recipe" in content else None
    state = weights_in(content)
    try:
        if encoder is None and (recipe is None or recipe.arch in RESNETS):
            network = build_resnet(state)
        elif recipe is None:
            network = fill(cast(Encoder, copy.deepcopy(encoder)), state)
        else:
            arch = recipe.arch if encoder is None else OWN
            network = fill(build_encoder(recipe.model_copy(update={"arch": arch}), encoder), state)
        return network.to(memory_format=torch.channels_last), recipe
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


def weights_in(content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in the content of a file, under the keys that they have there."""
    groups = (content.get(key) for key in ("method", "state_dict", "model"))
    return next((group for group in groups if isinstance(group, dict)), content)


def fill(network: Encoder, state: dict[str, Tensor]) -> Encoder:
    """The network with the weights that are in `state` under its own keys, behind some prefix."""
    network.load_state_dict(own_weights(network, state))
    return network


def own_weights(network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights in `state` under the network's own keys, behind some prefix.

    Raises ValueError, which names missing keys, if there is no such prefix, or several.
    """
    keys = network.state_dict().keys()
    ends = {key: [0, *(dot.end() for dot in re.finditer(r"\.", key))] for key in state}
    prefixes = {key[:end] for key in state for end in ends[key] if key[end:] in keys}
    lacks = {
        prefix: [key for key in keys if prefix + key not in state]
        for prefix in prefixes
        if not FOLLOWER.search(prefix)
    }
    whole = [prefix for prefix, lack in lacks.items() if not lack]
    if len(whole) != 1:
        kind = type(network).__name__
        if whole:
            raise ValueError(f"found a {kind} under {', '.join(map(repr, sorted(whole)))}")
        lack = min(lacks.values(), key=len, default=list(keys))
        raise ValueError(
            f"of the {len(keys)} weights of a {kind}, {len(lack)} are not there: "
            f"{', '.join(lack[:5])}"
        )
    return {key: state[whole[0] + key] for key in keys}


def build_resnet(state: dict[str, Tensor]) -> Encoder:
    """The ResNet whose weights are in `state` behind some prefix.

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
    encoder = Encoder(arch_of(weights), stem, width=len(first), in_channels=first.shape[1])
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
    """The name in `RESNETS` of the network with the same type, number and groups of blocks."""
    blocks = [
        len({key.split(".")[1] for key in weights if key.startswith(f"layer{stage}.")})
        for stage in (1, 2, 3, 4)
    ]
    bottleneck = "layer1.0.conv3.weight" in weights
    if "layer1.0.conv2.weight" not in weights:
        raise ValueError("there is no layer1.0.conv2.weight")
    shape = weights["layer1.0.conv2.weight"].shape  # (channels, channels of a group, 3, 3)
    planes = len(weights["layer1.0.conv3.weight"]) // 4 if bottleneck else shape[0]
    for arch, layers in RESNETS.items():
        of_a_group = planes * layers.width_per_group // 64
        same_blocks = list(layers.blocks) == blocks and layers.bottleneck == bottleneck
        if same_blocks and shape[:2] == (of_a_group * layers.groups, of_a_group):
            return arch
    kind = f"bottleneck blocks with {shape[0]} channels in groups of {shape[1]}"
    kind = kind if bottleneck else "basic blocks"
    raise ValueError(f"{blocks} {kind} are none of {', '.join(RESNETS)}")


def traits(encoder: Encoder) -> dict[str, Any]:
    """The fields of a recipe that describe a ResNet."""
    return {
        "arch": arch_of(encoder.state_dict()),
        "stem": "cifar" if isinstance(encoder.maxpool, nn.Identity) else "imagenet",
        "width": encoder.width,
        "in_channels": encoder.conv1.in_channels,
    }


def beginning(encoder: Encoder) -> str:
    """The layers of a ResNet in which projects differ, although the weights fit."""
    return f"{encoder.conv1}, {encoder.relu}, {encoder.maxpool}"
