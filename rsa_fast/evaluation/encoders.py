"""Encoders of this project and from elsewhere, told by how their keys are spelled.

    encoder, recipe = load_encoder(Path("moco_v2_800ep_pretrain.pth.tar"))     # recipe is None: not this project's

| from | keys |
|---|---|
| this project | `online.encoder.*` or `encoder.*` under `method` |
| RSA, MoCo | `module.encoder_q.*` |
| SimSiam | `module.encoder.*` |
| solo-learn, lightly | `backbone.*`, in a Sequential `backbone.0.weight` |
| MoCo's CIFAR demo | `encoder_q.net.0.weight` |
| torchvision, timm | `conv1.weight` |

All are torchvision's keys behind a prefix, under `state_dict` or `model` or not; a Sequential numbers what torchvision
names. A 3x3 first convolution means the CIFAR stem. What no key tells is taken to be as in torchvision: the max-pool after
a 7x7 convolution, and the stride in a bottleneck's 3x3 convolution.
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

STAGE = re.compile(
    r"((?:.*\.)?)(layer1|\d+)\.0\.conv1\.weight"
)  # prefix, and the name or number of a stage
FOLLOWER = re.compile(
    r"(^|[._])(k|momentum|target|teacher|ema)[._]"
)  # in the prefix of a network that follows another
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
STEMS = {3: "cifar", 7: "imagenet"}  # by the first convolution's side


def load_encoder(path: Path) -> tuple[Encoder, Recipe | None]:
    """The online encoder of a checkpoint, channels_last on the CPU, and the recipe it was trained by, if it says.

    Raises FileNotFoundError, and ValueError for a file that holds code, no or several ResNets, or an encoder of which a key
    is missing or not known, each named.
    """
    state = read(path)
    recipe = validate(state["recipe"]) if "recipe" in state else None
    state = next(
        (
            state[key]
            for key in ("method", "state_dict", "model")
            if isinstance(state.get(key), dict)
        ),
        state,
    )
    try:
        return build(state).to(memory_format=torch.channels_last), recipe
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path} holds no encoder that can be used: {error}") from error


def read(path: Path) -> dict[str, Any]:
    """A file of torch.save or of safetensors, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    if path.suffix == ".safetensors" and find_spec("safetensors") is None:
        raise ValueError(f"to read {path}: pip install safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if is_zipfile(path):  # not the format of torch before 1.6
            checkpoint.check(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # of many types, for a damaged file and for one that holds more than tensors
        advice = "torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)"
        raise ValueError(
            f"{path} is damaged or holds more than tensors; if you trust it, {advice}\n{error}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} holds {type(state).__name__}, wanted a dictionary of tensors")
    return state


def build(state: dict[str, Tensor]) -> Encoder:
    """The encoder whose keys are in `state` behind some prefix. Raises ValueError, or by torch RuntimeError, with the keys."""
    stages = defaultdict(list)
    for key in state:
        if stage := STAGE.fullmatch(key):
            stages[stage[1]].append(stage[2])
    leaders = [prefix for prefix in stages if not FOLLOWER.search(prefix)]
    if len(leaders) != 1:
        found = (
            f"ResNets under {', '.join(map(repr, leaders))}"
            if leaders
            else f"no ResNet among {list(state)[:5]}"
        )
        raise ValueError(
            f"found {found}; wanted one, conv1.weight and layer1.0.conv1.weight, behind any prefix"
        )
    (prefix,) = leaders
    numbers = [] if "layer1" in stages[prefix] else sorted(map(int, stages[prefix]))
    weights = renamed(
        {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)},
        numbers,
    )
    if "conv1.weight" not in weights:
        raise ValueError(f"there is no {prefix}{'0' if numbers else 'conv1'}.weight")
    encoder = Encoder(
        arch_of(weights),
        STEMS.get(weights["conv1.weight"].shape[-1], "imagenet"),
        len(weights["conv1.weight"]),
    )
    encoder.load_state_dict(weights)
    if (
        numbers and numbers[0] == 2
    ):  # convolution, BatchNorm, stages: a Sequential of lightly's own ResNet loses the ReLU
        encoder.relu = nn.Identity()
    if (
        prefix == "backbone."
        and "classifier.weight" in state
        and isinstance(encoder.maxpool, nn.Identity)
    ):
        encoder.conv1.padding = (2, 2)  # solo-learn's CIFAR stem (solo/methods/base.py)
    return encoder


def renamed(weights: dict[str, Tensor], numbers: list[int]) -> dict[str, Tensor]:
    """Torchvision's keys, without heads. `numbers` are the stages' in a Sequential, whose first two are conv1 and bn1 and
    whose last, after the stages, is a classifier."""
    names = (
        {"0": "conv1", "1": "bn1", **{str(n): f"layer{i}" for i, n in enumerate(numbers, 1)}}
        if numbers
        else {}
    )
    kept = {}
    for key, value in weights.items():
        first, dot, rest = key.replace(".shortcut.", ".downsample.").partition(
            "."
        )  # lightly's own ResNet says shortcut
        first = names.get(
            first, "fc" if numbers and first.isdigit() and int(first) > numbers[-1] else first
        )
        if first not in HEADS:
            kept[first + dot + rest] = value
    return kept


def arch_of(weights: dict[str, Tensor]) -> str:
    """The name in `LAYERS` of the network with as many blocks of the same type."""
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
