"""What a view is: the augmentation as plain numbers, and the batch that every backend yields.

RSA augments in two stages (section 4.1 of the paper, with the values of MoCo v2). A *weak* view is
a crop and a flip. An *aggressive* view is that same crop and flip, followed by colour jitter,
grayscale and blur. Two crops per image give four views. A vertical flip and a rotation by quarter
turns can be added to the weak stage, and a function of one's own after both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from pipelines.named import absolute_spec

if TYPE_CHECKING:
    from torch import Tensor

VIEWS = ("weak_1", "weak_2", "aggressive_1", "aggressive_2")


@dataclass(frozen=True)
class ViewSpec:
    """The augmentation of one dataset. Every backend applies all of it and adds nothing.

    The defaults are the values that the paper uses for all datasets (section 4.1, MoCo v2). Size,
    mean and std differ per dataset.
    """

    __pydantic_config__: ClassVar[dict[str, object]] = {"extra": "forbid", "allow_inf_nan": False}

    size_px: int  # side of the square views
    mean: tuple[float, float, float]  # of the red, green and blue values, which lie in [0, 1]
    std: tuple[float, float, float]
    crop_area: tuple[float, float] = (0.2, 1.0)  # fraction of the image's area
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)  # width / height, log-uniform
    flip_p: float = 0.5
    # These two belong to the weak stage, for images without an upper side, such as aerial ones.
    vertical_flip_p: float = 0
    quarter_turns: bool = False  # by 0, 90, 180 or 270 degrees, each as likely as the others
    jitter_p: float = 0.8  # brightness, contrast, saturation and hue, in a random order per view
    brightness: float = 0.4  # the factor lies in 1 +- this
    contrast: float = 0.4  # as brightness
    saturation: float = 0.4  # as brightness
    hue: float = 0.1  # the shift lies in +- this, in turns of the colour circle
    grayscale_p: float = 0.2
    blur_p: float = 0.5
    blur_sigma_px: tuple[float, float] = (0.1, 2.0)  # not scaled with size_px
    # A function of one's own, `my_views.py:function`, which changes a batch's views at the end (see
    # extra.py). The path is made absolute here, so that a resumed run may start in another folder.
    extra: str | None = None

    def __post_init__(self) -> None:
        """Raise a ValueError that names every field whose value makes no sense."""
        if self.extra is not None:
            object.__setattr__(self, "extra", absolute_spec(self.extra))
        bad = [
            f"{name}={getattr(self, name)}: a probability lies in [0, 1]"
            for name in ("flip_p", "vertical_flip_p", "jitter_p", "grayscale_p", "blur_p")
            if not 0 <= getattr(self, name) <= 1
        ]
        if self.size_px < 1:
            bad.append(f"size_px={self.size_px}: at least 1")
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
        if bad:
            raise ValueError("not an augmentation: " + "; ".join(bad))


@dataclass
class Batch:
    """The input of one training step.

    `views` contains the views that the method reads, by their names in `VIEWS`. The others were not
    computed. Each view is `(B, 3, H, W)`, normalised, in channels_last memory format, on the device
    and in the compute dtype. `aggressive_i` has the same crop, flips and turns as `weak_i`,
    followed by colour jitter, grayscale and blur. The crops 1 and 2 of an image are independent of
    each other.
    `label` is `(B,)` int64, -1 for unlabelled images.
    """

    label: Tensor
    views: dict[str, Tensor]

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
