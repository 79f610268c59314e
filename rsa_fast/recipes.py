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
    eval_resize_px: int | None = Field(None, ge=1)  # short side before the centre crop; None: images as they are
    arch: Literal["resnet18", "resnet50"]
    stem: Literal["cifar", "imagenet"]
    width: int = Field(64, ge=1)  # channels of the first stage; 64 is the standard ResNet
    zero_init_residual: bool = True  # every residual block starts as the identity
    bn: str = Field("local", pattern=r"^(local|sync|split:[1-9]\d*)$")  # over a rank's batch, all ranks', or an N-th of all
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
    aggressive_on: AggressiveOn = "auto"  # where the aggressive stage runs; auto: the device on a GPU
    decode_on: DecodeOn = "gpu"  # of the dali backend on a GPU: decode there (mixed), or on the host
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
                raise ValueError(f"bn = {self.bn} does not cut a batch of {self.batch_size} into equal parts of 2 or more")
        return self

    def schedule(self, step: int, plan: Plan) -> dict[str, float]:
        """What changes with the step (counted from 0): the learning rate, and the method's own tau and beta."""
        return {"lr": schedules.learning_rate(step, plan.total_steps, plan.warmup_steps, plan.peak_lr)}

    def check_labels(self, labelled: bool, classes: int) -> None:
        """Raise ValueError when the method cannot train on a dataset with so many classes, or without labels."""


class Target(Recipe):
    """Of methods with a target network."""

    tau_base: float = Field(0.99, ge=0, le=1)  # the target's momentum at the start
    tau_schedule: Literal["cosine", "fixed"] = "cosine"  # cosine: ends at 1

    def schedule(self, step: int, plan: Plan) -> dict[str, float]:
        tau = schedules.tau(step + 1, plan.total_steps, self.tau_base, self.tau_schedule)
        return super().schedule(step, plan) | {"tau": tau}


class Beta(Recipe):
    """Of RSA's methods."""

    beta_base: float = Field(ge=0, le=1)  # the weight of aggressive pairs at the start
    beta_schedule: Literal["cosine", "fixed"] = "cosine"  # cosine: ends at 0; fixed: PAPER Table 1's ablation

    def schedule(self, step: int, plan: Plan) -> dict[str, float]:
        beta = schedules.beta(step + 1, plan.total_steps, self.beta_base, self.beta_schedule)
        return super().schedule(step, plan) | {"beta": beta}


class Bootstrap(Target):
    """The sizes of BYOL's networks, which RSA uses too."""

    hidden_dim: int = Field(ge=1)  # of projector and predictor
    out_dim: int = Field(ge=1)  # of projector and predictor


class Byol(Bootstrap):
    pairs: Literal["AA", "AW"] = "AA"  # the two views: both aggressive, or aggressive and weak (PAPER Table 1)


class Rsa(Bootstrap, Beta):
    pass


class SimSiam(Recipe):
    projector_layers: int = Field(ge=2)
    out_dim: int = Field(ge=1)  # of projector and predictor
    hidden_dim: int = Field(ge=1)  # of the predictor
    constant_predictor_lr: bool = True  # the predictor keeps the peak learning rate


class SimSiamRsa(SimSiam, Beta):
    aa_target: Literal["pred", "proj"] = "pred"  # what aggressive pairs are drawn to: predictions (Eq. 5), projections


class SimClr(Recipe):
    out_dim: int = Field(ge=1)
    temperature: float = Field(gt=0)


class Queue(Target):
    """Of methods that compare with a queue of past embeddings."""

    out_dim: int = Field(ge=1)
    queue_size: int = Field(ge=1)
    temperature: float = Field(gt=0)

    @model_validator(mode="after")
    def queue_holds_a_step(self) -> Queue:
        if self.queue_size < 2 * self.batch_size:
            raise ValueError(f"queue_size = {self.queue_size} is less than the two views of {self.batch_size} images")
        return self


class MoCo(Queue):
    pass


class ReSsl(Queue):
    hidden_dim: int = Field(ge=1)  # of the head
    teacher_temperature: float = Field(gt=0)


class Supervised(Recipe):
    classes: int = Field(ge=2)

    def check_labels(self, labelled: bool, classes: int) -> None:
        if not labelled or classes != self.classes:
            found = f"labels of {classes} classes" if labelled else "images without labels"
            raise ValueError(f"supervised training on {self.classes} classes found {found}: --set classes={classes or 'N'}")


RECIPES: dict[str, type[Recipe]] = {
    "rsa": Rsa,
    "byol": Byol,
    "simsiam": SimSiam,
    "simsiam-rsa": SimSiamRsa,
    "simclr": SimClr,
    "moco": MoCo,
    "ressl": ReSsl,
    "supervised": Supervised,
}
METHODS = tuple(RECIPES)


@dataclass(frozen=True)
class Sourced:
    value: Any
    source: str


def cite(source: str, **fields: Any) -> dict[str, Sourced]:
    return {name: Sourced(value, source) for name, value in fields.items()}


CIFAR_MEAN_STD = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
STL_MEAN_STD = {"mean": (0.4408, 0.4279, 0.3867), "std": (0.2682, 0.2610, 0.2686)}
TINY_MEAN_STD = {"mean": (0.4802, 0.4481, 0.3975), "std": (0.2302, 0.2265, 0.2262)}
IMAGENET_MEAN_STD = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

SMALL = cite("PAPER 4.1", arch="resnet18", optimizer="sgd", base_lr=0.1, batch_size=256, epochs=200)
SMALL |= cite("PAPER 4.1; on all parameters: CODE train_single.py", weight_decay=5e-4)
SMALL |= cite("CODE methods/BYOL.py, at 64 px too", stem="cifar")
LARGE = cite("PAPER 4.1", arch="resnet50", stem="imagenet", epochs=200)
LARGE |= cite("CODE eval_multi.py", eval_resize_px=256)
LARGE |= cite("PAPER 4.1; CODE train_multi.py getAugs", views={"size_px": 224, **IMAGENET_MEAN_STD})
IMAGENET_1K = LARGE | cite("PAPER 4.1", optimizer="lars", weight_decay=1e-6, batch_size=2048, base_lr=0.6)
IMAGENET_1K |= cite("CODE README", warmup_epochs=10) | cite("CODE train_multi.py", bn="sync")

DATASETS: dict[str, dict[str, Sourced]] = {
    "cifar10": SMALL | cite("CODE train_single.py getAugs", views={"size_px": 32, **CIFAR_MEAN_STD}),
    "cifar100": SMALL | cite("CODE train_single.py getAugs: CIFAR-10's", views={"size_px": 32, **CIFAR_MEAN_STD}),
    # Evaluated on the central 64x64 of the native 96x96: CODE eval_single.py.
    "stl10": SMALL | cite("CODE train_single.py getAugs", views={"size_px": 64, **STL_MEAN_STD}),
    "tinyimagenet": SMALL | cite("CODE train_single.py getAugs", views={"size_px": 64, **TINY_MEAN_STD}),
    "imagenet100": LARGE | cite("PAPER 4.1", optimizer="sgd", base_lr=0.2, weight_decay=1e-4, batch_size=256),
    "imagenet1k": IMAGENET_1K,
    "imagenet1k-100ep": IMAGENET_1K | cite("PAPER 4.1", base_lr=0.9, epochs=100),
    # Its classes are shape and texture at 32 px: more colour jitter and grayscale, larger crops and less blur.
    "demo": SMALL
    | cite(
        "chosen: tools/make_demo.py's images on two CPU cores (README)",
        views={
            "size_px": 32,
            "mean": (0.5, 0.5, 0.5),
            "std": (0.25, 0.25, 0.25),
            "crop_area": (0.4, 1.0),
            "brightness": 0.8,
            "contrast": 0.8,
            "saturation": 0.8,
            "hue": 0.4,
            "grayscale_p": 0.5,
            "blur_p": 0.2,
            "blur_sigma_px": (0.1, 1.0),
        },
        eval_resize_px=32,
        width=24,
        batch_size=32,
        peak_lr=0.06,
        epochs=20,
        knn_every_epochs=4,
    ),
}

# The rows of a method that hold for a dataset: "all", then those named here.
SCALES: dict[str, tuple[str, ...]] = {
    "cifar10": ("32px",),
    "cifar100": ("32px",),
    "demo": ("32px", "demo"),
    "stl10": ("64px",),
    "tinyimagenet": ("64px",),
    "imagenet100": ("224px", "imagenet100"),
    "imagenet1k": ("224px", "imagenet1k"),
    "imagenet1k-100ep": ("224px", "imagenet1k"),
}

BYOL_HEADS = {
    "all": cite("PAPER 4.1", hidden_dim=1024, out_dim=128, tau_base=0.99),
    "224px": cite("CODE methods/BYOL.py", hidden_dim=4096, out_dim=256),
    "demo": cite("chosen: 1,500 steps", tau_base=0.97),
}
BETA = {"all": cite("PAPER 4.1", beta_base=0.4), "32px": cite("PAPER 4.1", beta_base=0.3)}
SIMSIAM = {
    "all": cite("facebookresearch/simsiam issue 9: the CIFAR recipe", projector_layers=2)
    | cite("SimSiam 3, builder.py", out_dim=2048, hidden_dim=512),
    "224px": cite("SimSiam 3, builder.py", projector_layers=3),
    "imagenet1k": cite("SimSiam 4", optimizer="sgd", base_lr=0.05, batch_size=512, weight_decay=1e-4, warmup_epochs=0),
}
QUEUE_INIT = cite("MoCo builder.py, ReSSL backbone.py", zero_init_residual=False) | cite("MoCo v2", tau_schedule="fixed")


def stacked(*rows: dict[str, dict[str, Sourced]]) -> dict[str, dict[str, Sourced]]:
    """Rows of several tables by scale, later ones on top."""
    return {scale: {k: v for row in rows for k, v in row.get(scale, {}).items()} for row in rows for scale in row}


METHOD_ROWS: dict[str, dict[str, dict[str, Sourced]]] = {
    "byol": BYOL_HEADS,
    "rsa": stacked(BYOL_HEADS, BETA),
    "simsiam": SIMSIAM,
    "simsiam-rsa": stacked(SIMSIAM, BETA),
    # The RSA paper names neither temperature nor head; the temperatures of SimCLR's CIFAR command, of others' 224 px runs.
    "simclr": {
        "all": cite("SimCLR 3", out_dim=128) | cite("SimCLR README: the CIFAR-10 command", temperature=0.5),
        "224px": cite("solo-learn's choice for batches of 256", temperature=0.2),
        "imagenet1k": cite("SimCLR README", temperature=0.1, batch_size=4096, base_lr=0.3, weight_decay=1e-4),
    },
    "moco": {
        "all": QUEUE_INIT
        | cite("PAPER 4.1: .99 in all experiments", tau_base=0.99)
        | cite("MoCo v2", out_dim=128)
        | cite("MoCo's CIFAR-10 demo", temperature=0.1, bn="split:8", queue_size=4096),
        "64px": cite("chosen: between the CIFAR demo's and ImageNet's", queue_size=16_384),
        "224px": cite("MoCo v2", temperature=0.2, queue_size=65_536, bn="local"),
        "imagenet1k": cite("MoCo v2", optimizer="sgd", base_lr=0.03, batch_size=256, weight_decay=1e-4, warmup_epochs=0)
        | cite("MoCo v1", tau_base=0.999),
    },
    # The official small-data settings are not public; these are what third-party ports agree on.
    "ressl": {
        "all": QUEUE_INIT
        | cite("ReSSL 3", temperature=0.1, teacher_temperature=0.04)
        | cite("chosen: third-party ports (sslic)", tau_base=0.99, out_dim=128, hidden_dim=2048, queue_size=4096)
        | cite("ReSSL's CIFAR scripts in solo-learn", base_lr=0.05),
        "64px": cite("chosen: third-party ports (sslic)", tau_base=0.996, queue_size=16_384),
        "224px": cite("ReSSL ressl.py", tau_base=0.999, out_dim=512, hidden_dim=4096, bn="local")
        | cite("ReSSL ressl.py", optimizer="sgd", weight_decay=1e-4, warmup_epochs=5, batch_size=256),
        "imagenet100": cite("chosen: half of ImageNet-1K's", queue_size=65_536),
        "imagenet1k": cite("ReSSL ressl.py", queue_size=131_072),
    },
    # PAPER Table 4's first row gives epochs and batch only; the rest is the usual recipe, with this project's cosine.
    "supervised": {
        "all": cite("torchvision's default", zero_init_residual=False) | cite("CIFAR-10, STL-10, the demo", classes=10),
        "imagenet1k": cite("the usual recipe", optimizer="sgd", base_lr=0.1, weight_decay=1e-4, warmup_epochs=0)
        | cite("PAPER Table 4", batch_size=256, epochs=100)
        | cite("the usual recipe", bn="local"),
    },
}
CLASSES = {"cifar100": 100, "tinyimagenet": 200, "imagenet100": 100, "imagenet1k": 1000, "imagenet1k-100ep": 1000}

# PAPER Table 1: the method and the fields of its four rows; beta is .5 in all of that table.
ABLATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "aa": ("byol", {"pairs": "AA"}),
    "aw": ("byol", {"pairs": "AW"}),
    "ma-fixed": ("rsa", {"beta_base": 0.5, "beta_schedule": "fixed"}),
    "ma-decay": ("rsa", {"beta_base": 0.5, "beta_schedule": "cosine"}),
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


def row(dataset: str, method: str) -> dict[str, Sourced]:
    """The fields of a dataset and a method with their sources. Raises ValueError for a name that is not known."""
    if dataset not in DATASETS:
        raise ValueError(f"no dataset {dataset!r}{nearest(dataset, DATASETS)}: choose from {', '.join(DATASETS)}")
    if method not in RECIPES:
        raise ValueError(f"no method {method!r}{nearest(method, RECIPES)}: choose from {', '.join(RECIPES)}")
    fields = dict(DATASETS[dataset])
    for scale in ("all", *SCALES[dataset]):
        fields |= METHOD_ROWS[method].get(scale, {})
    if method == "supervised" and dataset in CLASSES:
        fields |= cite("the dataset's", classes=CLASSES[dataset])
    return fields


def build_recipe(dataset: str, method: str, file: Path | None = None, overrides: dict[str, Any] | None = None) -> Recipe:
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
    if not isinstance(method, str) or method not in RECIPES:
        raise ValueError(f"no method {method!r}: choose from {', '.join(RECIPES)}")
    try:
        return RECIPES[method].model_validate(fields)
    except ValidationError as error:
        faults = "\n".join(f"  {explain(e, method)}" for e in error.errors())
        raise ValueError("the recipe has faults:\n" + faults) from None


def explain(error: Any, method: str) -> str:
    key = ".".join(str(part) for part in error["loc"])
    known = [*RECIPES[method].model_fields, *(f"views.{name}" for name in ViewSpec.__dataclass_fields__)]
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        owners = [name for name, recipe in RECIPES.items() if key in recipe.model_fields]
        hint = f": {method} does not use it, {', '.join(owners)} do" if owners else nearest(key, known)
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
    return {key.strip(): load_yaml(value, f"--set {key}") for key, _, value in (item.partition("=") for item in items)}


def flatten(fields: dict[str, Any]) -> list[tuple[str, Any]]:
    views = fields.get("views")
    rest = [(key, value) for key, value in fields.items() if not (key == "views" and isinstance(views, dict))]
    return rest + [(f"views.{key}", value) for key, value in (views if isinstance(views, dict) else {}).items()]


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}") from error
    fields = load_yaml(text, str(path))
    if not isinstance(fields, dict) or not all(isinstance(key, str) for key in fields):
        raise ValueError(f"{path} holds {type(fields).__name__}, wanted recipe fields as `key: value` lines")
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
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError) as error:  # bad tags too
        raise ValueError(f"{place} is no YAML of a recipe: {str(error)[:500]}") from error


def dump_yaml(recipe: Recipe) -> str:
    """The whole recipe; `--config` reads it back to an equal one."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
