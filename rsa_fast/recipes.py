"""Recipes: what is trained, on what, how. A dataset's row, the method, a user's file and `--set key=value`, in that order.

    recipe = build_recipe("cifar100", "rsa", overrides={"epochs": 800})
    plan = resolve(recipe, count=50_000)          # the derived numbers: steps, peak_lr, ...

Unknown keys are errors. Sources: PAPER is RSA (NeurIPS 2022) with the section; CODE is github.com/tmllab/RSA.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.views import ViewSpec

METHODS = ("rsa", "byol")
# Fields in which a resumed run may differ from its start: those of speed, and those of what is recorded.
SPEED_FIELDS = ("backend", "threads", "prefetch_batches", "aggressive_on", "decode_on", "device")
RECORD_FIELDS = ("log_every_steps", "knn_every_epochs", "checkpoint_every_epochs", "keep_last")


class Recipe(BaseModel):
    """Everything that defines a run. Batch sizes are global; lengths are epochs unless the name says steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # --- changes the result
    dataset: str
    method: Literal["rsa", "byol"]
    views: ViewSpec
    eval_resize_px: int | None = Field(None, ge=1)  # short side before the centre crop; None: images as they are
    arch: Literal["resnet18", "resnet50"]
    stem: Literal["cifar", "imagenet"]
    width: int = Field(64, ge=1)  # channels of the first stage; 64 is the standard ResNet
    hidden_dim: int = Field(ge=1)  # of projector and predictor
    out_dim: int = Field(ge=1)  # of projector and predictor
    pairs: Literal["AA", "AW"] = "AA"  # BYOL's two views: both aggressive, or aggressive and weak (PAPER Table 1)
    beta_base: float = Field(ge=0, le=1)  # RSA's weight of aggressive pairs at the start
    beta_schedule: Literal["cosine", "fixed"] = "cosine"  # fixed: PAPER Table 1's ablation
    tau_base: float = Field(0.99, ge=0, le=1)  # target momentum at the start; ends at 1 (PAPER 4.1)
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)  # global
    optimizer: Literal["sgd", "lars"]
    base_lr: float = Field(gt=0)  # per 256 images: peak_lr = base_lr * batch_size / 256
    peak_lr: float | None = Field(None, gt=0)  # sets the peak directly instead
    momentum: float = Field(0.9, ge=0, lt=1)
    weight_decay: float = Field(ge=0)
    trust_coefficient: float = Field(0.001, gt=0)  # LARS only (CODE common/lars.py)
    warmup_epochs: int = Field(0, ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"  # auto: bf16 where the device has it, fp16 on other GPUs
    seed: int = Field(0, ge=0)  # of the initialisation, the order and the views

    # --- changes only speed
    backend: str = "auto"
    threads: int = Field(2, ge=1)  # of the loader, per rank
    prefetch_batches: int = Field(2, ge=1)  # made ahead of the one in use
    aggressive_on: Literal["auto", "host", "device"] = "auto"  # where the aggressive stage runs; auto: the device on a GPU
    decode_on: Literal["gpu", "cpu"] = "gpu"  # of the dali backend on a GPU: decode there (mixed), or on the host
    device: Literal["auto", "cpu", "cuda"] = "auto"

    # --- changes only what is recorded
    log_every_steps: int = Field(20, ge=1)
    knn_every_epochs: int = Field(10, ge=0)  # 0: only at the end
    checkpoint_every_epochs: int = Field(1, ge=1)
    keep_last: int = Field(2, ge=1)  # checkpoints kept


CIFAR_MEAN_STD = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
IMAGENET_MEAN_STD = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

# PAPER 4.1: ResNet-18, heads 1024/128, SGD lr .1, weight decay 5e-4 on all parameters (CODE), batch 256.
SMALL = {
    "arch": "resnet18",
    "stem": "cifar",
    "hidden_dim": 1024,
    "out_dim": 128,
    "optimizer": "sgd",
    "base_lr": 0.1,
    "weight_decay": 5e-4,
    "batch_size": 256,
    "epochs": 200,
}
# PAPER 4.1: ResNet-50, heads 4096/256 (CODE methods/BYOL.py), beta .4, evaluation at 256/224.
LARGE = {
    "arch": "resnet50",
    "stem": "imagenet",
    "hidden_dim": 4096,
    "out_dim": 256,
    "beta_base": 0.4,
    "views": {"size_px": 224, **IMAGENET_MEAN_STD},
    "eval_resize_px": 256,
}
# PAPER 4.1: LARS, weight decay 1e-6, batch 2048. Ten warm-up epochs: CODE README.
IMAGENET_1K = {**LARGE, "optimizer": "lars", "weight_decay": 1e-6, "batch_size": 2048, "warmup_epochs": 10}

DATASETS: dict[str, dict[str, Any]] = {
    # beta .3 on CIFAR, .4 elsewhere: PAPER 4.1. CIFAR-100 is normalised by CIFAR-10's constants: CODE train_single.py.
    "cifar10": {**SMALL, "beta_base": 0.3, "views": {"size_px": 32, **CIFAR_MEAN_STD}},
    "cifar100": {**SMALL, "beta_base": 0.3, "views": {"size_px": 32, **CIFAR_MEAN_STD}},
    # Evaluated on the central 64x64 of the native 96x96: CODE eval_single.py.
    "stl10": {
        **SMALL,
        "beta_base": 0.4,
        "views": {"size_px": 64, "mean": (0.4408, 0.4279, 0.3867), "std": (0.2682, 0.2610, 0.2686)},
    },
    "tinyimagenet": {
        **SMALL,
        "beta_base": 0.4,
        "views": {"size_px": 64, "mean": (0.4802, 0.4481, 0.3975), "std": (0.2302, 0.2265, 0.2262)},
    },
    # PAPER 4.1: SGD lr .2, weight decay 1e-4.
    "imagenet100": {**LARGE, "optimizer": "sgd", "base_lr": 0.2, "weight_decay": 1e-4, "batch_size": 256, "epochs": 200},
    # PAPER 4.1: base lr .9 for 100 epochs, .6 for 200.
    "imagenet1k": {**IMAGENET_1K, "base_lr": 0.6, "epochs": 200},
    "imagenet1k-100ep": {**IMAGENET_1K, "base_lr": 0.9, "epochs": 100},
    # `make demo`: tools/make_demo.py's images on two CPU cores, chosen by measurement (README). Its classes are shape and
    # texture at 32 px: more colour jitter and grayscale than the paper's, larger crops and less blur.
    "demo": {
        **SMALL,
        "beta_base": 0.3,
        "views": {
            **{"size_px": 32, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "crop_area": (0.4, 1.0)},
            **{"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.4, "grayscale_p": 0.5},
            **{"blur_p": 0.2, "blur_sigma_px": (0.1, 1.0)},
        },
        "eval_resize_px": 32,
        "width": 24,
        "batch_size": 32,
        "peak_lr": 0.06,
        "tau_base": 0.97,
        "epochs": 20,
        "knn_every_epochs": 4,
    },
}


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


def build_recipe(dataset: str, method: str, file: Path | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
    """The dataset's row with the file's and then the caller's overrides; `views.blur_p` reaches into the views.

    Raises ValueError naming every unknown key, with the nearest known one, and every value out of range.
    """
    if dataset not in DATASETS:
        raise ValueError(f"no dataset {dataset!r}{nearest(dataset, DATASETS)}: choose from {', '.join(DATASETS)}")
    if method not in METHODS:
        raise ValueError(f"no method {method!r}{nearest(method, METHODS)}: choose from {', '.join(METHODS)}")
    fields = {"dataset": dataset, "method": method, **DATASETS[dataset]}
    fields["views"] = dict(fields["views"])
    for key, value in [*flatten(read_yaml(file) if file else {}), *(overrides or {}).items()]:
        head, _, tail = key.partition(".")
        (fields["views"] if head == "views" and tail else fields)[tail or head] = value
    return validate(fields)


def validate(fields: dict[str, Any]) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise ValueError("the recipe has faults:\n" + "\n".join(f"  {explain(e)}" for e in error.errors())) from None


def explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"])
    known = [*Recipe.model_fields, *(f"views.{name}" for name in ViewSpec.__dataclass_fields__)]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"no field {key!r}{nearest(key, known)}"
    return f"{key} = {error['input']!r}: {error['msg']}"


def nearest(word: str, known: Any) -> str:
    found = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean {found[0]!r}?)" if found else ""


def parse_set(items: tuple[str, ...]) -> dict[str, Any]:
    """`("beta_base=0.3", "views.blur_p=0")` to a dict, values read as YAML. Raises ValueError without an equals sign."""
    if bad := [item for item in items if "=" not in item]:
        raise ValueError(f"--set takes key=value, found {', '.join(bad)}")
    return {key.strip(): yaml.safe_load(value) for key, _, value in (item.partition("=") for item in items)}


def flatten(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    views = fields.get("views")
    rest = [(key, value) for key, value in fields.items() if not (key == "views" and isinstance(views, dict))]
    return rest + [(f"views.{key}", value) for key, value in (views if isinstance(views, dict) else {}).items()]


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        fields = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} holds {type(fields).__name__}, wanted recipe fields as `key: value` lines")
    return fields


def dump_yaml(recipe: Recipe) -> str:
    """The whole recipe; `--config` reads it back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
