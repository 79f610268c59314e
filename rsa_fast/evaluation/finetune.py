"""Fine-tuning: train an encoder with a linear classifier, on all or some of the labels.

    finetune("runs/a", None, "runs/a-1pct", labels=1, preset="swav")

It is supervised training (see `methods/supervised.py`) that starts from a trained encoder. The
engine is that of pre-training, so the run folder, resuming and signals are the same. The classifier
has its own learning rate. With `freeze_encoder`, only the classifier is trained. The encoder is
then in eval mode and gets no gradient, as in the linear protocols (see `linear.py`).

The test accuracy is measured during training. In a result, `finetune_top1` is the accuracy after
the last epoch, and `finetune_best_top1` is the best one, which the reference codes report.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field, field_validator
from torch import Tensor, nn

from rsa_fast import terminal
from rsa_fast.archs import RESNET_FIELDS
from rsa_fast.datasets import CHECKPOINTS, every, name_of
from rsa_fast.distributed import world_size
from rsa_fast.evaluation.accuracy import TOP5_ABOVE
from rsa_fast.evaluation.encoders import load_encoder, traits
from rsa_fast.evaluation.evaluate import Evaluation, embed, recipe_for_images
from rsa_fast.evaluation.features import eval_mode
from rsa_fast.methods.supervised import Supervised, SupervisedRecipe
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.combined import fraction_of, listed_ids, stratified_ids, subset
from rsa_fast.pipelines.files import read_list_text
from rsa_fast.pipelines.layouts import Data, described
from rsa_fast.pipelines.named import nearest
from rsa_fast.pipelines.sources import Source
from rsa_fast.recipes import (
    LOADING_FIELDS,
    Derived,
    Recipe,
    build_recipe,
    read_yaml,
    replaced,
    stored_recipe,
)
from rsa_fast.sourced import Fields, Rows, cite
from rsa_fast.training.callbacks import Callback
from rsa_fast.training.checkpoint import newest_checkpoint
from rsa_fast.training.engine import train
from rsa_fast.training.run_folder import places_of_checkpoint, stored_places

log = logging.getLogger("rsa_fast")

# The augmentation of the images that train the classifier, as in `Evaluation.augmented`.
WEAK = {
    "crop_area": (0.08, 1.0),
    "crop_aspect": (3 / 4, 4 / 3),
    "flip_p": 0.5,
    "vertical_flip_p": 0,
    "quarter_turns": False,
    "extra": None,  # never execute a file that a checkpoint names
    "groups": ({"name": "crops", "count": 1},),
}
# The fields that are copied from the checkpoint's recipe: the encoder's and the images'.
NETWORK = ("arch", "in_channels", "stem", "width", "compile")
IMAGES = ("eval_resize_px", "val_fraction", "exif_orientation", "precision", "device")

# The published recipes for ImageNet, by the percentage of the labels.
ALL = cite("all of these codes", optimizer="sgd", momentum=0.9, weight_decay=0.0, warmup_epochs=0)
SIMCLR = (
    ALL
    | cite("SimCLR v1 B.5", base_lr=0.05, head_base_lr=0.05, batch_size=4096, nesterov=True)
    | cite("SimCLR run.py: global_bn", bn="sync")
    | cite("SimCLR tf2/model.py", head_init_std=0.01)
    | cite("SimCLR v1 B.5: cosine", lr_per="step")
)
SWAV = (
    ALL
    | cite("SwAV eval_semisup.py", batch_size=256, epochs=20, lr_drop_epochs=(12, 16), lr_drop=0.2)
    | cite("SwAV eval_semisup.py", bn="sync", head_init_std=None)
)
COSINE_20 = cite(
    "Barlow Twins evaluate.py, README; VICReg README",
    batch_size=256,
    epochs=20,
    lr_per="epoch",
    bn="local",
    head_init_std=0.01,
)
BARLOW_TWINS = ALL | COSINE_20 | cite("Barlow Twins README", base_lr=0.005, head_base_lr=0.5)
VICREG = ALL | COSINE_20
AS_10 = "chosen: the same as for 10%, because none is published for all labels"
PRESETS: dict[str, dict[int, Fields]] = {
    "simclr": {
        1: SIMCLR | cite("SimCLR v1 B.5", epochs=60),
        10: SIMCLR | cite("SimCLR v1 B.5", epochs=30),
        100: SIMCLR | cite("lightly finetune_eval.py", epochs=30),
    },
    "swav": {
        1: SWAV | cite("SwAV README", base_lr=0.02, head_base_lr=5.0),
        10: SWAV | cite("SwAV README", base_lr=0.01, head_base_lr=0.2),
        100: SWAV | cite(AS_10, base_lr=0.01, head_base_lr=0.2),
    },
    "barlow-twins": {
        1: BARLOW_TWINS,
        10: BARLOW_TWINS,
        100: BARLOW_TWINS | cite(AS_10, base_lr=0.005, head_base_lr=0.5),
    },
    "vicreg": {
        1: VICREG | cite("VICReg README", base_lr=0.03, head_base_lr=0.08),
        10: VICREG | cite("VICReg README", base_lr=0.01, head_base_lr=0.1),
        100: VICREG | cite(AS_10, base_lr=0.01, head_base_lr=0.1),
    },
}
# If the images fill a preset's batch fewer times in an epoch, the batch is halved until they fill
# it this often. SimCLR's 1% of ImageNet fills a batch of 4096 three times.
LEAST_STEPS_PER_EPOCH = 3
# The least steps of a run with a halved batch. This is our choice: on few images, the number of
# steps matters.
LEAST_STEPS = 500
SCORES = 60  # about the most scores in a run; the published recipes have one an epoch

# The MD5 sums of the lists in github.com/google-research/simclr, imagenet_subsets/.
OFFICIAL_LISTS = {
    "b61c91b8ddb75fabdb02a9bb2ae3bd74": "SimCLR's 1percent.txt",
    "b0d861160cc9531910d069ff547fc1b6": "SimCLR's 10percent.txt",
}


class FinetuneRecipe(SupervisedRecipe):
    """The fields of fine-tuning. `base_lr` and `peak_lr` are the encoder's."""

    head_base_lr: float = Field(gt=0)  # the classifier's learning rate for 256 images
    head_peak_lr: float | None = Field(None, gt=0)  # replaces the scaled head_base_lr
    # The standard deviation of the classifier's normally distributed initial weights. Its bias
    # starts at 0. With None, torch's initialisation of nn.Linear is used.
    head_init_std: float | None = Field(None, ge=0)
    freeze_encoder: bool = False  # train only the classifier, on the encoder in eval mode
    labels: float = Field(1, gt=0, le=1)  # the fraction of each class's images that is used
    images_list: str | None = None  # a file with the names of the images that are used instead

    @field_validator("images_list")
    @classmethod
    def list_is_found_from_everywhere(cls, images_list: str | None) -> str | None:
        return os.path.abspath(images_list) if images_list else None

    @property
    def head_lr_ratio(self) -> float:
        """The learning rate of the classifier, divided by that of the encoder."""
        peak = self.head_peak_lr or self.head_base_lr * self.batch_size / 256
        return peak / self.highest_lr

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        schedule = super().schedule(step, derived)
        return schedule | {"head_lr": schedule["lr"] * self.head_lr_ratio}

    def training_source(self, data: Data, cache: str | Path | None = None) -> Source:
        """The labelled training images, or the chosen part of them."""
        source = self.open_source(data, "train", cache)
        if self.images_list:
            return subset(source, listed_ids(source, read_names(self.images_list)), "train")
        if self.labels == 1:
            return source
        ids = stratified_ids(source.manifest.labels, self.labels, self.seed)
        return subset(source, ids, "train")


class Finetune(Supervised):
    """A linear classifier on a trained encoder. Each has its own learning rate."""

    recipe_type = FinetuneRecipe
    rows: ClassVar[Rows] = {
        "all": PRESETS["simclr"][100]
        | cite("torchvision's default", zero_init_residual=False)
        | cite("torchvision's RandomResizedCrop", views={"crop_area": (0.08, 1.0)})
    }

    def __init__(self, recipe: FinetuneRecipe, encoder: Encoder) -> None:
        super().__init__(recipe, encoder)
        self.freeze_encoder, self.head_lr_ratio = recipe.freeze_encoder, recipe.head_lr_ratio
        self.encoder.requires_grad_(not recipe.freeze_encoder)
        if recipe.head_init_std is not None:
            generator = torch.Generator().manual_seed(recipe.seed)
            nn.init.normal_(self.classifier.weight, std=recipe.head_init_std, generator=generator)
            nn.init.zeros_(self.classifier.bias)

    def train(self, mode: bool = True) -> Finetune:
        super().train(mode)
        if self.freeze_encoder:
            self.encoder.eval()
        return self

    def lr_ratios(self) -> Mapping[nn.Parameter, float]:
        return dict.fromkeys(self.classifier.parameters(), self.head_lr_ratio)

    def score(self, evaluation: Evaluation, protocols: tuple[str, ...]) -> dict[str, Any]:
        """The accuracies of the classifier on the test images, whatever the `protocols`."""
        return score(self, evaluation)

    def summary(self, records: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """The best accuracy of all epochs, and the epoch."""
        scored = [record for record in records if "finetune_top1" in record]
        if not scored:
            return {}
        best = max(scored, key=lambda record: record["finetune_top1"])
        return {"finetune_best_top1": best["finetune_top1"], "finetune_best_epoch": best["epoch"]}


@torch.no_grad()
def logits(method: Supervised, images: Tensor) -> Tensor:
    """The classifier's float32 outputs `(B, C)` for images `(B, 3, H, W)`.

    The features are computed in the images' dtype, and the rest in float32.
    """
    with torch.autocast(images.device.type, enabled=False):
        outputs: Tensor = method.classifier(embed(method.encoder, images))
    return outputs


def score(method: Supervised, evaluation: Evaluation) -> dict[str, Any]:
    """The accuracies of the classifier on the test images, in percent.

    The top-5 accuracy is measured if there are more than ten classes. Images that cannot be read
    do not count. With several ranks, every rank must call this.
    """
    test = evaluation.test
    # The counts are the hits of top-1, the hits of top-5, and the images.
    counts = torch.zeros(3, dtype=torch.int64, device=test.device)
    with eval_mode(method):
        for images, labels in test:
            outputs = logits(method, images)
            hits = outputs.topk(min(5, outputs.shape[1])).indices == labels[:, None]  # (B, 5)
            counts += torch.stack([hits[:, 0].sum(), hits.sum(), (labels >= 0).sum()])
    if world_size() > 1:
        dist.all_reduce(counts)
    top1, top5, images_scored = counts.tolist()
    scores = {
        "test_transform": test.transform,
        "finetune_protocol": "finetune/1",
        "finetune_top1": 100 * top1 / images_scored,
    }
    if method.classifier.out_features > TOP5_ABOVE:
        scores["finetune_top5"] = 100 * top5 / images_scored
    if skipped := len(test.source.manifest) - images_scored + len(test.source.bad):
        scores["test_images_skipped"] = skipped
    return scores


def finetune(
    checkpoint: str | Path | None,
    data: Data | None,
    out: str | Path,
    *,
    labels: float | str | None = None,
    images_list: str | Path | None = None,
    preset: str = "simclr",
    freeze_encoder: bool = False,
    dataset: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    encoder: nn.Module | None = None,
    key: str | None = None,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any] | None:
    """Train the encoder of a checkpoint together with a linear classifier.

    This is what `rsa-fast finetune` runs. The result is that of `train`, with `finetune_top1`,
    `finetune_top5` if there are more than ten classes, `finetune_best_top1` and
    `finetune_best_epoch`, in percent on the test images of `data`. On all ranks except rank 0 it is
    None. The checkpoints in `out` contain the classifier, which `predict` uses.

    Args:
        checkpoint: A run's folder, which means its newest checkpoint, or a file of this or another
            project (see `load_encoder`). If it is None, with `resume`, the run in `out` continues
            with its own recipe.
        data: Labelled images. None means the images of the checkpoint's run.
        labels: How many of each class's labels are used. It is a percentage from 1 to 100, which
            may be written as "10%", or a fraction below 1. None means all. The images are chosen at
            random by the recipe's seed.
        images_list: A text file with one image name per line, such as SimCLR's lists for ImageNet.
            These images are used instead of those chosen by `labels`.
        preset: The published numbers to use: simclr, swav, barlow-twins or vicreg. Each has numbers
            for 1, 10 and 100 percent of the labels, and the nearest are used. If the images fill
            too few of the preset's batches, the batch is made smaller and the epochs are increased.
        freeze_encoder: Train only the classifier.
        dataset: Images are sized and normalised as for this dataset of `rsa_fast.datasets` instead
            of as in the checkpoint's recipe.
        overrides: Fields of the recipe, such as `epochs`, `peak_lr`, `head_peak_lr`.

    The other arguments and the errors are those of `train`. Also raises ValueError for names in a
    list that no image has, and for an encoder without a recipe if `dataset` is missing.
    """
    out, chosen = Path(out), {k: v for k, v in (overrides or {}).items() if v is not None}
    if checkpoint is None:
        stored = out / "recipe.yaml"
        if not (resume and stored.is_file()):
            raise ValueError(f"there is no run to resume in {out}: give a checkpoint to start from")
        recipe: Recipe = stored_recipe(read_yaml(stored), str(stored))
        recipe = replaced(recipe, chosen)
        places = data or stored_places(out)
    else:
        places = data or places_of_checkpoint(checkpoint)
        checkpoint = newest_checkpoint(checkpoint)
        network, own = load_encoder(checkpoint, encoder, key)
        base = recipe_for_images(checkpoint, own, places, dataset, None, {"unlabelled": False})
        of_network = {name: getattr(own or base, name) for name in NETWORK}
        if own is None and encoder is None:
            of_network |= traits(network)
        choice = {"labels": labels, "images_list": images_list, "freeze_encoder": freeze_encoder}
        recipe = build_finetune_recipe(base, of_network, places, preset, choice, chosen)
    return train(
        recipe,
        places,
        out,
        resume=resume,
        overwrite=overwrite,
        init_from=checkpoint,
        key=key,
        force=force,
        encoder=encoder,
        callbacks=callbacks,
    )


def build_finetune_recipe(
    base: Recipe,
    of_network: Mapping[str, Any],
    data: Data,
    preset: str,
    choice: Mapping[str, Any],
    chosen: Mapping[str, Any],
) -> Recipe:
    """The recipe that `finetune` trains. The log shows the choices.

    `base` determines how images are read, and `of_network` contains the fields of the encoder.
    `choice` contains the arguments of `finetune` about the labels, the images and what is trained.
    `chosen` contains its `overrides`.
    """
    if preset not in PRESETS:
        raise ValueError(
            f"no preset {preset!r}{nearest(preset, PRESETS)}: choose from {', '.join(PRESETS)}"
        )
    if choice["labels"] is not None and choice["images_list"]:
        raise ValueError("a list of images already chooses the labels: leave out labels")
    part = 1.0 if choice["labels"] is None else fraction_of(choice["labels"])
    defaults = {
        name: field.default
        for name, field in FinetuneRecipe.model_fields.items()
        if not field.is_required()
    }
    fields = {
        **{name: value for name, value in defaults.items() if name not in RESNET_FIELDS},
        **{name: getattr(base, name) for name in (*IMAGES, *LOADING_FIELDS)},
        **of_network,
        "views": asdict(base.views) | WEAK,
        "name": name_of(data),
        "freeze_encoder": choice["freeze_encoder"],
        "labels": part,
        "images_list": choice["images_list"] and str(choice["images_list"]),
    }

    def recipe_with(**changes: Any) -> FinetuneRecipe:
        overrides = {**fields, **changes, **chosen}
        recipe = build_recipe(base.dataset, "finetune", overrides=overrides)
        assert isinstance(recipe, FinetuneRecipe)
        return recipe

    # The images decide the number of classes, the row of the preset, and how long the run is.
    draft = recipe_with(classes=2)
    every, source = draft.open_source(data, "train").manifest, draft.training_source(data).manifest
    if not every.labelled:
        raise ValueError(
            f"{described(data)} has no labels for fine-tuning: sort the images into class folders"
        )
    share = len(source) / len(every) if choice["images_list"] else part
    percent = min(PRESETS[preset], key=lambda percent: abs(math.log(percent / 100 / share)))
    row = PRESETS[preset][percent]
    changes = {name: sourced.value for name, sourced in row.items()}
    shorter = run_length(len(source), changes, chosen)
    changes |= shorter | {"classes": len(every.classes)}
    if terminal.speaks():
        counts = np.bincount(source.labels, minlength=len(every.classes))
        each = " to ".join(dict.fromkeys(map(str, (counts.min(), counts.max()))))
        listed = f", those in {in_words(choice['images_list'])}" if choice["images_list"] else ""
        total = f"{len(source):,} of {len(every):,} images"
        log.info(f"labels: {total}, {each} of each class{listed}")
        log.info(f"preset {preset} for {percent}% of the labels: {in_words_of(row)}")
        if shorter["batch_size"] < row["batch_size"].value and "batch_size" not in chosen:
            length = f"batch {shorter['batch_size']} and {shorter['epochs']} epochs"
            log.info(f"there are few images for the preset's batch, so the run has {length}")
    return recipe_with(**changes)


def run_length(count: int, fields: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the length of a run on `count` images, which may be few for the preset.

    `fields` are those of the preset, and `chosen` are those that the user set.
    """
    batch_size, epochs = fields["batch_size"], fields["epochs"]
    while batch_size > 2 and count // batch_size < LEAST_STEPS_PER_EPOCH:
        batch_size //= 2
    if batch_size < fields["batch_size"]:
        epochs = max(epochs, -(-LEAST_STEPS // max(1, count // batch_size)))
    epochs = chosen.get("epochs", epochs)
    drops = fields.get("lr_drop_epochs", ())
    return {
        "batch_size": batch_size,
        "epochs": epochs,
        "lr_drop_epochs": tuple(round(epochs * drop / fields["epochs"]) for drop in drops),
        "knn_every_epochs": every(epochs, SCORES),
        "checkpoint_every_epochs": every(epochs, CHECKPOINTS),
    }


def in_words_of(row: Fields) -> str:
    """The numbers of a preset with their sources."""
    by_source: dict[str, list[str]] = {}
    for name, sourced in row.items():
        by_source.setdefault(sourced.source, []).append(f"{name} {sourced.value}")
    return "; ".join(f"{', '.join(numbers)} ({source})" for source, numbers in by_source.items())


def in_words(images_list: str | Path) -> str:
    """A text for a list of images, which also says whether it is a published one."""
    md5 = hashlib.md5(Path(images_list).read_bytes(), usedforsecurity=False).hexdigest()
    official = f", {OFFICIAL_LISTS[md5]}" if md5 in OFFICIAL_LISTS else ""
    return f"{images_list} (MD5 {md5}{official})"


def read_names(path: str | Path) -> list[str]:
    """The names in a list of images, which has one name per line."""
    return [line.strip() for line in read_list_text(Path(path)).splitlines() if line.strip()]
