"""The files of examples/ run on a few small images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from rsa_fast import build_recipe, load_encoder, train
from rsa_fast.methods.method import build_method
from rsa_fast.pipelines.named import load_module, load_object
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.training.metrics import read_metrics
from tests.helpers import ROOT, write_folder
from tests.tiny_runs import NARROW

EXAMPLES = ROOT / "examples"
SMALL = {"epochs": 1, "hidden_dim": 16, "out_dim": 8, "precision": "fp32", "knn_every_epochs": 0}


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """40 images in two class folders: 32 to train on, 8 are held out."""
    return write_folder(tmp_path_factory.mktemp("own"), {"my_photos": 20}, (24, 24)) / "my_photos"


def test_there_are_four_of_at_most_a_page():
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.stem for file in files] == ["own_backbone", "own_images", "own_loop", "own_method"]
    assert all(len(file.read_text().splitlines()) <= 80 for file in files)


def test_own_images_are_trained_on_scored_embedded_and_exported(photos, tmp_path):
    main = load_module(EXAMPLES / "own_images.py").main
    out = tmp_path / "run"
    scores = main(photos, out, **NARROW, **SMALL)
    assert scores.keys() == {"knn_top1", "linear_top1"}
    assert all(100 * 8 * value % 100 == 0 for value in scores.values())  # of 8 test images
    with np.load(out / "embeddings.npz") as rows:
        assert rows["features"].shape == (40, 32)
    encoder, _ = load_encoder(out)
    weights = load_file(out / "encoder" / "encoder.safetensors")
    assert all(torch.equal(encoder.state_dict()[key], value) for key, value in weights.items())


def test_the_own_method_s_loss_is_its_formula_and_it_trains(folder, tmp_path):
    fields = SMALL | NARROW | {"batch_size": 8, "views.size_px": 16}
    recipe = build_recipe("cifar10", str(EXAMPLES / "own_method.py"), overrides=fields)
    method = build_method(recipe).eval()
    views = {name: torch.randn(3, 3, 16, 16) for name in VIEWS}
    loss = method(Batch(torch.zeros(3), views), {"step": 0}).total
    terms = [
        2
        - F.cosine_similarity(q(method, views["aggressive_1"][i]), z(method, views["weak_2"][i]))
        - F.cosine_similarity(q(method, views["aggressive_2"][i]), z(method, views["weak_1"][i]))
        for i in range(3)
    ]
    torch.testing.assert_close(loss, torch.cat(terms).mean())
    train(recipe, folder, tmp_path / "run", stop_at_step=5)
    assert any("agreement" in record for record in read_metrics(tmp_path / "run"))


def q(method, image):
    return method.predictor(method.online(image[None]))


def z(method, image):
    return method.online(image[None])


def test_the_own_backbone_trains_from_a_module_and_is_what_arch_names(photos, tmp_path):
    spec = f"{EXAMPLES / 'own_backbone.py'}:small"
    network = load_object(spec)()
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, network.feature_dim)
    main = load_module(EXAMPLES / "own_backbone.py").main
    assert 0 <= main(photos, tmp_path / "run", **SMALL) <= 100
    recipe = build_recipe("auto", "byol", data=photos, arch=spec, **SMALL)
    assert type(build_method(recipe).encoder) is type(network)


def test_the_own_loop_reads_each_epoch_once_and_repeats_itself(folder):
    main = load_module(EXAMPLES / "own_loop.py").main
    losses = main(folder, epochs=2, batch_size=8)
    assert len(losses) == 2 and all(-1 <= loss <= 1 for loss in losses)
    assert main(folder, epochs=1, batch_size=8) == losses[:1]
