"""Recipes: what is trained, on what, how. A dataset's row, the method's, a user's file and `--set key=value`, in that order.

    recipe = build_recipe("cifar100", "rsa", overrides={"epochs": 800})
    plan = resolve(recipe, count=50_000)          # the derived numbers: steps, peak_lr, ...

Unknown keys are errors, and so are fields of another method. Every number of a row has its source beside it: PAPER is RSA
(NeurIPS 2022) with the section, CODE is github.com/tmllab/RSA, chosen is where neither says.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypedDict

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipelines import AggressiveOn, Backend, DecodeOn, OnBadImage
from pipelines.views import ViewSpec
from rsa_fast import schedules
from rsa_fast.datasets import DATASETS
from rsa_fast.methods import METHODS, method_class
from rsa_fast.sourced import Fields, cite


class Loading(TypedDict, total=False):
    """The settings of `open_views` that change only the speed of the loader."""

    backend: Backend
    threads: int
    prefetch_batches: int
    aggressive_on: AggressiveOn
    decode_on: DecodeOn
    on_bad_image: OnBadImage


LOADING_FIELDS = tuple(Loading.__annotations__)
# Fields in which a resumed run may differ from its start. A bad image where none is skipped ends the run: nothing is seen
# with one `on_bad_image` that is not seen with the other.
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
    """What every run has. Batch sizes are global; lengths are epochs unless the name says steps."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # --- changes the result
    dataset: str
    method: str
    views: ViewSpec
    eval_resize_px: int | None = Field(
        None, ge=1
    )  # short side before the centre crop; None: images as they are
    arch: Literal["resnet18", "resnet50"]
    stem: Literal["cifar", "imagenet"]
    width: int = Field(64, ge=1)  # channels of the first stage; 64 is the standard ResNet
    zero_init_residual: bool = True  # every residual block starts as the identity
    bn: str = Field(
        "local", pattern=r"^(local|sync|split:[1-9]\d*)$"
    )  # over a rank's batch, all ranks', or an N-th of all
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # global
    optimizer: Literal["sgd", "lars"]
    base_lr: float = Field(gt=0)  # per 256 images: peak_lr = base_lr * batch_size / 256
    peak_lr: float | None = Field(None, gt=0)  # sets the peak directly instead
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    trust_coefficient: float = Field(0.001, gt=0)  # LARS only (CODE common/lars.py)
    warmup_epochs: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = (
        "auto"  # auto: bf16 where the device has it, fp16 on other GPUs
    )
    seed: int = Field(0, ge=0, lt=2**63)  # of the initialisation, the order and the views

    # --- changes the result by rounding alone
    # The encoder's training by torch.compile, which fuses BatchNorm, ReLU and sums. Modelled for RSA, ResNet-50, 224 px, fp16,
    # 256 images a V100: its bytes fall by 25%, its roofline time by 21%; but there are 28% more kernels to launch, for which
    # small images and batches wait, and minutes go to compiling.
    compile: bool = False

    # --- changes only speed or memory
    # Of the encoder's four, how many stages run again in the backward instead of being kept for it (Chen et al. 2016). Modelled
    # likewise: 1 takes 12.3 GiB for 21.6 and 11% more time, which 16 GB hold; 2 takes 9.7 GiB and 19%.
    recompute_stages: int = Field(0, ge=0, le=4)
    backend: Backend = "auto"
    threads: int = Field(2, ge=1)  # of the loader, per rank
    prefetch_batches: int = Field(2, ge=1)  # made ahead of the one in use
    aggressive_on: AggressiveOn = (
        "auto"  # where the aggressive stage runs; auto: the device on a GPU
    )
    decode_on: DecodeOn = (
        "gpu"  # of the dali backend on a GPU: decode there (mixed), or on the host
    )
    device: Literal["auto", "cpu", "cuda"] = "auto"
    on_bad_image: OnBadImage = "stop"  # which cannot be read any more: skip takes the next that can

    # --- changes only what is recorded
    log_every_steps: int = Field(20, ge=1)
    knn_every_epochs: int = Field(10, ge=0)  # 0: only at the end
    checkpoint_every_epochs: int = Field(1, ge=1)
    keep_last: int = Field(2, ge=1)  # checkpoints kept
    max_skips: int = Field(50, ge=1)  # fp16 steps that overflow in a row before the run stops
    timeout_s: float = Field(600, gt=0)  # that ranks wait for each other before the run stops
    wandb: bool = False  # records go to Weights & Biases too

    @property
    def loading(self) -> Loading:
        """All of `LOADING_FIELDS`, as keywords of `open_views`."""
        return {
            "backend": self.backend,
            "threads": self.threads,
            "prefetch_batches": self.prefetch_batches,
            "aggressive_on": self.aggressive_on,
            "decode_on": self.decode_on,
            "on_bad_image": self.on_bad_image,
        }

    @model_validator(mode="after")
    def split_fits(self) -> Recipe:
        if self.bn.startswith("split:"):
            groups = int(self.bn.removeprefix("split:"))
            if self.batch_size % groups or self.batch_size // groups < 2:
                raise ValueError(
                    f"bn = {self.bn} does not cut a batch of {self.batch_size} into equal parts of 2 or more"
                )
        return self

    def schedule(self, step: int, plan: Plan) -> dict[str, float]:
        """What changes with the step (counted from 0): the learning rate, and the method's own tau and beta."""
        return {
            "lr": schedules.learning_rate(step, plan.total_steps, plan.warmup_steps, plan.peak_lr)
        }

    def check_labels(self, labelled: bool, classes: int) -> None:
        """Raise ValueError when the method cannot train on a dataset with so many classes, or without labels."""


@dataclass(frozen=True)
class Plan:
    """Numbers derived from a recipe, a dataset and the world; printed before step 0."""

    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    peak_lr: float
    batch_per_gpu: int


def resolve(recipe: Recipe, count: int, world_size: int = 1) -> Plan:
    """The derived numbers for `count` training images."""
    steps = count // recipe.batch_size
    return Plan(
        steps_per_epoch=steps,
        total_steps=steps * recipe.epochs,
        warmup_steps=steps * recipe.warmup_epochs,
        peak_lr=recipe.peak_lr or recipe.base_lr * recipe.batch_size / 256,
        batch_per_gpu=recipe.batch_size // world_size,
    )


def recipe_type(method: str) -> type[Recipe]:
    return method_class(method).recipe_type


def row(dataset: str, method: str) -> Fields:
    """The fields of a dataset and a method with their sources. Raises ValueError for a name that is not known."""
    if dataset not in DATASETS:
        raise ValueError(
            f"no dataset {dataset!r}{nearest(dataset, DATASETS)}: choose from {', '.join(DATASETS)}"
        )
    if method not in METHODS:
        raise ValueError(
            f"no method {method!r}{nearest(method, METHODS)}: choose from {', '.join(METHODS)}"
        )
    about, kind = DATASETS[dataset], method_class(method)
    fields = dict(about.fields)
    for scale in ("all", *about.scales):
        fields |= kind.rows.get(scale, {})
    if "classes" in kind.recipe_type.model_fields:
        fields |= cite("the dataset's", classes=about.classes)
    return fields


def build_recipe(
    dataset: str, method: str, file: Path | None = None, overrides: dict[str, Any] | None = None
) -> Recipe:
    """The row with the file's and then the caller's overrides; `views.blur_p` reaches into the views.

    Raises ValueError naming every unknown key, with the nearest known one, and every value out of range.
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
    """A recipe from all its fields, such as a checkpoint's. Raises ValueError naming every fault."""
    method = fields.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"no method {method!r}: choose from {', '.join(METHODS)}")
    try:
        return recipe_type(method).model_validate(fields)
    except ValidationError as error:
        faults = "\n".join(f"  {explain(e, method)}" for e in error.errors())
        raise ValueError("the recipe has faults:\n" + faults) from None


def explain(error: Any, method: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    known = [
        *recipe_type(method).model_fields,
        *(f"views.{name}" for name in ViewSpec.__dataclass_fields__),
    ]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owners = [name for name in METHODS if key in recipe_type(name).model_fields]
        hint = (
            f": {method} does not use it, {', '.join(owners)} do" if owners else nearest(key, known)
        )
        return f"no field {key!r}{hint}"
    if error["type"] == "value_error" and not key:
        return str(error["msg"]).removeprefix("Value error, ")
    return f"{key} = {reprlib.repr(error['input'])}: {error['msg']}"


def nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def parse_set(items: tuple[str, ...]) -> dict[str, Any]:
    """`("beta_base=0.3", "views.blur_p=0")` to a dict, values read as YAML. Raises ValueError without an equals sign."""
    if bad := [item for item in items if "=" not in item]:
        raise ValueError(f"--set takes key=value, found {', '.join(bad)}")
    return {
        key.strip(): load_yaml(value, f"--set {key}")
        for key, _, value in (item.partition("=") for item in items)
    }


def flatten(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    views = fields.get("views")
    rest = [
        (key, value)
        for key, value in fields.items()
        if not (key == "views" and isinstance(views, dict))
    ]
    return rest + [
        (f"views.{key}", value) for key, value in (views if isinstance(views, dict) else {}).items()
    ]


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    fields = load_yaml(text, str(path))
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise ValueError(
            f"{path} holds {type(fields).__name__}, wanted recipe fields as `key: value` lines"
        )
    return fields


class PlainYaml(yaml.SafeLoader):
    """YAML without references: a few lines of them unfold to gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe has no aliases (*name)")
        return super().compose_node(parent, index)


def load_yaml(text: str, place: str) -> Any:
    """Raises ValueError naming the `place` of what is no YAML, or YAML that no recipe has."""
    try:
        return yaml.load(text, PlainYaml)
    except (
        yaml.YAMLError,
        RecursionError,
        ValueError,
        LookupError,
        AttributeError,
    ) as error:  # bad tags too
        raise ValueError(f"{place} is no YAML of a recipe: {str(error)[:500]}") from error


def dump_yaml(recipe: Recipe) -> str:
    """The whole recipe; `--config` reads it back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
