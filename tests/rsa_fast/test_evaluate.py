from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import natural_image, write_folder
from PIL import Image
from torchvision import transforms

from pipelines.plain import PlainImages, plain_image
from pipelines.sources import open_source
from pipelines.views import ViewSpec
from rsa_fast import evaluate
from rsa_fast.evaluate import Evaluation, features, fit_linear, knn, linear_fast
from rsa_fast.networks import Encoder
from rsa_fast.recipes import build_recipe

CPU = torch.device("cpu")


def clusters(count: int, spread: float, seed: int, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.eye(8)[:classes] * 2
    return centres[labels] + spread * torch.randn(count, 8, generator=generator), labels


def naive_knn(bank, bank_labels, queries, labels, classes, k, temperature) -> float:
    """One query at a time, in Python."""
    hits = 0
    for query, label in zip(queries.tolist(), labels.tolist(), strict=True):
        scored = []
        for row, owner in zip(bank.tolist(), bank_labels.tolist(), strict=True):
            inner = sum(a * b for a, b in zip(query, row, strict=True))
            scored.append((inner / math.hypot(*query) / math.hypot(*row), owner))
        votes = [0.0] * classes
        for cosine, owner in sorted(scored, reverse=True)[:k]:
            votes[owner] += math.exp(cosine / temperature)
        hits += votes.index(max(votes)) == label
    return 100 * hits / len(labels)


def test_knn_equals_a_loop_over_queries(monkeypatch):
    monkeypatch.setattr(evaluate, "KNN_CHUNK", 7)  # 40 queries: the last chunk is short
    bank, queries = clusters(300, 1.6, 0), clusters(40, 1.6, 1)
    scores = knn(*bank, *queries, 3)
    assert scores["knn_top1"] == pytest.approx(naive_knn(*bank, *queries, 3, 200, 0.1))
    assert scores["knn20_top1"] == pytest.approx(naive_knn(*bank, *queries, 3, 20, 0.07))
    assert 40 < scores["knn_top1"] < 100 and scores["knn_top1"] != scores["knn20_top1"]


def test_knn_of_a_bank_smaller_than_k_uses_all_of_it():
    bank, queries = clusters(9, 0.1, 0), clusters(6, 0.1, 1)
    assert knn(*bank, *queries, 3) == {"knn_top1": 100.0, "knn20_top1": 100.0}


def test_the_linear_probe_learns_what_can_be_learned_and_no_more():
    assert linear_fast(*clusters(600, 0.2, 0), *clusters(90, 0.2, 1), 3)["linear_top1"] == 100
    x, labels = clusters(600, 1.0, 2)
    noise = labels[torch.randperm(600, generator=torch.Generator().manual_seed(3))]
    assert linear_fast(x, noise, *clusters(300, 1.0, 4), 3)["linear_top1"] < 55


def test_side_by_side_fits_equal_torch_s_own_sgd():
    x, labels = clusters(300, 1.0, 0)
    sweep = fit_linear(x, labels, 3, (0.03, 0.3))
    for weight, lr in zip(sweep, (0.03, 0.3), strict=True):
        layer = torch.nn.Linear(8, 3)
        torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
        steps = evaluate.PROBE_EPOCHS * 2  # 300 images in batches of 256
        for step in range(steps):
            order = torch.from_numpy(evaluate.epoch_order(300, 1, step // 2))
            rows = order[:256] if step % 2 == 0 else order[256:]
            optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(x[rows]), labels[rows]).backward()
            optimizer.step()
        torch.testing.assert_close(weight[:8].T, layer.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(weight[8], layer.bias, rtol=1e-3, atol=1e-4)


def test_features_come_from_eval_mode_and_change_no_buffer(folder):
    torch.manual_seed(0)
    encoder = Encoder("resnet18", "cifar", width=4).train()
    buffers = {name: value.clone() for name, value in encoder.named_buffers()}
    spec = ViewSpec(20, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    source = open_source(folder, "test")
    images = PlainImages(source, spec, None, 7, CPU, torch.float32, 2)
    rows, labels = features(encoder, images)
    assert encoder.training and all(torch.equal(value, buffers[name]) for name, value in encoder.named_buffers())
    one = transforms.Compose([transforms.ToTensor(), transforms.Normalize(spec.mean, spec.std)])
    with torch.no_grad():
        expected = encoder.eval()(torch.stack([one(Image.fromarray(source.read(i))) for i in range(20)]))
    torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(labels, torch.from_numpy(source.manifest.labels))


@pytest.mark.parametrize(
    ("size", "resize_px", "reference"),
    [
        ((32, 32), None, transforms.CenterCrop(32)),
        ((96, 96), None, transforms.CenterCrop(64)),  # STL-10
        ((375, 500), 256, transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])),  # ImageNet
        ((40, 30), None, transforms.Compose([transforms.Resize(32), transforms.CenterCrop(32)])),  # too small: filled
    ],
)
def test_plain_images_equal_torchvision_s_transform(size, resize_px, reference):
    image = natural_image(0, *size)
    expected = np.asarray(reference(Image.fromarray(image)))
    assert (plain_image(image, expected.shape[0], resize_px) == expected).all()


def test_data_that_cannot_be_evaluated_on_says_why(tmp_path):
    recipe = build_recipe("cifar10", "rsa")
    write_folder(tmp_path / "a", {"train": 2})
    with pytest.raises(FileNotFoundError, match="no val/ or test/"):
        Evaluation(tmp_path / "a", recipe, CPU, torch.float32)
    write_folder(tmp_path / "b", {"train": 2}, classes=3)
    write_folder(tmp_path / "b", {"test": 2}, classes=2)
    with pytest.raises(ValueError, match="only one has class_2"):
        Evaluation(tmp_path / "b", recipe, CPU, torch.float32)
