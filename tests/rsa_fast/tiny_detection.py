"""A detector and COCO data that are small enough for a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from tests.helpers import natural_image

# Sizes of images and numbers of proposals and regions that a CPU can handle.
MODEL_OPTIONS = {
    "min_size": (32,),
    "rpn_post_nms_top_n_train": 20,
    "rpn_post_nms_top_n_test": 10,
    "box_batch_size_per_image": 8,
}
CATEGORIES = [{"id": 3, "name": "box"}, {"id": 7, "name": "disc"}]  # COCO's ids have gaps too.


def write_coco(root: Path) -> Path:
    """Write two images per split, landscape and portrait, with a bright rectangle and disc each."""
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True)
        images, annotations = [], []
        for i, (width, height) in enumerate([(96, 64), (64, 96)]):
            picture = Image.fromarray(natural_image(i, height, width) // 2)
            draw = ImageDraw.Draw(picture)
            x, y, side = 4 + 2 * i, 6 + i, 24
            rectangle = [x, y, x + side, y, x + side, y + side, x, y + side]
            angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            disc = (
                np.stack([width - 20 + 12 * np.cos(angles), height - 20 + 12 * np.sin(angles)], 1)
                .ravel()
                .tolist()
            )
            for polygon, colour, category in (
                (rectangle, (255, 40, 40), 3),
                (disc, (40, 255, 40), 7),
            ):
                draw.polygon(polygon, fill=colour)
                low, high = np.reshape(polygon, (-1, 2)).min(0), np.reshape(polygon, (-1, 2)).max(0)
                entry = {
                    "id": len(annotations) + 1,
                    "image_id": 10 * i + 5,
                    "category_id": category,
                    "iscrowd": 0,
                }
                box = {
                    "bbox": [*low.tolist(), *(high - low).tolist()],
                    "area": float(np.prod(high - low)),
                }
                annotations.append({**entry, **box, "segmentation": [polygon]})
            picture.save(root / split / f"{i:012}.png")
            images.append(
                {"id": 10 * i + 5, "file_name": f"{i:012}.png", "width": width, "height": height}
            )
        write_annotations(
            root, split, {"images": images, "annotations": annotations, "categories": CATEGORIES}
        )
    return root


def annotations_of(root: Path, split: str) -> dict:
    return json.loads((root / "annotations" / f"instances_{split}.json").read_text())


def write_annotations(root: Path, split: str, content: object) -> None:
    (root / "annotations").mkdir(exist_ok=True)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
