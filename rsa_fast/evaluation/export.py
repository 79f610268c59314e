"""Export an encoder in the formats of other libraries, with a model card beside it.

    export(Path("runs/a/checkpoints/step_00039000.pt"), "onnx", Path("release/encoder.onnx"))

- `torchvision`, `timm` and `safetensors` contain a ResNet under torchvision's keys without `fc`,
  because pre-training has no classifier. They load strictly into a network whose `fc` is
  nn.Identity, so no weights stay untrained unnoticed. Other networks keep their own keys: `timm` is
  for timm's models, and `safetensors` is for any network.
- `hf-timm` is a folder for Hugging Face's hub, from which timm builds the network: `config.json`,
  `model.safetensors` and the card. It supports the same networks as `timm`.
- `detectron2` follows MoCo's detection/convert-pretrain-to-detectron2.py, which does not swap the
  channels, so the encoder reads RGB. detectron2's defaults are BGR and Caffe's pixel mean. The card
  therefore contains the settings for RGB.
- `onnx` and `torch-export` contain the graph in eval mode. It maps `images`
  `(B, 3, size_px, size_px)` to `features` `(B, feature_dim)` for any B.
"""

from __future__ import annotations

import io
import json
import logging
import math
import pickle
import re
import shlex
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torchvision import models

from rsa_fast.archs import OWN, RESNETS, TIMM, short_arch
from rsa_fast.datasets import DATASETS
from rsa_fast.evaluation.encoders import beginning, load_encoder, traits
from rsa_fast.methods import short_name
from rsa_fast.networks import Encoder, timm_options
from rsa_fast.pipelines.files import write_text, write_whole
from rsa_fast.pipelines.machine import PIP
from rsa_fast.recipes import build_recipe, dump_yaml
from rsa_fast.training import checkpoint

# detectron2 and timm choose how to read a file by its suffix.
SUFFIXES = {
    "torchvision": ".pth",
    "timm": ".pth",
    "detectron2": ".pkl",
    "safetensors": ".safetensors",
    "onnx": ".onnx",
    "torch-export": ".pt2",
    "hf-timm": "",  # a folder
}
NEEDS = {
    "safetensors": ("safetensors",),
    "onnx": ("onnx", "onnxscript"),
    "hf-timm": ("safetensors",),
}
# These contain the network. The other formats contain weights, and the reader builds the network.
GRAPHS = ("onnx", "torch-export")
# For each stem, the dataset whose images a checkpoint without a recipe is assumed to read.
ASSUMED_DATASETS = {"imagenet": "imagenet1k", "cifar": "cifar10"}

# The part of a card that Hugging Face reads. The publisher has to name the licence.
HEADER = """---
license: unknown  # name it before you publish: hf.co/docs/hub/repositories-licenses
library_name: {library}
pipeline_tag: image-feature-extraction
{datasets}---

"""
CARD = """# {arch} encoder: {name}

Maps `images` `(B, 3, {size_px}, {size_px})` to `features` `(B, {feature_dim})`.
The images are RGB in [0, 1], normalised by mean {mean} and std {std}.
{network}: {parameters:,} parameters.

To fine-tune it, train `torch.nn.Sequential(model, torch.nn.Linear({feature_dim}, classes))` at a \
small learning rate, or run `rsa-fast finetune`.

## Transform

From a PIL image in RGB{upright} to `images`, with torchvision:

```python
from torchvision import transforms

transform = transforms.Compose(
    [
        transforms.Resize({resize_px}),  # the short side, bilinear
        transforms.CenterCrop({size_px}),
        transforms.ToTensor(),
        transforms.Normalize({mean}, {std}),
    ]
)
images = transform(image)[None]
```

with timm:

```python
import timm

transform = timm.data.create_transform(
    input_size=(3, {size_px}, {size_px}),
    crop_pct={crop_pct},
    interpolation="bilinear",
    mean={mean},
    std={std},
)
images = transform(image)[None]
```

## Accuracy

{accuracy}

## Data

Fingerprint of the training images: {data}

## Recipe

```yaml
{recipe}```
"""
SECTION = "\n## Load "  # starts the section of one exported file
SNIPPETS = {
    "torchvision": """import torch
import torchvision

model = torchvision.models.{arch}()
model.fc = torch.nn.Identity()  # the file holds no classifier
model.load_state_dict(torch.load("{file}", weights_only=True))
features = model.eval()(images)""",
    "timm": """import timm

model = timm.create_model({timm_options}, checkpoint_path="{file}")
features = model.eval()({timm_images})""",
    "hf-timm": """import timm

# After an upload: "hf-hub:OWNER/NAME". num_classes=N adds a classifier to fine-tune.
model = timm.create_model("local-dir:.", pretrained=True, num_classes=0)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
features = model.eval()({timm_images})""",
    "safetensors": """from safetensors.torch import load_file

{build}
model.load_state_dict(load_file("{file}"))
features = model.eval()({network_images})""",
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
    NUM_GROUPS: {groups}
    WIDTH_PER_GROUP: {width_per_group}
    STRIDE_IN_1X1: False  # it is in the 3x3 convolution
    NORM: "SyncBN"  # every layer is fine-tuned, as MoCo does
  BACKBONE:
    FREEZE_AT: 0
INPUT:
  FORMAT: "RGB"  # the default is BGR""",
}


def export(
    path: str | Path,
    format: str,
    out: str | Path,
    overwrite: bool = False,
    encoder: nn.Module | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Write the encoder of checkpoint `path` to `out` and a model card `README.md` beside it.

    `path` is a file, or a run's folder, which means its newest undamaged checkpoint. For `hf-timm`,
    `out` is a folder, and the card is in it. `encoder` is the network, if it was passed to training
    in Python. `key` chooses among several networks in the file, such as `teacher` (see
    `load_encoder`).

    If a card of the same checkpoint already exists, a section for `out` is added to it. Returns
    `out`, `format` and the number of `parameters`.

    Raises FileExistsError if `out` or another README.md exists and `overwrite` is false. Raises
    ValueError if the format cannot represent the network, if a library is missing, or if the suffix
    of `out` is wrong.
    """
    path, out = checkpoint.newest_checkpoint(path), Path(out)
    if format not in SUFFIXES:
        raise ValueError(f"no format {format!r}: choose from {', '.join(SUFFIXES)}")
    if not out.name.endswith(SUFFIXES[format]):
        raise ValueError(
            f"{format} needs a file name that ends in {SUFFIXES[format]}, found {out.name}"
        )
    if missing := [name for name in NEEDS.get(format, ()) if find_spec(name) is None]:
        install = f"{PIP} install {' '.join(missing)}"
        raise ValueError(f"{format} needs {' and '.join(missing)}: {install}")
    files = [out / "model.safetensors", out / "config.json"] if format == "hf-timm" else [out]
    if not overwrite and (there := [file for file in files if file.exists()]):
        raise FileExistsError(
            f"{there[0]} already exists: choose another --out, or replace it with --overwrite"
        )
    network, card_values = open_encoder(path, encoder, key)
    if not supports(format, network, card_values):
        begins = f" that begins with {beginning(network)}" if isinstance(network, Encoder) else ""
        able = ", ".join(other for other in SUFFIXES if supports(other, network, card_values))
        raise ValueError(f"{format} cannot save a {card_values['arch']}{begins}: choose {able}")

    weights, head = files[0], CARD.format(**card_values)
    card = weights.with_name("README.md")
    library = "timm" if supports("timm", network, card_values) else "rsa-fast"
    header = HEADER.format(library=library, **card_values)
    parts = parts_of_card(card, header, head, weights.name, overwrite)
    chosen = ["--key", key] if key else []
    words = ["--checkpoint", str(path), *chosen, "--format", format, "--out", str(out)]
    command = shlex.join(["rsa-fast", "export", *words])
    code = SNIPPETS[format].format(file=weights.name, **card_values)
    language = "yaml" if format == "detectron2" else "python"
    section = f"`{weights.name}`\n\n```{language}\n{code}\n```\n\nMade by `{command}`.\n"
    with quiet():
        content = encode(network, format, card_values)
    weights.parent.mkdir(parents=True, exist_ok=True)
    write_whole(weights, lambda file: file.write(content))
    for config in files[1:]:
        write_text(config, timm_config(network, card_values))
    write_text(card, SECTION.join([*parts, section]))
    return {"out": str(out), "format": format, "parameters": card_values["parameters"]}


def parts_of_card(card: Path, header: str, head: str, name: str, overwrite: bool) -> list[str]:
    """The header with the head, and the sections of an existing card about other files.

    `name` is the file whose section is replaced. An existing card keeps its header, because its
    owner may have named the licence there. Raises FileExistsError if the card belongs to another
    checkpoint and may not be overwritten.
    """
    if card.exists():
        old_head, *sections = card.read_text().split(SECTION)
        if old_head.endswith(head):
            return [old_head, *(part for part in sections if not part.startswith(f"`{name}`"))]
        if not overwrite:
            raise FileExistsError(
                f"{card} is not this checkpoint's card: choose another folder, "
                "or replace it by --overwrite"
            )
    return [header + head]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the warnings and the log lines of torch's exporters out of the terminal.

    They are about torch's own code, which the user cannot change.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def open_encoder(
    path: Path, own: nn.Module | None, key: str | None
) -> tuple[Encoder, dict[str, Any]]:
    """The encoder in eval mode, and the values for the card and its code."""
    encoder, recipe = load_encoder(path, own, key)
    state = checkpoint.load(path) if recipe else {}
    arch, stem = OWN if own is not None or recipe is None else recipe.arch, "imagenet"
    if isinstance(encoder, Encoder):
        arch, stem = traits(encoder)["arch"], traits(encoder)["stem"]
    reads = recipe or build_recipe(ASSUMED_DATASETS[stem], "byol")
    # A dataset that this version does not know is treated like the user's own images.
    views, dataset = reads.views, DATASETS.get(reads.dataset, DATASETS["auto"])
    # If images are evaluated in their own size, the card names the size of the dataset's images.
    resize_px = reads.eval_resize_px or max(dataset.side_px or 0, views.size_px)
    if recipe:
        name = f"{short_name(recipe.method)} on {recipe.data_name}, step {state['step']:,}"
        # The path of a method's file would only show folders of this machine.
        short = {"method": short_name(recipe.method), "arch": short_arch(recipe.arch)}
        shown = recipe.model_copy(update=short)
        recipe_text = dump_yaml(shown)
    else:
        name = path.name
        recipe_text = "# not in the checkpoint: size, mean and std of the images are assumed\n"
    if key:
        name += f", {key}"
    # The field `name` is only set for the user's own images.
    hub_id = dataset.hub_id if recipe and not recipe.name else None
    card_values = {
        "name": name,
        **building(encoder, arch, recipe.in_channels if recipe else 3, views.size_px),
        "feature_dim": encoder.feature_dim,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "size_px": views.size_px,
        "resize_px": resize_px,
        "crop_pct": crop_fraction(views.size_px, resize_px),
        "upright": " that is turned upright as its EXIF tags say" if reads.exif_orientation else "",
        "mean": views.mean,
        "std": views.std,
        "pixel_mean": [round(255 * value, 3) for value in views.mean],
        "pixel_std": [round(255 * value, 3) for value in views.std],
        # The run's scores are those of its online encoder.
        "accuracy": accuracy(path, {} if key else state),
        "data": state.get("data", "not in the checkpoint"),
        "datasets": f"datasets:\n- {hub_id}\n" if hub_id else "",
        "recipe": recipe_text,
    }
    # safetensors accepts contiguous tensors only.
    return encoder.eval().to(memory_format=torch.contiguous_format), card_values


def crop_fraction(size_px: int, resize_px: int) -> float:
    """The number from which timm computes floor(size_px / number) = resize_px."""
    fraction = size_px / resize_px
    exact = math.floor(size_px / fraction) == resize_px
    return fraction if exact else math.nextafter(fraction, 0)


def building(encoder: Encoder, arch: str, in_channels: int, size_px: int) -> dict[str, Any]:
    """The values for the card about building the network and passing `images` to it."""
    fields = traits(encoder) if isinstance(encoder, Encoder) else {"in_channels": in_channels}
    in_channels = fields["in_channels"]
    mean = "images" if in_channels == 3 else "images.mean(1, keepdim=True)"
    values = {"arch": arch, "network": arch, "network_images": mean, "timm_images": mean, **fields}
    if isinstance(encoder, Encoder):
        given = {name: value for name, value in fields.items() if name != "arch"}
        options = ", ".join(f"{name}={json.dumps(value)}" for name, value in given.items())
        return values | {
            "network": f"{arch} with the {fields['stem']} stem and {fields['width']} channels in "
            "its first stage",
            "network_images": "images",  # encoders of this project average the channels themselves
            "build": "from rsa_fast.networks import Encoder\n\n"
            f'model = Encoder("{arch}", {options})  # keys are torchvision\'s, without fc',
            "timm_options": f'"{arch}", num_classes=0, in_chans={in_channels}',
            "depth": re.sub(r"\D*(\d+).*", r"\1", arch),
            "res2_channels": encoder.width * encoder.layer1[0].expansion,
            "groups": RESNETS[arch].groups,
            "width_per_group": RESNETS[arch].width_per_group,
        }
    if arch.startswith(TIMM):
        options = timm_options(arch, in_channels, size_px)
        text = ", ".join(f"{name}={json.dumps(value)}" for name, value in options.items())
        build = f"import timm\n\nmodel = timm.create_model({text})"
        return values | {"build": build, "timm_options": text}
    if arch == OWN:
        return values | {"build": "model = ...  # the module that was passed to training"}
    arch = short_arch(arch)
    build = f'from rsa_fast.pipelines.named import load_object\n\nmodel = load_object("{arch}")()'
    return values | {"arch": arch, "network": arch, "build": build}


def supports(format: str, encoder: Encoder, card_values: dict[str, Any]) -> bool:
    """Whether readers of the format can build the encoder's network.

    `safetensors` is read by this project, which can build any of its networks. Readers of the other
    weights can only build a standard ResNet or timm's own models. Graphs contain the network.
    """
    arch = card_values["arch"]
    if format in GRAPHS:
        return True
    of_timm = format in ("timm", "hf-timm")
    if not isinstance(encoder, Encoder):
        return format == "safetensors" or (of_timm and arch.startswith(TIMM))
    if format != "safetensors" and not hasattr(models, arch):  # resnet10 is only in this project
        return False
    names = ["in_channels"] if of_timm else []
    names = ["stem", "width", "in_channels"] if format == "safetensors" else names
    with torch.device("meta"):
        return str(Encoder(arch, **{name: card_values[name] for name in names})) == str(encoder)


def accuracy(path: Path, state: dict[str, Any]) -> str:
    """The scores in the run's result.json as a table, if they are from the checkpoint's step."""
    result = path.absolute().parent.parent / "result.json"
    scores = json.loads(result.read_text()) if state and result.is_file() else {}
    rows = [
        (key, value)
        for key, value in scores.items()
        if key.startswith(("knn", "linear")) and isinstance(value, int | float | str)
    ]
    if not rows or scores["step"] != state["step"]:
        return "Not measured at this step."
    table = ["| top-1 in percent | |", "|---|---|"]
    for key, value in rows:
        table.append(f"| {key} | {value if isinstance(value, str) else f'{value:.4g}'} |")
    return "\n".join(table)


def encode(encoder: Encoder, format: str, card_values: dict[str, Any]) -> bytes:
    """The bytes of the file, in memory, so that an error does not leave a file behind."""
    weights, buffer = encoder.state_dict(), io.BytesIO()
    if format in GRAPHS:
        images = torch.zeros(2, 3, card_values["size_px"], card_values["size_px"])
        # Height and width are fixed. If they were free, the strides would add guards on even sizes.
        shapes = ({0: torch.export.Dim("batch")},)
        try:
            program = torch.export.export(encoder, (images,), dynamic_shapes=shapes)
        except Exception as error:  # networks fail in many ways, and torch's explanations are long
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"torch.export cannot make a graph of {card_values['arch']}, which {format} needs "
                f"({reason}): choose safetensors"
            ) from error
    match format:
        case "torchvision" | "timm":
            torch.save(weights, buffer)
        case "safetensors" | "hf-timm":
            from safetensors.torch import save

            names = {"arch", "stem", "width", "in_channels", "feature_dim", "data", "recipe"}
            header = {key: str(card_values[key]) for key in sorted(names & card_values.keys())}
            return save(weights, {"format": "pt", **header})
        case "detectron2":
            arrays = {
                detectron2_key(key): value.numpy()
                for key, value in weights.items()
                if "num_batches" not in key
            }
            content = {"model": arrays, "__author__": "rsa-fast", "matching_heuristics": True}
            ArrayPickler(buffer, 4).dump(content)
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
            assert onnx is not None  # only the exporter without dynamo returns None
            return bytes(onnx.model_proto.SerializeToString())
    return buffer.getvalue()


def timm_config(encoder: Encoder, card_values: dict[str, Any]) -> str:
    """The config.json from which timm builds the network and its transform."""
    # With these, timm adapts the network to other channels, classes and sizes. In the ResNets of
    # this project, the layers have the same names as in timm.
    adapted = ("first_conv", "classifier", "fixed_input_size")
    known = getattr(encoder, "pretrained_cfg", {"first_conv": "conv1", "classifier": "fc"})
    size_px = card_values["size_px"]
    config = {
        "architecture": card_values["arch"].removeprefix(TIMM).partition(".")[0],
        "num_classes": 0,
        "num_features": card_values["feature_dim"],
        "pretrained_cfg": {
            **{key: known[key] for key in adapted if key in known},
            "num_classes": 0,
            "input_size": [card_values["in_channels"], size_px, size_px],
            "crop_pct": card_values["crop_pct"],
            "crop_mode": "center",
            "interpolation": "bilinear",
            "mean": card_values["mean"],
            "std": card_values["std"],
        },
    }
    return json.dumps(config, indent=2)


def detectron2_key(key: str) -> str:
    """Rename `layer1.0.bn2.weight` to `res2.0.conv2.norm.weight`, for example."""
    key = re.sub(r"^layer(\d)", lambda stage: f"res{int(stage[1]) + 1}", key)
    key = re.sub(r"\bbn(\d)", r"conv\1.norm", key)
    key = key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return key if key.startswith("res") else f"stem.{key}"


class ArrayPickler(pickle.Pickler):
    """A pickler that writes arrays as calls of `numpy.ndarray`.

    NumPy 2's own pickles name modules that NumPy 1 does not have, and detectron2 is often installed
    with NumPy 1 (github.com/numpy/numpy/issues/28340).
    """

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return np.ndarray, (value.shape, value.dtype.str, bytearray(value.tobytes()))
        return NotImplemented
