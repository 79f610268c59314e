"""The expected accuracy and cost of each recipe: `expectations()` returns one row per recipe.

The accuracies are published results of a linear classifier. They are not measured by this project.
A published figure is listed only if its run had the same number of epochs as the recipe. A note
names what its source did differently.

The GPU-hours are predicted by `rsa-fast plan` for V100s of 32 GB and enough CPU cores to decode.
`python -m tools.gpu_hours` prints the table again.

This module imports nothing heavy, so `rsa-fast recipes` lists the rows quickly.
"""

from __future__ import annotations

from dataclasses import dataclass

from rsa_fast.sourced import Fields, Sourced, cite

GPU = "v100-32g"
# The datasets of `GPU_HOURS`, in the same order, and the number of GPUs. It is that of PAPER 4.5,
# and for ImageNet-1K a node of eight.
GPUS = {
    "cifar10": 1,
    "cifar100": 1,
    "stl10": 1,
    "tinyimagenet": 1,
    "imagenet100": 4,
    "imagenet1k": 8,
    "imagenet1k-100ep": 8,
}

# Without recomputing, these batches of 4,096 images do not fit into eight such GPUs.
RECOMPUTE = frozenset(
    (dataset, method)
    for dataset in ("imagenet1k", "imagenet1k-100ep")
    for method in ("simclr", "swav", "w-mse")
)

# Top-1 accuracy of a linear classifier in percent, by dataset and method.
REPORTED: dict[str, Fields] = {
    "cifar10": cite("PAPER Table 2", simclr=88.3, moco=87.1, simsiam=86.9, byol=90.2, rsa=92.3),
    "cifar100": cite("PAPER Table 2", simclr=59.5, moco=60.3, simsiam=55.8, byol=63.9, rsa=68.1)
    | cite("PAPER Table 8", **{"simsiam-rsa": 63.7}),
    "stl10": cite("PAPER Table 2", simclr=87.9, moco=88.4, simsiam=85.0, byol=91.3, rsa=93.1)
    | cite("PAPER Table 8", **{"simsiam-rsa": 89.2}),
    "tinyimagenet": cite(
        "PAPER Table 2", simclr=46.7, moco=47.8, simsiam=41.2, byol=49.5, rsa=54.8
    ),
    "imagenet100": cite("PAPER Table 3", simclr=82.4, moco=83.9, simsiam=82.6, byol=83.6, rsa=85.5)
    | cite("PAPER Table 8", **{"simsiam-rsa": 84.0}),
    "imagenet1k": cite(
        "PAPER Table 4",
        **{"inst-dis": 56.5, "simsiam": 70.0, "swav": 69.1, "supervised": 76.2, "rsa": 73.1},
    )
    | cite("PAPER Table 4", pirl=63.6, moco=67.5, jcl=68.7, ressl=69.6, infomin=70.1)
    | cite("PAPER Table 4, batch 4096", byol=70.6),
    "imagenet1k-100ep": cite("PAPER Table 4", rsa=71.4, supervised=76.2)
    | cite("PAPER Table 4, batch 4096", byol=66.5)
    | cite("SimSiam README", simsiam=68.3),
}

# Predicted GPU-hours, by method and by the datasets of `GPUS`.
GPU_HOURS: dict[str, tuple[float, ...]] = {
    "barlow-twins": (0.44, 0.44, 3.4, 3.2, 13, 130, 66),
    "byol": (0.55, 0.55, 4.6, 4.3, 17, 170, 86),
    "dino": (0.57, 0.57, 4.6, 4.4, 26, 280, 140),
    "infomin": (0.57, 0.57, 4.2, 4, 16, 140, 70),
    "inst-dis": (0.22, 0.22, 1.7, 1.7, 7.4, 78, 39),
    "jcl": (0.57, 0.57, 4.7, 4.5, 19, 170, 83),
    "moco": (0.63, 0.63, 5.2, 4.9, 21, 180, 90),
    "pirl": (0.46, 0.46, 3.2, 3, 13, 120, 62),
    "ressl": (0.32, 0.32, 2.6, 2.5, 11, 100, 51),
    "rsa": (0.55, 0.55, 4.6, 4.3, 17, 170, 86),
    "simclr": (0.4, 0.4, 3.3, 3.2, 12, 140, 71),
    "simsiam": (0.41, 0.41, 3.3, 3.2, 12, 130, 65),
    "simsiam-rsa": (0.56, 0.56, 4.6, 4.3, 17, 180, 89),
    "supervised": (0.2, 0.2, 1.7, 1.6, 6.2, 32, 32),
    "swav": (0.42, 0.42, 3.4, 3.2, 13, 140, 71),
    "vicreg": (0.44, 0.44, 3.4, 3.2, 13, 140, 68),
    "w-mse": (0.41, 0.41, 3.3, 3.2, 12, 140, 71),
}


@dataclass(frozen=True)
class Expectation:
    """A row of the table that `rsa-fast recipes` prints."""

    dataset: str
    method: str
    top1: Sourced | None  # None if it is neither published for these epochs nor measured
    gpu_hours: float
    gpus: int

    @property
    def name(self) -> str:
        """The name of the recipe for `rsa-fast recipes`."""
        return f"{self.dataset}/{self.method}"

    @property
    def command(self) -> str:
        words = f"rsa-fast train --dataset {self.dataset} --method {self.method} --data DATA"
        if self.gpus > 1:
            words += f" --gpus {self.gpus}"
        return words + "".join(f" --set {key}={value}" for key, value in self.changes.items())

    @property
    def changes(self) -> dict[str, int]:
        """The recipe's fields that the GPUs' memory requires. They change only the speed."""
        return {"recompute_stages": 1} if (self.dataset, self.method) in RECOMPUTE else {}


def expectations() -> list[Expectation]:
    """A row for each published dataset and each method of this package."""
    return [
        Expectation(dataset, method, REPORTED[dataset].get(method), hours[column], gpus)
        for column, (dataset, gpus) in enumerate(GPUS.items())
        for method, hours in GPU_HOURS.items()
    ]
