"""A contact sheet of what training sees: sources with both crop windows and the four views made of them, labelled.

    preview(recipe, open_source("data/imagenet", "pretrain"), Path("views.png"), images=4, compare="torchvision")

Views lie on the sheet pixel for pixel, enlarged by a whole factor where they are small.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines import VIEWS, Backend, Order, Source, choose_backend, open_views
from pipelines.draws import draw
from rsa_fast.recipes import Recipe
from rsa_fast.training.step import choose_device

JITTER = ("brightness", "contrast", "saturation", "hue")  # by draws' operation numbers
TILE_PX, GAP_PX, LINE_PX, FRAME_PX = 192, 14, 17, 3  # the widest label fits below a tile of 192 px
FONT, HEADING = ImageFont.load_default(13), ImageFont.load_default(16)
INK, CROP_INKS = "#222222", ("#d62728", "#1f77b4")
AMPLIFY = 64  # of differences: a level, the least that 8 bits can differ by, is a quarter of white


def preview(
    recipe: Recipe,
    source: Source,
    out: Path,
    *,
    images: int = 4,
    epoch: int = 0,
    compare: Backend | None = None,
) -> dict[str, Any]:
    """Draw the first `images` that training reads in `epoch` to the PNG `out`; with a second backend to `compare`, its
    views and the differences too.

    Returns out, backend, images and, of two backends, each view's mean absolute difference in 8-bit levels. Raises
    ValueError when there are fewer images, `out` is no .png, or a backend does not exist or cannot read the source.
    """
    manifest, spec = source.manifest, recipe.views
    if images > len(manifest):
        raise ValueError(f"{images} images wanted, the data has {len(manifest)}: lower --images")
    if out.suffix.lower() != ".png":
        raise ValueError(f"the sheet is a PNG: found --out {out}, wanted a name that ends in .png")
    order = Order(
        len(manifest), images, recipe.seed
    )  # its first batch is where training's begins, whatever the batch size
    ids = order.ids(epoch, 0)
    params = draw(recipe.seed, epoch, ids, spec, manifest.sizes[ids])
    automatic = choose_backend(source, choose_device(recipe.device))[0]
    names = [automatic if name == "auto" else name for name in (recipe.backend, compare) if name]
    made = [view_levels(recipe, source, order, epoch, name) for name in names]
    result = {"out": str(out), "backend": names[0], "images": images}

    title = f"{recipe.dataset}, {spec.size_px} px, epoch {epoch}, seed {recipe.seed}, by {' and '.join(names)}"
    headings, rows = list(VIEWS), [""]
    if compare:
        gap = np.abs(made[0] - made[1])
        means = gap.mean((2, 3, 4), dtype=np.float64)  # (B, 4)
        by_view = dict(zip(VIEWS, means.mean(0).round(4).tolist(), strict=True))
        result |= {"compare": names[1], "difference_levels": by_view}
        title += ": mean absolute difference in 8-bit levels"
        headings = [f"{name}: {apart(mean)}" for name, mean in by_view.items()]
        rows, made = [*names, f"difference x {AMPLIFY}"], [*made, AMPLIFY * gap]
    scale = -(-TILE_PX // spec.size_px)
    tiles = (
        np.stack(made, 1).round().clip(0, 255).astype(np.uint8).repeat(scale, 3).repeat(scale, 4)
    )
    sheet = [heading(tiles.shape[3], title, headings)]
    for i, sample in enumerate(ids):
        labels = view_labels(params[i], manifest.sizes[sample])
        if compare:
            labels = [
                f"{label}\n{apart(mean)}" for label, mean in zip(labels, means[i], strict=True)
            ]
        image, of_class = source.read(sample), manifest.labels[sample]
        text = f"sample {sample}, {image.shape[1]}x{image.shape[0]} px\n"
        text += manifest.classes[of_class][:40] if 0 <= of_class < len(manifest.classes) else ""
        sheet.append(block(windows(image, params[i], tiles.shape[3]), text, rows, tiles[i], labels))
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(sheet)).save(out)
    return result


def view_levels(
    recipe: Recipe, source: Source, order: Order, epoch: int, backend: Backend
) -> np.ndarray:
    """`(B, 4, S, S, 3)` float32: the epoch's first batch from a backend, in the order of `VIEWS`, as 8-bit levels.

    Computed in float32, whatever the recipe's precision: 0 to 255, whole numbers but for rounding where the host makes them.
    """
    with open_views(
        source,
        recipe.views,
        frozenset(VIEWS),
        order,
        device=choose_device(recipe.device),
        backend=backend,
        threads=recipe.threads,
        prefetch_batches=recipe.prefetch_batches,
        aggressive_on=recipe.aggressive_on,
        decode_on=recipe.decode_on,
        on_bad_image=recipe.on_bad_image,
    ) as loader:
        batch = next(loader.batches(epoch))
    views = torch.stack([batch.views[name] for name in VIEWS], 1).permute(0, 1, 3, 4, 2).cpu()
    return (
        255 * (views * torch.tensor(recipe.views.std) + torch.tensor(recipe.views.mean))
    ).numpy()


def apart(levels: float) -> str:
    return (
        f"{levels:.2f} levels apart" if round(levels, 4) else "equal"
    )  # but for float32's rounding


def view_labels(pair: np.ndarray, size: np.ndarray) -> list[str]:
    """What was drawn for each of `VIEWS`: `pair` `(2,)` of `draws.VIEW_PARAMS`, `size` the image's height and width in px."""
    weak, aggressive = [], []
    for p in pair:
        area = p["height"] * p["width"] / size.prod()
        weak.append(
            f"crop {p['width']}x{p['height']} px, scale {area:.2f}\n{'flip' if p['flip'] else 'no flip'}"
        )
        jitter = [
            f"{JITTER[k]} {p['factor'][k]:{'+.3f' if JITTER[k] == 'hue' else '.2f'}}"
            for k in p["order"]
        ]
        lines = (
            [", ".join(jitter[:2]) + ",", ", ".join(jitter[2:])] if p["jitter"] else ["no jitter"]
        )
        blur = f"blur {p['blur_sigma_px']:.2f} px" if p["blur_sigma_px"] > 0 else "no blur"
        aggressive.append("\n".join([*lines, f"{'gray' if p['grayscale'] else 'no gray'}, {blur}"]))
    return weak + aggressive


def windows(image: np.ndarray, pair: np.ndarray, tile_px: int) -> Image.Image:
    """The source fitted into a box of 4/3 tiles by 1, with both crop windows drawn on it."""
    fitted = ImageOps.contain(
        Image.fromarray(image), (tile_px * 4 // 3, tile_px), Image.Resampling.BOX
    )
    pen, zoom = ImageDraw.Draw(fitted), fitted.height / image.shape[0]
    for p, ink in zip(pair, CROP_INKS, strict=True):
        left, top, width, height = (
            zoom * float(p[name]) for name in ("left", "top", "width", "height")
        )
        pen.rectangle([left, top, left + width - 1, top + height - 1], outline=ink, width=FRAME_PX)
    return fitted


def blank(tile_px: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, list[int]]:
    """A white band of the sheet, a pen on it, and the left edges of its four columns of views."""
    first = tile_px * 4 // 3 + 2 * GAP_PX + LINE_PX
    edges = [first + k * (tile_px + GAP_PX) for k in range(4)]
    page = Image.new("RGB", (edges[3] + tile_px + GAP_PX, height), "white")
    return page, ImageDraw.Draw(page), edges


def heading(tile_px: int, title: str, headings: list[str]) -> np.ndarray:
    """The band with the sheet's title and what its columns show."""
    page, pen, edges = blank(tile_px, 3 * GAP_PX + 2 * LINE_PX)
    pen.text((GAP_PX, GAP_PX), title, INK, HEADING)
    for left, text, ink in zip(
        (GAP_PX, *edges), ("source", *headings), (INK, *2 * CROP_INKS), strict=True
    ):
        pen.text((left, 2 * GAP_PX + LINE_PX), text, ink, HEADING)
    return np.asarray(page)


def block(
    source: Image.Image, text: str, names: list[str], tiles: np.ndarray, labels: list[str]
) -> np.ndarray:
    """The band of one image: the source with its text, and named rows of views `(rows, 4, H, W, 3)` with labels below."""
    tile_px = tiles.shape[2]
    row_px = tile_px + 2 * FRAME_PX + 2
    lines = 1 + max(label.count("\n") for label in labels)
    page, pen, edges = blank(tile_px, len(names) * row_px + LINE_PX * lines + GAP_PX)
    page.paste(source, (GAP_PX, FRAME_PX))
    pen.text((GAP_PX, FRAME_PX + source.height + FRAME_PX), text, INK, FONT)
    for row, name in enumerate(names):
        top = row * row_px
        turned = Image.new("RGB", (tile_px, LINE_PX), "white")
        ImageDraw.Draw(turned).text((tile_px / 2, LINE_PX / 2), name, INK, FONT, anchor="mm")
        page.paste(
            turned.rotate(90, expand=True), (edges[0] - LINE_PX - 2 * FRAME_PX, top + FRAME_PX)
        )
        for left, tile, ink in zip(edges, tiles[row], 2 * CROP_INKS, strict=True):
            right, bottom = left + tile_px + FRAME_PX - 1, top + tile_px + 2 * FRAME_PX - 1
            pen.rectangle([left - FRAME_PX, top, right, bottom], outline=ink, width=FRAME_PX)
            page.paste(Image.fromarray(tile), (left, top + FRAME_PX))
    for left, label in zip(edges, labels, strict=True):
        pen.text((left, len(names) * row_px + FRAME_PX), label, INK, FONT)
    return np.asarray(page)
