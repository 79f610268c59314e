"""What one batch's features say of the encoder: how many directions they fill, and how far an aggressive view moves an
image from its weak one, which is the semantic shift that RSA is about.

Taken once an epoch, on its last batch, in eval mode: training is the same bit for bit, and two forwards of a batch longer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import Batch
from rsa_fast.evaluation.evaluate import embed

PAIRS = (("aggressive_1", "weak_1"), ("aggressive_2", "weak_2"))  # views of one crop
COSINE_BINS = (
    20  # of equal width from 0 to 1: features follow a ReLU, so that no cosine is negative
)


def feature_stats(encoder: nn.Module, batch: Batch) -> dict[str, Any]:
    """`effective_rank` of the features, at most the batch's size, of an aggressive view where there is one.

    Where the batch holds both views of a crop, their cosine too: `weak_aggressive_cosine`, the mean;
    `weak_aggressive_counts`, the images in each of `COSINE_BINS`; and `other_image_cosine`, the mean between one image's
    aggressive view and another's weak one, which says how alike features are by chance. Empty when a feature is not finite:
    the loss tells of that. Waits for the device.
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
        stats["weak_aggressive_cosine"] = cosine.mean().item()
        stats["other_image_cosine"] = F.cosine_similarity(aggressive, weak.roll(1, 0)).mean().item()
        stats["weak_aggressive_counts"] = (
            torch.histc(cosine.clamp(0, 1), COSINE_BINS, 0, 1).int().tolist()
        )
    return stats


def effective_rank(rows: Tensor) -> float:
    """exp of the entropy of the singular values over their sum (Roy & Vetterli 2007): `(B, D)` to 1 (all rows in one
    direction) .. min(B, D) (spread evenly in all)."""
    values = torch.linalg.svdvals(rows)
    entropy = torch.special.entr(values / values.sum().clamp(min=1e-12)).sum()
    return float(entropy.exp())
