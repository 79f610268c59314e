"""The datasets. Each has one row, with everything that the project knows about it.

    DATASETS["cifar10"].classes

A recipe starts from the row's `fields`. The row `auto` is for the user's own images, and
`own_dataset` completes it from the images themselves. This module imports nothing heavy, so
`rsa-fast --help` lists the names quickly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rsa_fast.sourced import Fields, cite

if TYPE_CHECKING:
    import numpy as np

    from rsa_fast.pipelines.layouts import Data


@dataclass(frozen=True)
class Dataset:
    """One dataset. `scales` names the rows of a method that apply to it, besides "all".

    `file_gib` is a published size. For ImageNet it is the size of ILSVRC2012_img_train.tar, or a
    part of it in proportion to the images. For Tiny ImageNet it is the size of its zip file. For
    the others it is the size of their pixels. `binary_layout` is torchvision's class for the
    dataset's binary files, if it has such files. `hub_id` is the name on Hugging Face's hub, either
    of the dataset or of the one that contains it. `run_length` are fields that a method's rows do
    not replace.
    """

    fields: Fields
    scales: tuple[str, ...]
    classes: int
    images: int  # the number of images for pre-training
    test_images: int
    file_gib: float
    side_px: int | None  # None if the images have different sizes
    binary_layout: str | None = None
    hub_id: str | None = None
    run_length: Fields = field(default_factory=dict)


# The mean and standard deviation of RGB in [0, 1].
CIFAR_MEAN_STD = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
STL_MEAN_STD = {"mean": (0.4408, 0.4279, 0.3867), "std": (0.2682, 0.2610, 0.2686)}
TINY_MEAN_STD = {"mean": (0.4802, 0.4481, 0.3975), "std": (0.2302, 0.2265, 0.2262)}
IMAGENET_MEAN_STD = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

SMALL = (
    cite("PAPER 4.1", arch="resnet18", optimizer="sgd", base_lr=0.1, batch_size=256, epochs=200)
    | cite("PAPER 4.1; on all parameters: CODE train_single.py", weight_decay=5e-4)
    | cite("CODE train_single.py main", lr_per="epoch")
    | cite("CODE methods/BYOL.py, also at 64 px", stem="cifar")
    | cite("CODE: PIL reads the images and ignores it", exif_orientation=False)
)
LARGE = (
    cite("PAPER 4.1", arch="resnet50", stem="imagenet", epochs=200)
    | cite("CODE train_multi.py adjust_learning_rate", lr_per="step")
    | cite("CODE eval_multi.py", eval_resize_px=256)
    | cite("PAPER 4.1; CODE train_multi.py getAugs", views={"size_px": 224, **IMAGENET_MEAN_STD})
    | cite("CODE: PIL reads the images and ignores it", exif_orientation=False)
)
IMAGENET_1K = (
    LARGE
    | cite("PAPER 4.1", optimizer="lars", weight_decay=1e-6, batch_size=2048, base_lr=0.6)
    | cite("CODE README", warmup_epochs=10)
    | cite("CODE train_multi.py", bn="sync")
)

DATASETS = {
    "cifar10": Dataset(
        fields=SMALL
        | cite("CODE train_single.py getAugs", views={"size_px": 32, **CIFAR_MEAN_STD}),
        scales=("32px",),
        classes=10,
        images=50_000,
        test_images=10_000,
        file_gib=0.15,
        side_px=32,
        binary_layout="CIFAR10",
        hub_id="uoft-cs/cifar10",
    ),
    "cifar100": Dataset(
        fields=SMALL
        | cite("CODE train_single.py getAugs: CIFAR-10's", views={"size_px": 32, **CIFAR_MEAN_STD}),
        scales=("32px",),
        classes=100,
        images=50_000,
        test_images=10_000,
        file_gib=0.15,
        side_px=32,
        binary_layout="CIFAR100",
        hub_id="uoft-cs/cifar100",
    ),
    # Evaluation reads the central 64x64 pixels of the native 96x96 (CODE eval_single.py).
    "stl10": Dataset(
        fields=SMALL | cite("CODE train_single.py getAugs", views={"size_px": 64, **STL_MEAN_STD}),
        scales=("64px",),
        classes=10,
        images=105_000,
        test_images=8_000,
        file_gib=2.7,
        side_px=96,
        binary_layout="STL10",
    ),
    "tinyimagenet": Dataset(
        fields=SMALL | cite("CODE train_single.py getAugs", views={"size_px": 64, **TINY_MEAN_STD}),
        scales=("64px",),
        classes=200,
        images=100_000,
        test_images=10_000,
        file_gib=0.22,
        side_px=64,
        hub_id="zh-plus/tiny-imagenet",
    ),
    "imagenet100": Dataset(
        fields=LARGE
        | cite("PAPER 4.1", optimizer="sgd", base_lr=0.2, weight_decay=1e-4, batch_size=256)
        | cite(
            "CODE train_multi.py: statistics of each GPU, with 64 images on 4 GPUs (PAPER Table "
            "7); split:4 restores these parts on one GPU",
            bn="local",
        ),
        scales=("224px", "imagenet100"),
        classes=100,
        images=126_689,
        test_images=5_000,
        file_gib=13.6,
        side_px=None,
        hub_id="ILSVRC/imagenet-1k",
    ),
    "imagenet1k": Dataset(
        fields=IMAGENET_1K,
        scales=("224px", "imagenet1k"),
        classes=1000,
        images=1_281_167,
        test_images=50_000,
        file_gib=137.7,
        side_px=None,
        hub_id="ILSVRC/imagenet-1k",
    ),
    "imagenet1k-100ep": Dataset(
        fields=IMAGENET_1K | cite("PAPER 4.1", base_lr=0.9, epochs=100),
        scales=("224px", "imagenet1k"),
        classes=1000,
        images=1_281_167,
        test_images=50_000,
        file_gib=137.7,
        side_px=None,
        hub_id="ILSVRC/imagenet-1k",
    ),
    # The demo's classes are shapes and textures at 32 px. Its views therefore have more colour
    # jitter and grayscale, larger crops and less blur.
    "demo": Dataset(
        fields=SMALL
        | cite(
            "chosen: tools/make_demo.py's images on two CPU cores (docs/results.md)",
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
            arch="resnet10",
            width=8,
            precision="fp32",  # with 8 channels, bf16 takes 1.4 times as long on one core
            batch_size=32,
            peak_lr=0.09,
            lr_per="step",
            epochs=24,
            warmup_epochs=2,  # Without it, one of three seeds of BYOL collapses.
            knn_every_epochs=8,
        ),
        scales=("32px", "short"),
        classes=10,
        images=2_400,
        test_images=600,
        file_gib=0.01,
        side_px=64,
    ),
    # The user's own images. These fields are always the same. `own_dataset` chooses the others.
    "auto": Dataset(
        fields=cite("ImageNet's, as usual for photographs", views=IMAGENET_MEAN_STD)
        | cite("chosen: held out for scores if there is no val/ or test/", val_fraction=0.2)
        | cite("chosen: phones store photographs without rotating them", exif_orientation=True),
        scales=(),
        classes=0,
        images=0,
        test_images=0,
        file_gib=0.0,
        side_px=None,
    ),
}


# The rules of `auto`. To change them, change these tables and numbers.
@dataclass(frozen=True)
class OwnSize:
    """The size of views for images of some size, with the other numbers that depend on it.

    The row is for images whose shorter sides have a median of up to `side_px`. If the user chose
    the size of the views, the row is for views of up to `size_px`.
    """

    side_px: float
    size_px: int
    eval_resize_px: int
    scale: str  # the scale that selects rows of the methods
    largest_batch: int
    fields: Fields


OWN_SMALL = cite("CODE methods/BYOL.py: for small images", stem="cifar") | cite(
    "PAPER 4.1: small images", optimizer="sgd", base_lr=0.1, weight_decay=5e-4
)
OWN_LARGE = cite("PAPER 4.1: ImageNet", stem="imagenet") | cite(
    "PAPER 4.1: ImageNet-100", optimizer="sgd", base_lr=0.2, weight_decay=1e-4
)
OWN_SIZES = (
    OwnSize(48, 32, 32, "32px", 256, OWN_SMALL),
    OwnSize(128, 64, 64, "64px", 256, OWN_SMALL),
    OwnSize(math.inf, 224, 256, "224px", 128, OWN_LARGE),
)
# Up to this number of images, the run has this number of steps in total.
OWN_STEPS = (
    (1_000, 3_200),
    (5_000, 6_400),
    (20_000, 12_800),
    (100_000, 32_000),
    (500_000, 100_000),
)
OWN_EPOCHS = 200  # for more images (PAPER 4.1)
RESNET50_IMAGES = 20_000  # from this number, a ResNet-50 is worth its time at 224 px
LEAST_IMAGES = 32
LEAST_BATCH = 16
LEAST_STEPS_PER_EPOCH = 16
SHORT_STEPS = 20_000  # a run with fewer steps uses the methods' rows "short"
KNN_SCORES, CHECKPOINTS = 10, 20  # the numbers of both in a run


def own_dataset(
    sizes: np.ndarray,
    classes: int,
    *,
    size_px: int | None = None,
    batch_size: int | None = None,
    epochs: int | None = None,
) -> Dataset:
    """The row `auto` for training images with these heights and widths, `sizes` `(N, 2)`.

    `size_px` of the views, `batch_size` and `epochs` are choices of the user. They replace those
    made here, and the other numbers are chosen to match.

    Raises ValueError for too few images.
    """
    import numpy as np

    same, images = DATASETS["auto"].fields, len(sizes)
    if images < LEAST_IMAGES and batch_size is None:
        raise ValueError(
            f"auto found {images} training images and needs at least {LEAST_IMAGES}: add images, "
            "or choose a --batch-size yourself"
        )
    side_px = int(np.median(sizes.min(axis=1)))
    reason = f"chosen: the images' shorter sides have a median of {side_px} px"
    if size_px:
        own = next((own for own in OWN_SIZES if size_px <= own.size_px), OWN_SIZES[-1])
        reason = "chosen: for the size of the views"
    else:
        own = next(own for own in OWN_SIZES if side_px <= own.side_px)
        size_px = own.size_px
    large = own is OWN_SIZES[-1]
    arch = "resnet50" if large and images >= RESNET50_IMAGES else "resnet18"

    wanted_batch = own.largest_batch
    while wanted_batch > LEAST_BATCH and images // wanted_batch < LEAST_STEPS_PER_EPOCH:
        wanted_batch //= 2
    batch_size = batch_size or wanted_batch
    steps_per_epoch = max(1, images // batch_size)
    total_steps = next((steps for most, steps in OWN_STEPS if images <= most), None)
    wanted_epochs = -(-total_steps // steps_per_epoch) if total_steps else OWN_EPOCHS
    epochs = epochs or wanted_epochs
    length_reason = "PAPER 4.1"
    if total_steps:
        length_reason = f"chosen: about {total_steps:,} steps in total for {images:,} images"

    return Dataset(
        fields=same
        | own.fields
        | cite(
            f"{reason}; mean and std: {same['views'].source}",
            views={"size_px": size_px, **same["views"].value},
        )
        | cite(
            "chosen: the whole image is seen, but for its margins",
            eval_resize_px=round(size_px * own.eval_resize_px / own.size_px),
        )
        | cite(f"chosen: {size_px} px views, {images:,} images", arch=arch),
        scales=(own.scale, *(["short"] if steps_per_epoch * epochs < SHORT_STEPS else [])),
        classes=classes,
        images=images,
        test_images=0,
        file_gib=0.0,
        side_px=None,
        run_length=cite(
            f"chosen: the largest from {LEAST_BATCH} to {own.largest_batch} with "
            f"{LEAST_STEPS_PER_EPOCH} steps per epoch, or else the smallest",
            batch_size=batch_size,
        )
        | cite(length_reason, epochs=epochs)
        | cite(f"chosen: about {KNN_SCORES} scores", knn_every_epochs=every(epochs, KNN_SCORES))
        | cite(
            f"chosen: about {CHECKPOINTS} checkpoints",
            checkpoint_every_epochs=every(epochs, CHECKPOINTS),
        ),
    )


def name_of(data: Data) -> str:
    """The name of the user's own images: that of their folder, or of the file that lists them."""
    if isinstance(data, str | Path):
        place = Path(data).resolve()
        return place.stem if place.is_file() else place.name
    return "+".join(map(name_of, data))


def every(epochs: int, times: int) -> int:
    """The number of epochs between two events, so that there are about `times` in a run."""
    return max(1, round(epochs / times))


def own_rules() -> list[tuple[str, str, str]]:
    """The rules of `own_dataset`: field, rule, reason."""

    def by_size(values: list[object]) -> str:
        if len(set(values)) == 1:
            return str(values[0])
        bounds = [f"up to {own.side_px:g} px: " for own in OWN_SIZES[:-1]] + ["else: "]
        return "; ".join(f"{bound}{value}" for bound, value in zip(bounds, values, strict=True))

    def by_field(name: str) -> tuple[str, str, str]:
        sourced = [own.fields[name] for own in OWN_SIZES]
        reasons = "; ".join(dict.fromkeys(one.source for one in sourced))
        return name, by_size([one.value for one in sourced]), reasons

    same, largest_px = DATASETS["auto"].fields, OWN_SIZES[-1].size_px
    steps = "; ".join(f"up to {most:,} images: {steps:,} steps" for most, steps in OWN_STEPS)
    return [
        (
            "views.size_px",
            by_size([own.size_px for own in OWN_SIZES]),
            "chosen: by the median of the images' shorter sides, like all rules here that depend "
            "on px",
        ),
        by_field("stem"),
        (
            "arch",
            f"resnet18; at {largest_px} px from {RESNET50_IMAGES:,} images: resnet50",
            "chosen: a larger network needs more images",
        ),
        (
            "eval_resize_px",
            by_size([own.eval_resize_px for own in OWN_SIZES]),
            "chosen: the whole image is seen, but for its margins",
        ),
        ("views.mean, views.std", "ImageNet's", same["views"].source),
        (
            "batch_size",
            f"the largest power of two from {LEAST_BATCH} with at least {LEAST_STEPS_PER_EPOCH} "
            f"steps per epoch; at most {by_size([own.largest_batch for own in OWN_SIZES])}",
            "chosen: on few images, the number of steps matters (docs/results.md)",
        ),
        (
            "epochs",
            f"by the number of steps ({steps}); for more images {OWN_EPOCHS} epochs",
            "chosen: as for batch_size; PAPER 4.1 for more images",
        ),
        *map(by_field, ("optimizer", "base_lr", "weight_decay")),
        *((name, str(same[name].value), same[name].source) for name in same if name != "views"),
        ("knn_every_epochs", f"{KNN_SCORES} scores, about", "chosen: enough for a curve"),
        (
            "checkpoint_every_epochs",
            f"{CHECKPOINTS} checkpoints, about",
            "chosen: so that a stop loses little work",
        ),
        (
            "the method's",
            f"its rows for {by_size([own.scale for own in OWN_SIZES])}; with fewer than "
            f"{SHORT_STEPS:,} steps, its rows for short runs",
            "the same as for the published datasets: rsa-fast recipes DATASET/METHOD",
        ),
        ("name", "the folder's name", "chosen: so that results name the data"),
    ]
