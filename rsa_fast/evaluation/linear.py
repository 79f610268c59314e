"""Linear classifiers on the features of a frozen encoder: the RSA paper's two protocols, and a fast one.

Features are `(N, D)` float32 with labels `(N,)` beside them; accuracies are top-1 in percent. `fast` reads the features of
plain images, made once. `rsa_small` and `rsa_large` read those of randomly cropped and flipped images: `batches(epoch)`
yields an epoch of them, on every rank the global batch's, so that all ranks train the same classifier. Of these the test
accuracy after the last epoch comes first, and second the best of all epochs, which is what the reference codes report.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines.order import epoch_order
from rsa_fast.distributed import rank
from rsa_fast.schedules import cosine_ramp

Features = tuple[Tensor, Tensor]  # (N, D), (N,)
Batches = Callable[[int], Iterable[Features]]

BATCH_SIZE = 256  # eval_single.py, eval_multi.py in github.com/tmllab/RSA
FAST_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
FAST_EPOCHS = 100
SMALL_EPOCHS = 100
LARGE_EPOCHS = 40


def rsa_small(
    batches: Batches,
    test: Callable[[], Features],
    classes: int,
    seed: int,
    epochs: int = SMALL_EPOCHS,
    nesterov: bool = True,
) -> dict[str, float]:
    """The protocol of CIFAR, STL-10 and Tiny ImageNet (RSA 4.1, after MoCo): raw features, SGD with lr 30, a tenth of it from
    60% and a hundredth from 80% of the epochs on. `nesterov` is in the code (eval_single.py), not in the paper.

    `test()` is asked for the test set's features after every epoch.
    """
    rows, _ = test()
    head = linear_layer(rows.shape[1], classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.SGD(
        head.to(rows.device).parameters(), lr=30, momentum=0.9, nesterov=nesterov
    )
    return {
        "linear_nesterov": nesterov,
        **train_head(head, optimizer, (0.6, 0.8), epochs, batches, test),
    }


def rsa_large(
    batches: Batches,
    train: Features,
    test: Features,
    classes: int,
    seed: int,
    epochs: int = LARGE_EPOCHS,
) -> dict[str, float]:
    """The protocol of ImageNet (RSA 4.1, after Mean Shift's eval_linear.py): features of unit length, standardised by the
    training set's mean and unbiased variance; SGD with lr .01, a tenth of it from epoch 15 and a hundredth from epoch 30 of
    40 on, at the same fractions of other `epochs`.

    The statistics are of plain training images, as Mean Shift's; the reference code takes them of cropped ones where it
    reads image files. Features that are all zero keep the length zero, where the reference divides by it.
    """
    variance, mean = torch.var_mean(F.normalize(train[0], dim=1), dim=0)

    def standardise(batch: Features) -> Features:
        return (F.normalize(batch[0], dim=1) - mean) / (variance + 1e-5).sqrt(), batch[1]

    head = linear_layer(len(mean), classes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in head.parameters():  # as torch initialises nn.Linear
        nn.init.uniform_(parameter, -(len(mean) ** -0.5), len(mean) ** -0.5, generator=generator)
    optimizer = torch.optim.SGD(
        head.to(mean.device).parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4
    )
    test = standardise(test)
    return train_head(
        head,
        optimizer,
        (15 / 40, 30 / 40),
        epochs,
        lambda epoch: map(standardise, batches(epoch)),
        lambda: test,
    )


def linear_layer(dim: int, classes: int) -> nn.Linear:
    """A linear layer on the CPU, uninitialised: torch's random generator is not used."""
    return nn.Linear(dim, classes, device="meta").to_empty(device="cpu")


def train_head(
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    drops: tuple[float, float],
    epochs: int,
    batches: Batches,
    test: Callable[[], Features],
) -> dict[str, float]:
    """Cross-entropy; the learning rate falls to a tenth after each of the fractions `drops` of the epochs, rounded."""
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [round(drop * epochs) for drop in drops]
    )
    scores = []
    for epoch in range(epochs):
        for rows, labels in batches(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(head(rows), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives no types
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            rows, labels = test()
            scores.append(top1(head(rows), labels))
        if rank() == 0:
            print(f"linear epoch {epoch + 1}/{epochs}  top1 {scores[-1]:.2f}", file=sys.stderr)
    return {"linear_top1": scores[-1], "linear_best_top1": max(scores), "linear_epochs": epochs}


def fast(train: Features, test: Features, classes: int) -> dict[str, float]:
    """The learning rate is chosen on every tenth training image, then the classifier is trained on all of them. Features are
    standardised by the training set's mean and deviation."""
    mean, std = train[0].mean(0), train[0].std(0).clamp(min=1e-6)

    def standardise(rows: Tensor) -> Tensor:
        return F.pad((rows - mean) / std, (0, 1), value=1)  # the last column is the bias's

    def batch(
        ids: Tensor,
    ) -> Features:  # a batch at a time: no second copy of ImageNet's features, 10 GB
        return standardise(train[0][ids]), train[1][ids]

    order = torch.from_numpy(epoch_order(len(train[0]), 0, 0)).to(mean.device)
    held, rest = (order % 10 == 0).nonzero()[:, 0], (order % 10 != 0).nonzero()[:, 0]
    rows, labels = batch(held)
    scores = [
        top1(rows @ weight, labels) for weight in fit(batch, rest, len(mean) + 1, classes, FAST_LRS)
    ]
    best_lr = FAST_LRS[scores.index(max(scores))]
    (weight,) = fit(
        batch, torch.arange(len(order), device=mean.device), len(mean) + 1, classes, (best_lr,)
    )
    return {"linear_top1": top1(standardise(test[0]) @ weight, test[1]), "linear_lr": best_lr}


def fit(
    batch: Callable[[Tensor], Features], ids: Tensor, dim: int, classes: int, lrs: tuple[float, ...]
) -> Tensor:
    """Softmax regressions `(L, dim, C)`, one per learning rate, trained side by side on `batch` of `ids`: SGD, momentum .9,
    cosine, from 0."""
    weight = torch.zeros(len(lrs), dim, classes, device=ids.device)
    momentum = torch.zeros_like(weight)
    lr = torch.tensor(lrs, device=ids.device)[:, None, None]
    steps = -(-len(ids) // BATCH_SIZE)
    for epoch in range(FAST_EPOCHS):
        order = torch.from_numpy(epoch_order(len(ids), 1, epoch)).to(ids.device)
        for step, chosen in enumerate(torch.split(order, BATCH_SIZE)):
            ramp = cosine_ramp(epoch + step / steps, FAST_EPOCHS)
            rows, labels = batch(ids[chosen])
            error = torch.softmax(rows @ weight, -1) - F.one_hot(labels, classes)  # (L, B, C)
            momentum.mul_(0.9).add_(rows.T @ error / len(rows))
            weight.sub_(momentum * lr * ramp)
    return weight


def top1(logits: Tensor, labels: Tensor) -> float:
    return 100 * int((logits.argmax(-1) == labels).sum()) / len(labels)
