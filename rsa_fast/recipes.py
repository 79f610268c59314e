"""Recipes: what is trained, on what, and how.

    recipe = build_recipe("cifar100", "rsa", overrides={"epochs": 800})
    derived = resolve(recipe, count=50_000)  # steps_per_epoch, total_steps, peak_lr, ...

The fields come from the dataset's row, the method's row, a user's file and `--set key=value`; later
ones replace earlier ones. Unknown keys are errors, and so are fields of another method. In a row,
every number has its source beside it (see `sourced.py` for PAPER, CODE and "chosen").
"""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from pipelines.loading import AggressiveOn, DecodeOn, Loading, OnBadImage
from pipelines.views import ViewSpec
from rsa_fast import schedules
from rsa_fast.datasets import DATASETS
from rsa_fast.methods import METHODS, method_class
from rsa_fast.sourced import Fields, cite

LOADING_FIELDS = tuple(field.name for field in dataclasses.fields(Loading))
# The fields that a resumed run may change. `on_bad_image` is one of them: a bad image ends the run
# unless it is skipped, so until then the setting has not changed what the run has seen.
FREE_FIELDS = (
    *LOADING_FIELDS,
    "recompute_stages",
    "device",
    "timeout_s",
    "max_skips",
    "keep_last",
    "log_every_steps",
    "knn_every_epochs",
    "checkpoint_every_epochs",
    "wandb",
)


class Recipe(BaseModel):
    """The fields of every run. Batch sizes are global. Lengths are in epochs unless named steps.

    A field without a default gets its value and its source from a row of `datasets.py` or of the
    method's file. A default holds for every dataset, unless a row replaces it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # --- Fields that change the result
    dataset: str  # a name in datasets.py
    method: str  # the name of a file in methods/
    views: ViewSpec  # the augmentation
    # Evaluation resizes the short side of images to this before the centre crop. None: it resizes
    # only images that are smaller than the crop.
    eval_resize_px: int | None = Field(None, ge=1)
    arch: Literal["resnet18", "resnet50"]  # the encoder
    stem: Literal["cifar", "imagenet"]  # 3x3 convolution without max-pool, or 7x7 with it
    width: int = Field(64, ge=1)  # channels of the first stage; 64 is the standard ResNet
    # Every residual block starts as the identity (CODE methods/BYOL.py).
    zero_init_residual: bool = True
    # BatchNorm's statistics are those of each rank's batch (local), of all ranks' (sync), or of
    # each of N equal parts of the global batch (split:N).
    bn: str = Field("local", pattern=r"^(local|sync|split:[1-9]\d*)$")
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # images of all ranks together
    optimizer: Literal["sgd", "lars"]
    base_lr: float = Field(gt=0)  # per 256 images: peak_lr = base_lr * batch_size / 256
    peak_lr: float | None = Field(None, gt=0)  # if given, replaces that product
    momentum: float = Field(0.9, ge=0, lt=1)  # of the optimiser (PAPER 4.1)
    weight_decay: float = Field(ge=0)
    trust_coefficient: float = Field(0.001, gt=0)  # only used by LARS (CODE common/lars.py)
    warmup_epochs: int = Field(0, ge=0)  # the learning rate rises linearly from 0
    # auto: bf16 if the device computes in it, else fp16 on a GPU and fp32 on a CPU.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    seed: int = Field(0, ge=0, lt=2**63)  # for the initialisation, the sample order and the views

    # --- Fields that change the result by rounding only
    # Train the encoder with torch.compile, which fuses BatchNorm, ReLU and sums. A model of RSA's
    # training (ResNet-50, 224 px, fp16, 256 images per V100) predicts 25% fewer bytes and 21% less
    # roofline time. But there are 28% more kernels to launch, which costs time where images or
    # batches are small, and compiling takes minutes.
    compile: bool = False

    # --- Fields that change only speed or memory
    # How many of the encoder's four stages are computed again in the backward pass, so that their
    # activations need not be stored (Chen et al. 2016). The same model predicts 12.3 GiB instead of
    # 21.6 GiB and 11% more time for one stage, which then fits a GPU of 16 GB, and 9.7 GiB and 19%
    # more time for two.
    recompute_stages: int = Field(0, ge=0, le=4)
    backend: str = "auto"  # what makes the views
    threads: int = Field(2, ge=1)  # loader threads per rank
    prefetch_batches: int = Field(2, ge=1)  # batches made ahead of the one in use
    # Where jitter, grayscale and blur are computed; auto: on the device if that is a GPU.
    aggressive_on: AggressiveOn = "auto"
    # Where the dali backend decodes if the device is a GPU: on the GPU (mixed) or on the host.
    decode_on: DecodeOn = "gpu"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # What happens when an image can no longer be read: stop the run, or skip to the next readable.
    on_bad_image: OnBadImage = "stop"

    # --- Fields that change only what is recorded, and when a run stops
    log_every_steps: int = Field(20, ge=1)
    knn_every_epochs: int = Field(10, ge=0)  # 0: only at the end
    checkpoint_every_epochs: int = Field(1, ge=1)
    keep_last: int = Field(2, ge=1)  # checkpoints that are not deleted
    max_skips: int = Field(50, ge=1)  # fp16 steps that overflow in a row before the run stops
    timeout_s: float = Field(600, gt=0)  # how long ranks wait for each other before the run stops
    wandb: bool = False  # send the records to Weights & Biases too

    @property
    def loading(self) -> Loading:
        """The settings of loading, for `open_views`."""
        return Loading(**{name: getattr(self, name) for name in LOADING_FIELDS})

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
                    "of 2 or more"
                )
        return self

    def schedule(self, step: int, derived: Derived) -> dict[str, float]:
        """The numbers that change with the step, which is counted from 0.

        These are the learning rate, `lr`, and what the method's recipe adds, such as `tau`.
        """
        total, warmup, peak = derived.total_steps, derived.warmup_steps, derived.peak_lr
        return {"lr": schedules.learning_rate(step, total, warmup, peak)}

    def check_labels(self, labelled: bool, classes: int) -> None:
        """Raise ValueError if the method cannot train with these labels.

        `labelled` says whether the dataset has labels, `classes` how many classes.
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
    batch_per_gpu: int


def resolve(recipe: Recipe, count: int, world_size: int = 1) -> Derived:
    """The derived numbers for `count` training images on `world_size` ranks.

    An incomplete last batch of an epoch is dropped.
    """
    steps = count // recipe.batch_size
    return Derived(
        steps_per_epoch=steps,
        total_steps=steps * recipe.epochs,
        warmup_steps=steps * recipe.warmup_epochs,
        peak_lr=recipe.peak_lr or recipe.base_lr * recipe.batch_size / 256,
        batch_per_gpu=recipe.batch_size // world_size,
    )


def recipe_type(method: str) -> type[Recipe]:
    return method_class(method).recipe_type


def row(dataset: str, method: str) -> Fields:
    """The fields of a dataset and a method, with sources. Raises ValueError for unknown names."""
    if dataset not in DATASETS:
        raise ValueError(
            f"no dataset {dataset!r}{nearest(dataset, DATASETS)}: choose from {', '.join(DATASETS)}"
        )
    if method not in METHODS:
        raise ValueError(
            f"no method {method!r}{nearest(method, METHODS)}: choose from {', '.join(METHODS)}"
        )
    fields = dict(DATASETS[dataset].fields)
    for scale in ("all", *DATASETS[dataset].scales):
        fields |= method_class(method).rows.get(scale, {})
    if "classes" in recipe_type(method).model_fields:
        fields |= cite("the dataset's", classes=DATASETS[dataset].classes)
    return fields


def build_recipe(
    dataset: str, method: str, file: Path | None = None, overrides: dict[str, Any] | None = None
) -> Recipe:
    """The row of a dataset and a method, changed by a YAML file and then by `overrides`.

    The key `views.blur_p` changes a field of the views. Raises ValueError, which names every value
    out of range and every unknown key, with the nearest known one.
    """
    fields = {name: sourced.value for name, sourced in row(dataset, method).items()}
    fields |= {"dataset": dataset, "method": method, "views": dict(fields["views"])}
    for key, value in [*flatten(read_yaml(file) if file else {}), *(overrides or {}).items()]:
        head, _, tail = key.partition(".")
        if head == "views" and tail and isinstance(fields["views"], dict):
            fields["views"][tail] = value
        else:
            fields[key] = value
    return validate(fields)


def validate(fields: dict[str, Any]) -> Recipe:
    """A recipe from all its fields, such as a checkpoint's. Raises ValueError with every fault."""
    method = fields.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"no method {method!r}: choose from {', '.join(METHODS)}")
    try:
        return recipe_type(method).model_validate(fields)
    except ValidationError as error:
        faults = "\n".join(f"  {explain(e, method)}" for e in error.errors())
        raise ValueError("the recipe has faults:\n" + faults) from None


def explain(error: Any, method: str) -> str:
    """One of pydantic's errors in our words."""
    key = ".".join(str(part) for part in error["loc"])
    known = [
        *recipe_type(method).model_fields,
        *(f"views.{name}" for name in ViewSpec.__dataclass_fields__),
    ]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owners = ", ".join(name for name in METHODS if key in recipe_type(name).model_fields)
        hint = f": {method} does not use it, {owners} do" if owners else nearest(key, known)
        return f"no field {key!r}{hint}"
    if error["type"] == "value_error" and not key:
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{key} = {reprlib.repr(error['input'])}: {error['msg']}"


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the most similar known word, or an empty string if none is similar."""
    matches = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def parse_set(items: tuple[str, ...]) -> dict[str, Any]:
    """Turn `("beta_base=0.3", "views.blur_p=0")` into a dict, whose values are read as YAML.

    Raises ValueError for an item without an equals sign.
    """
    if bad := [item for item in items if "=" not in item]:
        raise ValueError(f"--set takes key=value, found {', '.join(bad)}")
    return {
        key.strip(): load_yaml(value, f"--set {key}")
        for key, _, value in (item.partition("=") for item in items)
    }


def flatten(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    """The fields as pairs; those of a `views` mapping come last, as `views.blur_p` and so on."""
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
            f"{path} contains {type(fields).__name__}, wanted recipe fields as `key: value` lines"
        )
    return fields


class PlainYaml(yaml.SafeLoader):
    """YAML without aliases: with them, a few lines can unfold to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe must not use aliases (*name)")
        return super().compose_node(parent, index)


def load_yaml(text: str, origin: str) -> Any:
    """The value of a YAML text. Raises ValueError, naming `origin`, for text no recipe may have."""
    try:
        return yaml.load(text, PlainYaml)
    # Values that do not fit their tag, such as `!!bool maybe`, raise one of the last three.
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{origin} is not YAML for a recipe: {str(error)[:500]}") from error


def dump_yaml(recipe: Recipe) -> str:
    """All fields as YAML. `--config` turns the text back into an equal recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
