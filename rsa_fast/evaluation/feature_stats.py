"""Statistics of the features of one batch.

They measure how many directions the features fill, and how far the aggressive view of an image is
from its weak view. This distance is the semantic shift that RSA reduces.

They are computed once an epoch, on its last batch and in eval mode. They do not change the
training, and cost two forward passes of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsa_fast.evaluation.evaluate import embed
from rsa_fast.pipelines import Batch

PAIRS = (("aggressive_1", "weak_1"), ("aggressive_2", "weak_2"))  # views of one crop
# Bins of equal width from 0 to 1. A ResNet's features come from a ReLU, so no cosine is negative.
# Negative cosines of other networks count in the first bin.
COSINE_BINS = 20


def feature_stats(encoder: nn.Module, batch: Batch) -> dict[str, Any]:
    """The statistics of one batch. Waits for the device.

    `effective_rank` is that of the features of one view, which is an aggressive one if the batch
    has any. It is at most the batch's size. If the batch has both views of a crop, there are also:

    - `weak_aggressive_cosine`: the mean over the images
    - `weak_aggressive_counts`: the number of images in each of the `COSINE_BINS` bins
    - `other_image_cosine`: the mean between the aggressive view of an image and the weak view of
      another image, which shows how similar features are by chance

    The result is empty if a feature is not finite. The check of the loss reports this.
    """
    names = next((pair for pair in PAIRS if batch.views.keys() >= set(pair)), (min(batch.views),))
    training = encoder.training
    encoder.eval()
    features = [embed(encoder, batch.views[name]).cpu() for name in names]
    encoder.train(training)
    if not all(x.isfinite().all() for x in features):
        return {}
    stats: dict[str, Any] = {"effective_rank": effective_rank(F.normalize(features[0], dim=1))}
    if len(features) == 2:
        aggressive, weak = features
        cosine = F.cosine_similarity(aggressive, weak)
        counts = torch.histc(cosine.clamp(0, 1), COSINE_BINS, 0, 1)
        other_image_cosine = F.cosine_similarity(aggressive, weak.roll(1, 0))
        stats["weak_aggressive_cosine"] = cosine.mean().item()
        stats["other_image_cosine"] = other_image_cosine.mean().item()
        stats["weak_aggressive_counts"] = counts.int().tolist()
    return stats


def effective_rank(features: Tensor) -> float:
    """The effective rank of features `(B, D)` (Roy & Vetterli 2007).

    It is the exp of the entropy of the singular values divided by their sum. It is between 1 (all
    features in one direction) and min(B, D) (spread evenly).
    """
    values = torch.linalg.svdvals(features)
    entropy = torch.special.entr(values / values.sum().clamp(min=1e-12)).sum()
    return float(entropy.exp())
