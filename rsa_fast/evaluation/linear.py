"""Linear classifiers on a frozen encoder: the two protocols of the RSA paper, and a fast one.

Features are `(N, D)` float32, labels are `(N,)`, and accuracies are top-1 in percent. `fast` trains
on features of plain images, which are computed once. Each rank passes its own rows, which may be in
host memory and in half precision (see `features`). Every rank has all features of the test set on
its device. `rsa_small` and `rsa_large` train on features of randomly cropped and flipped images.
`batches(epoch)` yields the features of one epoch. Every rank receives the global batch, so that all
ranks train the same classifier.

All of them add the classifier's outputs for the test images to `predictions`, if it is given. They
also report `linear_top5` if there are more than ten classes.

`rsa_small` and `rsa_large` report two test accuracies. `linear_top1` is the accuracy after the last
epoch. `linear_best_top1` is the best of all epochs, which the reference codes report.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsa_fast.distributed import rank
from rsa_fast.evaluation.accuracy import Predictions
from rsa_fast.evaluation.features import (
    LabelledFeatures,
    gather_rows,
    mean_and_variance,
    take_rows,
)
from rsa_fast.pipelines.order import epoch_order
from rsa_fast.schedules import cosine_ramp

Batches = Callable[[int], Iterable[LabelledFeatures]]

BATCH_SIZE = 256  # eval_single.py, eval_multi.py in github.com/tmllab/RSA
FAST_LRS = (0.01, 0.03, 0.1, 0.3, 1.0)
FAST_EPOCHS = 100
SMALL_EPOCHS = 100
LARGE_EPOCHS = 40
TEST_ROWS = 2048  # number of rows whose logits are computed at a time, for all `FAST_LRS` together
HOST = torch.device("cpu")

log = logging.getLogger("rsa_fast")


def rsa_small(
    batches: Batches,
    test: Callable[[], LabelledFeatures],
    classes: int,
    seed: int,
    epochs: int = SMALL_EPOCHS,
    nesterov: bool = True,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """The protocol for CIFAR, STL-10 and Tiny ImageNet (RSA 4.1, after MoCo).

    It trains on raw features by SGD with a learning rate of 30, which falls to 3 after 60% of the
    epochs and to 0.3 after 80%. `nesterov` is in the reference code (eval_single.py) but not in the
    paper. `test()` is called after every epoch for the features of the test set.
    """
    features, _ = test()
    head = linear_layer(features.shape[1], classes)
    nn.init.normal_(head.weight, std=0.01, generator=torch.Generator().manual_seed(seed))
    nn.init.zeros_(head.bias)
    parameters = head.to(features.device).parameters()
    optimizer = torch.optim.SGD(parameters, lr=30, momentum=0.9, nesterov=nesterov)
    scores = train_head(
        head,
        optimizer,
        drops=(0.6, 0.8),
        epochs=epochs,
        batches=batches,
        test=test,
        predictions=predictions,
    )
    return {"linear_nesterov": nesterov, **scores}


def rsa_large(
    batches: Batches,
    train: LabelledFeatures,
    test: LabelledFeatures,
    classes: int,
    seed: int,
    epochs: int = LARGE_EPOCHS,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """The protocol for ImageNet (RSA 4.1, after Mean Shift's eval_linear.py).

    Features are scaled to unit length, then standardised by the training set's mean and unbiased
    variance. SGD starts with a learning rate of 0.01, which falls to a tenth after 15 of 40 epochs
    and to a hundredth after 30. Other values of `epochs` keep these fractions.

    The mean and the variance are those of plain training images, as in Mean Shift. The RSA code
    takes them from cropped images when it reads image files. Features that are all zero keep the
    length zero here, whereas the RSA code divides by zero. Each rank passes its own rows of
    `train`.
    """
    mean, variance = mean_and_variance(train, test[0].device, prepare=F.normalize)

    def standardise(batch: LabelledFeatures) -> LabelledFeatures:
        return (F.normalize(batch[0], dim=1) - mean) / (variance + 1e-5).sqrt(), batch[1]

    head = linear_layer(len(mean), classes)
    generator, bound = torch.Generator().manual_seed(seed), len(mean) ** -0.5
    for parameter in head.parameters():  # the initialisation of torch's nn.Linear
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    parameters = head.to(mean.device).parameters()
    optimizer = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
    test = standardise(test)
    return train_head(
        head,
        optimizer,
        drops=(15 / 40, 30 / 40),
        epochs=epochs,
        batches=lambda epoch: map(standardise, batches(epoch)),
        test=lambda: test,
        predictions=predictions,
    )


def linear_layer(dim: int, classes: int) -> nn.Linear:
    """An uninitialised linear layer on the CPU. Its creation uses no random numbers of torch."""
    return nn.Linear(dim, classes, device="meta").to_empty(device="cpu")


def train_head(
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    drops: tuple[float, float],
    epochs: int,
    batches: Batches,
    test: Callable[[], LabelledFeatures],
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """Train `head` with cross-entropy and test it after every epoch.

    `drops` are two fractions of the epochs. After each of them, rounded to an integer number of
    epochs, the learning rate is divided by 10.
    """
    milestones = [round(drop * epochs) for drop in drops]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones)
    scores = []
    for epoch in range(epochs):
        for features, labels in batches(epoch):
            optimizer.zero_grad()
            loss = F.cross_entropy(head(features), labels)
            loss.backward()  # type: ignore[no-untyped-call]  # torch gives no types
            optimizer.step()
        schedule.step()
        with torch.no_grad():
            features, labels = test()
            logits = head(features)
            scores.append(top1(logits, labels))
        if rank() == 0:
            log.info(f"linear epoch {epoch + 1}/{epochs}  top1 {scores[-1]:.2f}")
    predictions = predictions or Predictions(head.out_features)
    predictions.add(logits, labels)
    last = predictions.scores("linear") | {"linear_top1": scores[-1]}
    return {**last, "linear_best_top1": max(scores), "linear_epochs": epochs}


def fast(
    train: LabelledFeatures,
    test: LabelledFeatures,
    classes: int,
    predictions: Predictions | None = None,
) -> dict[str, float]:
    """Choose a learning rate, then train a classifier with it on all training features.

    The learning rate is the one of `FAST_LRS` whose classifier is best on a tenth of the training
    images, after training on the others. Features are standardised by the training set's mean and
    deviation. Each rank passes its own rows of `train`.
    """
    device = test[0].device
    mean, variance = mean_and_variance(train, device)
    std = variance.sqrt().clamp(min=1e-6)
    train_labels = gather_rows(train[1].to(device))

    def standardise(features: Tensor) -> Tensor:
        return F.pad((features - mean) / std, (0, 1), value=1)  # the last column is for the bias

    # One batch at a time is moved to the device and standardised. All of ImageNet takes 10 GB.
    def batch(ids: Tensor) -> LabelledFeatures:
        return standardise(take_rows(train[0], ids, device)), train_labels[ids.to(device)]

    ids = (train_labels.cpu() >= 0).nonzero()[:, 0]  # images that could be read
    held_out = torch.from_numpy(epoch_order(len(ids), 0, 0)) % 10 == 0
    validation_ids, training_ids = ids[held_out], ids[~held_out]

    def fit_on(some_ids: Tensor, lrs: tuple[float, ...]) -> Tensor:
        return fit(batch, some_ids, len(mean) + 1, classes, lrs, device)

    weights = fit_on(training_ids, FAST_LRS)
    scores = top1_of_each(weights, map(batch, torch.split(validation_ids, TEST_ROWS)))
    best_lr = FAST_LRS[scores.index(max(scores))]
    weight = fit_on(ids, (best_lr,))
    predictions = predictions or Predictions(classes)
    test_rows, test_labels = (torch.split(part, TEST_ROWS) for part in test)
    for rows, labels in zip(map(standardise, test_rows), test_labels, strict=True):
        predictions.add((rows @ weight)[0], labels)
    return {**predictions.scores("linear"), "linear_lr": best_lr}


def fit(
    batch: Callable[[Tensor], LabelledFeatures],
    ids: Tensor,
    dim: int,
    classes: int,
    lrs: tuple[float, ...],
    device: torch.device = HOST,
) -> Tensor:
    """Train one softmax regression per learning rate, all at the same time and on the same batches.

    The classifiers are trained on `ids`, which are in host memory. `batch` returns the features and
    labels of some ids. SGD with momentum 0.9 and a cosine schedule starts from zero weights.
    Returns weights `(L, D, C)`.
    """
    weight = torch.zeros(len(lrs), dim, classes, device=device)
    momentum = torch.zeros_like(weight)
    lr = torch.tensor(lrs, device=device)[:, None, None]
    steps = -(-len(ids) // BATCH_SIZE)
    for epoch in range(FAST_EPOCHS):
        order = torch.from_numpy(epoch_order(len(ids), 1, epoch))
        for step, positions in enumerate(torch.split(order, BATCH_SIZE)):
            ramp = cosine_ramp(epoch + step / steps, FAST_EPOCHS)
            features, labels = batch(ids[positions])
            # A CPU multiplies denormal numbers very slowly. The smallest are therefore set to 0.
            probabilities = F.threshold(torch.softmax(features @ weight, -1), 1e-30, 0)
            error = probabilities - F.one_hot(labels, classes)  # (L, B, C)
            momentum.mul_(0.9).add_(features.T @ error / len(features))
            weight.sub_(momentum * lr * ramp)
    return weight


def top1_of_each(weights: Tensor, batches: Iterable[LabelledFeatures]) -> list[float]:
    """The top-1 accuracy in percent of each of the classifiers `(L, D, C)` on all batches."""
    hits, count = [0] * len(weights), 0
    for features, labels in batches:
        right = ((features @ weights).argmax(-1) == labels).sum(1).tolist()
        hits, count = [a + b for a, b in zip(hits, right, strict=True)], count + len(labels)
    return [100 * hit / count for hit in hits]


def top1(logits: Tensor, labels: Tensor) -> float:
    """The percentage of rows of `logits` `(N, C)` whose largest value belongs to the label."""
    return 100 * int((logits.argmax(-1) == labels).sum()) / len(labels)
