"""Pictures for the page of a run: views of some images, and the nearest neighbours of others.

html = examples(Path("runs/rsa"))
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from rsa_fast.distributed import world_size
from rsa_fast.evaluation.embed import Embeddings, filename, valid
from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.evaluate import extract_features
from rsa_fast.evaluation.features import plain_images
from rsa_fast.insight.neighbours import TILE_PX, Pictures, nearest_html
from rsa_fast.insight.page import Picture, data_url, picture_row
from rsa_fast.insight.preview import view_levels
from rsa_fast.pipelines import Order, Source
from rsa_fast.pipelines.combined import subset
from rsa_fast.recipes import Recipe
from rsa_fast.training import checkpoint
from rsa_fast.training.run_folder import stored_places
from rsa_fast.training.step import choose_device, choose_dtype, for_any_device

log = logging.getLogger("rsa_fast")

VIEWED, QUERIES, NEAREST, SEED = 4, 6, 8, 0
POOL = 1000  # neighbours are searched among this number of images, to save time


def examples(folder: Path) -> str:
    """The pictures of the run in `folder` as HTML, by its newest checkpoint.

    The images are chosen at random from the training images, in the same way for the same run. The
    result is empty before the first checkpoint. It is also empty, with a line in the log, if the
    images or the encoder cannot be read.
    """
    checkpoints = checkpoint.paths_in(folder / "checkpoints")
    if not checkpoints:
        return ""
    try:
        if world_size() > 1:
            raise ValueError(
                "they need a single process, and this run has several: run rsa-fast report "
                f"{folder}"
            )
        network, recipe = load_encoder(checkpoints[-1])
        assert recipe is not None
        recipe = for_any_device(recipe)
        if not (places := stored_places(folder)):
            raise ValueError("its env.json does not record where its images are")
        every = recipe.training_source(places, cache=folder)
        draw = np.random.default_rng(SEED)
        count = len(every.manifest)
        ids = np.sort(draw.choice(count, min(POOL, count), replace=False))
        source = subset(every, ids, "pretrain")
        device = choose_device(recipe.device)
        dtype = choose_dtype(recipe.precision, device)
        images = plain_images(source, recipe, device, dtype)
        features, labels = extract_features(network.to(device), images)
        readable = np.array([i for i in range(len(ids)) if i not in images.bad], int)
        rows = Embeddings(
            features.float().numpy()[readable],
            labels.numpy()[readable],
            [filename(source.manifest, i) for i in readable.tolist()],
            source.manifest.classes,
            {},
        )
        pictures = Pictures(rows, source)
        asked = draw.choice(len(readable), min(QUERIES, len(readable)), replace=False)
        viewed = subset(source, readable[asked[:VIEWED]], "pretrain")
        share = f"the {count:,}" if len(ids) == count else f"{len(ids):,} of the {count:,}"
        among = f"{share} images that it is trained on"
        return (
            views_html(recipe, viewed)
            + nearest_html(rows, pictures, asked, NEAREST, SEED, among)[0]
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        log.info(f"the page of {folder} has no pictures: {reason}")
        return ""


def views_html(recipe: Recipe, few: Source) -> str:
    """A few images with all views of them, as HTML.

    It is empty if the views come from the user's own file, which is not executed for a page.
    """
    if recipe.views.extra:
        return ""
    order = Order(len(few.manifest), len(few.manifest), recipe.seed)
    levels = view_levels(recipe, few, order, 0, "native")
    lines = []
    for i, sample in enumerate(order.ids(0, 0).tolist()):
        name = valid(filename(few.manifest, sample))
        image = ImageOps.contain(Image.fromarray(few.read(sample)), (TILE_PX, TILE_PX))
        shown = [Picture(data_url(image, "JPEG"), "image", name)]
        for view, pixels in levels.items():
            tile = Image.fromarray(pixels[i].round().clip(0, 255).astype(np.uint8))
            tile.thumbnail((TILE_PX, TILE_PX))
            caption = view.replace("_", " ")
            shown.append(Picture(data_url(tile, "JPEG"), caption, f"{name}: {caption}", "small"))
        lines.append(picture_row(shown))
    about = "Images and random views of them by the recipe. Each method reads some of these."
    return f'<h2>Views</h2>\n<p>{about}</p>\n<div class="beside">{"".join(lines)}</div>\n'
