"""The datasets: one row each, with everything that the project knows about it.

    DATASETS["cifar10"].classes

A recipe starts from the row's `fields`. This module imports nothing heavy, so `rsa-fast --help`
lists the names quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from rsa_fast.sourced import Fields, cite


@dataclass(frozen=True)
class Dataset:
    """One dataset. `scales` names the rows of a method that apply to it, besides "all".

    `file_gib` is a published size: for ImageNet that of ILSVRC2012_img_train.tar, or a part of it
    in proportion to the images; for Tiny ImageNet that of its zip file; for the others that of
    their pixels.
    `binary_layout` is torchvision's class for the dataset's binary files, if it has such files.
    """

    fields: Fields
    scales: tuple[str, ...]
    classes: int
    images: int  # for pre-training
    file_gib: float
    side_px: int | None  # None: the images have different sizes
    binary_layout: str | None = None


# The mean and standard deviation of RGB in [0, 1].
CIFAR_MEAN_STD = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
STL_MEAN_STD = {"mean": (0.4408, 0.4279, 0.3867), "std": (0.2682, 0.2610, 0.2686)}
TINY_MEAN_STD = {"mean": (0.4802, 0.4481, 0.3975), "std": (0.2302, 0.2265, 0.2262)}
IMAGENET_MEAN_STD = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

SMALL = (
    cite("PAPER 4.1", arch="resnet18", optimizer="sgd", base_lr=0.1, batch_size=256, epochs=200)
    | cite("PAPER 4.1; on all parameters: CODE train_single.py", weight_decay=5e-4)
    | cite("CODE methods/BYOL.py, at 64 px too", stem="cifar")
)
LARGE = (
    cite("PAPER 4.1", arch="resnet50", stem="imagenet", epochs=200)
    | cite("CODE eval_multi.py", eval_resize_px=256)
    | cite("PAPER 4.1; CODE train_multi.py getAugs", views={"size_px": 224, **IMAGENET_MEAN_STD})
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
        file_gib=0.15,
        side_px=32,
        binary_layout="CIFAR10",
    ),
    "cifar100": Dataset(
        fields=SMALL
        | cite("CODE train_single.py getAugs: CIFAR-10's", views={"size_px": 32, **CIFAR_MEAN_STD}),
        scales=("32px",),
        classes=100,
        images=50_000,
        file_gib=0.15,
        side_px=32,
        binary_layout="CIFAR100",
    ),
    # Evaluation reads the central 64x64 pixels of the native 96x96 (CODE eval_single.py).
    "stl10": Dataset(
        fields=SMALL | cite("CODE train_single.py getAugs", views={"size_px": 64, **STL_MEAN_STD}),
        scales=("64px",),
        classes=10,
        images=105_000,
        file_gib=2.7,
        side_px=96,
        binary_layout="STL10",
    ),
    "tinyimagenet": Dataset(
        fields=SMALL | cite("CODE train_single.py getAugs", views={"size_px": 64, **TINY_MEAN_STD}),
        scales=("64px",),
        classes=200,
        images=100_000,
        file_gib=0.22,
        side_px=64,
    ),
    "imagenet100": Dataset(
        fields=LARGE
        | cite("PAPER 4.1", optimizer="sgd", base_lr=0.2, weight_decay=1e-4, batch_size=256),
        scales=("224px", "imagenet100"),
        classes=100,
        images=126_689,
        file_gib=13.6,
        side_px=None,
    ),
    "imagenet1k": Dataset(
        fields=IMAGENET_1K,
        scales=("224px", "imagenet1k"),
        classes=1000,
        images=1_281_167,
        file_gib=137.7,
        side_px=None,
    ),
    "imagenet1k-100ep": Dataset(
        fields=IMAGENET_1K | cite("PAPER 4.1", base_lr=0.9, epochs=100),
        scales=("224px", "imagenet1k"),
        classes=1000,
        images=1_281_167,
        file_gib=137.7,
        side_px=None,
    ),
    # The demo's classes are shapes and textures at 32 px. Its views therefore have more colour
    # jitter and grayscale, larger crops and less blur.
    "demo": Dataset(
        fields=SMALL
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
        scales=("32px", "demo"),
        classes=10,
        images=2_400,
        file_gib=0.01,
        side_px=64,
    ),
}
