"""The augmentation of the views as plain numbers, and the batch that every backend yields.

RSA augments in two stages (section 4.1 of the paper, with the values of MoCo v2). A *weak* view is
a crop and a flip. An *aggressive* view is that same crop and flip, followed by colour jitter,
grayscale and blur. Two crops per image give four views. A vertical flip and a rotation by quarter
turns can be added to the weak stage, and solarize and RandAugment to the aggressive one. A function
of the user can be added after both.

Any number of crops can be made of one decoded image. They are in groups, whose sizes and
augmentations may differ, as in the multi-crop of SwAV:

    groups = (CropGroup("global", 2, crop_area=(0.14, 1)), CropGroup("local", 6, size_px=96))
    spec = ViewSpec(224, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), groups=groups)
    spec.names("aggressive", "local")  # aggressive_3 ... aggressive_8
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from rsa_fast.pipelines.named import absolute_spec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

VIEWS = ("weak_1", "weak_2", "aggressive_1", "aggressive_2")  # the views of two crops, for RSA
Stage = Literal["weak", "aggressive", "patches"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Interpolation = Literal["bilinear", "bicubic"]


def view_name(stage: Stage, crop: int) -> str:
    """The name of a view. Crops are counted from 0, and from 1 in names."""
    return f"{stage}_{crop + 1}"


def stage_and_crop(view: str) -> tuple[str, int]:
    """The stage and the crop of a view, from the name that `view_name` gave it."""
    stage, _, number = view.rpartition("_")
    return stage, int(number) - 1


def patch_px(size_px: int) -> int:
    """The side of a jigsaw's patches: 64 px in cells of 85 px, as in PIRL's code."""
    return size_px // 3 * 64 // 85


@dataclass(frozen=True)
class CropGroup:
    """Crops of one image with the same augmentation: their name, their number and their own values.

    Every field except the first two replaces the field of the same name in the `ViewSpec` that has
    this group, unless it is None. Crops with different parameters must be different groups.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "allow_inf_nan": False}

    name: str
    count: int
    size_px: int | None = None
    crop_area: tuple[float, float] | None = None
    crop_aspect: tuple[float, float] | None = None
    interpolation: Interpolation | None = None
    flip_p: float | None = None
    vertical_flip_p: float | None = None
    quarter_turns: bool | None = None
    jitter_p: float | None = None
    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    grayscale_p: float | None = None
    blur_p: float | None = None
    blur_sigma_px: tuple[float, float] | None = None
    solarize_p: float | None = None
    rand_augment: bool | None = None
    jigsaw: bool | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """The fields that replace those of the `ViewSpec`."""
        values = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class ViewSpec:
    """The augmentation of one dataset. Every backend applies all of it and adds nothing.

    The defaults are the values that the paper uses for all datasets (section 4.1, MoCo v2). Size,
    mean and std differ per dataset.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "allow_inf_nan": False}

    size_px: int  # the side of the square views
    # The means of the red, green and blue values, in [0, 1]. They are subtracted from the values.
    mean: tuple[float, float, float]
    std: tuple[float, float, float]  # their standard deviations, by which the rest is divided
    crop_area: tuple[float, float] = (0.2, 1.0)  # the range of the crop's share of the image's area
    crop_aspect: tuple[float, float] = (
        3 / 4,
        4 / 3,
    )  # the range of its width / height, log-uniform
    interpolation: Interpolation = "bilinear"  # how a crop is resized, antialiased as by PIL
    flip_p: float = 0.5  # probability of a horizontal flip
    # The probability of a vertical flip, in the weak stage: for images without an upper side, such
    # as aerial ones.
    vertical_flip_p: float = 0
    # Whether the weak stage turns the image by 0, 90, 180 or 270 degrees, with equal probability.
    quarter_turns: bool = False
    # The probability that brightness, contrast, saturation and hue change, in a random order.
    jitter_p: float = 0.8
    brightness: float = 0.4  # its factor is in the range 1 +- this
    contrast: float = 0.4  # the same for contrast
    saturation: float = 0.4  # the same for saturation
    hue: float = 0.1  # its shift is in the range +- this, in turns of the colour circle
    grayscale_p: float = 0.2  # probability that the colours are removed
    blur_p: float = 0.5  # probability of a Gaussian blur
    # The range of the blur's standard deviation. It is not scaled with size_px.
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)
    solarize_p: float = 0  # probability that levels of 128 and more are inverted, after the blur
    rand_augment: bool = False  # InfoMin's RandAugment, rand-n2-m10-mstd0.5, at the end
    # Whether the weak crop is also cut into the nine patches of a jigsaw, the views `patches_k`.
    jigsaw: bool = False
    # The groups of crops, in their order. All crops are made of one decoded image.
    groups: tuple[CropGroup, ...] = (CropGroup("crops", 2),)
    # The user's own function, `my_views.py:function`, which changes a batch's views at the end (see
    # extra.py). The path is made absolute here, so that a resumed run may start in another folder.
    extra: str | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError that names every field whose value makes no sense."""
        if self.extra is not None:
            object.__setattr__(self, "extra", absolute_spec(self.extra))
        bad = [
            f"{name}={getattr(self, name)}: a probability is in [0, 1]"
            for name in PROBABILITIES
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.size_px < 1:
            bad.append(f"size_px={self.size_px}: at least 1")
        if self.interpolation not in get_args(Interpolation):
            bad.append(f"interpolation={self.interpolation!r}: bilinear or bicubic")
        if self.jigsaw and (self.size_px % 3 or patch_px(self.size_px) < 1):
            bad.append(f"size_px={self.size_px}: a multiple of 3, at least 6, for a jigsaw")
        if min(self.std) <= 0:
            bad.append(f"std={self.std}: positive")
        if not 0 < self.crop_area[0] <= self.crop_area[1] <= 1:
            bad.append(f"crop_area={self.crop_area}: 0 < low <= high <= 1")
        if not 0 < self.crop_aspect[0] <= self.crop_aspect[1]:
            bad.append(f"crop_aspect={self.crop_aspect}: 0 < low <= high")
        if not 0 < self.blur_sigma_px[0] <= self.blur_sigma_px[1]:
            bad.append(f"blur_sigma_px={self.blur_sigma_px}: 0 < low <= high")
        bad += [
            f"{name}={getattr(self, name)}: in [0, 1]"
            for name in ("brightness", "contrast", "saturation")
            if not 0 <= getattr(self, name) <= 1
        ]
        if not 0 <= self.hue <= 0.5:
            bad.append(f"hue={self.hue}: in [0, 0.5] turns")
        names = [group.name for group in self.groups]
        if not names or len(set(names)) < len(names) or not all(names):
            bad.append(f"groups={names}: at least one, each with its own name")
        bad += [
            f"count={group.count} of the group {group.name}: at least 1"
            for group in self.groups
            if group.count < 1
        ]
        if not bad:
            try:
                _ = self.crops
            except ValueError as error:
                bad.append(str(error))
        if bad:
            raise ValueError("not an augmentation: " + "; ".join(bad))

    @cached_property
    def crops(self) -> tuple[ViewSpec, ...]:
        """The augmentation of every crop, in the order of the groups: `(K,)`."""
        crops: list[ViewSpec] = []
        for group in self.groups:
            crop, changes = self, group.changes
            if changes:
                try:
                    crop = replace(self, groups=(CropGroup(group.name, group.count),), **changes)
                except ValueError as error:
                    cause = str(error).removeprefix("not an augmentation: ")
                    raise ValueError(f"the group {group.name}: {cause}") from error
            crops += group.count * [crop]
        return tuple(crops)

    @cached_property
    def by_crop(self) -> dict[str, np.ndarray]:
        """Every number of the augmentation for each of the K crops: `(K,)`, or `(2, K)` of a range.

        They are cached, because making them takes a tenth of the time of the draws of 256 images.
        """
        import numpy as np

        numbers = [name for name in CropGroup.__dataclass_fields__ if hasattr(self, name)]
        return {name: np.array([getattr(crop, name) for crop in self.crops]).T for name in numbers}

    def names(self, stage: Stage, group: str | None = None) -> tuple[str, ...]:
        """The names of a stage's views, of all crops or of those of a group.

        Raises ValueError for an unknown group.
        """
        names = [g.name for g in self.groups for _ in range(g.count)]  # (K,)
        if group is not None and group not in names:
            choices = ", ".join(dict.fromkeys(names))
            raise ValueError(f"no group {group!r} of crops: choose from {choices}")
        return tuple(view_name(stage, k) for k, name in enumerate(names) if group in (None, name))

    def shape(self, view: str) -> tuple[int, ...]:
        """The shape of a view of one image: `(3, S, S)`, or `(9, 3, P, P)` of patches."""
        stage, crop = stage_and_crop(view)
        side = self.crops[crop].size_px
        return (9, 3, *2 * (patch_px(side),)) if stage == "patches" else (3, side, side)

    @cached_property
    def views(self) -> tuple[str, ...]:
        """The names of all views, stage by stage. Only crops with a jigsaw have patches."""
        patches = [view_name("patches", k) for k, crop in enumerate(self.crops) if crop.jigsaw]
        return (*self.names("weak"), *self.names("aggressive"), *patches)


PROBABILITIES = ("flip_p", "vertical_flip_p", "jitter_p", "grayscale_p", "blur_p", "solarize_p")


@dataclass
class Batch:
    """The input of one training step.

    `views` contains the views that the method reads, by their names (`ViewSpec.names`), with crops
    counted from 1. The others were not computed. Each view is `(B, 3, S, S)`, normalised, in
    channels_last memory format, on the device and in the compute dtype. `aggressive_i` has the same
    crop, flips and turns as `weak_i`, followed by colour jitter, grayscale, blur and the optional
    operations of the recipe. `patches_i` `(B, 9, 3, P, P)` are parts of `weak_i`. The crops of an
    image are independent of each other.

    `label` is `(B,)` int64, -1 for unlabelled images. `ids` is `(B,)` int64, the sample ids of the
    images in the rows, or None without a dataset.
    """

    label: Tensor
    views: dict[str, Tensor]
    ids: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        ids = [] if self.ids is None else [self.ids]
        return [self.label, *ids, *self.views.values()]

    @property
    def weak_1(self) -> Tensor:
        return self.view("weak_1")

    @property
    def weak_2(self) -> Tensor:
        return self.view("weak_2")

    @property
    def aggressive_1(self) -> Tensor:
        return self.view("aggressive_1")

    @property
    def aggressive_2(self) -> Tensor:
        return self.view("aggressive_2")

    def view(self, name: str) -> Tensor:
        """One of the views. Raises AttributeError when it was not loaded."""
        if name not in self.views:
            raise AttributeError(
                f"this batch has no {name}, only {', '.join(sorted(self.views))}: "
                "a view is loaded when the method's `reads` contains it"
            )
        return self.views[name]
