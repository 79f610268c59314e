"""Load encoders of this and other projects. ResNets are recognised by their weights' names.

    encoder, recipe = load_encoder(Path("moco_v2_800ep_pretrain.pth.tar"))
    # recipe is None: the checkpoint is from another project

| from | keys |
|---|---|
| this project | `online.encoder.*` or `encoder.*` under `method` |
| RSA, MoCo | `module.encoder_q.*`, MoCo v3 `module.base_encoder.*` |
| SimSiam | `module.encoder.*` |
| solo-learn, lightly, Barlow Twins, VICReg | `backbone.*`, in a Sequential `backbone.0.weight` |
| MoCo's CIFAR demo | `encoder_q.net.0.weight` |
| SwAV | `module.conv1.weight` beside `module.prototypes` |
| byol-pytorch | `net.*`, the same under `online_encoder.net.*`, and `target_encoder.net.*` |
| DINO | `module.backbone.*` under `student`, `backbone.*` under `teacher` |
| VISSL | `_feature_blocks.*` under `classy_state_dict`, `base_model`, `model`, `trunk` |
| torchvision, timm, SimCLR converters | `conv1.weight` |

All are torchvision's keys after a prefix. Nested dictionaries are searched, and their names become
parts of the prefix. A Sequential numbers the layers that torchvision names. A first convolution of
3x3 means the CIFAR stem. The keys do not show two properties, which are assumed to be as in
torchvision: the max-pool after a 7x7 convolution, and the stride in the 3x3 convolution of a
bottleneck.

If a file has several networks, the one that is trained by gradient is read, such as `student` or
`encoder_q`, and not the one that follows it, such as `teacher`, `encoder_k` or `momentum_encoder`.
A `key` chooses another one: `load_encoder(path, key="teacher")`. The log lists the tensors that are
not read.

Other networks are built from the `arch` in the checkpoint's recipe. It names a model of timm, or a
function in a file or module, which is called. One may also pass a network, into which the weights
are loaded: `load_encoder(path, encoder=module)`.
"""

from __future__ import annotations

import argparse
import copy
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from rsa_fast import terminal
from rsa_fast.archs import OWN, RESNETS
from rsa_fast.networks import Encoder, build_encoder
from rsa_fast.pipelines.machine import PIP
from rsa_fast.recipes import Recipe, checkpoint_recipe
from rsa_fast.training import checkpoint

log = logging.getLogger("rsa_fast")

# The first weight of a stage: the prefix, and the name or the number of the stage.
STAGE = re.compile(r"((?:.*\.)?)(layer1|\d+)\.0\.conv1\.weight")
# Words in the prefix of a network that is a moving average of another one.
FOLLOWER = re.compile(r"(^|[._])(k|key|momentum|target|teacher|ema)[._]", re.IGNORECASE)
# Words in the names of heads, whose keys are next to those of the encoder's layers.
HEAD = re.compile(
    r"fc|linear|head|classif|proj|predict|proto|mlp|logit|queue|memory|center|(top|last)_layer"
)
# solo-learn's encoder and momentum encoder, which are next to a classifier.
SOLO_LEARN = re.compile(r"((?:state_dict\.)?)(?:momentum_)?backbone\.")
STEMS = {3: "cifar", 7: "imagenet"}  # the keys are the sides of the first convolution's kernel
LISTED = 5  # the number of names in a message

Names = dict[str, str]  # from the network's own keys to the keys in the file


@dataclass(frozen=True)
class Choice:
    """The network that was chosen among those in a file."""

    prefix: str  # of its keys in the file
    weights: dict[str, Tensor]  # under the network's own keys
    left_out: str  # a text for the log, which is empty if the file contains nothing else


def load_encoder(
    path: str | Path, encoder: nn.Module | None = None, key: str | None = None
) -> tuple[Encoder, Recipe | None]:
    """The online encoder of a checkpoint, channels_last on the CPU, and its training recipe.

    `path` is a file, or the folder of a run, which means its newest undamaged checkpoint. If
    `encoder` is given, the encoder is a copy of it with the weights of the checkpoint. `key`
    chooses among several networks in the file. It is one or more parts, between dots, of the path
    to the weights, such as `teacher`, `target_encoder` or `state_dict_ema`.

    The recipe is None if the checkpoint has none. If its method is not part of this package, only
    the recipe's fields are read, and the method is not loaded. Nothing in the file is executed.
    Raises FileNotFoundError if there is no file. Raises ValueError if the file contains code, no
    encoder or several encoders, or if weights are missing, unknown or not finite. The message names
    the first ones.
    """
    path = checkpoint.newest_checkpoint(path)
    content = read_file(path)
    recipe = checkpoint_recipe(content["recipe"]) if is_own(content) else None
    leaves = leaves_in(content)
    try:
        if encoder is None and (recipe is None or recipe.arch in RESNETS):
            network, choice = build_resnet(leaves, key)
        else:
            if recipe is None:
                network = cast(Encoder, copy.deepcopy(encoder))
            else:
                arch = recipe.arch if encoder is None else OWN
                network = build_encoder(recipe.model_copy(update={"arch": arch}), encoder)
            choice = find_weights(network, leaves, key)
            fill(network, choice.weights, type(network).__name__)
    except ValueError as error:
        raise ValueError(f"{path} contains no encoder that can be used: {error}") from error
    if recipe is None or key:
        log_left_out(path, choice)
    return network.to(memory_format=torch.channels_last), recipe


def read_file(path: Path) -> dict[str, Any]:
    """The content of a file written by torch.save or by safetensors, on the CPU.

    Nothing in the file is executed. Many training scripts also save their arguments as a Namespace
    of argparse. It is read, because it contains only values.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    if path.suffix == ".safetensors" and find_spec("safetensors") is None:
        raise ValueError(f"to read {path}: {PIP} install safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):
            if is_zipfile(path):  # before version 1.6, torch wrote another format
                checkpoint.check_archive(path)
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files and files with code raise many types
        # torch's own message has many lines, and recommends executing the code.
        text = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = text.partition("\n")[0][:300]
        if code := re.search(r"GLOBAL (\S+)", text):
            reason = f"it contains calls of {code[1]}; only tensors and plain values are allowed"
        advice = "torch.save(torch.load(OLD, weights_only=False)['state_dict'], NEW)"
        raise ValueError(
            f"{path} is damaged or contains more than tensors; if you trust it, {advice}\n{reason}"
        ) from error
    if not isinstance(state, dict):
        raise ValueError(f"{path} contains a {type(state).__name__}, not a dictionary of tensors")
    return state


def is_own(content: dict[str, Any]) -> bool:
    """Whether this is the content of a checkpoint of this project."""
    return isinstance(content.get("recipe"), dict) and isinstance(content.get("method"), dict)


def leaves_in(content: dict[str, Any]) -> dict[str, Any]:
    """The values in nested dictionaries, under keys that are joined by dots.

    From a checkpoint of this project, only the values of the method are returned.
    """
    leaves: dict[str, Any] = {}
    start = ("method.", content["method"]) if is_own(content) else ("", content)
    groups: list[tuple[str, dict[str, Any]]] = [start]
    seen = {id(start[1])}  # a dictionary may contain itself
    for prefix, group in groups:  # the list grows during the loop
        for name, value in group.items():
            if not isinstance(value, dict):
                leaves[f"{prefix}{name}"] = value
            elif id(value) not in seen:
                seen.add(id(value))
                groups.append((f"{prefix}{name}.", value))
    return leaves


def tensors_of(leaves: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in leaves.items() if isinstance(value, Tensor)}


def choose(
    candidates: dict[str, Names], tensors: dict[str, Tensor], key: str | None, kind: str
) -> Choice:
    """Choose the network that `load_encoder` reads among the `candidates`, by their prefixes.

    Networks with equal weights count as one. Raises ValueError if none or several are left, and for
    weights that are not finite.
    """
    inside = [prefix for prefix in candidates if key is None or f".{key}." in f".{prefix}"]
    if not inside:
        raise ValueError(f"found no {kind} under the key {key!r}, only under {listed(candidates)}")
    leaders = [prefix for prefix in inside if not FOLLOWER.search(prefix)] or inside
    networks = {
        prefix: {own: tensors[name] for own, name in candidates[prefix].items()}
        for prefix in leaders
    }
    prefix, *copies = leaders
    weights = networks[prefix]
    checkpoint.check_finite({candidates[prefix][own]: value for own, value in weights.items()})
    if different := [other for other in copies if not are_equal(networks[other], weights)]:
        keys = [branch(prefix, different[0]), *(branch(other, prefix) for other in different)]
        raise ValueError(
            f"found {kind}s under {listed(leaders)}; choose one by --key "
            f"{' or '.join(dict.fromkeys(filter(None, keys[:LISTED])))}"
        )
    read = {name for leader in leaders for name in candidates[leader].values()}
    counts = Counter(branch(name, prefix) for name in tensors if name not in read)
    where = f" under {prefix!r}" if prefix else ""
    notes = [f"{len(weights)} tensors{where} are loaded"] if copies or counts else []
    if copies:
        notes.append(f"those under {listed(copies)} are the same")
    if counts:
        parts = [f"{name} ({number})" for name, number in counts.items()]
        notes.append(f"not loaded, with the number of tensors: {few(parts)}")
    others = (branch(other, prefix) for other in candidates if other not in leaders)
    if name := next(filter(None, others), ""):
        notes.append(f"--key {name} loads that network instead")
    return Choice(prefix, weights, "; ".join(notes))


def are_equal(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    same_keys = weights.keys() == others.keys()
    return same_keys and all(torch.equal(value, others[key]) for key, value in weights.items())


def branch(key: str, prefix: str) -> str:
    """The first part of a key, between dots, that differs from `prefix`."""
    pairs = zip(key.split("."), prefix.split("."), strict=False)
    return next((part for part, common in pairs if part != common), key)


def few(names: Iterable[str]) -> str:
    """The first names and the number of further ones."""
    first = list(names)
    more = f" and {len(first) - LISTED:,} more" if len(first) > LISTED else ""
    return ", ".join(first[:LISTED]) + more


def listed(names: Iterable[str]) -> str:
    return few(map(repr, names))


def log_left_out(path: Path, choice: Choice) -> None:
    """Log which tensors of the file are not loaded, on one rank only."""
    if choice.left_out and terminal.speaks():
        log.info(f"{path.name}: {choice.left_out}")


def fill(network: nn.Module, weights: dict[str, Tensor], kind: str) -> None:
    """Load the weights into a network, which messages call `kind`.

    Raises ValueError with one line if a weight is missing, unknown or has another shape.
    """
    expected = network.state_dict()
    of = f"of the {len(expected)} weights of a {kind}"
    differ = [k for k in weights if k in expected and weights[k].shape != expected[k].shape]
    if differ:
        there, here = (tuple(state[differ[0]].shape) for state in (weights, expected))
        raise ValueError(
            f"{of}, {len(differ)} have other shapes: {differ[0]} is {there} in the file and {here} "
            "in the network"
        )
    missing, unknown = network.load_state_dict(weights, strict=False)
    faults = [
        f"{title} {len(keys)}: " + few(f'"{key}"' for key in keys)
        for title, keys in (("Missing", missing), ("Unexpected", unknown))
        if keys
    ]
    if faults:
        raise ValueError(f"{of}: {'; '.join(faults)}")


def find_weights(network: nn.Module, leaves: dict[str, Any], key: str | None = None) -> Choice:
    """The weights among `leaves` whose keys are those of the network, after some prefix.

    Raises ValueError, which names missing keys, if there is no such prefix or several.
    """
    kind, keys, tensors = type(network).__name__, network.state_dict().keys(), tensors_of(leaves)
    ends = {name: [0, *(dot.end() for dot in re.finditer(r"\.", name))] for name in tensors}
    prefixes = dict.fromkeys(
        name[:end] for name in tensors for end in ends[name] if name[end:] in keys
    )
    lacks = {prefix: [k for k in keys if prefix + k not in tensors] for prefix in prefixes}
    complete = {p: {k: p + k for k in keys} for p, lack in lacks.items() if not lack}
    if not complete:
        lack = min(lacks.values(), key=len, default=list(keys))
        raise ValueError(
            f"of the {len(keys)} weights of a {kind}, {len(lack)} are missing: {few(lack)}"
        )
    return choose(complete, tensors, key, kind)


def build_resnet(leaves: dict[str, Any], key: str | None = None) -> tuple[Encoder, Choice]:
    """The ResNet whose weights are among `leaves`, after some prefix.

    Raises ValueError if there is none or several, for missing or unknown keys, and for a ResNet
    that this project cannot build.
    """
    stages, tensors = defaultdict(list), tensors_of(leaves)
    for name in tensors:
        if match := STAGE.fullmatch(name):
            stages[match[1]].append(match[2])
    if not stages:
        names = list(tensors | leaves)[:LISTED]
        raise ValueError(
            f"found no ResNet among {names}; it needs conv1.weight and layer1.0.conv1.weight, "
            "after any prefix (load_encoder(path, encoder=module) reads the weights of other "
            "networks)"
        )
    numbers = {
        prefix: [] if "layer1" in layers else sorted(map(int, layers))
        for prefix, layers in stages.items()
    }
    candidates = {
        prefix: torchvision_names(names_under(prefix, tensors, stages), prefix, numbers[prefix])
        for prefix in stages
    }
    choice = choose(candidates, tensors, key, "ResNet")
    prefix, weights = choice.prefix, choice.weights
    if "conv1.weight" not in weights:
        raise ValueError(f"there is no {prefix}{'0' if numbers[prefix] else 'conv1'}.weight")
    first = weights["conv1.weight"]
    if first.ndim != 4:
        raise ValueError(f"{prefix}conv1.weight is {tuple(first.shape)}, but needs 4 dimensions")
    stem, arch = STEMS.get(first.shape[-1], "imagenet"), arch_of(weights)
    encoder = Encoder(arch, stem, width=len(first), in_channels=first.shape[1])
    fill(encoder, weights, f"{arch} of width {len(first)} with the {stem} stem")
    # The stages follow the convolution and BatchNorm directly. This is lightly's own ResNet, which
    # loses the ReLU in between when it is put into a Sequential.
    if numbers[prefix] and numbers[prefix][0] == 2:
        encoder.relu = nn.Identity()
    # solo-learn's CIFAR stem pads by 2 (solo/methods/base.py).
    solo_learn = SOLO_LEARN.fullmatch(prefix)
    if solo_learn and f"{solo_learn[1]}classifier.weight" in tensors and stem == "cifar":
        encoder.conv1.padding = (2, 2)
    return encoder, choice


def names_under(prefix: str, tensors: Iterable[str], prefixes: Iterable[str]) -> list[str]:
    """The keys that begin with `prefix`, without those of networks with a longer prefix."""
    below = tuple(other for other in prefixes if other.startswith(prefix) and other != prefix)
    return [name for name in tensors if name.startswith(prefix) and not name.startswith(below)]


def torchvision_names(keys: list[str], prefix: str, numbers: list[int]) -> Names:
    """From torchvision's keys to the keys after `prefix`, without heads.

    `numbers` are the positions of the stages in a Sequential. It is empty if the layers have names.
    In a Sequential, the first two layers are conv1 and bn1, and a layer with weights after the
    stages is a classifier.
    """
    layers: dict[str, str] = {}
    if numbers:
        layers = {"0": "conv1", "1": "bn1"}
        layers |= {str(number): f"layer{i}" for i, number in enumerate(numbers, 1)}
    names = {}
    for key in keys:
        # lightly's own ResNet says `shortcut` instead of `downsample`.
        own = key.removeprefix(prefix).replace(".shortcut.", ".downsample.")
        layer, dot, rest = own.partition(".")
        is_classifier = bool(numbers) and layer.isdigit() and int(layer) > numbers[-1]
        if not (is_classifier or HEAD.search(layer)):
            names[layers.get(layer, layer) + dot + rest] = key
    return names


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
    if len(shape) != 4:
        raise ValueError(f"layer1.0.conv2.weight is {tuple(shape)}, but needs 4 dimensions")
    planes = len(weights["layer1.0.conv3.weight"]) // 4 if bottleneck else shape[0]
    for arch, layers in RESNETS.items():
        of_a_group = planes * layers.width_per_group // 64
        same_blocks = list(layers.blocks) == blocks and layers.bottleneck == bottleneck
        if same_blocks and shape[:2] == (of_a_group * layers.groups, of_a_group):
            return arch
    kind = f"bottleneck blocks with {shape[0]} channels in groups of {shape[1]}"
    kind = kind if bottleneck else "basic blocks"
    raise ValueError(f"{blocks} {kind} do not belong to any of {', '.join(RESNETS)}")


def traits(encoder: Encoder) -> dict[str, Any]:
    """The fields of a recipe that describe a ResNet."""
    return {
        "arch": arch_of(encoder.state_dict()),
        "stem": "cifar" if isinstance(encoder.maxpool, nn.Identity) else "imagenet",
        "width": encoder.width,
        "in_channels": encoder.conv1.in_channels,
    }


def beginning(encoder: Encoder) -> str:
    """The layers of a ResNet that can differ between projects although the weights fit."""
    return f"{encoder.conv1}, {encoder.relu}, {encoder.maxpool}"
