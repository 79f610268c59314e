from __future__ import annotations

import argparse
import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from rsa_fast.cli import main
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.evaluate import evaluate
from rsa_fast.evaluation.export import export
from rsa_fast.methods.method import build_method
from rsa_fast.networks import Encoder
from rsa_fast.recipes import build_recipe
from rsa_fast.training import checkpoint
from tests.helpers import Exploit, invoke, result_of


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
    # From 16 channels on, both networks call the same operations of oneDNN.
    network = lived_in(models.ResNetGenerator("resnet-18", width=0.25))
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


def of_swav():
    head = {"projection_head": nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16))}
    online = lived_in(small(stem="imagenet"))
    state = online.state_dict() | holder(**head, prototypes=nn.Linear(16, 30, bias=False))
    return online, {"epoch": 800, "state_dict": wrapped(state), "amp": {"loss_scaler0": {}}}


def of_byol_pytorch():
    """A learner has its network twice, in itself and in the online encoder."""
    online = lived_in(small(stem="imagenet"))
    net = with_head(copy.deepcopy(online), nn.Linear(64, 10))
    encoder = nn.ModuleDict({"net": net, "projector": nn.Linear(64, 8)})
    target = nn.ModuleDict({"net": small(stem="imagenet"), "projector": nn.Linear(64, 8)})
    parts = {"net": net, "online_encoder": encoder, "target_encoder": target}
    return online, holder(**parts, online_predictor=nn.Linear(8, 8))


def of_dino(chosen: str = "student"):
    """The full file of a training, with its arguments, of which the student is read."""
    networks = {name: lived_in(small(stem="imagenet")) for name in ("student", "teacher")}
    student, teacher = (
        holder(backbone=network, head=nn.Linear(64, 8)) for network in networks.values()
    )
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(8)}}, "param_groups": [{"lr": 0.3}]}
    args = argparse.Namespace(arch="resnet50", lr=0.3, output_dir="/there", local_crops=(0.05, 0.4))
    return networks[chosen], {
        "student": wrapped(student),
        "teacher": teacher,
        "optimizer": optimizer,
        "epoch": 800,
        "args": args,
        "dino_loss": {"center": torch.zeros(1, 8)},
    }


def of_vissl():
    online = lived_in(small(stem="imagenet"))
    model = {
        "trunk": holder(_feature_blocks=online),
        "heads": {"0.clf.0.weight": torch.ones(9, 64)},
    }
    return online, {"phase_idx": 9, "classy_state_dict": {"base_model": {"model": model}}}


def of_moco_v3():
    head = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32))
    online = with_head(lived_in(small(stem="imagenet")), head)
    state = holder(base_encoder=online, momentum_encoder=small(), predictor=nn.Linear(32, 32))
    return with_head(online, nn.Identity()), {"arch": "resnet18", "state_dict": wrapped(state)}


def of_barlow_twins():
    online = lived_in(small(stem="imagenet"))
    state = holder(backbone=online, projector=nn.Linear(64, 8), bn=nn.BatchNorm1d(8))
    return online, {"epoch": 1000, "model": wrapped(state), "optimizer": {"param_groups": []}}


def of_lightning():
    online = lived_in(small())
    state = holder(model=nn.ModuleDict({"encoder": online, "projection": nn.Linear(64, 8)}))
    callbacks = {"ModelCheckpoint": {"best_model_score": torch.tensor(3.0)}}
    return online, {
        "pytorch-lightning_version": "2.1.0",
        "state_dict": state,
        "callbacks": callbacks,
        "optimizer_states": [{"state": {0: {"momentum_buffer": torch.zeros(8)}}}],
        "hyper_parameters": {"lr": 0.1},
    }


def of_timm_s_training():
    online = lived_in(small(stem="imagenet"))
    states = {"state_dict": holder(m=online), "state_dict_ema": holder(m=lived_in(small()))}
    return online, {"arch": "resnet18", "args": argparse.Namespace(lr=0.1), **states}


SPELLINGS = [of_rsa, of_moco, of_moco_s_cifar_demo, of_simsiam, of_solo_learn, of_torchvision]
SPELLINGS += [of_lightly, of_lightly_s_own_resnet, of_lightly_s_own_resnet_in_a_sequential]
SPELLINGS += [of_swav, of_byol_pytorch, of_dino, of_vissl, of_moco_v3, of_barlow_twins]
SPELLINGS += [of_lightning, of_timm_s_training]


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
    assert "contains a list, not a dictionary of tensors" in failure(tmp_path, [torch.zeros(3)])
    twice = holder(left=small(), right=small())
    assert "ResNets under 'left.', 'right.'; choose one" in failure(tmp_path, twice)
    short = {
        key: value for key, value in small().state_dict().items() if not key.startswith("layer4.1")
    }
    message = failure(tmp_path, short)
    assert "[2, 2, 2, 1] basic blocks do not belong to any of resnet10, resnet18, " in message
    message = failure(tmp_path, {"args": Path("/there")})
    assert "contains more than tensors; if you trust it" in message
    (tmp_path / "cut.pth").write_bytes((tmp_path / "there.pth").read_bytes()[:99])
    with pytest.raises(ValueError, match="is damaged"):
        load_encoder(tmp_path / "cut.pth")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_encoder(tmp_path / "nowhere.pth")


# ---- Several networks in a file


def save(path: Path, state) -> Path:
    torch.save(state, path)
    return path


def test_a_line_says_what_of_a_file_is_read_and_left_out(tmp_path, caplog):
    caplog.set_level("INFO", "rsa_fast")
    load_encoder(save(tmp_path / "swav.pth", of_swav()[1]))
    assert caplog.messages == [
        "swav.pth: 120 tensors under 'state_dict.module.' are loaded; not loaded, with the number "
        "of tensors: projection_head (7), prototypes (1)"
    ]
    caplog.clear()
    load_encoder(save(tmp_path / "byol.pth", of_byol_pytorch()[1]))
    (line,) = caplog.messages
    assert "120 tensors under 'net.' are loaded; those under 'online_encoder.net.' are the" in line
    assert "fc (2), online_encoder (4), target_encoder (122), online_predictor (2)" in line
    assert line.endswith("--key target_encoder loads that network instead")
    caplog.clear()
    load_encoder(save(tmp_path / "plain.pth", small().state_dict()))
    assert not caplog.messages  # all of it is read


@pytest.mark.parametrize("key", ["student", "teacher", "student.module"])
def test_a_key_chooses_among_the_networks_of_a_file(tmp_path, key, caplog):
    caplog.set_level("INFO", "rsa_fast")
    torch.manual_seed(0)
    source, state = of_dino(key.partition(".")[0])
    encoder, _ = load_encoder(save(tmp_path / "dino.pth", state), key=key)
    expected = source.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in encoder.state_dict().items())
    other = {"student": "teacher", "teacher": "student"}[key.partition(".")[0]]
    assert f"{other} (122)" in caplog.text and f"--key {other} loads that network" in caplog.text


def test_a_file_whose_only_network_is_a_teacher_gives_it(tmp_path):
    source, state = of_dino("teacher")
    encoder, _ = load_encoder(save(tmp_path / "t.pth", {"teacher": state["teacher"]}))
    assert torch.equal(encoder.conv1.weight, source.conv1.weight)


def test_a_key_that_is_missing_or_wrong_is_said(tmp_path):
    path = save(tmp_path / "two.pth", holder(left=small(), right=small(), far=small()))
    with pytest.raises(ValueError, match="choose one by --key left or right or far"):
        load_encoder(path)
    with pytest.raises(ValueError, match=r"no ResNet under the key 'righ', only under 'left"):
        load_encoder(path, key="righ")


def test_eval_export_and_init_from_take_the_key(folder, tmp_path):
    path = save(tmp_path / "dino.pth", of_dino()[1])
    arguments = ["eval", "knn", "--checkpoint", str(path), "--data", str(folder)]
    scores = {}
    for key in ("student", "teacher"):
        extra = ["--dataset", "stl10", "--key", key]
        result = invoke(main, *arguments, *extra)
        scores[key] = result_of(result)
        assert scores[key] == evaluate(path, folder, "knn", dataset="stl10", key=key)
    assert scores["teacher"]["key"] == "teacher"

    arguments = ["export", "--checkpoint", str(path), "--key", "teacher"]
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    out = tmp_path / "teacher.safetensors"
    result = invoke(main, *arguments, "--format", "safetensors", "--out", out)
    assert result.exit_code == 0, result.output
    (teacher, _), (exported, _) = load_encoder(path, key="teacher"), load_encoder(out)
    assert torch.equal(exported.conv1.weight, teacher.conv1.weight)
    assert "--key teacher" in (tmp_path / "README.md").read_text()
    refused = invoke(main, "train", folder, "--key", "teacher")
    assert "--key is only valid with --init-from" in refused.output


def test_the_card_of_another_network_than_the_scored_one_has_no_scores(tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is not installed")
    recipe = build_recipe("cifar10", "byol", overrides={"width": 8, "hidden_dim": 8, "out_dim": 8})
    built = build_method(recipe)
    state = {"step": 1, "recipe": recipe.model_dump(mode="json"), "method": built.state_dict()}
    path = checkpoint.save(tmp_path / "run/checkpoints", state, 1)
    (tmp_path / "run/result.json").write_text('{"step": 1, "knn_top1": 91.5}')
    cards = []
    for name, key in (("online", None), ("target", "target")):
        out = tmp_path / name / "encoder.safetensors"
        export(path, "safetensors", out, key=key)
        cards.append(out.with_name("README.md").read_text())
    assert "91.5" in cards[0] and "91.5" not in cards[1]


# ---- Files that cannot be used


@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_file_is_executed_and_what_it_wants_is_named(tmp_path, zipped):
    marker = tmp_path / "executed"
    for content in (Exploit(marker), {"args": argparse.Namespace(hook=Exploit(marker))}):
        state = {"state_dict": small().state_dict(), "more": content}
        path = tmp_path / "there.pth"
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match=r"it contains calls of .*posix\.mkdir") as error:
            load_encoder(path)
        assert len(str(error.value).splitlines()) == 2 and len(str(error.value)) < 500
    assert not marker.exists()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_namespace_is_read_from_a_file_of_an_old_version_too(tmp_path):
    source, state = of_dino()
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    encoder, _ = load_encoder(tmp_path / "old.pth")
    assert torch.equal(encoder.conv1.weight, source.conv1.weight)


def test_a_dictionary_that_contains_itself_is_read_once(tmp_path):
    state = {"state_dict": small().state_dict()}
    state["again"] = state
    encoder, _ = load_encoder(save(tmp_path / "there.pth", state))
    assert torch.equal(encoder.conv1.weight, state["state_dict"]["conv1.weight"])


def test_a_resnet_that_cannot_be_built_is_described_in_a_line(tmp_path):
    wide = Encoder("resnet50", width=16).state_dict()
    wide["conv1.weight"] = torch.zeros(8, 3, 7, 7)  # a stem that is not as wide as the stages
    message = failure(tmp_path, {"state_dict": wide})
    assert (
        "of the 318 weights of a resnet50 of width 8 with the imagenet stem, " in message
        and "bn1.weight is (16,) in the file and (8,) in the network" in message
    )
    assert "\n" not in message and len(message) < 400
    other = {f"block1.layer.{i}.conv.weight": torch.zeros(1) for i in range(100)}
    assert len(failure(tmp_path, {"state_dict": other})) < 500
    assert "but needs 4 dimensions" in failure(
        tmp_path, small().state_dict() | {"conv1.weight": torch.zeros(8)}
    )


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_weights_that_are_not_finite_are_refused_with_the_first_name(tmp_path, value):
    state = of_dino()[1]
    state["teacher"]["backbone.layer2.0.bn1.running_var"][3] = value
    load_encoder(save(tmp_path / "there.pth", state))  # which reads the student
    with pytest.raises(
        ValueError, match=r"teacher\.backbone\.layer2\.0\.bn1\.running_var has values that are NaN"
    ):
        load_encoder(tmp_path / "there.pth", key="teacher")


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
    refused = invoke(main, *arguments)
    assert refused.exit_code != 0 and "has no recipe: use --dataset" in refused.output
    scored = invoke(main, *arguments, "--dataset", "stl10")
    assert result_of(scored)["test_transform"] == "centre crop 64 px"
