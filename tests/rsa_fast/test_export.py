from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from rsa_fast.archs import RESNETS
from rsa_fast.cli import main
from rsa_fast.evaluation import export as module
from rsa_fast.evaluation.export import SUFFIXES, export
from rsa_fast.methods.method import build_method
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.plain import plain_image
from rsa_fast.recipes import Recipe, build_recipe, validate
from rsa_fast.training import checkpoint
from tests.helpers import code_of, invoke

INSTALL = "is not installed: pip install 'rsa-fast[export,dev]'"
safetensors = pytest.importorskip("safetensors", reason=f"safetensors {INSTALL}")
timm = pytest.importorskip("timm", reason="timm is not installed: pip install 'rsa-fast[dev]'")
LAYERS = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)

NETWORKS = {
    "standard": ("imagenet1k", {"views.size_px": 64}),
    "narrow": ("imagenet1k", {"views.size_px": 64, "width": 8}),
    "cifar": ("cifar10", {"arch": "resnet10", "width": 8}),
    "grey": ("imagenet1k", {"views.size_px": 64, "arch": "resnet18", "in_channels": 1}),
    "timm": ("cifar10", {"arch": "timm/test_vit"}),
    "grey timm": ("cifar10", {"arch": "timm/test_resnet.r160_in1k", "in_channels": 1}),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Return, by name, a checkpoint, its encoder and its recipe.

    Gains, offsets and statistics of BatchNorm are as if they were trained.
    """
    return {
        name: train(tmp_path_factory.mktemp(name), dataset, more)
        for name, (dataset, more) in NETWORKS.items()
    }


def train(run: Path, dataset: str, overrides: dict) -> tuple[Path, Encoder, Recipe]:
    torch.manual_seed(0)
    recipe = build_recipe(dataset, "byol", overrides={"hidden_dim": 8, "out_dim": 4, **overrides})
    method = build_method(recipe)
    for norm in method.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5), nn.init.normal_(norm.bias, std=0.3)
            nn.init.normal_(norm.running_mean, std=0.3), nn.init.uniform_(norm.running_var, 0.5, 2)
    state = {
        "step": 20,
        "recipe": recipe.model_dump(mode="json"),
        "data": "f1n9e2",
        "method": method.state_dict(),
    }
    return checkpoint.save(run / "checkpoints", state, 1), method.encoder.eval(), recipe


def assert_same_features(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare to 1e-5 of the largest feature.

    The sum over a convolution's inputs is rounded at their scale, not at the result's.
    """
    scale = expected.detach().abs().max()
    torch.testing.assert_close(found.detach() / scale, expected.detach() / scale, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "network"),
    [
        *[(format, "standard") for format in ("torchvision", "timm", "hf-timm")],
        *[(format, name) for format in ("timm", "hf-timm") for name in ("grey", "timm")],
        ("hf-timm", "grey timm"),
        pytest.param("onnx", "narrow", marks=pytest.mark.slow),
        *[(format, "cifar") for format in ("safetensors", "onnx", "torch-export")],
    ],
)
def test_the_card_s_code_loads_a_file_that_gives_the_encoder_s_features(
    trained, tmp_path, monkeypatch, format, network
):
    path, encoder, recipe = trained[network]
    for library in {"onnx": ["onnx", "onnxscript", "onnxruntime"]}.get(format, []):
        pytest.importorskip(library, reason=f"{library} {INSTALL}")
    out = tmp_path / f"encoder.v2{SUFFIXES[format]}"
    words = ("--checkpoint", path, "--format", format, "--out", out)
    result = invoke(main, "export", *words, standalone_mode=False)
    assert result.exit_code == 0, result.output
    parameters = sum(p.numel() for p in encoder.parameters())
    assert json.loads(result.stdout) == {
        "out": str(out),
        "format": format,
        "parameters": parameters,
    }
    file = out / "model.safetensors" if format == "hf-timm" else out
    monkeypatch.chdir(file.parent)
    count = {"narrow": 1, "cifar": 5}.get(network, 3)  # Graphs are exported with 2.
    scope = {"images": torch.randn(count, 3, recipe.views.size_px, recipe.views.size_px)}
    exec(code_of(file.with_name("README.md"), file.name), scope)
    assert_same_features(torch.as_tensor(scope["features"]), encoder(scope["images"]))


@pytest.mark.parametrize("arch", RESNETS)
def test_timm_s_resnet_has_the_layers_of_the_network_of_the_same_name(arch):
    # timm has no function for a ResNet-10.
    name, options = ("resnet18", {"layers": (1, 1, 1, 1)}) if arch == "resnet10" else (arch, {})
    with torch.device("meta"):
        ours, theirs = (
            {name: str(m) for name, m in network.named_modules() if isinstance(m, LAYERS)}
            for network in (Encoder(arch), timm.create_model(name, num_classes=0, **options))
        )
    assert ours == theirs


def pixels(height: int, width: int) -> Image.Image:
    """Return an image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


@pytest.mark.parametrize(
    ("dataset", "fields", "image"),
    [
        ("imagenet1k", {"width": 8}, pixels(300, 411)),
        # timm computes floor(29 / (29 / 30)) = 29 in float64.
        ("imagenet1k", {"width": 8, "views.size_px": 29, "eval_resize_px": 30}, pixels(70, 40)),
        ("cifar10", {"width": 8}, pixels(32, 32)),
        ("cifar10", {"width": 8, "views.size_px": 48}, pixels(32, 32)),
        ("stl10", {"width": 8}, pixels(96, 96)),
    ],
)
def test_the_card_s_transforms_make_the_images_of_the_evaluation(tmp_path, dataset, fields, image):
    path, _, recipe = train(tmp_path, dataset, fields)
    export(path, "safetensors", tmp_path / "encoder.safetensors")
    views = recipe.views
    expected = plain_image(np.asarray(image), views.size_px, recipe.eval_resize_px) / 255
    expected = torch.from_numpy((expected - views.mean) / views.std).permute(2, 0, 1)[None]
    text = (tmp_path / "README.md").read_text().partition("## Transform")[2].partition("## Acc")[0]
    codes = re.findall("```python\n(.+?)```", text, re.DOTALL)
    assert [re.search(r"import (torchvision|timm)|from (\w+)", code)[0] for code in codes] == [
        "from torchvision",
        "import timm",
    ]
    for code in codes:
        scope = {"image": image}
        exec(code, scope)
        torch.testing.assert_close(scope["images"], expected.float())


def test_the_folder_for_timm_has_the_transform_and_takes_a_classifier(trained, tmp_path):
    path, encoder, recipe = trained["standard"]
    export(path, "hf-timm", tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=7).eval()
    images = torch.randn(2, 3, 64, 64)
    assert model(images).shape == (2, 7)
    assert_same_features(model.forward_head(model.forward_features(images), True), encoder(images))
    image, views = pixels(80, 100), recipe.views
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    expected = plain_image(np.asarray(image), 64, recipe.eval_resize_px) / 255
    expected = torch.from_numpy((expected - views.mean) / views.std).permute(2, 0, 1)
    torch.testing.assert_close(transform(image), expected.float())


def test_hugging_face_reads_the_card_s_header_and_its_owner_s_licence_stays(trained, tmp_path):
    hub = pytest.importorskip("huggingface_hub", reason=f"huggingface_hub {INSTALL}")
    card = tmp_path / "README.md"
    export(trained["grey"][0], "hf-timm", tmp_path)
    data = hub.ModelCard.load(card).data
    assert (data.license, data.library_name) == ("unknown", "timm")
    assert data.pipeline_tag == "image-feature-extraction"
    assert data.datasets == ["ILSVRC/imagenet-1k"]
    card.write_text(card.read_text().replace("license: unknown", "license: mit"))
    export(trained["grey"][0], "timm", tmp_path / "encoder.pth")
    assert hub.ModelCard.load(card).data.license == "mit"
    assert re.findall("## Load `(.+)`", card.read_text()) == ["model.safetensors", "encoder.pth"]

    path, *_ = train(tmp_path / "own", "cifar10", {"width": 8, "name": "my_photos"})
    export(path, "safetensors", tmp_path / "own" / "encoder.safetensors")
    data = hub.ModelCard.load(tmp_path / "own" / "README.md").data
    assert data.datasets is None and data.library_name == "rsa-fast"


QUIET = """
import sys
from rsa_fast.cli import main

for format, file in (("onnx", "encoder.onnx"), ("torch-export", "encoder.pt2")):
    words = ["export", "--checkpoint", sys.argv[1], "--format", format, "--out", file]
    main(words, standalone_mode=False)
"""


@pytest.mark.slow
def test_the_exporters_of_torch_write_nothing_to_the_terminal(trained, tmp_path):
    for library in ("onnx", "onnxscript"):
        pytest.importorskip(library, reason=f"{library} {INSTALL}")
    command = [sys.executable, "-c", QUIET, str(trained["cifar"][0])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["out"] for result in results] == ["encoder.onnx", "encoder.pt2"]


class Conv(nn.Conv2d):
    """A convolution that contains its norm, as in detectron2."""

    def __init__(self, inputs: int, outputs: int, size: int, stride: int = 1) -> None:
        super().__init__(inputs, outputs, size, stride, size // 2, bias=False)
        self.norm = FrozenBatchNorm2d(outputs)

    def forward(self, x):
        return self.norm(super().forward(x))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, stride_in_1x1: bool) -> None:
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = Conv(inputs, outputs // 4, 1, first)
        self.conv2 = Conv(outputs // 4, outputs // 4, 3, second)
        self.conv3 = Conv(outputs // 4, outputs, 1)
        self.shortcut = Conv(inputs, outputs, 1, stride) if inputs != outputs else nn.Identity()

    def forward(self, x):
        return (self.shortcut(x) + self.conv3(self.conv2(self.conv1(x).relu()).relu())).relu()


class Detectron2R50(nn.Module):
    """Normalisation, stem and res2 to res5, followed by pooling.

    It is built from a config by the rules of detectron2/modeling/backbone/resnet.py. Its 265 keys
    were once compared with those of detectron2 0.5 itself and are the same.
    """

    def __init__(self, config: dict) -> None:
        super().__init__()
        model, resnet = config["MODEL"], config["MODEL"]["RESNETS"]
        assert config["INPUT"] == {"FORMAT": "RGB"} and resnet["DEPTH"] == 50
        self.pixel_mean, self.pixel_std = (
            torch.tensor(model[key])[:, None, None] for key in ("PIXEL_MEAN", "PIXEL_STD")
        )
        self.stem = nn.Module()
        self.stem.conv1 = Conv(3, 64, 7, 2)
        inputs, outputs = 64, resnet["RES2_OUT_CHANNELS"]
        for name, blocks, stride in (
            ("res2", 3, 1),
            ("res3", 4, 2),
            ("res4", 6, 2),
            ("res5", 3, 2),
        ):
            sides, strides = [inputs] + [outputs] * (blocks - 1), [stride] + [1] * (blocks - 1)
            made = [
                Block(i, outputs, s, resnet["STRIDE_IN_1X1"])
                for i, s in zip(sides, strides, strict=True)
            ]
            self.add_module(name, nn.Sequential(*made))
            inputs, outputs = outputs, 2 * outputs

    def forward(self, pixels):
        x = self.stem.conv1((pixels - self.pixel_mean) / self.pixel_std).relu()
        x = nn.functional.max_pool2d(x, 3, 2, 1)
        return self.res5(self.res4(self.res3(self.res2(x)))).mean((2, 3))


class Recorder(pickle.Unpickler):
    """Reads a pickle as detectron2's DetectionCheckpointer does, and records what it imports."""

    def __init__(self, file) -> None:
        super().__init__(file, encoding="latin1")
        self.imports = set()

    def find_class(self, module, name):
        self.imports.add((module, name))
        return super().find_class(module, name)


def test_detectron2_finds_every_weight_and_computes_the_same_from_rgb_pixels(trained, tmp_path):
    path, encoder, recipe = trained["standard"]
    export(path, "detectron2", tmp_path / "encoder.pkl")
    config = yaml.safe_load(code_of(tmp_path / "README.md", "encoder.pkl"))
    with (tmp_path / config["MODEL"]["WEIGHTS"]).open("rb") as file:
        reader = Recorder(file)
        content = reader.load()
    # NumPy 1 has all of these.
    assert reader.imports == {("numpy", "ndarray"), ("builtins", "bytearray")}
    assert (
        content.keys() == {"model", "__author__", "matching_heuristics"}
        and content["matching_heuristics"] is True
    )
    weights = content["model"]
    assert len(weights) == 53 * 5 and all(
        isinstance(value, np.ndarray) and value.flags.writeable for value in weights.values()
    )
    assert {
        "stem.conv1.norm.running_var",
        "res2.0.shortcut.norm.bias",
        "res5.2.conv3.weight",
    } < weights.keys()
    model = Detectron2R50(config)
    # Loading is strict: no key is missing or superfluous.
    model.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    pixels = torch.randint(0, 256, (3, 3, 64, 64)).float()
    mean, std = (
        torch.tensor(value)[:, None, None] for value in (recipe.views.mean, recipe.views.std)
    )
    expected = encoder((pixels / 255 - mean) / std)
    assert_same_features(model(pixels), expected)
    assert not torch.allclose(model(pixels.flip(1)), expected, rtol=0.1)  # BGR differs.


@pytest.mark.parametrize("network", ["narrow", "cifar"])
@pytest.mark.parametrize("format", ["torchvision", "timm", "detectron2", "hf-timm"])
def test_a_format_that_cannot_hold_the_network_says_which_can(trained, tmp_path, format, network):
    with pytest.raises(
        ValueError, match=r"begins with Conv2d\(3, 8, .*\): choose safetensors, onnx, torch-export"
    ):
        export(trained[network][0], format, tmp_path / f"encoder{SUFFIXES[format]}")
    assert not list(tmp_path.iterdir())


def test_weights_of_a_network_that_no_reader_builds_are_refused(tmp_path, monkeypatch):
    encoder = Encoder("resnet18")
    encoder.relu = nn.Identity()  # Keys and shapes stay the same.
    monkeypatch.setattr(module, "load_encoder", lambda *_: (encoder, None))
    for format in ("torchvision", "timm", "detectron2", "safetensors", "hf-timm"):
        with pytest.raises(
            ValueError,
            match=rf"{format} cannot save .* Identity\(\), MaxPool2d.*: choose onnx, torch-export$",
        ):
            export(Path("model.pth"), format, tmp_path / f"encoder{SUFFIXES[format]}")


@pytest.mark.parametrize(
    ("format", "library"),
    [
        ("safetensors", "safetensors"),
        ("hf-timm", "safetensors"),
        ("onnx", "onnx"),
        ("onnx", "onnxscript"),
    ],
)
def test_a_missing_library_is_named_with_the_line_that_installs_it(
    trained, tmp_path, monkeypatch, format, library
):
    monkeypatch.setitem(sys.modules, library, None)
    wanted = rf"{format} needs (onnx and )?{library}: \S+ -m pip install (onnx )?{library}$"
    with pytest.raises(ValueError, match=wanted):
        export(trained["cifar"][0], format, tmp_path / f"encoder{SUFFIXES[format]}")


def test_a_name_with_another_suffix_is_an_error(trained, tmp_path):
    with pytest.raises(
        ValueError, match=r"detectron2 needs a file name that ends in \.pkl, found encoder\.pth"
    ):
        export(trained["standard"][0], "detectron2", tmp_path / "encoder.pth")


def test_the_card_and_the_header_hold_recipe_and_fingerprint(trained, tmp_path):
    path, _, recipe = trained["cifar"]
    export(path, "safetensors", tmp_path / "encoder.safetensors")
    card = (tmp_path / "README.md").read_text()
    with safetensors.safe_open(tmp_path / "encoder.safetensors", "pt") as file:
        header = file.metadata()
    assert header["data"] == "f1n9e2" and "training images: f1n9e2\n" in card
    for text in (header["recipe"], re.search("```yaml\n(.+?)```", card, re.DOTALL)[1]):
        assert validate(yaml.safe_load(text)) == recipe
    options = f"--checkpoint {path} --format safetensors --out {tmp_path}/encoder.safetensors"
    assert f"rsa-fast export {options}" in card
    assert (
        "byol on cifar10, step 20" in card
        and f"mean {recipe.views.mean} and std {recipe.views.std}" in card
    )


@pytest.mark.parametrize(("step", "measured"), [(20, True), (30, False)])
def test_the_card_holds_the_accuracy_of_its_own_step_only(tmp_path, step, measured):
    train(tmp_path, "cifar10", {"width": 4})
    scores = {
        "knn_protocol": "knn/1",
        "knn_top1": 37.123,
        "linear_top1": None,
        "images_per_s": 350.0,
    }
    (tmp_path / "result.json").write_text(json.dumps({"step": step, **scores}))
    export(tmp_path, "safetensors", tmp_path / "out" / "encoder.safetensors")
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("| knn_protocol | knn/1 |\n| knn_top1 | 37.12 |\n\n" in card) is measured
    assert ("Not measured at this step." in card) is not measured
    assert "linear_top1" not in card and "350" not in card


def test_a_checkpoint_without_a_recipe_says_that_its_images_are_assumed(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_encoder", lambda *_: (Encoder("resnet18"), None))
    export(tmp_path / "foreign" / "model.pth", "torchvision", tmp_path / "encoder.pth")
    card = (tmp_path / "README.md").read_text()
    assert (
        "resnet18 encoder: model.pth" in card
        and "mean (0.485, 0.456, 0.406)" in card
        and "are assumed" in card
    )
    assert "training images: not in the checkpoint" in card and "Not measured" in card


def test_files_of_one_checkpoint_share_a_card_and_a_file_has_one_section(trained, tmp_path):
    path, *_ = trained["cifar"]
    for name in ("a", "b", "a"):
        export(
            path,
            "safetensors",
            tmp_path / f"{name}.safetensors",
            overwrite=(tmp_path / f"{name}.safetensors").exists(),
        )
    card = (tmp_path / "README.md").read_text()
    assert (
        re.findall("## Load `(.+)`", card) == ["b.safetensors", "a.safetensors"]
        and card.count("## Recipe") == 1
    )


def test_nothing_is_replaced_without_overwrite(trained, tmp_path):
    path, *_ = trained["cifar"]
    out, card = tmp_path / "encoder.safetensors", tmp_path / "README.md"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"encoder\.safetensors already exists.*--overwrite"):
        export(path, "safetensors", out)
    assert [file.name for file in tmp_path.iterdir()] == [out.name] and out.read_text() == "mine"
    out.unlink()
    card.write_text("# My project\n")
    with pytest.raises(
        FileExistsError, match=r"README\.md is not this checkpoint's card.*--overwrite"
    ):
        export(path, "safetensors", out)
    assert [file.name for file in tmp_path.iterdir()] == [
        card.name
    ] and card.read_text() == "# My project\n"
    export(path, "safetensors", out, overwrite=True)
    header, text = card.read_text().split("---\n\n", 1)
    assert header.startswith("---\n") and text.startswith("# resnet10 encoder: byol on cifar10")


def test_a_disk_that_fails_leaves_the_file_that_was_there(trained, tmp_path, monkeypatch):
    out = tmp_path / "encoder.safetensors"
    export(trained["cifar"][0], "safetensors", out)
    before = out.read_bytes()

    def fail(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        export(trained["cifar"][0], "safetensors", out, overwrite=True)
    assert out.read_bytes() == before
