"""How good a frozen encoder is: kNN, and the linear classifiers of `linear`. Accuracies are top-1 in percent.

    evaluation = Evaluation(data, recipe, device, dtype)
    scores = evaluation.score(encoder, ("knn", "linear-rsa-small"), recalibrate=True)

Protocols carry a name and a version, which stand in every result. Of several ranks each reads its own part of the images,
and all get the result that one would get.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipelines import Order, open_source, open_views
from pipelines.plain import PlainImages
from rsa_fast.distributed import gather, rank, world_size
from rsa_fast.evaluation import linear
from rsa_fast.evaluation.linear import Batches, Features
from rsa_fast.recipes import Recipe

PROTOCOLS = ("knn", "linear-fast", "linear-rsa-small", "linear-rsa-large")
KNN_SETTINGS = {
    "knn_top1": (200, 0.1),
    "knn20_top1": (20, 0.07),
}  # k, temperature: InstDis/MoCo/RSA code; DINO/solo-learn
KNN_CHUNK = 1024  # queries at a time: 1024 x 1.28M similarities are 5 GiB


@torch.no_grad()
def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    """Float32 features `(B, D)` of images in the compute dtype."""
    with torch.autocast(images.device.type, images.dtype, enabled=images.dtype != torch.float32):
        rows: Tensor = encoder(images)
        return rows.float()


def features(encoder: nn.Module, images: PlainImages) -> Features:
    """This rank's features `(n, D)` in eval mode, and labels `(n,)`; the encoder's mode is put back."""
    training = encoder.training
    encoder.eval()
    rows = [(embed(encoder, batch), labels) for batch, labels in images]
    encoder.train(training)
    return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])


def gather_rows(x: Tensor) -> Tensor:
    """Every `world_size`-th row, `(n, ...)`, from all ranks put back in the order of the whole; n differs by 1 at most."""
    counts = gather(torch.tensor([len(x)], device=x.device))
    padded = F.pad(x, [0, 0] * (x.ndim - 1) + [0, int(counts.max()) - len(x)])
    by_rank = torch.unflatten(gather(padded), 0, (world_size(), -1))
    return by_rank.transpose(0, 1).flatten(0, 1)[: int(counts.sum())]


def knn(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, classes: int
) -> dict[str, float]:
    """Top-1 of the exact weighted vote of the k nearest by cosine, for each of `KNN_SETTINGS`.

    Each rank gives its rows of `bank` `(N, D)` and `queries` `(M, D)` and compares all queries with its own part of the
    bank; only the nearest of each part are gathered. A neighbour's vote is exp(cos / T) (Wu et al. 2018, InstDis). k is cut
    to N.
    """
    queries, labels = F.normalize(gather_rows(queries), dim=1), gather_rows(labels)
    lengths = bank.norm(dim=1).clamp(min=1e-12)
    most = min(max(k for k, _ in KNN_SETTINGS.values()), len(gather_rows(bank_labels)))
    correct = dict.fromkeys(KNN_SETTINGS, 0)
    for first in range(0, len(queries), KNN_CHUNK):
        cosine, index = (
            (queries[first : first + KNN_CHUNK] @ bank.T).div_(lengths).topk(min(most, len(bank)))
        )
        missing = (0, most - cosine.shape[1])
        parts = F.pad(cosine, missing, value=-torch.inf).T, F.pad(bank_labels[index], missing).T
        cosine, owner = (gather(part).T for part in parts)  # (chunk, world_size most)
        cosine, index = cosine.topk(most)
        owner = owner.gather(1, index)
        for name, (k, temperature) in KNN_SETTINGS.items():
            votes = torch.zeros(len(cosine), classes, device=bank.device)
            votes.scatter_add_(1, owner[:, :k], (cosine[:, :k] / temperature).exp())
            correct[name] += int((votes.argmax(1) == labels[first : first + KNN_CHUNK]).sum())
    return {name: 100 * hits / len(queries) for name, hits in correct.items()}


class Evaluation:
    """The labelled train and test splits of a dataset, opened once, to score an encoder as often as wanted.

    Raises FileNotFoundError or ValueError when there is no labelled train and test split.
    """

    def __init__(
        self,
        data: Path,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path | None = None,
    ) -> None:
        sources = [open_source(data, split, cache) for split in ("train", "test")]
        train, test = (source.manifest for source in sources)
        if not (train.labelled and test.labelled):
            raise ValueError(
                f"{data} has no labels for both train and test images: nothing to evaluate on"
            )
        if train.classes != test.classes:
            differ = sorted(set(train.classes) ^ set(test.classes))
            raise ValueError(
                f"train and test under {data} do not have the same classes; only one has {', '.join(differ[:10])}"
            )
        self.classes, self.recipe = len(train.classes), recipe
        opened = (
            recipe.views,
            recipe.eval_resize_px,
            linear.BATCH_SIZE,
            device,
            dtype,
            recipe.threads,
            rank(),
            world_size(),
        )
        self.train, self.test = (PlainImages(source, *opened) for source in sources)

    def score(
        self,
        encoder: nn.Module,
        protocols: tuple[str, ...] = ("knn", "linear-fast"),
        recalibrate: bool = False,
        epochs: int | None = None,
        nesterov: bool | None = None,
    ) -> dict[str, Any]:
        """The results of the protocols named (of `PROTOCOLS`), in one dict; every rank has to call it.

        The encoder is in eval mode meanwhile, and comes back unchanged. linear-rsa-small and
        linear-rsa-large use `epochs`, and linear-rsa-small uses `nesterov`; None means the
        protocol's own value (see `rsa_fast.evaluation.linear`).
        `recalibrate` is of linear-rsa-small: the classifier is trained on a copy with BatchNorm in train mode, whose running
        statistics its images replace, as happens in eval_single.py of github.com/tmllab/RSA. Raises ValueError when there
        are several ranks to recalibrate on: each would have statistics of its own.
        """
        if unknown := set(protocols) - set(PROTOCOLS):
            raise ValueError(
                f"no protocol {', '.join(unknown)}: choose from {', '.join(PROTOCOLS)}"
            )
        if recalibrate and world_size() > 1:
            raise ValueError(f"recalibrating BatchNorm takes one process, found {world_size()}")
        training, before = encoder.training, copy.deepcopy(encoder.state_dict())
        encoder.eval()
        test = features(encoder, self.test)
        train = cache(lambda: features(encoder, self.train))  # linear-rsa-small never calls it
        results: dict[str, Any] = {"test_transform": self.test.transform}
        scores: dict[str, Any]
        for protocol in protocols:
            match protocol:
                case "knn":
                    scores = knn(*train(), *test, self.classes)
                case "linear-fast":
                    scores = linear.fast(whole(train()), whole(test), self.classes)
                case "linear-rsa-small":
                    scores = self.rsa_small(encoder, whole(test), recalibrate, epochs, nesterov)
                case "linear-rsa-large":
                    with self.augmented(encoder) as batches:
                        scores = linear.rsa_large(
                            batches,
                            whole(train()),
                            whole(test),
                            self.classes,
                            self.recipe.seed,
                            epochs or linear.LARGE_EPOCHS,
                        )
            results |= {f"{protocol.partition('-')[0]}_protocol": f"{protocol}/1", **scores}
        encoder.train(training)
        after = (
            encoder.state_dict()
        )  # MoCo's check, main_lincls.py: a frozen network is one that did not change
        assert all(torch.equal(after[key], value) for key, value in before.items()), (
            "the encoder changed in evaluation"
        )
        return results

    def rsa_small(
        self,
        encoder: nn.Module,
        test: Features,
        recalibrate: bool,
        epochs: int | None,
        nesterov: bool | None,
    ) -> dict[str, Any]:
        learner = copy.deepcopy(encoder).train() if recalibrate else encoder
        test_now = (lambda: features(learner, self.test)) if recalibrate else (lambda: test)
        with self.augmented(learner) as batches:
            scores = linear.rsa_small(
                batches,
                test_now,
                self.classes,
                self.recipe.seed,
                epochs or linear.SMALL_EPOCHS,
                nesterov is not False,
            )
        return {"linear_bn": "recalibrate" if recalibrate else "eval", **scores}

    @contextmanager
    def augmented(self, encoder: nn.Module) -> Iterator[Batches]:
        """Features of the training images, randomly cropped and flipped, an epoch at a time, by the encoder as it stands.

        The last images of an epoch, that fill no batch, are left out: eval_single.py does so, eval_multi.py does not.
        """
        source, count = self.train.source, len(self.train.source.manifest)
        views = replace(
            self.recipe.views, crop_area=(0.08, 1.0), crop_aspect=(3 / 4, 4 / 3), flip_p=0.5
        )
        order = Order(count, min(linear.BATCH_SIZE, count), self.recipe.seed, rank(), world_size())
        with open_views(
            source,
            views,
            frozenset({"weak_1"}),
            order,
            device=self.train.device,
            dtype=self.train.dtype,
            threads=self.train.threads,
        ) as loader:

            def batches(epoch: int) -> Iterator[Features]:
                for batch in loader.batches(epoch):
                    yield gather(embed(encoder, batch.weak_1)), gather(batch.label)

            yield batches


def whole(part: Features) -> Features:
    """Features and labels of all ranks, in the images' order."""
    return gather_rows(part[0]), gather_rows(part[1])
