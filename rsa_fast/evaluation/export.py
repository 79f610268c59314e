"""A checkpoint's encoder in the formats other libraries read, and a model card beside it.

    export(Path("runs/a/checkpoints/step_00039000.pt"), "onnx", Path("release/encoder.onnx"))

`torchvision`, `timm` and `safetensors` hold torchvision's keys without `fc`: pre-training has no classifier, so they load
strictly into a network whose `fc` is nn.Identity, and no untrained weights can pass for trained ones. `detectron2` follows
MoCo's detection/convert-pretrain-to-detectron2.py, which leaves the channels as they are: the encoder reads RGB, and the
card has the settings for that, as detectron2's defaults are BGR and Caffe's pixel mean. `onnx` and `torch-export` hold the
graph in eval mode: `images` `(B, 3, size_px, size_px)`, any B, to `features` `(B, feature_dim)`.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from pipelines.files import write_whole
from rsa_fast.evaluation.encoders import arch_of, load_encoder
from rsa_fast.networks import Encoder
from rsa_fast.recipes import build_recipe, dump_yaml
from rsa_fast.training import checkpoint

SUFFIXES = {  # detectron2 and timm choose their reader by it
    "torchvision": ".pth",
    "timm": ".pth",
    "detectron2": ".pkl",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch-export": ".pt2",
}
NEEDS = {"safetensors": ("safetensors",), "onnx": ("onnx", "onnxscript")}
GRAPHS = ("onnx", "torch-export")  # the others hold weights, for a network that their reader builds
ASSUMED = {
    "imagenet": "imagenet1k",
    "cifar": "cifar10",
}  # by stem: whose images a checkpoint without a recipe reads

CARD = """# {arch} encoder: {name}

Maps `images` `(B, 3, {size_px}, {size_px})`, RGB in [0, 1] less {mean} over {std}, to `features` `(B, {feature_dim})`.
{arch} with the {stem} stem and {width} channels in its first stage: {parameters:,} parameters.

## Accuracy

{accuracy}

## Data

Fingerprint of the training images: {data}

## Recipe

```yaml
{recipe}```
"""
SECTION = "\n## Load "  # one for each file of the checkpoint
SNIPPETS = {
    "torchvision": """import torch
import torchvision

model = torchvision.models.{arch}()
model.fc = torch.nn.Identity()  # the file holds no classifier
model.load_state_dict(torch.load("{file}", weights_only=True))
features = model.eval()(images)""",
    "timm": """import timm

model = timm.create_model("{arch}", num_classes=0, checkpoint_path="{file}")
features = model.eval()(images)""",
    "safetensors": """from safetensors.torch import load_file

from rsa_fast.networks import Encoder

model = Encoder("{arch}", stem="{stem}", width={width})  # keys are torchvision's, without fc
model.load_state_dict(load_file("{file}"))
features = model.eval()(images)""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("{file}")
(features,) = session.run(["features"], {{"images": images.numpy()}})""",
    "torch-export": """import torch

model = torch.export.load("{file}").module()
features = model(images)""",
    "detectron2": """MODEL:
  WEIGHTS: "{file}"
  PIXEL_MEAN: {pixel_mean}
  PIXEL_STD: {pixel_std}
  RESNETS:
    DEPTH: {depth}
    RES2_OUT_CHANNELS: {res2_channels}
    STRIDE_IN_1X1: False  # it is in the 3x3 convolution
    NORM: "SyncBN"  # every layer is fine-tuned, as MoCo does
  BACKBONE:
    FREEZE_AT: 0
INPUT:
  FORMAT: "RGB"  # the default is BGR""",
}


def export(path: Path, format: str, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Write the encoder of checkpoint `path` to `out` and a model card `README.md` beside it; returns what was written.

    The card of the same checkpoint gains a section. Raises FileExistsError when `out` or another README.md is there and
    not to be overwritten; ValueError when the format cannot hold the network, a library is missing, or the suffix is wrong.
    """
    if format not in SUFFIXES:
        raise ValueError(f"no format {format!r}: choose from {', '.join(SUFFIXES)}")
    if out.suffix != SUFFIXES[format]:
        raise ValueError(
            f"{format} wants a file name that ends in {SUFFIXES[format]}, found {out.name}"
        )
    if missing := [name for name in NEEDS.get(format, ()) if find_spec(name) is None]:
        raise ValueError(f"{format} needs {' and '.join(missing)}: pip install 'rsa-fast[export]'")
    if out.exists() and not overwrite:
        raise FileExistsError(
            f"{out} is there already: choose another --out, or replace it with --overwrite"
        )
    encoder, facts = open_encoder(path)
    if not holds(format, encoder, facts):
        begins = f"{encoder.conv1}, {encoder.relu}, {encoder.maxpool}"
        able = ", ".join(other for other in SUFFIXES if holds(other, encoder, facts))
        raise ValueError(
            f"{format} cannot hold a {facts['arch']} that begins with {begins}: choose {able}"
        )

    card, head, others = out.with_name("README.md"), CARD.format(**facts), []
    if card.exists():
        old, *sections = card.read_text().split(SECTION)
        if old == head:
            others = [section for section in sections if not section.startswith(f"`{out.name}`")]
        elif not overwrite:
            raise FileExistsError(
                f"{card} is not this checkpoint's card: choose another folder, or replace it by --overwrite"
            )
    command = shlex.join(
        ["rsa-fast", "export", "--checkpoint", str(path), "--format", format, "--out", str(out)]
    )
    code = SNIPPETS[format].format(file=out.name, **facts)
    language = "yaml" if format == "detectron2" else "python"
    section = f"`{out.name}`\n\n```{language}\n{code}\n```\n\nMade by `{command}`.\n"
    content = encode(encoder, format, facts)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, lambda file: file.write(content))
    write_whole(card, lambda file: file.write(SECTION.join([head, *others, section]).encode()))
    return {"out": str(out), "format": format, "parameters": facts["parameters"]}


def open_encoder(path: Path) -> tuple[Encoder, dict[str, Any]]:
    """The encoder in eval mode, contiguous, and all that the card says of it."""
    encoder, recipe = load_encoder(path)
    state = checkpoint.load(path) if recipe else {}
    arch = arch_of(encoder.state_dict())
    stem = "cifar" if isinstance(encoder.maxpool, nn.Identity) else "imagenet"
    views = (recipe or build_recipe(ASSUMED[stem], "byol")).views
    facts = {
        "name": f"{recipe.method} on {recipe.dataset}, step {state['step']:,}"
        if recipe
        else path.name,
        "arch": arch,
        "stem": stem,
        "width": encoder.width,
        "feature_dim": encoder.feature_dim,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "size_px": views.size_px,
        "mean": views.mean,
        "std": views.std,
        "pixel_mean": [round(255 * value, 3) for value in views.mean],
        "pixel_std": [round(255 * value, 3) for value in views.std],
        "depth": arch.removeprefix("resnet"),
        "res2_channels": encoder.width * encoder.layer1[0].expansion,
        "accuracy": accuracy(path, state),
        "data": state.get("data", "not in the checkpoint"),
        "recipe": dump_yaml(recipe)
        if recipe
        else "# not in the checkpoint: size, mean and std of the images are assumed\n",
    }
    return encoder.eval().to(
        memory_format=torch.contiguous_format
    ), facts  # safetensors takes no other format


def holds(format: str, encoder: Encoder, facts: dict[str, Any]) -> bool:
    """Whether the network that the format's reader builds is the encoder's: the standard one, or for ours any of ours."""
    network = (
        (facts["arch"], facts["stem"], facts["width"])
        if format == "safetensors"
        else (facts["arch"],)
    )
    with torch.device("meta"):
        return format in GRAPHS or str(Encoder(*network)) == str(encoder)


def accuracy(path: Path, state: dict[str, Any]) -> str:
    """The scores in the run's result.json, when they are those of this step."""
    result = path.absolute().parent.parent / "result.json"
    scores = json.loads(result.read_text()) if state and result.is_file() else {}
    rows = [
        (key, value)
        for key, value in scores.items()
        if key.startswith(("knn", "linear")) and value is not None
    ]
    if not rows or scores["step"] != state["step"]:
        return "Not measured at this step."
    table = [
        f"| {key} | {value if isinstance(value, str) else f'{value:.4g}'} |" for key, value in rows
    ]
    return "\n".join(["| top-1 in percent | |", "|---|---|", *table])


def encode(encoder: Encoder, format: str, facts: dict[str, Any]) -> bytes:
    """The file's bytes. Made in memory, so that `out` and the card are written only when nothing failed."""
    weights, buffer = encoder.state_dict(), io.BytesIO()
    if format in GRAPHS:
        images = torch.zeros(2, 3, facts["size_px"], facts["size_px"])
        shapes = (
            {0: torch.export.Dim("batch")},
        )  # not height and width: the strides would make guards on their parity
        program = torch.export.export(encoder, (images,), dynamic_shapes=shapes)
    match format:
        case "torchvision" | "timm":
            torch.save(weights, buffer)
        case "safetensors":
            from safetensors.torch import save

            about = {key: str(facts[key]) for key in ("arch", "stem", "width", "data", "recipe")}
            return save(weights, {"format": "pt", **about})
        case "detectron2":
            arrays = {
                detectron2_key(key): value.numpy()
                for key, value in weights.items()
                if "num_batches" not in key
            }
            ArrayPickler(buffer, 4).dump(
                {"model": arrays, "__author__": "rsa-fast", "matching_heuristics": True}
            )
        case "torch-export":
            torch.export.save(program, buffer)
        case "onnx":
            onnx = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=["features"],
                dynamic_shapes=shapes,
            )
            assert onnx is not None  # None comes from the exporter without dynamo only
            return bytes(onnx.model_proto.SerializeToString())
    return buffer.getvalue()


def detectron2_key(key: str) -> str:
    """`layer1.0.bn2.weight` to `res2.0.conv2.norm.weight`, `bn1.bias` to `stem.conv1.norm.bias`."""
    key = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return key if key.startswith("res") else f"stem.{key}"


class ArrayPickler(pickle.Pickler):
    """Writes arrays as calls of `numpy.ndarray`: NumPy 2's own pickles name modules that NumPy 1, with which detectron2 is
    often installed, does not have (github.com/numpy/numpy/issues/28340)."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented
