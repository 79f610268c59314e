"""A sheet of what training sees: images with both crop windows, and their four views with labels.

    preview(recipe, open_source("data/imagenet", "pretrain"), Path("views.png"), images=4)

The pixels of the sheet are those of the views. Small views are enlarged by a whole factor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from pipelines import VIEWS, Order, Source, choose_backend, open_views
from pipelines.draws import draw
from rsa_fast.recipes import Recipe
from rsa_fast.training.step import choose_device, for_any_device

JITTER = ("brightness", "contrast", "saturation", "hue")  # by the operation numbers of draws.py
TILE_PX = 192  # the least width of a tile: the widest label fits below
GAP_PX = 14
LINE_PX = 17
FRAME_PX = 3
FONT = ImageFont.load_default(13)
HEADING_FONT = ImageFont.load_default(16)
INK = "#222222"
CROP_INKS = ("#d62728", "#1f77b4")
# Differences are amplified: a level, the least that 8 bits can differ by, is a quarter of white.
AMPLIFY = 64


def preview(
    recipe: Recipe,
    source: Source,
    out: str | Path,
    *,
    images: int = 4,
    epoch: int = 0,
    compare: str | None = None,
) -> dict[str, Any]:
    """Draw the first `images` images that training reads in `epoch` to the PNG file `out`.

    With a second backend to `compare`, its views and the differences are drawn too.

    Returns out, backend and images; for two backends also the mean absolute difference of each view
    in 8-bit levels. Raises ValueError when there are fewer images, when `out` is no .png, and when
    a backend does not exist or cannot read the source.
    """
    recipe = for_any_device(recipe)
    out, manifest, spec = Path(out), source.manifest, recipe.views
    if images > len(manifest):
        raise ValueError(f"{images} images wanted, the data has {len(manifest)}: lower --images")
    if out.suffix.lower() != ".png":
        raise ValueError(f"the sheet is a PNG: found --out {out}, wanted a name that ends in .png")
    # The first batch has the images with which training starts, whatever the batch size there.
    order = Order(len(manifest), images, recipe.seed)
    ids = order.ids(epoch, 0)
    params = draw(recipe.seed, epoch, ids, spec, manifest.sizes[ids])
    automatic = choose_backend(source, choose_device(recipe.device))[0]
    backends = [automatic if name == "auto" else name for name in (recipe.backend, compare) if name]
    levels = [view_levels(recipe, source, order, epoch, backend) for backend in backends]
    result = {"out": str(out), "backend": backends[0], "images": images}

    title = (
        f"{recipe.data_name}, {spec.size_px} px, epoch {epoch}, seed {recipe.seed}, "
        f"by {' and '.join(backends)}"
    )
    headings = list(VIEWS)
    rows = [""]
    if compare:
        difference = np.abs(levels[0] - levels[1])
        means = difference.mean((2, 3, 4), dtype=np.float64)  # (B, 4)
        by_view = dict(zip(VIEWS, means.mean(0).round(4).tolist(), strict=True))
        result |= {"compare": backends[1], "difference_levels": by_view}
        title += ": mean absolute difference in 8-bit levels"
        headings = [f"{name}: {difference_text(mean)}" for name, mean in by_view.items()]
        rows = [*backends, f"difference x {AMPLIFY}"]
        levels.append(AMPLIFY * difference)
    scale = -(-TILE_PX // spec.size_px)
    pixels = np.stack(levels, 1).round().clip(0, 255).astype(np.uint8)  # (B, rows, 4, S, S, 3)
    tiles = pixels.repeat(scale, 3).repeat(scale, 4)
    tile_px = tiles.shape[3]
    sheet = [heading(tile_px, title, headings)]
    for i, sample in enumerate(ids):
        labels = view_labels(params[i], manifest.sizes[sample])
        if compare:
            differences = map(difference_text, means[i])
            labels = [f"{a}\n{b}" for a, b in zip(labels, differences, strict=True)]
        image, label = source.read(sample), manifest.labels[sample]
        text = f"sample {sample}, {image.shape[1]}x{image.shape[0]} px\n"
        text += manifest.classes[label][:40] if 0 <= label < len(manifest.classes) else ""
        fitted = windows(image, params[i], tile_px)
        sheet.append(block(source=fitted, text=text, names=rows, tiles=tiles[i], labels=labels))
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(sheet)).save(out)
    return result


def view_levels(
    recipe: Recipe, source: Source, order: Order, epoch: int, backend: str
) -> np.ndarray:
    """The 8-bit levels of the epoch's first batch: `(B, 4, S, S, 3)` float32, in `VIEWS`' order.

    They are computed in float32, whatever the recipe's precision. They lie between 0 and 255, and
    are whole numbers, up to rounding, where the host makes them.
    """
    with open_views(
        source,
        recipe.views,
        frozenset(VIEWS),
        order,
        device=choose_device(recipe.device),
        loading=replace(recipe.loading, backend=backend),
    ) as loader:
        batch = next(loader.batches(epoch))
    views = torch.stack([batch.views[name] for name in VIEWS], 1).permute(0, 1, 3, 4, 2).cpu()
    mean, std = torch.tensor(recipe.views.mean), torch.tensor(recipe.views.std)
    return (255 * (views * std + mean)).numpy()


def difference_text(levels: float) -> str:
    """Differences that float32's rounding makes count as none."""
    return f"{levels:.2f} levels apart" if round(levels, 4) else "equal"


def view_labels(pair: np.ndarray, size: np.ndarray) -> list[str]:
    """The random parameters of each of `VIEWS` as text.

    `pair` is `(2,)` of `draws.VIEW_PARAMS`, `size` the image's height and width in px.
    """
    weak, aggressive = [], []
    for p in pair:
        scale = p["height"] * p["width"] / size.prod()
        crop = f"crop {p['width']}x{p['height']} px, scale {scale:.2f}"
        moves = ["flip" if p["flip"] else "no flip"]
        moves += ["vertical flip"] * bool(p["vertical_flip"])
        moves += [f"turned by {90 * p['quarter_turns']}"] * bool(p["quarter_turns"])
        weak.append(f"{crop}\n{', '.join(moves)}")
        lines = ["no jitter"]
        if p["jitter"]:
            first, second, third, fourth = (jitter_text(k, p["factor"][k]) for k in p["order"])
            lines = [f"{first}, {second},", f"{third}, {fourth}"]
        blur = f"blur {p['blur_sigma_px']:.2f} px" if p["blur_sigma_px"] > 0 else "no blur"
        aggressive.append("\n".join([*lines, f"{'gray' if p['grayscale'] else 'no gray'}, {blur}"]))
    return weak + aggressive


def jitter_text(operation: int, factor: float) -> str:
    name = JITTER[operation]
    return f"{name} {factor:+.3f}" if name == "hue" else f"{name} {factor:.2f}"


def windows(image: np.ndarray, pair: np.ndarray, tile_px: int) -> Image.Image:
    """The image with both crop windows drawn on it, fitted into 4/3 tiles by 1 tile."""
    box = (tile_px * 4 // 3, tile_px)
    fitted = ImageOps.contain(Image.fromarray(image), box, Image.Resampling.BOX)
    pen = ImageDraw.Draw(fitted)
    zoom = fitted.height / image.shape[0]
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
    """The band with the sheet's title and the headings of its columns."""
    page, pen, edges = blank(tile_px, 3 * GAP_PX + 2 * LINE_PX)
    pen.text((GAP_PX, GAP_PX), title, INK, HEADING_FONT)
    top = 2 * GAP_PX + LINE_PX
    pen.text((GAP_PX, top), "source", INK, HEADING_FONT)
    for left, text, ink in zip(edges, headings, 2 * CROP_INKS, strict=True):
        pen.text((left, top), text, ink, HEADING_FONT)
    return np.asarray(page)


def block(
    source: Image.Image, text: str, names: list[str], tiles: np.ndarray, labels: list[str]
) -> np.ndarray:
    """The band of one image: the source with its text, and rows of views with labels below.

    `names` are those of the rows of `tiles`, `(rows, 4, H, W, 3)`; each column has one of `labels`.
    """
    tile_px = tiles.shape[2]
    row_px = tile_px + 2 * FRAME_PX + 2
    lines = 1 + max(label.count("\n") for label in labels)
    page, pen, edges = blank(tile_px, len(names) * row_px + LINE_PX * lines + GAP_PX)
    page.paste(source, (GAP_PX, FRAME_PX))
    pen.text((GAP_PX, FRAME_PX + source.height + FRAME_PX), text, INK, FONT)
    for row, name in enumerate(names):
        top = row * row_px
        row_name = Image.new("RGB", (tile_px, LINE_PX), "white")
        ImageDraw.Draw(row_name).text((tile_px / 2, LINE_PX / 2), name, INK, FONT, anchor="mm")
        left = edges[0] - LINE_PX - 2 * FRAME_PX
        page.paste(row_name.rotate(90, expand=True), (left, top + FRAME_PX))
        for left, tile, ink in zip(edges, tiles[row], 2 * CROP_INKS, strict=True):
            right, bottom = left + tile_px + FRAME_PX - 1, top + tile_px + 2 * FRAME_PX - 1
            pen.rectangle([left - FRAME_PX, top, right, bottom], outline=ink, width=FRAME_PX)
            page.paste(Image.fromarray(tile), (left, top + FRAME_PX))
    for left, label in zip(edges, labels, strict=True):
        pen.text((left, len(names) * row_px + FRAME_PX), label, INK, FONT)
    return np.asarray(page)
