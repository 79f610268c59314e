"""Predict the classes of images by a trained classifier, and write them to a csv file.

    result = predict("runs/tuned", "my_photos", "predictions.csv", top=2)

The columns are file, class and probability, and with `top` class_2, probability_2 and so on. One
row per image follows, in the order of the images in their source, whatever the number of ranks. The
file is the image's path relative to the data folder. Packed images have no names, so their numbers
are used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor, nn

from rsa_fast.distributed import gather, process_group, rank
from rsa_fast.evaluation.embed import (
    Block,
    features_of,
    filename,
    table_writer,
)
from rsa_fast.evaluation.features import eval_mode, plain_images
from rsa_fast.evaluation.finetune import logits
from rsa_fast.methods.method import build_method
from rsa_fast.methods.supervised import Supervised
from rsa_fast.pipelines.files import write_whole
from rsa_fast.pipelines.layouts import Data, inventory, open_source
from rsa_fast.pipelines.sources import Source
from rsa_fast.recipes import Recipe, stored_recipe
from rsa_fast.training import checkpoint as checkpoints
from rsa_fast.training.step import choose_device, choose_dtype, for_any_device

log = logging.getLogger("rsa_fast")


class Classifier(nn.Module):
    """A trained classifier, from images `(B, 3, H, W)` to float32 logits `(B, C)`."""

    def __init__(self, method: Supervised, classes: list[str]) -> None:
        super().__init__()
        self.method, self.classes = method, classes

    def forward(self, images: Tensor) -> Tensor:
        return logits(self.method, images)


def load_classifier(path: Path, encoder: nn.Module | None = None) -> tuple[Classifier, Recipe]:
    """The classifier in a checkpoint of `finetune` or of the method supervised, and its recipe.

    Raises ValueError for a checkpoint without a classifier, and the errors of `checkpoint.load`.
    """
    state = checkpoints.load(path)
    name = state["recipe"].get("method")
    if name not in ("finetune", "supervised"):
        raise ValueError(
            f"{path} has no classifier, because its method is {name}: train one with rsa-fast "
            "finetune"
        )
    recipe = for_any_device(stored_recipe(state["recipe"], "the checkpoint"))
    # Only the statistics in the checkpoint are used. They do not depend on `bn`.
    method = build_method(recipe.model_copy(update={"bn": "local"}), encoder)
    assert isinstance(method, Supervised)
    method.load_state_dict(state["method"])
    # Earlier versions did not store the names.
    numbers = [str(label) for label in range(method.classifier.out_features)]
    return Classifier(method, state.get("classes") or numbers), recipe


def predict(
    checkpoint: str | Path,
    data: Data,
    out: str | Path,
    *,
    top: int = 1,
    split: Literal["all", "train", "test"] = "all",
    encoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Write the most probable class of every image in `data` to the csv file `out`.

    This is what `rsa-fast predict` runs, and the result is what it prints. `checkpoint` is the
    folder of a run of `finetune`, whose newest checkpoint is read, or a checkpoint with a
    classifier. `encoder` is the network for its weights, if it was passed to training in Python.
    `top` is the number of classes to write for each image. The images are those of a split, or all
    images below the folder `data`. From packed images, only a split can be read.

    Images that cannot be read are left out and counted. With several ranks, all return the result,
    and rank 0 writes the file.

    Raises ValueError for a checkpoint without a classifier and for a `top` above the number of
    classes. Raises FileNotFoundError if the checkpoint or the images do not exist.
    """
    path, out = checkpoints.newest_checkpoint(checkpoint), Path(out)
    classifier, recipe = load_classifier(path, encoder)
    classes = classifier.classes
    if not 1 <= top <= len(classes):
        raise ValueError(f"top = {top}: choose 1 to {len(classes)}, the number of classes")
    with process_group(recipe.device, recipe.timeout_s):
        source = open_images(recipe, data, split)
        if rank() == 0:
            log.info(inventory(source))
        device = choose_device(recipe.device)
        dtype = choose_dtype(recipe.precision, device)
        images = plain_images(source, recipe, device, dtype)
        with eval_mode(classifier.to(device)):
            blocks = features_of(classifier, images)
            if rank() == 0:
                out.parent.mkdir(parents=True, exist_ok=True)
                rows = rows_of(blocks, source, classes, top)
                write_whole(out, lambda file: write_rows(file, rows))
            for _ in blocks:  # the other ranks only compute
                pass
        unreadable = int(gather(torch.tensor([len(images.bad)], device=device)).sum())
        result = {
            "out": str(out),
            "images": len(source.manifest) - unreadable,
            "left_out": unreadable + len(source.bad),
            "classes": len(classes),
            "checkpoint": str(path),
        }
        if result["left_out"] and rank() == 0:
            log.warning(f"{result['left_out']:,} images could not be read and have no row")
    return result


def rows_of(
    blocks: Iterator[Block], source: Source, classes: list[str], top: int
) -> Iterator[list[str]]:
    """The heading, and one row per image, from blocks of sample ids and logits."""
    more = [f"{name}_{i}" for i in range(2, top + 1) for name in ("class", "probability")]
    yield ["file", "class", "probability", *more]
    for ids, outputs in blocks:
        best = torch.from_numpy(outputs).double().softmax(1).topk(top)
        for sample, *row in zip(
            ids.tolist(), best.indices.tolist(), best.values.tolist(), strict=True
        ):
            pairs = [(classes[number], f"{p:.6g}") for number, p in zip(*row, strict=True)]
            yield [filename(source.manifest, sample), *chain.from_iterable(pairs)]


def write_rows(file: BinaryIO, rows: Iterator[list[str]]) -> None:
    with table_writer(file, ",") as table:
        table.writerows(rows)


def open_images(recipe: Recipe, data: Data, split: str) -> Source:
    """The images of a split of `data`, or all images below the folder."""
    if split != "all":
        return recipe.open_source(data, split)
    try:
        return open_source(
            data,
            "pretrain",
            unlabelled=True,
            on_bad_image="skip",
            exif_orientation=recipe.exif_orientation,
        )
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}. For packed images, give --split train or test") from None
