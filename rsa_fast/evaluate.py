"""How good a frozen encoder is: kNN and a linear probe on cached features. Accuracies are top-1 in percent.

Protocols carry a name and a version, which stand in every result: `knn/1` and `linear-fast/1`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.order import epoch_order
from pipelines.plain import PlainImages
from pipelines.sources import open_source
from rsa_fast.recipes import Recipe
from rsa_fast.schedules import cosine_ramp

KNN_SETTINGS = {"knn_top1": (200, 0.1), "knn20_top1": (20, 0.07)}  # k, temperature: InstDis/MoCo/RSA code; DINO/solo-learn
KNN_CHUNK = 1024  # queries at a time: 1024 x 1.28M similarities are 5 GiB
PROBE_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
PROBE_EPOCHS = 100
PROBE_BATCH = 256


@torch.no_grad()
def features(encoder: nn.Module, images: PlainImages) -> tuple[Tensor, Tensor]:
    """Float32 features `(N, D)` in eval mode, and labels `(N,)`; the encoder's mode is put back and no buffer changes."""
    training = encoder.training
    encoder.eval()
    with torch.autocast(images.device.type, images.dtype, enabled=images.dtype != torch.float32):
        rows = [(encoder(batch).float(), labels) for batch, labels in images]
    encoder.train(training)
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def knn(bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """Top-1 of the exact weighted vote of the k nearest by cosine, for each of `KNN_SETTINGS`.

    `bank` `(N, D)`, `queries` `(M, D)`; a neighbour's vote is exp(cos / T) (Wu et al. 2018, InstDis). k is cut to N.
    """
    bank, queries = F.normalize(bank, dim=1), F.normalize(queries, dim=1)
    correct = dict.fromkeys(KNN_SETTINGS, 0)
    most = min(max(k for k, _ in KNN_SETTINGS.values()), len(bank))
    for first in range(0, len(queries), KNN_CHUNK):
        cosine, index = (queries[first : first + KNN_CHUNK] @ bank.T).topk(most)  # (chunk, most)
        for name, (k, temperature) in KNN_SETTINGS.items():
            votes = torch.zeros(len(cosine), classes, device=bank.device)
            votes.scatter_add_(1, bank_labels[index[:, :k]], (cosine[:, :k] / temperature).exp())
            correct[name] += int((votes.argmax(1) == labels[first : first + KNN_CHUNK]).sum())
    return {name: 100 * hits / len(queries) for name, hits in correct.items()}


def linear_fast(train: Tensor, train_labels: Tensor, test: Tensor, labels: Tensor, classes: int) -> dict[str, float]:
    """A linear classifier on cached features `(N, D)`: the learning rate is chosen on every tenth training image, then the
    classifier is trained on all of them. Features are standardised by the training set's mean and deviation."""
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    held = epoch_order(len(train), 0, 0) % 10 == 0
    held = torch.from_numpy(held).to(train.device)
    sweep = fit_linear(train[~held], train_labels[~held], classes, PROBE_LRS)
    scores = [top1(train[held], train_labels[held], weight) for weight in sweep]
    best_lr = PROBE_LRS[scores.index(max(scores))]
    (weight,) = fit_linear(train, train_labels, classes, (best_lr,))
    return {"linear_top1": top1(test, labels, weight), "linear_lr": best_lr}


def fit_linear(x: Tensor, labels: Tensor, classes: int, lrs: tuple[float, ...]) -> Tensor:
    """Softmax regressions `(L, D + 1, C)`, one per learning rate, trained side by side: SGD, momentum .9, cosine, from 0."""
    x = F.pad(x, (0, 1), value=1)  # the bias
    weight = torch.zeros(len(lrs), x.shape[1], classes, device=x.device)
    momentum = torch.zeros_like(weight)
    lr = torch.tensor(lrs, device=x.device)[:, None, None]
    target = F.one_hot(labels, classes).float()
    batches = -(-len(x) // PROBE_BATCH)
    for epoch in range(PROBE_EPOCHS):
        order = torch.from_numpy(epoch_order(len(x), 1, epoch)).to(x.device)
        for step, rows in enumerate(order.split(PROBE_BATCH)):
            ramp = cosine_ramp(epoch + step / batches, PROBE_EPOCHS)
            error = torch.softmax(x[rows] @ weight, -1) - target[rows]  # (L, B, C)
            momentum.mul_(0.9).add_(x[rows].T @ error / len(rows))
            weight.sub_(momentum * lr * ramp)
    return weight


def top1(x: Tensor, labels: Tensor, weight: Tensor) -> float:
    predicted = (F.pad(x, (0, 1), value=1) @ weight).argmax(-1)
    return 100 * float((predicted == labels).float().mean())


class Evaluation:
    """The labelled train and test splits of a dataset, opened once, to score an encoder as often as wanted.

    Raises FileNotFoundError or ValueError when there is no labelled train and test split.
    """

    def __init__(self, data: Path, recipe: Recipe, device: torch.device, dtype: torch.dtype, cache: Path | None = None) -> None:
        sources = [open_source(data, split, cache) for split in ("train", "test")]
        train, test = (source.manifest for source in sources)
        if not (train.labelled and test.labelled):
            raise ValueError(f"{data} has no labels for both train and test images: nothing to evaluate on")
        if train.classes != test.classes:
            differ = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(f"train and test under {data} do not have the same classes; only one has {', '.join(differ[:10])}")
        self.classes = len(train.classes)
        opened = (recipe.views, recipe.eval_resize_px, PROBE_BATCH, device, dtype, recipe.threads)
        self.train, self.test = (PlainImages(source, *opened) for source in sources)

    def score(self, encoder: nn.Module, protocols: tuple[str, ...] = ("knn", "linear")) -> dict[str, float | str]:
        """The results of the protocols named, in one dict."""
        train, test = features(encoder, self.train), features(encoder, self.test)
        results: dict[str, float | str] = {}
        if "knn" in protocols:
            results |= {"knn_protocol": "knn/1", **knn(*train, *test, self.classes)}
        if "linear" in protocols:
            results |= {"linear_protocol": "linear-fast/1", **linear_fast(*train, *test, self.classes)}
        return results


def load_encoder(path: Path) -> tuple[nn.Module, Recipe]:
    """The trained encoder of a checkpoint, channels_last on the CPU, and the recipe it was trained by."""
    from rsa_fast import checkpoint
    from rsa_fast.methods import build_method

    state = checkpoint.load(path)
    recipe = Recipe.model_validate(state["recipe"])
    method = build_method(recipe)
    method.load_state_dict(state["method"])
    return method.encoder, recipe
