"""Every ResNet of torchvision, models of timm and one's own networks train like the first two."""

from __future__ import annotations

import copy
import os
import re
import signal
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from rsa_fast.archs import RESNET_FIELDS, RESNETS, ResNetLayers
from rsa_fast.datasets import DATASETS
from rsa_fast.evaluation.encoders import arch_of, load_encoder
from rsa_fast.evaluation.evaluate import evaluate
from rsa_fast.evaluation.export import export
from rsa_fast.insight.planning import plan, trace
from rsa_fast.methods.method import build_method
from rsa_fast.networks import Encoder, build_encoder
from rsa_fast.recipes import build_recipe
from rsa_fast.syncbn import convert_batchnorm
from rsa_fast.training import checkpoint
from rsa_fast.training.callbacks import Callback
from rsa_fast.training.engine import train
from rsa_fast.training.start import take_weights
from rsa_fast.training.step import build_run
from tests import tiny_runs
from tests.forks import fork
from tests.helpers import ROOT, code_of
from tests.tiny_runs import same, weights

INSTALL = "timm is not installed: pip install 'rsa-fast[timm]'"
timm = pytest.importorskip("timm", reason=INSTALL)
# torchvision's weights and the other runs of these tests are of this network.
tiny = partial(tiny_runs.tiny, arch="resnet18")

# A user's file: its network draws dropout masks in training.
NETS = """
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.feature_dim = 12
        self.layers = nn.Sequential(
            nn.Conv2d(3, 12, 3, 2), nn.BatchNorm2d(12), nn.ReLU(), nn.Dropout(), nn.Flatten(2)
        )

    def forward(self, images):
        return self.layers(images).mean(2)


def flat():
    return nn.Flatten()


def unpooled():
    return nn.Conv2d(3, 4, 3)


def broken():
    raise RuntimeError("no weights here")


def number():
    return 7
"""


@pytest.fixture
def nets(tmp_path) -> Path:
    path = tmp_path / "my_nets.py"
    path.write_text(NETS)
    return path


class Own(nn.Module):
    feature_dim = 6

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.body(images).mean((2, 3))


def own_recipe(arch: str, **fields):
    """Return a recipe of BYOL with few numbers, for a network that is no ResNet."""
    sizes = {"hidden_dim": 8, "out_dim": 4, "batch_size": 8, "epochs": 1, "views.size_px": 16}
    sizes |= {"precision": "fp32", "device": "cpu", "knn_every_epochs": 0, "arch": arch}
    return build_recipe("cifar10", "byol", overrides=sizes | fields)


# ---- ResNets


@pytest.mark.parametrize("arch", RESNETS)
def test_names_and_shapes_are_torchvision_s(arch):
    with torch.device("meta"):
        # torchvision has no function for a ResNet-10.
        make = getattr(torchvision.models, arch, lambda: ResNet(BasicBlock, [1, 1, 1, 1]))
        encoder, theirs = Encoder(arch), make()
        narrow = Encoder(arch, "cifar", width=16)
    expected = {key: value.shape for key, value in theirs.state_dict().items() if "fc." not in key}
    assert {key: value.shape for key, value in encoder.state_dict().items()} == expected
    assert encoder.feature_dim == theirs.fc.in_features == 4 * narrow.feature_dim
    assert arch_of(encoder.state_dict()) == arch_of(narrow.state_dict()) == arch


def test_a_grouped_network_computes_what_torchvision_s_does(monkeypatch):
    monkeypatch.setitem(RESNETS, "resnext50_32x4d", ResNetLayers(True, (1, 1, 1, 1), 32, 4))
    theirs = ResNet(Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=4)
    theirs.fc = nn.Identity()
    encoder, images = Encoder("resnext50_32x4d"), torch.randn(2, 3, 32, 32)
    encoder.load_state_dict(theirs.state_dict())
    assert torch.equal(encoder.eval()(images), theirs.eval()(images))


def test_a_width_that_leaves_a_group_no_channel_is_refused():
    assert Encoder("resnext50_32x4d", "cifar", 16).layer1[0].conv2.weight.shape == (32, 1, 3, 3)
    with pytest.raises(ValueError, match="width = 8 leaves no channel in the 32 groups of resnext"):
        Encoder("resnext50_32x4d", "cifar", 8)


# ---- One channel


def test_an_encoder_of_one_channel_sees_the_mean_of_three():
    torch.manual_seed(0)
    one, three = Encoder("resnet18", "cifar", 4, in_channels=1), Encoder("resnet18", "cifar", 4)
    state = one.state_dict()
    # A convolution of the mean with w is one of all three channels with w / 3.
    three.load_state_dict(state | {"conv1.weight": state["conv1.weight"].expand(4, 3, 3, 3) / 3})
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(one.eval()(images), three.eval()(images))
    assert torch.equal(one(images), one(images.mean(1, keepdim=True)))
    assert Encoder("resnet18", in_channels=1).conv1.weight.shape == (64, 1, 7, 7)
    with pytest.raises(ValueError, match="in_channels = 4: choose 1"):
        Encoder("resnet18", in_channels=4)


def test_a_model_of_timm_with_one_channel_sees_the_mean_too():
    encoder = build_encoder(own_recipe("timm/test_resnet", in_channels=1)).eval()
    raw = timm.create_model("test_resnet", num_classes=0, in_chans=1).eval()
    raw.load_state_dict(encoder.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(encoder(images), raw(images.mean(1, keepdim=True)))


def test_the_network_in_the_documents_is_an_encoder(tmp_path):
    page = (ROOT / "docs" / "networks.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.M | re.S)
    (code,) = [code for code in blocks if "def small()" in code]
    (tmp_path / "my_nets.py").write_text(code)
    encoder = build_encoder(own_recipe(f"{tmp_path}/my_nets.py:small"))
    assert encoder(torch.zeros(2, 3, 32, 32)).shape == (2, encoder.feature_dim)


# ---- What is refused


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stem", "cifar"),
        ("width", 8),
        ("zero_init_residual", False),
        ("recompute_stages", 1),
        ("compile", True),
    ],
)
def test_fields_of_resnets_are_refused_by_name_elsewhere(field, value):
    message = f"{field} = {value} is only for ResNets, but arch is timm/x"
    with pytest.raises(ValueError, match=message):
        build_recipe("cifar10", "rsa", overrides={"arch": "timm/x", field: value})


@pytest.mark.parametrize("dataset", [name for name in DATASETS if name != "auto"])
def test_what_rows_say_about_their_resnets_is_left_out_for_other_networks(dataset):
    for method in ("rsa", "supervised"):
        recipe = build_recipe(dataset, method, overrides={"arch": "timm/x"})
        fields = type(recipe).model_fields
        assert all(getattr(recipe, name) == fields[name].default for name in RESNET_FIELDS)


def test_a_network_that_is_not_there_is_refused_before_images_are_read(nets, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"arch = 'resnet19': no such network \(did you mean 'res"):
        own_recipe("resnet19")
    nowhere = tmp_path / "no_images"
    wrong = {
        "timm/resnet10": r"has no model 'resnet10': did you mean .*resnet10t",
        "own": r"passed in Python \(arch = own\): pass it again, as encoder=module",
        f"{nets}:nett": "my_nets.py has no 'nett'",
        f"{tmp_path}/none.py:net": "there is no file",
    }
    for arch, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            train(own_recipe(arch), nowhere, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"needs timm: \S+ -m pip install timm"):
        train(own_recipe("timm/resnet10t"), nowhere, tmp_path / "run")


def test_a_network_without_features_says_what_it_has_instead(nets):
    wrong = {
        "flat": r"has no feature_dim and 768 features: set the module's feature_dim to 768",
        "unpooled": r"maps images \(2, 3, 16, 16\) to \(2, 4, 14, 14\), not to features",
        "broken": "called without arguments and raised RuntimeError: no weights here",
        "number": "returned int, not a torch.nn.Module",
    }
    for name, message in wrong.items():
        with pytest.raises(ValueError, match=message):
            build_encoder(own_recipe(f"{nets}:{name}"))
    with pytest.raises(ValueError, match=r"test_vit cannot be built|test_vit fails on images"):
        build_encoder(own_recipe("timm/test_vit", **{"views.size_px": 7}))


# ---- From training to a released file


class Kill(Callback):
    """Kills its own process in the second epoch, once the checkpoint of the first is there."""

    def __init__(self, out: Path) -> None:
        self.checkpoints = out / "checkpoints"

    def on_record(self, run, record):
        if run.step > run.derived.steps_per_epoch:
            while not checkpoint.paths_in(self.checkpoints):
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(recipe, data: Path, out: Path) -> None:
    train(recipe, data, out, callbacks=[Kill(out)])


@pytest.mark.parametrize(
    "arch",
    [pytest.param("timm/test_efficientnet", marks=pytest.mark.slow), "timm/test_vit", "Net"],
)
def test_a_network_trains_resumes_bit_for_bit_is_scored_and_exported(
    folder, nets, tmp_path, monkeypatch, arch, one_thread
):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    fields = {"bn": "split:2", "epochs": 2, "log_every_steps": 2}
    recipe = own_recipe(f"{nets}:{arch}" if arch == "Net" else arch, **fields)
    result = train(recipe, folder, tmp_path / "whole")
    killed = fork(train_until_killed, recipe, folder, tmp_path / "parts", log=tmp_path / "log")
    killed.join()
    assert killed.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert not (tmp_path / "parts" / "result.json").exists()
    train(recipe, folder, tmp_path / "parts", resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))

    path = checkpoint.paths_in(tmp_path / "whole" / "checkpoints")[-1]
    for protocol in ("knn", "linear"):
        score = f"{protocol}_top1"
        assert evaluate(path, folder, protocol)[score] == result[score]
    encoder, found = load_encoder(path)
    assert found == recipe
    monkeypatch.chdir(tmp_path)  # The card names the file without its folder.
    for format, file in (("safetensors", "enc.safetensors"), ("timm", "enc.pth")):
        if format == "timm" and arch == "Net":
            with pytest.raises(ValueError, match=r"timm cannot save a my_nets.py:Net: choose "):
                export(path, format, file)
            continue
        export(path, format, file)
        scope = {"images": torch.randn(2, 3, 16, 16)}
        exec(code_of(Path("README.md"), file), scope)
        torch.testing.assert_close(scope["features"], encoder.eval()(scope["images"]))
    assert str(tmp_path) not in Path("README.md").read_text().partition("Made by")[0]


def test_a_module_from_python_is_a_template_that_stays_as_it_is(folder, tmp_path):
    module = Own()
    before, recipe = copy.deepcopy(module.state_dict()), tiny("simsiam")
    train(recipe, folder, tmp_path / "whole", encoder=module)
    train(recipe, folder, tmp_path / "parts", encoder=module, stop_at_step=7)
    with pytest.raises(ValueError, match="arch: 'own' in the checkpoint, 'resnet18' now"):
        train(recipe, folder, tmp_path / "parts", resume=True)
    train(recipe, folder, tmp_path / "parts", encoder=module, resume=True)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "parts"))
    assert same(module.state_dict(), before)

    path = checkpoint.paths_in(tmp_path / "whole" / "checkpoints")[-1]
    encoder, found = load_encoder(path, encoder=module)
    assert found.arch == "own" and not same(encoder.state_dict(), before)
    trained = weights(tmp_path / "whole")
    expected = {key: trained[f"online.encoder.{key}"] for key in before}
    assert same(encoder.state_dict(), expected) and same(module.state_dict(), before)
    assert evaluate(path, folder, "knn", encoder=module).keys() > {"knn_top1"}
    with pytest.raises(ValueError, match=r"arch = own\): pass it again, as encoder=module"):
        evaluate(path, folder, "knn")
    module.feature_dim = 5
    with pytest.raises(ValueError, match="own has feature_dim = 5 and 6 features"):
        train(recipe, folder, tmp_path / "other", encoder=module)
    with pytest.raises(ValueError, match="compile = True is only for ResNets"):
        train(tiny("simsiam", compile=True), folder, tmp_path / "other", encoder=module)


def test_a_plan_measures_the_network_itself():
    vit, module = own_recipe("timm/test_vit"), Own()
    for recipe, encoder in ((vit, None), (tiny("byol"), module)):
        predicted = plan(recipe, "v100-32g", encoder=encoder)
        parameters = build_run(recipe, 40, encoder).method.parameters()
        assert predicted["parameters"] == sum(p.numel() for p in parameters)
    # A convolution 3x3 of 3 to 6 channels on 16x16 px, a target and an online network, two views:
    # 2 FLOP a product. The heads' layers are 6 to 16, 16 to 8, and the predictor's 8 to 16 to 8.
    convolution, projector, predictor = 2 * 14 * 14 * 27 * 6, 2 * (96 + 128), 2 * (128 + 128)
    target = 2 * (convolution + projector) / 1e9
    flop = predicted["gflop_per_image"]
    assert flop["target"] == pytest.approx(target)
    assert flop["online"] == pytest.approx(target + 2 * predictor / 1e9)


def test_attention_counts_in_a_plan():
    recipe = own_recipe("timm/test_vit", **{"views.size_px": 64})
    ledger, method = trace(recipe, 2, "fp32")
    linear = sum(m.weight.numel() for m in method.target.encoder.modules() if type(m) is nn.Linear)
    convolution = method.target.encoder.patch_embed.proj.weight.numel()
    heads = sum(m.weight.numel() for m in method.target.projector if type(m) is nn.Linear)
    patches, blocks, dim = 16, len(method.encoder.blocks), method.encoder.feature_dim
    attention = blocks * 2 * (patches + 1) ** 2 * dim  # products of queries, keys and values
    products = linear * (patches + 1) + convolution * patches + attention + heads
    assert ledger.flop("target") == 2 * 2 * 2 * products  # two views of two images


# ---- BatchNorm with an activation


def test_parts_of_a_batch_keep_the_activation_behind_timm_s_batchnorm():
    from timm.layers.norm_act import BatchNormAct2d

    torch.manual_seed(0)
    plain, images = BatchNormAct2d(4), torch.randn(6, 4, 3, 3)
    split = convert_batchnorm(copy.deepcopy(plain), 2)
    expected = torch.cat([copy.deepcopy(plain)(part) for part in images.chunk(2)])
    torch.testing.assert_close(split(images), expected)
    assert expected.min() == 0  # A ReLU is behind it.


def test_a_batchnorm_that_would_be_lost_is_refused():
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for norm in (Doubled(4), nn.BatchNorm2d(4, track_running_stats=False)):
        with pytest.raises(ValueError, match=r"bn: only local is possible .*: --set bn=local"):
            convert_batchnorm(norm, 2)
        assert convert_batchnorm(norm, 1) is norm


# ---- The weights that a run starts from


def methods(method: str = "byol", **fields):
    """Return a recipe and a new method, and the state of its heads."""
    recipe = tiny(method, **fields)
    built = build_method(recipe)
    heads = {k: v.clone() for k, v in built.state_dict().items() if "encoder." not in k}
    return recipe, built, heads


def save(path: Path, state: dict) -> Path:
    torch.save(state, path)
    return path


def assert_only_the_encoder_was_taken(built, heads, expected) -> None:
    state = built.state_dict()
    assert same({key: state[key] for key in heads}, heads)
    for network in ("online", "target"):
        found = {key: state[f"{network}.encoder.{key}"] for key in expected}
        assert same(found, expected)


def test_init_from_takes_torchvision_s_weights_into_both_networks(tmp_path):
    theirs = torchvision.models.resnet18().state_dict()
    path = save(tmp_path / "resnet18.pth", theirs)
    recipe, built, heads = methods(width=64, stem="imagenet")
    line = take_weights(built, recipe, path)
    assert line == (
        "encoder of resnet18 (resnet18.pth): 120 tensors loaded; heads start from scratch"
    )
    expected = {key: value for key, value in theirs.items() if "fc." not in key}
    assert_only_the_encoder_was_taken(built, heads, expected)


def test_init_from_takes_the_encoder_of_another_method_s_run(folder, tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    train(tiny("simsiam", epochs=1), folder, tmp_path / "first")
    (path,) = checkpoint.paths_in(tmp_path / "first" / "checkpoints")
    recipe, built, heads = methods()
    take_weights(built, recipe, path)
    first = weights(tmp_path / "first")
    expected = {key: first[f"online.encoder.{key}"] for key in built.encoder.state_dict()}
    assert_only_the_encoder_was_taken(built, heads, expected)
    train(recipe, folder, tmp_path / "second", init_from=path, stop_at_step=1)
    assert f"encoder of resnet18 ({path.name}): 120 tensors loaded; heads start" in caplog.text


@pytest.mark.parametrize("arch", ["timm/test_vit", "timm/test_resnet"])
def test_init_from_takes_the_weights_of_a_model_of_timm(tmp_path, arch):
    recipe = own_recipe(arch)
    built, source = build_method(recipe), build_encoder(recipe).state_dict()
    prefixed = {f"module.backbone.{key}": value for key, value in source.items()}
    others = {f"module.momentum_backbone.{k}": torch.zeros_like(v) for k, v in source.items()}
    take_weights(built, recipe, save(tmp_path / "m.pth", {"state_dict": prefixed | others}))
    assert same(built.encoder.state_dict(), source)
    assert same(built.target.encoder.state_dict(), source)


def test_init_from_says_both_sides_of_what_does_not_fit(tmp_path):
    def refusal(state, **fields) -> str:
        recipe, built, _ = methods(**fields)
        with pytest.raises(ValueError, match=r"there\.pth cannot start this run: ") as error:
            take_weights(built, recipe, save(tmp_path / "there.pth", state))
        assert "\n" not in str(error.value)
        return str(error.value)

    eight = Encoder("resnet18", "cifar", 8).state_dict()
    assert "width 8 in the checkpoint, 4 now (--set width=8)" in refusal(eight)
    assert "arch resnet18 in the checkpoint, resnet34 now" in refusal(
        eight, arch="resnet34", width=8
    )
    assert "stem cifar in the checkpoint, imagenet now" in refusal(eight, stem="imagenet", width=8)
    assert "in_channels 3 in the checkpoint, 1 now" in refusal(eight, in_channels=1, width=8)
    vit = own_recipe("timm/test_vit")
    saved = {"step": 1, "recipe": vit.model_dump(), "method": build_method(vit).state_dict()}
    assert "timm/test_vit in the checkpoint, resnet18 now" in refusal(saved)
    other = build_encoder(own_recipe("timm/test_vit", **{"views.size_px": 32})).state_dict()
    with pytest.raises(ValueError, match=r"pos_embed \(1, 5, 64\) in the checkpoint, \(1, 2, 64\)"):
        take_weights(build_method(vit), vit, save(tmp_path / "other.pth", other))
    with pytest.raises(
        ValueError, match=r"of the \d+ weights of a VisionTransformer, \d+ are missing"
    ):
        take_weights(build_method(vit), vit, save(tmp_path / "other.pth", eight))


def test_init_from_takes_the_network_that_the_key_names(tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    networks = {name: Encoder("resnet18", "cifar", 4) for name in ("student", "teacher")}
    state = {
        name: {f"backbone.{k}": v for k, v in network.state_dict().items()}
        for name, network in networks.items()
    }
    recipe, built, heads = methods()
    take_weights(built, recipe, save(tmp_path / "dino.pth", state), key="teacher")
    assert_only_the_encoder_was_taken(built, heads, networks["teacher"].state_dict())
    assert "not loaded, with the number of tensors: student (120)" in caplog.text


def test_init_from_refuses_weights_that_are_not_finite(tmp_path):
    recipe, built, _ = methods()
    built.predictor[0].weight.data[0, 0] = float("nan")
    saved = {"step": 1, "recipe": recipe.model_dump(), "method": built.state_dict()}
    with pytest.raises(
        ValueError, match=r"a\.pt cannot start this run: predictor\.0\.weight has val"
    ):
        take_weights(methods()[1], recipe, save(tmp_path / "a.pt", saved))


def test_the_same_method_with_other_heads_gives_its_encoder(tmp_path):
    recipe, built, _ = methods()
    saved = {"step": 1, "recipe": recipe.model_dump(), "method": built.state_dict()}
    path = save(tmp_path / "a.pt", saved)
    line = take_weights(methods()[1], recipe, path)
    assert re.fullmatch(r"byol \(a\.pt\): \d+ tensors loaded, including the heads", line)
    wider, other, heads = methods(out_dim=9)
    assert take_weights(other, wider, path).endswith(
        "heads start from scratch: online.projector.3.weight (8, 16) in the checkpoint, (9, 16) now"
    )
    assert_only_the_encoder_was_taken(other, heads, built.encoder.state_dict())
    line = take_weights(methods("simsiam")[1], tiny("simsiam"), path)
    assert line.endswith("heads start from scratch: method byol in the checkpoint, simsiam now")
