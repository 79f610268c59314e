"""The predictions of a classifier for test images, and their accuracy.

predictions = Predictions(classes=10)
for features, labels in batches:
    predictions.add(head(features), labels)
predictions.scores("linear")        # linear_top1 in percent, and linear_top5 for > 10 classes
predictions.per_class(names)        # the same for each class
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TOP5_ABOVE = 10  # top-5 says little about so few classes


class Predictions:
    """The predicted and the true classes of test images, collected a batch at a time.

    `predicted` and `labels` are `(N,)` int64, in host memory.
    """

    def __init__(self, classes: int) -> None:
        self.classes, self.top5_hits = classes, 0
        self.predicted = self.labels = torch.empty(0, dtype=torch.int64)

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Add images: their logits or votes `(B, classes)`, and their labels `(B,)`."""
        self.predicted = torch.cat([self.predicted, logits.argmax(1).cpu()])
        self.labels = torch.cat([self.labels, labels.cpu()])
        if self.classes > TOP5_ABOVE:
            self.top5_hits += int((logits.topk(5).indices == labels[:, None]).sum())

    @property
    def top1(self) -> float:
        """The percentage of images whose class is predicted correctly."""
        return 100 * int((self.predicted == self.labels).sum()) / len(self.labels)

    def scores(self, name: str) -> dict[str, float]:
        """The accuracies in percent: `{name}_top1`, and `{name}_top5` for more than ten classes."""
        scores = {f"{name}_top1": self.top1}
        if self.classes > TOP5_ABOVE:
            scores[f"{name}_top5"] = 100 * self.top5_hits / len(self.labels)
        return scores

    def per_class(self, names: Sequence[str]) -> dict[str, float | None]:
        """The accuracy of each class in percent, or None for a class without test images."""
        right = torch.bincount(self.labels[self.predicted == self.labels], minlength=self.classes)
        counts = torch.bincount(self.labels, minlength=self.classes)
        return {
            name: 100 * hits / count if count else None
            for name, hits, count in zip(names, right.tolist(), counts.tolist(), strict=True)
        }

    def confusion(self) -> list[list[int]]:
        """How often each class is predicted as each other: rows of label, prediction and count.

        Pairs that do not occur are left out.
        """
        pairs, counts = torch.unique(
            self.labels * self.classes + self.predicted, return_counts=True
        )
        rows = torch.stack([pairs // self.classes, pairs % self.classes, counts], 1)
        return rows.tolist()
