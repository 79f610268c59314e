"""Recipes, which contain all settings of a run: data, network, method and training.

    recipe = build_recipe("cifar100", "rsa", overrides={"epochs": 800})
    derived = resolve(recipe, count=50_000)  # steps_per_epoch, total_steps, peak_lr, ...

The fields come from the dataset's row, the method's row, a user's file and `--set key=value`. Later
ones replace earlier ones. Unknown keys and fields of another method are errors. In a row, every
number has a source (see `sourced.py` for PAPER, CODE and "chosen").
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import logging
import math
import reprlib
import textwrap
import tokenize
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rsa_fast import schedules
from rsa_fast.archs import CHOICES, OWN, RESNET_FIELDS, RESNETS, full_name
from rsa_fast.datasets import DATASETS, Dataset, name_of, own_dataset
from rsa_fast.methods import FILES, METHODS, method_class, short_name
from rsa_fast.pipelines.layouts import Data, open_source
from rsa_fast.pipelines.loading import AggressiveOn, DecodeOn, Loading
from rsa_fast.pipelines.machine import loader_threads
from rsa_fast.pipelines.named import absolute, is_file, nearest
from rsa_fast.pipelines.order import Order
from rsa_fast.pipelines.scan import OnBadImage
from rsa_fast.pipelines.sources import Source
from rsa_fast.pipelines.views import ViewSpec
from rsa_fast.sourced import Fields, cite, updated

log = logging.getLogger("rsa_fast")

VIEWS_WITHOUT_DEFAULT = {
    field.name for field in dataclasses.fields(ViewSpec) if field.default is dataclasses.MISSING
}
LOADING_FIELDS = tuple(field.name for field in dataclasses.fields(Loading))
# The fields that a resumed run may change. `on_bad_image` is one of them, because it had no effect
# before the run stopped at the first bad image.
FREE_FIELDS = (
    *LOADING_FIELDS,
    "recompute_stages",
    "device",
    "timeout_s",
    "max_skips",
    "keep_last",
    "keep_best",
    "log_every_steps",
    "evaluate",
    "knn_every_epochs",
    "checkpoint_every_epochs",
    "wandb",
    "name",
)


class Recipe(BaseModel):
    """The fields of every run. Batch sizes are global. Lengths are in epochs or, if named, steps.

    A field without a default gets its value and its source from a row of `datasets.py` or of the
    method's file. A default is valid for every dataset, unless a row replaces it.

    `rsa-fast recipes NAME` shows the comment after or above a field as its meaning (`meanings`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # --- Fields that change the result
    dataset: str  # a name in datasets.py
    method: str  # the name of a file in methods/ or of an entry point, or a file's absolute path
    views: ViewSpec  # the augmentation of the training images
    # Evaluation resizes the short side of images to this before the centre crop. If it is None,
    # only images that are smaller than the crop are resized.
    eval_resize_px: int | None = Field(None, ge=1)
    # If the data have no val/ or test/, this fraction of the labelled training images of each class
    # is held out for scores and not used for training.
    val_fraction: float = Field(0, ge=0, lt=1)
    # All images below the folder are training images without labels, and there are no scores.
    unlabelled: bool = False
    # Image files are turned upright, as their EXIF tags say. Packed images are read as stored.
    exif_orientation: bool = False
    # The encoder is a ResNet, timm/NAME, path/to/file.py:function, or own, which is passed in
    # Python. stem, width, zero_init_residual, recompute_stages and compile are for ResNets.
    arch: str
    in_channels: Literal[1, 3] = 3  # with 1, the encoder gets the mean of a view's three channels
    # The stem is a 3x3 convolution without max-pool (cifar), or a 7x7 convolution with it
    # (imagenet).
    stem: Literal["cifar", "imagenet"] = "imagenet"
    width: int = Field(64, ge=1)  # channels of the first stage; the standard ResNet has 64
    # Every residual block starts as the identity (CODE methods/BYOL.py).
    zero_init_residual: bool = True
    # BatchNorm's statistics are those of each rank's batch (local), of all ranks' (sync), or of
    # each of N equal parts of the global batch (split:N).
    bn: str = Field("local", pattern=r"^(local|sync|split:[1-9]\d*)$")
    epochs: int = Field(ge=1)  # the number of times that every training image is used
    batch_size: int = Field(ge=1)  # the images of an optimiser step, on all ranks together
    # Each rank takes its part of the batch in N passes, one after the other, and adds up the
    # gradients. N passes on one rank are equivalent to N ranks with bn = local, but need about the
    # memory of one pass.
    accumulate: int = Field(1, ge=1)
    # The algorithm that updates the weights.
    optimizer: Literal["sgd", "lars", "larc", "adam", "adamw"]
    base_lr: float = Field(gt=0)  # per 256 images: peak_lr = base_lr * batch_size / 256
    peak_lr: float | None = Field(None, gt=0)  # replaces base_lr * batch_size / 256
    # The cosine of the learning rate ends at this value. The default is that of PAPER 4.1.
    min_lr: float = Field(0, ge=0)
    # At the start of these epochs, the learning rate is multiplied by `lr_drop`. They are counted
    # from 0 or, if negative, from the end of the run. They replace the cosine. A run that is too
    # short to reach one of them after its warm-up leaves it out.
    lr_drop_epochs: tuple[int, ...] = ()
    lr_drop: float = Field(0.1, gt=0, lt=1)  # the factor at each of `lr_drop_epochs`
    # The learning rate of gains and biases, which have one dimension, divided by that of the other
    # parameters.
    bias_lr_ratio: float = Field(1, gt=0)
    # The cosine moves at every step, or at the start of every epoch. The warm-up moves at every
    # step.
    lr_per: Literal["step", "epoch"] = "step"
    # The momentum of the optimiser (PAPER 4.1). For Adam and AdamW it is beta_1, while beta_2 is
    # 0.999 and eps is 1e-8.
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False  # Nesterov's momentum, with SGD
    weight_decay: float = Field(ge=0)  # Adam adds it to the gradient, AdamW shrinks the weights
    # The parameters that have no weight decay with SGD, LARC, Adam and AdamW: none, or gains and
    # biases, which have one dimension. With LARS, gains and biases never have weight decay.
    decay_exclude: Literal["none", "norm_and_bias"] = "none"
    # If the norm of all gradients together is larger than this, they are scaled down to it.
    clip_grad_norm: float | None = Field(None, gt=0)
    # If the norm of a parameter's gradient is larger than this, it is scaled down to it (DINO).
    clip_each_grad_norm: float | None = Field(None, gt=0)
    trust_coefficient: float = Field(0.001, gt=0)  # for LARS and LARC (CODE common/lars.py)
    warmup_epochs: int = Field(0, ge=0)  # the learning rate rises linearly from `warmup_start_lr`
    warmup_start_lr: float = Field(0, ge=0)  # the learning rate of the first step of the warm-up
    # auto means bf16 if the device computes in it, and otherwise fp16 on a GPU and fp32 on a CPU.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = Field(0, ge=0, lt=2**63)  # for the initialisation, the sample order and the views
    # The order of an epoch. It is one permutation of all images (full), or it is first a
    # permutation of blocks of neighbours in the packed files and then of the images in a window of
    # blocks (blocks). Blocks help if packed data are larger than the memory and the disk does few
    # reads per second: 3,200 instead of 564 images/s at 500 reads per second. They do not help on a
    # local NVMe disk.
    order: Literal["full", "blocks"] = "full"
    block_mib: int = Field(1, ge=1)  # the size of a block, which is read in one piece
    window_mib: int = Field(4096, ge=1)  # for all ranks together; two windows are in memory

    # --- Fields that change the result by rounding only
    # Train the encoder with torch.compile, which fuses BatchNorm, ReLU and sums. A model of RSA's
    # training (ResNet-50, 224 px, fp16, 256 images per V100) predicts 25% fewer bytes and 21% less
    # roofline time. But there are 28% more kernels to launch, which takes time if images or batches
    # are small. Compiling takes minutes.
    compile: bool = False

    # --- Fields that change only speed or memory
    # The number of the encoder's four stages that are computed again in the backward pass, so that
    # their activations are not stored (Chen et al. 2016). For one stage, the same model predicts
    # 12.3 GiB instead of 21.6 GiB, which fits a GPU of 16 GB, and 11% more time. For two stages, it
    # predicts 9.7 GiB and 19% more time.
    recompute_stages: int = Field(0, ge=0, le=4)
    backend: str = "auto"  # the name of the backend that makes the views
    # The number of loader threads per rank. 0 means the rank's share of the cores, at most 16.
    threads: int = Field(0, ge=0)
    prefetch_batches: int = Field(2, ge=1)  # the number of batches that are prefetched
    # Where jitter, grayscale and blur are computed. auto means on the device if that is a GPU.
    aggressive_on: AggressiveOn = "auto"
    # Where the dali backend decodes if the device is a GPU: on the GPU (mixed) or on the host.
    decode_on: DecodeOn = "gpu"
    # Where the networks are trained. auto means on the GPU if torch finds one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # What to do with an image that cannot be read: stop or skip. With skip, it is left out at the
    # start, or replaced by the next readable image later.
    on_bad_image: OnBadImage = "stop"

    # --- Fields that change only what is recorded, and when a run stops
    log_every_steps: int = Field(20, ge=1)  # steps between two records of loss and speed
    evaluate: bool = True  # score the encoder, if the data have a test split
    knn_every_epochs: int = Field(10, ge=0)  # epochs between two kNN scores; 0: only at the end
    checkpoint_every_epochs: int = Field(1, ge=1)  # epochs between two checkpoints
    keep_last: int = Field(2, ge=1)  # the number of newest checkpoints that are not deleted
    # The score, such as knn_top1, whose best epoch is saved as checkpoints/best.pt, or empty.
    keep_best: str = ""
    max_skips: int = Field(50, ge=1)  # the run stops after this number of fp16 overflows in a row
    timeout_s: float = Field(600, gt=0)  # the run stops if ranks wait longer for each other
    wandb: bool = False  # also send the records to Weights & Biases
    name: str = ""  # the name of the data in results, or empty for the dataset's name

    def __repr__(self) -> str:
        """A summary line, then the fields that differ from the rows of the dataset and method."""
        title = (
            f"{short_name(self.method)} on {self.data_name}: {self.arch}, {self.views.size_px} px, "
            f"batch {self.batch_size}, {self.epochs} epochs, lr {self.highest_lr:.4g}"
        )
        differences = ", ".join(
            f"{key} {value} (not {usual})" for key, value, usual in changed(self) if key != "name"
        )
        lines = textwrap.wrap(differences, 98, break_on_hyphens=False, break_long_words=False)
        return "\n  ".join([title, *lines])

    __str__ = __repr__

    @property
    def data_name(self) -> str:
        """The name of the data in results."""
        return self.name or self.dataset

    @property
    def loading(self) -> Loading:
        """The settings of loading for `open_views`."""
        fields = {name: getattr(self, name) for name in LOADING_FIELDS}
        return Loading(**fields | {"threads": self.threads or loader_threads()})

    def open_source(self, data: Data, split: str, cache: str | Path | None = None) -> Source:
        """Open the images of a split of `data` by the recipe's settings (`pipelines.open_source`).

        Unreadable test images are always left out, so they are not scored.
        """
        return open_source(
            data,
            split,
            cache,
            self.val_fraction,
            unlabelled=self.unlabelled,
            on_bad_image="skip" if split == "test" else self.on_bad_image,
            exif_orientation=self.exif_orientation,
        )

    def training_source(self, data: Data, cache: str | Path | None = None) -> Source:
        """Open the training images of a run with this recipe."""
        return self.open_source(data, "pretrain", cache)

    def order_of(
        self, source: Source, rank: int = 0, world_size: int = 1, kind: type[Order] = Order
    ) -> Order:
        """The order in which one of `world_size` ranks reads the images of a run.

        Raises ValueError if batches cannot be divided, and for blocks of images that are not
        packed.
        """
        blocks = None
        if self.order == "blocks":
            if source.extents is None:
                raise ValueError(
                    f"order = blocks needs .beton files or tar shards, and {source.where} is "
                    "neither: convert it with rsa-fast convert, or set order=full"
                )
            blocks = source.extents.blocks(self.block_mib * 2**20, self.window_mib * 2**20)
        return kind(
            len(source.manifest),
            self.batch_size,
            self.seed,
            rank=rank,
            world_size=world_size,
            accumulate=self.accumulate,
            blocks=blocks,
        )

    @field_validator("method")
    @classmethod
    def method_is_found_from_everywhere(cls, method: str) -> str:
        return str(absolute(method)) if is_file(method) else method

    @field_validator("arch")
    @classmethod
    def arch_is_known(cls, arch: str) -> str:
        if (name := full_name(arch)) is None:
            raise ValueError(f"no such network{nearest(arch, RESNETS)}: choose from {CHOICES}")
        return name

    @model_validator(mode="after")
    def fields_of_resnets_are_for_resnets(self) -> Recipe:
        for name in RESNET_FIELDS if self.arch not in RESNETS else ():
            default = type(self).model_fields[name].default
            if (value := getattr(self, name)) != default:
                raise ValueError(
                    f"{name} = {value} is only for ResNets, but arch is {self.arch}: leave it out, "
                    f"or set {name}={default}"
                )
        return self

    @field_validator("backend")
    @classmethod
    def backend_exists(cls, backend: str) -> str:
        return Loading(backend=backend).backend

    @model_validator(mode="after")
    def split_fits(self) -> Recipe:
        if self.bn.startswith("split:"):
            groups = int(self.bn.removeprefix("split:"))
            if self.batch_size % groups or self.batch_size // groups < 2:
                raise ValueError(
                    f"bn = {self.bn} does not cut a batch of {self.batch_size} into equal parts "
                    "of 2 or more: use a larger batch or bn=local"
                )
        return self

    @model_validator(mode="after")
    def blocks_are_for_the_block_order(self) -> Recipe:
        for name in ("block_mib", "window_mib") if self.order == "full" else ():
            if (value := getattr(self, name)) != type(self).model_fields[name].default:
                raise ValueError(f"{name} = {value} is only for order=blocks, but order is full")
        return self

    @model_validator(mode="after")
    def nesterov_is_for_sgd(self) -> Recipe:
        if self.nesterov and self.optimizer != "sgd":
            raise ValueError(
                f"nesterov = True is only for SGD, but optimizer is {self.optimizer}: leave it out"
            )
        return self

    @model_validator(mode="after")
    def other_lrs_are_below_the_peak(self) -> Recipe:
        for name in ("min_lr", "warmup_start_lr"):
            if (value := getattr(self, name)) > self.highest_lr:
                raise ValueError(
                    f"{name} = {value} is above the peak learning rate {self.highest_lr:g}: "
                    "lower it, or set peak_lr"
                )
        return self

    @model_validator(mode="after")
    def drops_follow_the_warm_up(self) -> Recipe:
        given = f"lr_drop_epochs = {self.lr_drop_epochs}"
        if not self.lr_drop_epochs:
            return self
        if self.min_lr:
            raise ValueError(
                f"{given} replaces the cosine, but min_lr = {self.min_lr} is the end of the "
                "cosine: set min_lr=0, or lr_drop_epochs=[]"
            )
        if early := [e for e in self.lr_drop_epochs if 0 <= e <= self.warmup_epochs]:
            raise ValueError(
                f"{given}: epoch {early[0]} is not after the warm-up of {self.warmup_epochs} "
                "epochs: choose later ones"
            )
        if len(set(self.drop_epochs)) < len(self.drop_epochs):
            raise ValueError(
                f"{given} contains an epoch twice, in a run of {self.epochs}: leave one out"
            )
        return self

    @model_validator(mode="after")
    def accumulation_suits_the_method(self) -> Recipe:
        if self.accumulate == 1:
            return self
        given = f"accumulate = {self.accumulate}"
        if not method_class(self.method).mean_over_images:
            raise ValueError(
                f"{given}: {short_name(self.method)} compares the images of a batch with each "
                "other or with a queue, so parts of a batch would have another loss: to save "
                "memory, use recompute_stages or a smaller batch_size (your own method can set "
                "mean_over_images = True if its loss is a mean over images)"
            )
        if self.bn == "sync":
            raise ValueError(
                f"{given}: bn = sync needs all images of a step at once, but they pass in "
                f"{self.accumulate} turns: use bn = local, or split:N for N parts"
            )
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"{given} does not cut a batch of {self.batch_size} into equal parts of 2 or more"
            )
        return self

    @property
    def highest_lr(self) -> float:
        """The learning rate at the end of the warm-up."""
        return self.peak_lr or self.base_lr * self.batch_size / 256

    @property
    def drop_epochs(self) -> list[int]:
        """`lr_drop_epochs`, all counted from 0. Those before the start of the run are negative."""
        return [e if e >= 0 else self.epochs + e for e in self.lr_drop_epochs]

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        """The numbers that change with the step, which is counted from 0.

        These are the learning rate, `lr`, and what the method's recipe adds, such as `tau`.
        """
        total, warmup, peak = derived.total_steps, derived.warmup_steps, derived.peak_lr
        held = derived.steps_per_epoch if self.lr_per == "epoch" else 1
        drop_steps = [epoch * derived.steps_per_epoch for epoch in self.drop_epochs]
        lr = schedules.learning_rate(
            step,
            total,
            warmup,
            peak,
            self.min_lr,
            held,
            drop_steps,
            self.lr_drop,
            self.warmup_start_lr,
        )
        return {"lr": lr}

    def check_batch(self, world_size: int) -> None:
        """Raise ValueError if BatchNorm would get fewer than 2 images, which have no variance."""
        parts = 1 if self.bn == "sync" else world_size * self.accumulate
        if self.bn.startswith("split:") or self.batch_size >= 2 * parts:
            return  # `split_fits` has checked split:N
        shared = [f"{world_size} ranks"] if world_size > 1 else []
        shared += [f"accumulate = {self.accumulate}"] if self.accumulate > 1 else []
        among = f", on {' and '.join(shared)}," if shared else ""
        sync = ", or bn=sync" if self.accumulate == 1 < self.batch_size else ""
        raise ValueError(
            f"batch_size = {self.batch_size}, which is global{among} gives BatchNorm fewer than 2 "
            f"images at a time: it must be at least {2 * parts}{sync}"
        )

    def check_labels(self, labelled: bool, classes: int) -> None:
        """Raise ValueError if the method cannot train with these labels.

        `labelled` is true if the dataset has labels, and `classes` is the number of classes.
        """


@dataclass(frozen=True)
class Derived:
    """The numbers derived from a recipe, the dataset's size and the number of ranks.

    They are printed before the first step.
    """

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    batch_per_gpu: int  # the images of one pass; a step has `accumulate` passes


def resolve(recipe: Recipe, count: int, world_size: int = 1) -> Derived:
    """The derived numbers for `count` training images on `world_size` ranks.

    An incomplete last batch of an epoch is dropped. Raises ValueError as `Recipe.check_batch` does.
    """
    recipe.check_batch(world_size)
    steps = count // recipe.batch_size
    return Derived(
        steps_per_epoch=steps,
        total_steps=steps * recipe.epochs,
        warmup_steps=steps * recipe.warmup_epochs,
        peak_lr=recipe.highest_lr,
        batch_per_gpu=recipe.batch_size // (world_size * recipe.accumulate),
    )


def changed(recipe: Recipe) -> list[tuple[str, Any, Any]]:
    """The fields that differ from their rows, each with its name, its value and the rows' value.

    The list is empty if there are no rows to compare with.
    """
    if isinstance(recipe, ForeignRecipe):
        return []
    try:
        standard = build_recipe(recipe.dataset, recipe.method)
    except ValueError:
        return []
    own, usual = (dict(flatten(one.model_dump())) for one in (recipe, standard))
    return [(key, own[key], usual[key]) for key in own if own[key] != usual[key]]


def recipe_type(method: str) -> type[Recipe]:
    return method_class(method).recipe_type


def meanings(kind: type) -> dict[str, str]:
    """The meaning of each field of a recipe's class, such as `views.blur_p`.

    It is the comment after the field, or the lines of comment above it. Fields of a class without
    source code are left out.
    """
    texts: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        if not (issubclass(cls, Recipe) or cls is ViewSpec):
            continue
        with suppress(OSError, TypeError):
            texts |= comments_of_fields(textwrap.dedent(inspect.getsource(cls)))
    if issubclass(kind, Recipe):
        texts |= {f"views.{name}": text for name, text in meanings(ViewSpec).items()}
    return texts


def comments_of_fields(source: str) -> dict[str, str]:
    """The comments of the annotated fields of the class in `source`."""
    lines = source.splitlines()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    texts = {}
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        words, above = [comments.get(node.end_lineno or 0, "")], node.lineno - 1
        # A line such as `# --- Fields that ...` is the title of a part of the class.
        while lines[above - 1].lstrip().startswith("#") and not comments[above].startswith("---"):
            words.insert(0, comments[above])
            above -= 1
        if text := " ".join(filter(None, words)):
            texts[node.target.id] = text
    return texts


def row(dataset: str, method: str, own: Dataset | None = None) -> Fields:
    """The fields of a dataset and a method, with sources. Raises ValueError for unknown names.

    `own` is the row of the user's own images (`own_row`), for the dataset `auto`.
    """
    if dataset not in DATASETS:
        raise ValueError(
            f"no dataset {dataset!r}{nearest(dataset, DATASETS)}: choose from {', '.join(DATASETS)}"
        )
    numbers = own or DATASETS[dataset]
    fields = dict(numbers.fields)
    for scale in ("all", *numbers.scales):
        fields = updated(fields, method_class(method).rows.get(scale, {}))
    if "classes" in recipe_type(method).model_fields:
        fields |= cite("the dataset's", classes=numbers.classes)
    if own and "queue_size" in fields:
        fields |= short_queue(fields["queue_size"].value, own)
    return fields | numbers.run_length


def short_queue(queue_size: int, own: Dataset) -> Fields:
    """A queue so short that images are rarely compared with their own earlier embeddings."""
    largest = max(2 ** int(math.log2(own.images) - 1), 2 * own.run_length["batch_size"].value)
    if queue_size <= largest:
        return {}
    return cite("chosen: a queue with fewer than half of the images", queue_size=largest)


def own_row(data: Data, given: dict[str, Any] | None = None) -> Dataset:
    """The row `auto` for the training images in `data` (see `datasets.own_dataset`).

    `given` are fields that the user chose. Other fields are derived from them. Raises ValueError
    for too few images, and the errors of `open_source`.
    """
    given = given or {}

    def number(name: str) -> int | None:
        """The user's choice for a field. A value out of range is refused later, with all others."""
        value = given.get(name)
        return value if isinstance(value, int) and value >= 1 else None

    val_fraction = given.get("val_fraction")
    if not (isinstance(val_fraction, int | float) and 0 <= val_fraction < 1):
        val_fraction = DATASETS["auto"].fields["val_fraction"].value
    manifest = open_source(
        data,
        "pretrain",
        val_fraction=val_fraction,
        unlabelled=given.get("unlabelled") is True,
        on_bad_image="skip",  # the run itself decides about bad images
    ).manifest
    row = own_dataset(
        manifest.sizes,
        len(manifest.classes),
        size_px=number("views.size_px"),
        batch_size=number("batch_size"),
        epochs=number("epochs"),
    )
    return replace(row, fields=row.fields | cite("the place of the images", name=name_of(data)))


def build_recipe(
    dataset: str,
    method: str,
    file: str | Path | None = None,
    overrides: dict[str, Any] | None = None,
    *,
    data: Data | None = None,
    **changes: Any,
) -> Recipe:
    """The row of a dataset and a method, changed by a YAML file, by `overrides` and by keywords.

        build_recipe("cifar10", "rsa", epochs=3, batch_size=64, views={"blur_p": 0})
        build_recipe("cifar10", "my_methods/barlow_twins.py", overrides={"views.blur_p": 0})
        build_recipe("auto", "rsa", data="my_photos")

    The key `views.blur_p` changes a field of the views, and so does a keyword's mapping. Raises
    ValueError, which lists every value out of range and every unknown key, with the nearest known
    key.

    If only the size of the views is changed, `eval_resize_px` changes in proportion.

    The dataset `auto` chooses its row from the images in `data`. No other dataset reads them.
    `data` is not needed if file and overrides contain all fields, as a run's recipe.yaml does.
    """
    file_fields = flatten(read_yaml(Path(file)) if file else {})
    given = [*file_fields, *(overrides or {}).items(), *flatten(changes)]
    own = own_row(data, dict(given)) if dataset == "auto" and data else None
    fields = {name: sourced.value for name, sourced in row(dataset, method, own).items()}
    fields |= {"dataset": dataset, "method": method, "views": dict(fields["views"])}
    usual_px = fields["views"].get("size_px")
    arch = dict(given).get("arch", fields.get("arch"))
    if not (isinstance(arch, str) and arch in RESNETS):
        # In the rows, the values of these fields are for the rows' ResNets.
        fields = {name: value for name, value in fields.items() if name not in RESNET_FIELDS}
    for key, value in given:
        head, _, tail = key.partition(".")
        if head == "views" and tail and isinstance(fields["views"], dict):
            fields["views"][tail] = value
        else:
            fields[key] = value
    known = recipe_type(method).model_fields.items()
    if not own and dataset == "auto" and any(f.is_required() and k not in fields for k, f in known):
        raise ValueError("auto chooses from the images: give their folder by --data, or data=")
    views, resize_px = fields["views"], fields.get("eval_resize_px")
    size_px = views.get("size_px") if isinstance(views, dict) else None
    if resize_px and isinstance(size_px, int) and "eval_resize_px" not in dict(given):
        fields["eval_resize_px"] = resize_in_proportion(resize_px, usual_px, size_px)
    recipe = validate(fields)
    resize_px, size_px = recipe.eval_resize_px, recipe.views.size_px
    if recipe.evaluate and resize_px and resize_px < size_px:
        raise ValueError(
            f"eval_resize_px = {resize_px} is less than views.size_px = {size_px}: test images "
            f"resized to {resize_px} px do not fill the centre crop of {size_px} px; set "
            f"eval_resize_px={size_px} or more, or leave it out"
        )
    return recipe


def resize_in_proportion(resize_px: int, usual_px: int, size_px: int) -> int:
    """`eval_resize_px` for views of `size_px`, if it is `resize_px` for views of `usual_px`."""
    scaled = (2 * size_px * resize_px + usual_px) // (2 * usual_px)
    if size_px != usual_px:
        log.info(
            f"eval_resize_px is {scaled}, in proportion to views.size_px = {size_px} ({resize_px} "
            f"for {usual_px})"
        )
    return scaled


def replaced(recipe: Recipe, changes: dict[str, Any]) -> Recipe:
    """The recipe with other values of some fields, by their names, such as `views.size_px`.

    If only the size of the views is changed, `eval_resize_px` changes in proportion. Raises the
    errors of `parse`.
    """
    fields = recipe.model_dump()
    for key, value in changes.items():
        head, _, tail = key.partition(".")
        if head == "views" and tail:
            fields["views"][tail] = value
        else:
            fields[key] = value
    size_px, resize_px = changes.get("views.size_px"), recipe.eval_resize_px
    if resize_px and isinstance(size_px, int) and "eval_resize_px" not in changes:
        fields["eval_resize_px"] = resize_in_proportion(resize_px, recipe.views.size_px, size_px)
    return parse(fields, type(recipe))


def validate(fields: dict[str, Any]) -> Recipe:
    """A recipe from all its fields, such as a checkpoint's. Raises ValueError with every fault."""
    method = fields.get("method")
    if not isinstance(method, str):
        raise ValueError(f"no method {method!r}: choose from {', '.join(METHODS)}")
    return parse(fields, recipe_type(method))


def recipe_of_own_encoder(recipe: Recipe) -> Recipe:
    """The recipe with `own` as its arch, for a network that is passed in Python.

    Its stem, width and zero_init_residual are reset, because they describe the rows' ResNets.
    Raises ValueError for the other fields of ResNets.
    """
    fields = recipe.model_dump()
    rows = {"stem", "width", "zero_init_residual"}
    kept = {name: value for name, value in fields.items() if name not in rows}
    return parse(kept | {"arch": OWN}, type(recipe))


class ForeignRecipe(Recipe):
    """The recipe in a checkpoint of a method that is not part of this package.

    The method's own fields are not checked or changed.
    """

    model_config = ConfigDict(extra="allow")

    @model_validator(mode="after")
    def accumulation_suits_the_method(self) -> ForeignRecipe:
        return self  # this was checked before training, and the method is not loaded here


def checkpoint_recipe(fields: dict[str, Any]) -> Recipe:
    """The recipe in a checkpoint, for using its encoder without its method.

    A checkpoint may name a file, and reading the checkpoint must not execute code. Therefore a
    method that is not part of this package is not loaded, and it does not have to exist. Otherwise
    this is like `stored_recipe`.
    """
    method = fields.get("method")
    if not isinstance(method, str) or method in FILES:
        return stored_recipe(fields, "the checkpoint")
    log.info(f"{method} is not a method of this package: the encoder is loaded without the method")
    return parse(known_fields(fields, ForeignRecipe, "the checkpoint"), ForeignRecipe)


def stored_recipe(fields: dict[str, Any], origin: str | None = None) -> Recipe:
    """The recipe that a run of this or another version stored in a checkpoint or in recipe.yaml.

    A missing field has its default or, without a default, the value of its row. A field that this
    version does not know is ignored. If `origin` is given, a log line that begins with it lists
    these fields. Raises ValueError like `validate`.
    """
    method, dataset = fields.get("method"), fields.get("dataset")
    if not isinstance(method, str):
        return validate(fields)  # raises the error
    kind = recipe_type(method)
    fields = known_fields(fields, kind, origin)
    if isinstance(dataset, str) and dataset in DATASETS:
        for name, sourced in row(dataset, method).items():
            if kind.model_fields[name].is_required():
                fields.setdefault(name, sourced.value)
                if name == "views" and isinstance(fields[name], dict):
                    needed = sourced.value.keys() & VIEWS_WITHOUT_DEFAULT
                    fields[name] = {key: sourced.value[key] for key in needed} | fields[name]
    return parse(fields, kind)


def known_fields(fields: dict[str, Any], kind: type[Recipe], origin: str | None) -> dict[str, Any]:
    """The fields of a stored recipe that `kind` has. `stored_recipe` explains the other fields.

    `ForeignRecipe` has all fields that may belong to its method.
    """
    known: dict[str, Any] = {key: value for key, value in fields.items() if key != "views"}
    if kind is not ForeignRecipe:
        known = {key: value for key, value in known.items() if key in kind.model_fields}
    if "views" in fields:
        known["views"] = views = fields["views"]
        if isinstance(views, dict):
            names = ViewSpec.__dataclass_fields__
            known["views"] = {key: value for key, value in views.items() if key in names}
    unknown = {key: value for key, value in flatten(fields) if key not in dict(flatten(known))}
    if unknown and origin:
        listed = ", ".join(f"{key} = {reprlib.repr(value)}" for key, value in unknown.items())
        log.info(f"{origin} has recipe fields that this version does not know: {listed} (ignored)")
    return known


def parse(fields: dict[str, Any], kind: type[Recipe]) -> Recipe:
    """A recipe of the class `kind`. Raises ValueError with every fault."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        method = short_name(str(fields.get("method")))
        faults = "\n".join(f"  {explain(e, kind, method)}" for e in error.errors())
        raise ValueError("the recipe has faults:\n" + faults) from None


def explain(error: Any, kind: type[Recipe], method: str) -> str:
    """One of pydantic's errors as a short text."""
    key = ".".join(str(part) for part in error["loc"])
    known = [
        *kind.model_fields,
        *(f"views.{name}" for name in ViewSpec.__dataclass_fields__),
    ]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owners = ", ".join(name for name in METHODS if key in recipe_type(name).model_fields)
        hint = f": it belongs to {owners}, not to {method}" if owners else nearest(key, known)
        return f"no field {key!r}{hint}"
    if error["type"] == "value_error" and not key:
        return str(error["msg"]).removeprefix("Value error, ")
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key} = {reprlib.repr(error['input'])}: {message}"


def parse_set(items: tuple[str, ...]) -> dict[str, Any]:
    """Parse `("beta_base=0.3", "views.blur_p=0")` into a dict. The values are read as YAML.

    Raises ValueError for an item without an equals sign.
    """
    if bad := [item for item in items if "=" not in item]:
        raise ValueError(f"--set needs key=value, found {', '.join(bad)}")
    return {
        key.strip(): load_yaml(value, f"--set {key}")
        for key, _, value in (item.partition("=") for item in items)
    }


def flatten(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """The fields as pairs. Those of a `views` mapping come last, as `views.blur_p` and so on."""
    views = fields.get("views")
    if not isinstance(views, dict):
        return list(fields.items())
    others = [(key, value) for key, value in fields.items() if key != "views"]
    return others + [(f"views.{key}", value) for key, value in views.items()]


def read_yaml(path: Path) -> dict[str, Any]:
    """The fields in a recipe file. Raises ValueError if it contains anything else."""
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    fields = load_yaml(text, str(path))
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise ValueError(
            f"{path} contains a {type(fields).__name__}, not recipe fields as `key: value` lines"
        )
    return fields


class PlainYaml(yaml.SafeLoader):
    """YAML without aliases, because a few lines with aliases can expand to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe must not use aliases (*name)")
        return super().compose_node(parent, index)


def load_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text. Raises ValueError, which names `origin`, for an invalid text."""
    try:
        return yaml.load(text, PlainYaml)
    # Values that do not fit their tag, such as `!!bool maybe`, raise one of the last three.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{origin} is not valid YAML for a recipe: {str(error)[:500]}") from error


def dump_yaml(recipe: Recipe) -> str:
    """All fields as YAML. `--config` turns the text back into an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
