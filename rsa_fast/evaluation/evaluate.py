"""Scores of a frozen encoder: kNN and the linear classifiers of `linear`.

    scores = evaluate(Path("runs/a/checkpoints/step_00039000.pt"), Path("data/cifar10"), "knn")

`Evaluation` scores an encoder that is already in memory, as often as needed:

    evaluation = Evaluation(data, recipe, device, dtype)
    scores = evaluation.score(encoder, ("knn", "linear-rsa-small"), recalibrate=True)

Accuracies are in percent: top-1, and also top-5 if there are more than ten classes. Every result
contains the name and the version of its protocol. With several ranks, each rank reads its own part
of the images, and all ranks return the result that a single process would return.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rsa_fast.archs import RESNETS, TIMM
from rsa_fast.distributed import gather, process_group, rank, world_size
from rsa_fast.evaluation import linear
from rsa_fast.evaluation.accuracy import Predictions
from rsa_fast.evaluation.encoders import few, load_encoder
from rsa_fast.evaluation.features import (
    BLOCK_ROWS,
    LabelledFeatures,
    blocks,
    cached,
    eval_mode,
    gather_features,
    gather_rows,
    plain_images,
)
from rsa_fast.evaluation.linear import Batches
from rsa_fast.pipelines import CropGroup, Loading, Order, Source, open_views
from rsa_fast.pipelines.combined import fraction_of, stratified_ids, subset
from rsa_fast.pipelines.files import json_text, write_text
from rsa_fast.pipelines.layouts import Data, described, has_test_split, inventory, places_of
from rsa_fast.pipelines.named import nearest
from rsa_fast.pipelines.plain import PlainImages
from rsa_fast.recipes import Recipe, build_recipe, replaced
from rsa_fast.training.checkpoint import newest_checkpoint
from rsa_fast.training.run_folder import places_of_checkpoint
from rsa_fast.training.step import choose_device, choose_dtype, for_any_device

log = logging.getLogger("rsa_fast")

PROTOCOLS = ("knn", "linear-fast", "linear-rsa-small", "linear-rsa-large")
# The options of `evaluate` that a protocol reads. Protocols that are not listed read none.
PROTOCOL_OPTIONS = {
    "knn": {"k", "temperature"},
    "linear-rsa-small": {"epochs", "bn", "nesterov"},
    "linear-rsa-large": {"epochs"},
}
# k and temperature. The first pair is that of InstDis, MoCo and the RSA code. The second pair is
# that of DINO and solo-learn.
KNN_SETTINGS = {"knn_top1": (200, 0.1), "knn20_top1": (20, 0.07)}
# The fields of a recipe that evaluation reads.
EVALUATION_FIELDS = (
    "views.size_px",
    "views.mean",
    "views.std",
    "eval_resize_px",
    "val_fraction",
    "exif_orientation",
    "on_bad_image",
    "seed",
    "threads",
    "precision",
    "device",
)
KNN_CHUNK = 1024  # number of queries that are compared with `BLOCK_ROWS` images at a time: 64 MiB


def evaluate(
    checkpoint: str | Path,
    data: Data | None = None,
    protocol: Literal["knn", "linear"] = "knn",
    *,
    train: Data | None = None,
    test: Data | None = None,
    each: bool = False,
    variant: Literal["fast", "rsa-small", "rsa-large"] | None = None,
    dataset: str | None = None,
    resize_px: int | str | None = None,
    epochs: int | None = None,
    bn: Literal["eval", "recalibrate"] | None = None,
    nesterov: bool | None = None,
    k: int | None = None,
    temperature: float | None = None,
    labels: float | str | None = None,
    val_fraction: float | None = None,
    overrides: Mapping[str, Any] | None = None,
    encoder: nn.Module | None = None,
    key: str | None = None,
) -> dict[str, Any]:
    """Score the encoder of a checkpoint on the labelled train and test images under `data`.

    This is what `rsa-fast eval` runs, and the result is the object that it prints. It contains
    `checkpoint`, `data`, `train_images`, `test_images` and `test_transform`. For `knn` it also
    contains `knn_protocol`, `knn_top1`, `knn20_top1` and `knn_per_class`. For `linear` it also
    contains `linear_protocol`, `linear_top1`, `linear_per_class` and the entries of the classifier.
    Accuracies are in percent. If there are more than ten classes, there is a `top5` for each
    `top1`.

    Without `data`, the images are those of the run that the checkpoint belongs to. Instead of
    `data`, `train` and `test` give the images of the two splits, each as a folder of class folders.
    With `each`, every folder of `data` is scored separately, and the result has a list of these
    results in `folders`. The features of plain images are stored in the user's cache
    (`features.cached`).

    `checkpoint` is the folder of a run, a file of this project or an encoder of another project
    (see `load_encoder`). `encoder` is the network for its weights, if it was passed to training in
    Python. `key` chooses among several networks in the file, such as `teacher`. The checkpoint's
    recipe determines how images are sized and normalised, the device and the precision of the
    encoder, and the seed of the linear classifiers. `dataset` is the name of a dataset in
    `rsa_fast.datasets`, whose recipe is used instead. `overrides` replaces values of the recipe's
    fields, such as `views.size_px` or `views.mean`. `resize_px` is the length in pixels to which
    the short side of test images is resized before the centre crop. With "native", the images are
    not resized. If there are no test images, a fraction of the training images is held out, which
    `val_fraction` replaces. With the checkpoint's own fraction, these are the images that it was
    not trained on.

    `variant` is the linear classifier (see `rsa_fast.evaluation.linear`), `fast` by default.
    `epochs` is read by rsa-small (default 100) and rsa-large (40). `bn` and `nesterov` are read by
    rsa-small. With `bn` "eval" (the default), BatchNorm's statistics are frozen. With
    "recalibrate", they are replaced as in the RSA code. `nesterov` is true by default. `k` and
    `temperature` are read by knn, which then votes only once, with these values instead of its two
    usual pairs. With `labels`, only this part of each class of the training images is used, chosen
    at random by the recipe's seed. It is a percentage, such as 10, or a fraction below 1, such as
    0.1.

    Raises ValueError for an option that the protocol does not read, for an encoder without a recipe
    if neither `dataset` nor the size of the views is given, for a checkpoint without an encoder,
    and for data that cannot be evaluated on. Raises FileNotFoundError if the checkpoint or the data
    do not exist.
    """
    if protocol == "knn" and variant:
        raise ValueError("knn has no --protocol")
    name = "knn" if protocol == "knn" else f"{protocol}-{variant or 'fast'}"
    check_protocols((name,))
    options = {
        "epochs": epochs,
        "bn": bn,
        "nesterov": nesterov,
        "k": k,
        "temperature": temperature,
    }
    given = {key for key, value in options.items() if value is not None}
    if unread := given - PROTOCOL_OPTIONS.get(name, set()):
        raise ValueError(f"{name} has no --{', --'.join(sorted(unread))}")
    if bn not in (None, "eval", "recalibrate"):
        raise ValueError(f"no bn {bn!r}: choose from eval, recalibrate")
    if (k is not None and k < 1) or (temperature is not None and temperature <= 0):
        raise ValueError(f"k = {k}, temperature = {temperature}: both must be positive")
    fraction = None if labels is None else fraction_of(labels)
    if (train is None) != (test is None) or (data is not None and train is not None):
        raise ValueError("--train and --test must be given together, and without --data")
    path = newest_checkpoint(checkpoint)
    if data is None and train is None:
        data, each = places_of_checkpoint(path), False
    network, own_recipe = load_encoder(path, encoder, key)
    changes: dict[str, Any] = {"unlabelled": False}
    if own_recipe:
        changes["val_fraction"] = own_recipe.val_fraction
    changes |= checked_overrides(overrides or {})
    if val_fraction is not None:
        changes["val_fraction"] = val_fraction
    folders: list[Data | None] = [*places_of(data)] if each and data is not None else [data]
    recipes = [
        recipe_for_images(path, own_recipe, folder or train or (), dataset, resize_px, changes)
        for folder in folders
    ]
    # The user's own network can change although its weights do not.
    arch = own_recipe.arch if own_recipe else "resnet50"
    ours = encoder is None and (arch in RESNETS or arch.startswith(TIMM))
    results = []
    with process_group(recipes[0].device, recipes[0].timeout_s):
        device = choose_device(recipes[0].device)
        network = network.to(device)
        for folder, recipe in zip(folders, recipes, strict=True):
            dtype = choose_dtype(recipe.precision, device)
            evaluation = Evaluation(
                folder, recipe, device, dtype, splits=(train, test), labels=fraction, cached=ours
            )
            if rank() == 0:
                log.info(inventory(evaluation.train.source, evaluation.test.source))
            scores = evaluation.score(
                network,
                (name,),
                recalibrate=bn == "recalibrate",
                epochs=epochs,
                nesterov=nesterov,
                k=k,
                temperature=temperature,
            )
            results.append(evaluation.described() | scores | evaluation.per_class())
    shared = {"checkpoint": str(path), **({"key": key} if key else {})}
    return shared | ({"folders": results} if each else results[0])


def show(results: Sequence[Mapping[str, Any]]) -> None:
    """Print a table with a row for each of the results of several folders."""
    from rich.console import Console
    from rich.table import Table

    names = dict.fromkeys(key for result in results for key in result)  # only some have a top5
    columns = [key for key in names if key.endswith(("_top1", "_top5"))]
    table = Table("data", "train images", "test images", "classes", *columns)
    for result in results:
        scores = [f"{result[key]:.2f}" if key in result else "" for key in columns]
        classes = len(next(value for key, value in result.items() if key.endswith("_per_class")))
        counts = (result["train_images"], result["test_images"], classes)
        table.add_row(result["data"], *(f"{count:,}" for count in counts), *scores)
    Console().print(table)


def checked_overrides(overrides: Mapping[str, Any]) -> Mapping[str, Any]:
    """The overrides. Raises ValueError for a field that evaluation does not read."""
    for field in overrides:
        if field not in EVALUATION_FIELDS:
            raise ValueError(
                f"evaluation does not read {field}{nearest(field, EVALUATION_FIELDS)}: choose from "
                f"{', '.join(EVALUATION_FIELDS)}"
            )
    return overrides


def recipe_for_images(
    checkpoint: str | Path,
    recipe: Recipe | None,
    data: Data,
    dataset: str | None,
    resize_px: int | str | None,
    changes: dict[str, Any],
) -> Recipe:
    """The recipe by which the images in `data` are read, sized and normalised for an encoder.

    It is the checkpoint's `recipe`, or that of `dataset` if given, with `changes` of fields and
    `resize_px` (see `evaluate`). If there is neither, `changes` must contain the size of the views,
    and the other fields are those of ImageNet-1K. Raises ValueError otherwise, and for invalid
    values.
    """
    if dataset:
        # Only the fields about sizes and normalisation are read. With a batch of 1, `auto` accepts
        # any number of images.
        recipe = build_recipe(dataset, "rsa", data=data, batch_size=1)
    if recipe is None:
        if "views.size_px" not in changes:
            raise ValueError(
                f"{checkpoint} has no recipe: use --dataset, which determines how images are sized "
                "and normalised, or --set views.size_px=PX, with views.mean and views.std if not "
                "ImageNet's"
            )
        recipe = build_recipe("imagenet1k", "rsa")
        log.info(f"{checkpoint} has no recipe: fields that are not set are those of ImageNet-1K")
    if resize_px:
        changes = changes | {"eval_resize_px": None if resize_px == "native" else resize_px}
    return for_any_device(replaced(recipe, changes))


def check_protocols(names: tuple[str, ...]) -> None:
    """Raise ValueError unless all names are in `PROTOCOLS`."""
    if unknown := set(names) - set(PROTOCOLS):
        raise ValueError(f"no protocol {', '.join(unknown)}: choose from {', '.join(PROTOCOLS)}")


@torch.no_grad()
def embed_in_own_dtype(encoder: nn.Module, images: Tensor) -> Tensor:
    """Features `(B, D)` of images `(B, 3, H, W)`, computed in the images' dtype."""
    with torch.autocast(images.device.type, images.dtype, enabled=images.dtype != torch.float32):
        features: Tensor = encoder(images)
        return features


def embed(encoder: nn.Module, images: Tensor) -> Tensor:
    """Float32 features `(B, D)` of images `(B, 3, H, W)`, computed in the images' dtype."""
    return embed_in_own_dtype(encoder, images).float()


def extract_features(encoder: nn.Module, images: PlainImages) -> LabelledFeatures:
    """This rank's features `(n, D)`, computed in eval mode, and labels `(n,)`, in host memory.

    Afterwards, the encoder's previous mode is restored.
    """
    rows, labels, done = torch.empty(0), torch.empty(len(images.ids), dtype=torch.int64), 0
    with eval_mode(encoder):
        for batch, batch_labels in images:
            features = embed_in_own_dtype(encoder, batch)
            if done == 0:  # joining batches at the end would take twice the memory
                rows = torch.empty(len(labels), features.shape[1], dtype=features.dtype)
            end = done + len(features)
            rows[done:end], labels[done:end], done = features, batch_labels, end
    return rows, labels


def knn(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    labels: Tensor,
    classes: int,
    settings: Mapping[str, tuple[int, float]] = KNN_SETTINGS,
    predictions: dict[str, Predictions] | None = None,
) -> dict[str, float]:
    """Accuracy of a weighted vote among the k nearest neighbours, for all `settings`.

    Each setting is k and the temperature T, under the name of its top-1 accuracy. Its predictions
    are added to `predictions` under the same name.

    The similarity is the cosine, and a neighbour's vote is exp(cosine / T) (Wu et al. 2018,
    InstDis). The search is exact. If k is larger than the bank, the whole bank votes.

    Each rank passes its own rows of `bank` `(N, D)` and of `queries` `(M, D)`. A rank compares all
    queries with its own part of the bank, so only the nearest neighbours of each part are gathered.
    The bank may be in host memory. The search runs on the device of the queries.
    """
    device = queries.device
    queries, labels = gather_features((queries, labels), device)
    queries = F.normalize(queries, dim=1)
    bank_labels = bank_labels.to(device)
    most = min(max(k for k, _ in settings.values()), len(gather_rows(bank_labels)))
    chunks = [slice(first, first + KNN_CHUNK) for first in range(0, len(queries), KNN_CHUNK)]

    # The nearest neighbours so far. The bank is read once, and each block is compared with all
    # queries.
    cosines = queries.new_full((len(queries), most), -torch.inf)
    owners = labels.new_zeros(len(queries), most)
    block_labels = torch.split(bank_labels, BLOCK_ROWS)
    for block, own_labels in zip(blocks(bank, device), block_labels, strict=True):
        lengths = block.norm(dim=1).clamp(min=1e-12)
        for chunk in chunks:
            # An image that could not be read, with the label -1, is never a neighbour.
            cosine = (queries[chunk] @ block.T).div_(lengths)
            cosine.masked_fill_(own_labels < 0, -torch.inf)
            cosine, index = cosine.topk(min(most, len(block)))
            cosine = torch.cat([cosines[chunk], cosine], 1)
            owner = torch.cat([owners[chunk], own_labels[index].clamp_(min=0)], 1)
            cosines[chunk], index = cosine.topk(most)
            owners[chunk] = owner.gather(1, index)

    predictions = {} if predictions is None else predictions
    predictions |= {name: Predictions(classes) for name in settings}
    for chunk in chunks:
        # The nearest neighbours of all ranks, (chunk, world_size * most).
        cosine, owner = (gather(part[chunk].T.contiguous()).T for part in (cosines, owners))
        cosine, index = cosine.topk(most)
        owner = owner.gather(1, index)
        for name, (k, temperature) in settings.items():
            votes = torch.zeros(len(cosine), classes, device=device)
            votes.scatter_add_(1, owner[:, :k], (cosine[:, :k] / temperature).exp())
            predictions[name].add(votes, labels[chunk])
    scores: dict[str, float] = {}
    for name in settings:
        scores |= predictions[name].scores(name.removesuffix("_top1"))
    return scores


class NoLabelsError(ValueError):
    """The data have no labels, so nothing can be evaluated."""


def refuse_shared(train: Source, test: Source) -> None:
    """Raise ValueError if a file is both a training and a test image."""
    if not (train.file and test.file and train.manifest.paths and test.manifest.paths):
        return
    tested = {os.path.abspath(path) for path in map(test.file, range(len(test.manifest)))}
    trained = map(train.file, range(len(train.manifest)))
    if shared := [path for path in map(os.path.abspath, trained) if path in tested]:
        raise ValueError(
            f"{len(shared)} images are among the training and the test images, such as "
            f"{shared[0]}: remove them from one of the two"
        )


def open_splits(
    recipe: Recipe, train: Data | None, test: Data | None, cache: Path | None
) -> list[Source]:
    """The images of `train` and of `test`, which are datasets with splits, or class folders.

    If a dataset has a split of that name, the split is read, and otherwise all images.
    """
    assert train is not None and test is not None
    # No images are held out of the two.
    recipe = recipe.model_copy(update={"val_fraction": 0.0})
    split = "test" if all(map(has_test_split, places_of(test))) else "train"
    tested = recipe.model_copy(update={"on_bad_image": "skip"})
    return [recipe.open_source(train, "train", cache), tested.open_source(test, split)]


def with_classes(test: Source, classes: tuple[str, ...], place: str) -> Source:
    """The test images, with labels that count in `classes`, the classes of the training images.

    The log names classes without test images. Raises ValueError for test images of a class without
    training images.
    """
    number = {name: i for i, name in enumerate(classes)}
    if unknown := [name for name in test.manifest.classes if name not in number]:
        raise ValueError(
            f"train and test under {place} do not have the same classes; only the test images have "
            f"{few(unknown)}"
        )
    table = np.array([number[name] for name in test.manifest.classes], np.int64)
    labels = table[test.manifest.labels]
    counts = np.bincount(labels, minlength=len(classes))
    if (missing := [classes[i] for i in np.flatnonzero(counts == 0)]) and rank() == 0:
        log.info(
            f"{len(missing)} of {len(classes)} classes have no test images, so their accuracy is "
            f"not measured: {few(missing)}"
        )
    return replace(test, manifest=replace(test.manifest, classes=classes, labels=labels))


class Evaluation:
    """The labelled train and test images of a dataset, on which encoders are scored.

    `recipe` determines how images are sized and normalised. `device` and `dtype` are those of the
    encoders. `cache` is a folder for the scan of the images (see `open_source`). `splits` are the
    paths of training and test images, if these are not in `data`. `labels` is the fraction of the
    training images to use. With `cached`, features are stored for the next time.

    `predictions` contains the predictions of the last `score` for the test images. Its keys are the
    kinds of the protocols (`knn`, `linear`), or their names if there are several of a kind.

    Raises FileNotFoundError or ValueError if there is no labelled train and test split, and
    NoLabelsError if neither has labels.
    """

    def __init__(
        self,
        data: Data | None,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype,
        cache: Path | None = None,
        *,
        splits: tuple[Data | None, Data | None] = (None, None),
        labels: float | None = None,
        cached: bool = False,
    ) -> None:
        if data is None:
            assert splits[0] is not None and splits[1] is not None
            self.places = {"train": described(splits[0]), "test": described(splits[1])}
            sources = open_splits(recipe, *splits, cache)
        else:
            self.places = {"data": described(data)}
            sources = [recipe.open_source(data, split, cache) for split in ("train", "test")]
        place = ", ".join(self.places.values())
        refuse_shared(*sources)
        train, test = (source.manifest for source in sources)
        if not (train.labelled and test.labelled):
            fault = f"{place} has no labels for both train and test images"
            if not (train.labelled or test.labelled):
                raise NoLabelsError(f"{fault}: the encoder cannot be evaluated")
            place = sources[train.labelled].where  # the place of the split without labels
            raise ValueError(
                f"{fault}: {place} contains no class folders. Sort its images into class folders, "
                "or put Kaggle's table for ImageNet there, LOC_val_solution.csv"
            )
        sources[1] = with_classes(sources[1], train.classes, place)
        if labels is not None:
            ids = stratified_ids(train.labels, labels, recipe.seed)
            sources[0] = subset(sources[0], ids, "train")
        self.names, self.classes, self.recipe = train.classes, len(train.classes), recipe
        self.labels, self.cached = labels, cached
        self.predictions: dict[str, Predictions] = {}
        self.train, self.test = (
            plain_images(source, recipe, device, dtype, policy)
            # An unreadable test image is always left out. The recipe decides about training images.
            for source, policy in zip(sources, (recipe.on_bad_image, "skip"), strict=True)
        )

    def score(
        self,
        encoder: nn.Module,
        protocols: tuple[str, ...] = ("knn", "linear-fast"),
        recalibrate: bool = False,
        epochs: int | None = None,
        nesterov: bool | None = None,
        k: int | None = None,
        temperature: float | None = None,
    ) -> dict[str, Any]:
        """The results of the named protocols (of `PROTOCOLS`) in one dict.

        Their keys begin with the kind of the protocol, as in `linear_top1`. If several linear
        protocols are named, they begin with the protocol's name, as in `linear_fast_top1` and
        `linear_rsa_small_top1`.

        With several ranks, every rank must call this. The encoder is in eval mode meanwhile and
        does not change. linear-rsa-small and linear-rsa-large use `epochs`, and linear-rsa-small
        uses `nesterov`. None means the protocol's own value (see `rsa_fast.evaluation.linear`).
        With `k` or `temperature`, knn votes only once. If one of the two is None, the value of
        `knn_top1` is used.

        `recalibrate` is only for linear-rsa-small. The classifier is then trained on a copy of the
        encoder with BatchNorm in train mode, so the running statistics become those of the
        classifier's images. The same happens in eval_single.py of github.com/tmllab/RSA.

        Raises ValueError for an unknown protocol, and for `recalibrate` with several ranks, because
        each rank would have different statistics.
        """
        check_protocols(protocols)
        if recalibrate and world_size() > 1:
            raise ValueError(f"recalibrating BatchNorm needs one process, found {world_size()}")
        training, before = encoder.training, copy.deepcopy(encoder.state_dict())
        encoder.eval()
        test, device = self.features(encoder, self.test), self.test.device
        # This is a function, because linear-rsa-small needs no features of plain training images.
        train = cache(lambda: self.features(encoder, self.train))
        self.predictions = {}
        results: dict[str, Any] = {"test_transform": self.test.transform}
        unreadable = int((gather_rows(test[1].to(device)) < 0).sum())
        if skipped := unreadable + len(self.test.source.bad):
            results["test_images_skipped"] = skipped
        scores: dict[str, Any]
        distinct = tuple(dict.fromkeys(protocols))
        kinds = [protocol.partition("-")[0] for protocol in distinct]
        for protocol in distinct:
            kind = protocol.partition("-")[0]
            own = protocol.replace("-", "_") if kinds.count(kind) > 1 else kind
            predictions = self.predictions[own] = Predictions(self.classes)
            match protocol:
                case "knn":
                    rows, labels = test
                    votes: dict[str, Predictions] = {}
                    scores = {}
                    settings = KNN_SETTINGS
                    if k or temperature:
                        usual_k, usual_temperature = KNN_SETTINGS["knn_top1"]
                        pair = (k or usual_k, temperature or usual_temperature)
                        settings = {"knn_top1": pair}
                        scores = {"knn_k": pair[0], "knn_temperature": pair[1]}
                    scores |= knn(
                        *train(), rows.to(device), labels.to(device), self.classes, settings, votes
                    )
                    self.predictions[own] = votes["knn_top1"]
                case "linear-fast":
                    scores = linear.fast(
                        train(), gather_features(test, device), self.classes, predictions
                    )
                case "linear-rsa-small":
                    scores = self.rsa_small(
                        encoder,
                        gather_features(test, device),
                        recalibrate=recalibrate,
                        epochs=epochs or linear.SMALL_EPOCHS,
                        nesterov=nesterov is not False,
                        predictions=predictions,
                    )
                case "linear-rsa-large":
                    with self.augmented(encoder) as batches:
                        scores = linear.rsa_large(
                            batches,
                            train=train(),
                            test=gather_features(test, device),
                            classes=self.classes,
                            seed=self.recipe.seed,
                            epochs=epochs or linear.LARGE_EPOCHS,
                            predictions=predictions,
                        )
            scores = {f"{kind}_protocol": f"{protocol}/1", **scores}
            if own != kind:
                scores = {own + key.removeprefix(kind): value for key, value in scores.items()}
            results |= scores
        encoder.train(training)
        # A frozen network must not have changed. MoCo's main_lincls.py makes the same check.
        after = encoder.state_dict()
        unchanged = all(torch.equal(after[key], value) for key, value in before.items())
        assert unchanged, "the encoder changed in evaluation"
        return results

    def features(self, encoder: nn.Module, images: PlainImages) -> LabelledFeatures:
        """The result of `extract_features`, from the cache if `cached` is true."""
        if not self.cached:
            return extract_features(encoder, images)
        return cached(encoder, images, lambda: extract_features(encoder, images))

    def described(self) -> dict[str, Any]:
        """The places and the numbers of the images on which encoders are scored, for a result."""
        share = {} if self.labels is None else {"labels": self.labels}
        counts = {
            "train_images": len(self.train.source.manifest),
            "test_images": len(self.test.source.manifest),
        }
        return {**self.places, **share, **counts}

    def per_class(self) -> dict[str, dict[str, float | None]]:
        """The accuracy of each class in the last `score`: `knn_per_class` and so on."""
        return {
            f"{name}_per_class": predictions.per_class(self.names)
            for name, predictions in self.predictions.items()
        }

    def write_confusion(self, path: Path) -> None:
        """Write the confusions of the last protocol of the last `score` as JSON.

        `classes` are the names of the classes, and `counts` are the rows of
        `Predictions.confusion`.
        """
        name, predictions = list(self.predictions.items())[-1]
        content = {"score": name, "classes": self.names, "counts": predictions.confusion()}
        write_text(path, json_text(content))

    def rsa_small(
        self,
        encoder: nn.Module,
        test: LabelledFeatures,
        *,
        recalibrate: bool,
        epochs: int,
        nesterov: bool,
        predictions: Predictions,
    ) -> dict[str, Any]:
        """Run linear-rsa-small. `test` are the test set's features, computed in eval mode."""
        learner = copy.deepcopy(encoder).train() if recalibrate else encoder

        def test_features() -> LabelledFeatures:
            if not recalibrate:
                return test
            return gather_features(extract_features(learner, self.test), self.test.device)

        with self.augmented(learner) as batches:
            scores = linear.rsa_small(
                batches,
                test=test_features,
                classes=self.classes,
                seed=self.recipe.seed,
                epochs=epochs,
                nesterov=nesterov,
                predictions=predictions,
            )
        return {"linear_bn": "recalibrate" if recalibrate else "eval", **scores}

    @contextmanager
    def augmented(self, encoder: nn.Module) -> Iterator[Batches]:
        """A function that yields one epoch of features of randomly cropped and flipped images.

        The encoder computes them in its current mode. If the last images of an epoch do not fill a
        batch, they are left out, as in eval_single.py of the RSA code. In contrast, eval_multi.py
        uses them.
        """
        source, count = self.train.source, len(self.train.source.manifest)
        views = replace(
            self.recipe.views,
            crop_area=(0.08, 1.0),
            crop_aspect=(3 / 4, 4 / 3),
            flip_p=0.5,
            vertical_flip_p=0,
            quarter_turns=False,
            interpolation="bilinear",
            groups=(CropGroup("crops", 1),),
            extra=None,  # never execute a file that a checkpoint names
        )
        order = Order(
            count,
            batch_size=min(linear.BATCH_SIZE, count),
            seed=self.recipe.seed,
            rank=rank(),
            world_size=world_size(),
        )
        with open_views(
            source,
            views,
            frozenset({"weak_1"}),
            order,
            device=self.train.device,
            dtype=self.train.dtype,
            loading=Loading(threads=self.train.threads, on_bad_image=self.recipe.on_bad_image),
        ) as loader:

            def batches(epoch: int) -> Iterator[LabelledFeatures]:
                for batch in loader.batches(epoch):
                    yield gather(embed(encoder, batch.weak_1)), gather(batch.label)

            yield batches
