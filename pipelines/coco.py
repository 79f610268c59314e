"""Detection data in COCO's format: the images, their objects, and the order of reading.

images = CocoImages(Path("data/coco"), "train2017")
image, objects = images[17, False]
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from rsa_fast.pipelines.draws import sample_keys
from rsa_fast.pipelines.machine import PIP
from rsa_fast.pipelines.order import Order, epoch_order
from rsa_fast.pipelines.sources import read_rgb
from rsa_fast.pipelines.workers import FORKS, Parcel

Sample = tuple[Tensor, dict[str, Tensor]]  # an image and its objects
LAYOUT = (
    "wanted: train2017/, val2017/ and annotations/instances_{train,val}2017.json, in COCO's format"
)


class CocoImages(Dataset[Sample]):
    """A split of a dataset in COCO's format.

    `self[index, flip]` is an image `(3, H, W)` uint8 and a dictionary of its N objects: `boxes`
    `(N, 4)` as x1, y1, x2, y2 in pixels, `labels` `(N,)` int64 and `masks` `(N, H, W)` uint8. The
    labels count from 1 in the order of `categories`, because COCO's own ids have gaps.

    Raises FileNotFoundError for a missing folder or image, and ValueError for annotations that do
    not describe the images.
    """

    def __init__(self, data: Path, split: str) -> None:
        self.folder, path = data / split, data / "annotations" / f"instances_{split}.json"
        if absent := [place for place in (self.folder, path) if not place.exists()]:
            raise FileNotFoundError(f"no {absent[0]}; {LAYOUT}")
        self.coco = read_annotations(path)
        images, categories = self.coco.imgs, self.coco.cats
        names = [image["file_name"] for image in images.values()]
        if absent_images := [name for name in names if not (self.folder / name).is_file()]:
            raise FileNotFoundError(
                f"{path} lists {len(absent_images)} images that are not in {self.folder}: "
                f"{', '.join(absent_images[:5])}"
            )
        fields = {"image_id", "category_id", "bbox", "segmentation", "area", "iscrowd"}
        for entry in self.coco.anns.values():
            if missing := fields - entry.keys():
                lacking = ", ".join(sorted(missing))
                raise ValueError(f"{path}: annotation {entry['id']} has no {lacking}; {LAYOUT}")
            if entry["image_id"] not in images or entry["category_id"] not in categories:
                raise ValueError(
                    f"{path}: annotation {entry['id']} belongs to an image or a category "
                    "that does not exist"
                )
        self.ids = sorted(images)
        self.categories = {key: categories[key]["name"] for key in sorted(categories)}
        self.labels = {key: label for label, key in enumerate(self.categories, 1)}
        if not any(map(self.objects, self.ids)):
            raise ValueError(f"{path} contains no instances to train or to evaluate on")

    def objects(self, image_id: int) -> list[dict[str, Any]]:
        """The annotations of an image that are used: single objects with an area, no crowds."""
        entries = self.coco.imgToAnns[image_id]
        return [e for e in entries if not e["iscrowd"] and min(e["bbox"][2:]) > 0]

    def portrait(self) -> np.ndarray:
        """Whether each image is taller than wide, `(len(self),)` bool."""
        images = [self.coco.imgs[image_id] for image_id in self.ids]
        return np.array([image["height"] > image["width"] for image in images])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index_and_flip: tuple[int, bool]) -> Sample:
        index, flip = index_and_flip
        entry, objects = self.coco.imgs[self.ids[index]], self.objects(self.ids[index])
        image = torch.from_numpy(read_rgb(self.folder / entry["file_name"])).permute(2, 0, 1)
        size = entry["height"], entry["width"]
        if image.shape[1:] != size:
            raise ValueError(
                f"{entry['file_name']} is {tuple(image.shape[1:])} px high and wide, "
                f"but {size} in its annotations"
            )
        boxes = torch.tensor([item["bbox"] for item in objects]).reshape(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]  # from x, y, width, height to x1, y1, x2, y2
        labels = torch.tensor([self.labels[item["category_id"]] for item in objects]).long()
        pixels = np.array([self.coco.annToMask(item) for item in objects], np.uint8)
        masks = torch.from_numpy(pixels.reshape(-1, *size))
        if flip:
            image, masks = image.flip(-1), masks.flip(-1)
            boxes[:, [0, 2]] = size[1] - boxes[:, [2, 0]]
        return image, {"boxes": boxes, "labels": labels, "masks": masks}


def read_annotations(path: Path) -> Any:
    """An annotation file as pycocotools' `COCO`.

    Raises ValueError when it is not in COCO's format, or when pycocotools is not installed.
    """
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        reason = f"detection needs pycocotools ({error}): {PIP} install pycocotools"
        raise ValueError(reason) from error
    try:
        with redirect_stdout(sys.stderr):
            coco = COCO(str(path))
    except (ValueError, AssertionError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO annotation file ({error!r}); {LAYOUT}") from error
    if missing := {"images", "annotations", "categories"} - coco.dataset.keys():
        raise ValueError(f"{path} has no {', '.join(sorted(missing))}; {LAYOUT}")
    return coco


def reading_plan(
    order: Order, portrait: np.ndarray, first: int, end: int
) -> Iterator[list[tuple[int, bool]]]:
    """The batches of the steps from `first` up to `end`, each a list of (index, flip).

    A batch depends only on the seed and the step. In all batches of an epoch except one, the images
    have the same orientation, so little padding is needed (detectron2 groups images in this way).
    `portrait` `(N,)` is True for the images that are taller than wide.
    """
    for step in range(first, end):
        epoch, position = divmod(step, len(order))
        if position == 0 or step == first:
            ids = epoch_order(order.count, order.seed, epoch)
            ids = ids[np.argsort(portrait[ids], kind="stable")]
            flips = sample_keys(order.seed, epoch, ids) >> np.uint64(63) == 1
            blocks = epoch_order(len(order), order.seed, epoch)
        rows = slice(blocks[position] * order.batch_size, (blocks[position] + 1) * order.batch_size)
        yield list(zip(ids[rows].tolist(), flips[rows].tolist(), strict=True))


def open_loader(
    images: CocoImages, plan: Iterable[list[tuple[int, bool]]], workers: int, device: torch.device
) -> DataLoader[Sample]:
    return DataLoader(
        images,
        batch_sampler=plan,
        num_workers=workers,
        collate_fn=parcel if workers else list,
        pin_memory=device.type == "cuda",
        multiprocessing_context=FORKS if workers else None,
    )


def parcel(batch: list[Sample]) -> Parcel:
    """A batch as a worker returns it."""
    return Parcel(
        batch, [tensor for image, objects in batch for tensor in (image, *objects.values())]
    )
