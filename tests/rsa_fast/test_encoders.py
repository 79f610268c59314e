from __future__ import annotations

import argparse
import copy
import json

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torchvision.models import resnet18

from rsa_fast.cli import main
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.methods.method import build_method
from rsa_fast.networks import Encoder
from rsa_fast.recipes import build_recipe
from rsa_fast.training import checkpoint


def lived_in(network: nn.Module) -> nn.Module:
    """Change weights and BatchNorm statistics at random, and switch to eval mode."""
    with torch.no_grad():
        for value in [*network.parameters(), *network.buffers()]:
            if value.is_floating_point():
                value.mul_(torch.empty_like(value).uniform_(0.5, 1.5)).add_(0.01)
    return network.eval().to(memory_format=torch.channels_last)


def small(arch: str = "resnet18", stem: str = "cifar") -> nn.Module:
    """Return torchvision's ResNet with an eighth of the channels."""
    return Encoder(arch, stem, width=8)


def with_head(network: nn.Module, head: nn.Module) -> nn.Module:
    network.fc = head
    return network


def holder(**parts: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in nn.ModuleDict(parts).state_dict().items()}


def wrapped(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name the keys as DistributedDataParallel saves them."""
    return {f"module.{key}": value for key, value in state.items()}


def of_rsa():
    online, head = lived_in(small()), nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16))
    parts = {
        "encoder_q": online,
        "encoder_k": small(),
        "encoder_q_head": head,
        "pred": nn.Linear(16, 16),
    }
    return online, wrapped(holder(**parts))


def of_moco():
    head = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 128))
    online = with_head(lived_in(small("resnet50", "imagenet")), head)
    state = wrapped(holder(encoder_q=online, encoder_k=small("resnet50", "imagenet"))) | {
        "module.queue": torch.zeros(128, 8)
    }
    return with_head(online, nn.Identity()), {"epoch": 200, "arch": "resnet50", "state_dict": state}


def of_moco_s_cifar_demo():
    parts = [
        part for name, part in lived_in(small()).named_children() if name not in ("maxpool", "fc")
    ]
    online = nn.Sequential(*parts, nn.Flatten(1))
    net = nn.Sequential(*online, nn.Linear(64, 128))
    return online, {"state_dict": holder(encoder_q=nn.ModuleDict({"net": net}), encoder_k=small())}


def of_simsiam():
    online = with_head(
        lived_in(small(stem="imagenet")),
        nn.Sequential(nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64)),
    )
    state = wrapped(holder(encoder=online, predictor=nn.Linear(64, 64)))
    return with_head(online, nn.Identity()), {"state_dict": state}


def of_solo_learn():
    online = small()
    online.conv1 = nn.Conv2d(3, 8, kernel_size=3, stride=1, padding=2, bias=False)  # for CIFAR
    lived_in(online)
    heads = {
        "projector": nn.Linear(64, 8),
        "momentum_projector": nn.Linear(64, 8),
        "classifier": nn.Linear(64, 10),
    }
    state = holder(backbone=online, momentum_backbone=small(), **heads)
    return online, {"state_dict": state, "pytorch-lightning_version": "2.1"}


def of_lightly():
    heads = pytest.importorskip(
        "lightly.models.modules", reason="lightly is not installed: pip install rsa-fast[dev]"
    )
    online = nn.Sequential(*list(lived_in(small(stem="imagenet")).children())[:-1])
    parts = {"backbone": online, "projection_head": heads.SimCLRProjectionHead(64, 64, 32)}
    return online, {"state_dict": holder(**parts, backbone_momentum=copy.deepcopy(online))}


def of_lightly_s_own_resnet():
    models = pytest.importorskip(
        "lightly.models", reason="lightly is not installed: pip install rsa-fast[dev]"
    )
    network = lived_in(models.ResNetGenerator("resnet-18", width=0.125))
    state = holder(backbone=network)
    network.linear = nn.Identity()
    return network, state


def of_lightly_s_own_resnet_in_a_sequential():
    models = pytest.importorskip(
        "lightly.models", reason="lightly is not installed: pip install rsa-fast[dev]"
    )
    network = lived_in(models.ResNetGenerator("resnet-50", width=0.125))
    online = nn.Sequential(*list(network.children())[:-1], nn.AdaptiveAvgPool2d(1))
    return online, holder(backbone=online)


def of_torchvision():
    network = lived_in(resnet18())
    state = network.state_dict()
    return with_head(network, nn.Identity()), state


SPELLINGS = [of_rsa, of_moco, of_moco_s_cifar_demo, of_simsiam, of_solo_learn, of_torchvision]
SPELLINGS += [of_lightly, of_lightly_s_own_resnet, of_lightly_s_own_resnet_in_a_sequential]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_an_encoder_from_elsewhere_gives_its_network_s_features_bit_for_bit(spelling, tmp_path):
    torch.manual_seed(0)
    source, state = spelling()
    torch.save(state, tmp_path / "there.pth")
    encoder, recipe = load_encoder(tmp_path / "there.pth")
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        expected = source(images).flatten(1)
        assert torch.equal(encoder.eval()(images), expected) and expected.std() > 1e-3
    assert recipe is None


def test_safetensors_hold_the_same_encoder(tmp_path):
    safetensors = pytest.importorskip(
        "safetensors.torch", reason="safetensors is not installed: pip install safetensors"
    )
    torch.manual_seed(0)
    _, state = of_rsa()
    torch.save(state, tmp_path / "there.pth")
    safetensors.save_file(
        {key: value.contiguous() for key, value in state.items()}, tmp_path / "there.safetensors"
    )
    one, other = (
        load_encoder(tmp_path / name)[0].state_dict() for name in ("there.pth", "there.safetensors")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    (tmp_path / "there.safetensors").write_bytes(b"no header")
    with pytest.raises(ValueError, match="is damaged"):
        load_encoder(tmp_path / "there.safetensors")


@pytest.mark.parametrize("method", ["rsa", "moco", "simsiam", "supervised"])
def test_this_project_s_checkpoint_holds_the_online_encoder_and_its_recipe(method, tmp_path):
    torch.manual_seed(0)
    recipe = build_recipe(
        "cifar10",
        method,
        overrides={"width": 8, "out_dim": 8} if method != "supervised" else {"width": 8},
    )
    built = build_method(recipe)
    lived_in(built.encoder)
    state = {"step": 1, "recipe": recipe.model_dump(mode="json"), "method": built.state_dict()}
    encoder, found = load_encoder(checkpoint.save(tmp_path, state, 1))
    assert found == recipe
    expected = built.encoder.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in encoder.state_dict().items())
    assert encoder.conv1.padding == (1, 1) and encoder.conv1.weight.is_contiguous(
        memory_format=torch.channels_last
    )


def failure(tmp_path, state) -> str:
    torch.save(state, tmp_path / "there.pth")
    with pytest.raises(ValueError, match=r"there\.pth") as error:
        load_encoder(tmp_path / "there.pth")
    return str(error.value)


def test_keys_that_are_missing_or_not_known_are_named(tmp_path):
    state = holder(encoder_q=small())
    lost = (
        state.pop("encoder_q.layer2.1.bn2.running_var"),
        state.pop("encoder_q.layer4.0.downsample.0.weight"),
    )
    message = failure(tmp_path, state)
    assert (
        "Missing" in message
        and '"layer2.1.bn2.running_var", "layer4.0.downsample.0.weight"' in message
    )
    state |= {
        "encoder_q.layer2.1.bn2.running_var": lost[0],
        "encoder_q.layer4.0.downsample.0.weight": lost[1],
    }
    state |= {
        "encoder_q.layer2.1.se.weight": torch.zeros(3),
        "encoder_q.norm.weight": torch.zeros(3),
    }
    message = failure(tmp_path, state)
    assert "Unexpected" in message and '"norm.weight", "layer2.1.se.weight"' in message
    del state["encoder_q.conv1.weight"]
    assert "there is no encoder_q.conv1.weight" in failure(tmp_path, state)


def test_what_is_no_encoder_says_what_it_is(tmp_path):
    assert "found no ResNet among ['a', 'b']" in failure(tmp_path, {"a": torch.zeros(3), "b": 1})
    assert "holds list, wanted a dictionary" in failure(tmp_path, [torch.zeros(3)])
    twice = holder(left=small(), right=small())
    assert "ResNets under 'left.', 'right.'; wanted one" in failure(tmp_path, twice)
    short = {
        key: value for key, value in small().state_dict().items() if not key.startswith("layer4.1")
    }
    assert "[2, 2, 2, 1] basic blocks are none of resnet18, resnet34" in failure(tmp_path, short)
    assert "holds more than tensors; if you trust it" in failure(
        tmp_path, {"args": argparse.Namespace(lr=1)}
    )
    (tmp_path / "cut.pth").write_bytes((tmp_path / "there.pth").read_bytes()[:99])
    with pytest.raises(ValueError, match="is damaged"):
        load_encoder(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_encoder(tmp_path / "nowhere.pth")


def test_one_flipped_bit_of_an_encoder_is_found(tmp_path):
    torch.save(small().state_dict(), tmp_path / "whole.pth")
    weight = (
        load_encoder(tmp_path / "whole.pth")[0].conv1.weight.detach().contiguous().numpy().tobytes()
    )
    content = bytearray((tmp_path / "whole.pth").read_bytes())
    content[content.index(weight) + 100] ^= 1
    (tmp_path / "flipped.pth").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"flipped\.pth is damaged .*\n.*the checksum of its part .* is wrong"
    ):
        load_encoder(tmp_path / "flipped.pth")


def test_an_encoder_from_elsewhere_is_scored_by_the_views_of_a_dataset_s_row(folder, tmp_path):
    torch.save(of_simsiam()[1], tmp_path / "there.pth")
    arguments = ["eval", "knn", "--checkpoint", str(tmp_path / "there.pth"), "--data", str(folder)]
    refused = CliRunner().invoke(main, arguments)
    assert refused.exit_code != 0 and "has no recipe: --dataset says" in refused.output
    scored = CliRunner().invoke(main, [*arguments, "--dataset", "stl10"])
    assert scored.exit_code == 0, scored.output
    assert json.loads(scored.stdout.splitlines()[-1])["test_transform"] == "centre crop 64 px"
