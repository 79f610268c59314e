"""A sheet with the inputs of training: images with crop windows, and all views with labels.

    preview(recipe, open_source("data/imagenet", "pretrain"), Path("views.png"), images=4)

The pixels of the sheet are those of the views. Small views are enlarged by an integer factor.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps

from rsa_fast.pipelines import Order, Source, choose_backend, open_views
from rsa_fast.pipelines.draws import RandOp, draw
from rsa_fast.pipelines.views import ViewSpec, patch_px, stage_and_crop
from rsa_fast.recipes import Recipe
from rsa_fast.training.step import choose_device, for_any_device

JITTER = ("brightness", "contrast", "saturation", "hue")  # as numbered in draws.py
TILE_PX = 192  # the least width of a tile, so that the widest label fits below
GAP_PX = 14
LINE_PX = 17
FRAME_PX = 3
FONT = ImageFont.load_default(13)
HEADING_FONT = ImageFont.load_default(16)
INK = "#222222"
# The colours of the crops in their order. If there are more crops, the colours repeat.
CROP_INKS = ("#d62728", "#1f77b4", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf", "#8c564b", "#e377c2")
# Differences are amplified. One level of 8 bits is shown as a quarter of white.
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

    If `compare` names a second backend, its views and the differences are also drawn.

    Returns `out`, `backend` and `images`. For two backends, it also returns the mean absolute
    difference of each view in 8-bit levels. Raises ValueError if there are fewer images, if `out`
    does not end in .png, and if a backend does not exist or cannot read the source.
    """
    recipe = for_any_device(recipe)
    out, manifest, spec = Path(out), source.manifest, recipe.views
    if images > len(manifest):
        raise ValueError(f"the data has {len(manifest)} images, fewer than --images {images}")
    if out.suffix.lower() != ".png":
        raise ValueError(f"the sheet is a PNG: found --out {out}, but the name must end in .png")
    # The first batch contains the first images that training in the full order reads. They do not
    # depend on its batch size.
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
    names = list(levels[0])
    headings, rows = names, [""]
    if compare:
        difference = {name: np.abs(levels[0][name] - levels[1][name]) for name in names}
        means = np.stack(
            [difference[name].mean((1, 2, 3), dtype=np.float64) for name in names], 1
        )  # (B, views)
        by_view = dict(zip(names, means.mean(0).round(4).tolist(), strict=True))
        result |= {"compare": backends[1], "difference_levels": by_view}
        title += ": mean absolute difference in 8-bit levels"
        headings = [f"{name}: {difference_text(mean)}" for name, mean in by_view.items()]
        rows = [*backends, f"difference x {AMPLIFY}"]
        levels.append({name: AMPLIFY * gap for name, gap in difference.items()})
    # The views of the largest crop fill their tiles. Smaller views are enlarged at least as much.
    tile_px = max(enlarged_px(view.shape[1], TILE_PX) for view in levels[0].values())
    inks = [CROP_INKS[stage_and_crop(name)[1] % len(CROP_INKS)] for name in names]
    sheet = [heading(tile_px, title, headings, inks)]
    for i, sample in enumerate(ids):
        labels = view_labels(spec, params[i], manifest.sizes[sample])
        if compare:
            differences = map(difference_text, means[i])
            labels = [f"{a}\n{b}" for a, b in zip(labels, differences, strict=True)]
        image, label = source.read(sample), manifest.labels[sample]
        text = f"sample {sample}, {image.shape[1]}x{image.shape[0]} px\n"
        text += manifest.classes[label][:40] if 0 <= label < len(manifest.classes) else ""
        fitted = windows(image, params[i], tile_px)
        tiles = [[tile(view[i], tile_px) for view in row.values()] for row in levels]
        sheet.append(
            block(source=fitted, text=text, names=rows, tiles=tiles, labels=labels, inks=inks)
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(sheet)).save(out)
    return result


def enlarged_px(side_px: int, least_px: int) -> int:
    """The smallest multiple of a side that is at least `least_px`."""
    return side_px * -(-least_px // side_px)


def tile(view: np.ndarray, tile_px: int) -> np.ndarray:
    """A view of levels `(S, S, 3)` as uint8, enlarged by an integer to at most `tile_px`.

    It is placed in the upper left corner of a white tile `(tile_px, tile_px, 3)`.
    """
    scale = tile_px // view.shape[0]
    pixels = view.round().clip(0, 255).astype(np.uint8).repeat(scale, 0).repeat(scale, 1)
    page = np.full((tile_px, tile_px, 3), 255, np.uint8)
    page[: len(pixels), : len(pixels)] = pixels
    return page


def view_levels(
    recipe: Recipe, source: Source, order: Order, epoch: int, backend: str
) -> dict[str, np.ndarray]:
    """The 8-bit levels of all views of the epoch's first batch, `(B, S, S, 3)` float32 each.

    The nine patches of a jigsaw form one square. Levels are computed in float32, whatever the
    recipe's precision. They are between 0 and 255. If the host makes them, they are integers up to
    rounding.
    """
    with open_views(
        source,
        recipe.views,
        frozenset(recipe.views.views),
        order,
        device=choose_device(recipe.device),
        loading=replace(recipe.loading, backend=backend),
    ) as loader:
        batch = next(loader.batches(epoch))
    mean, std = torch.tensor(recipe.views.mean), torch.tensor(recipe.views.std)
    levels = {}
    for name, view in batch.views.items():
        if view.ndim == 5:  # (B, 9, 3, P, P) to (B, 3, 3 P, 3 P)
            count, _, _, _, side = view.shape
            cells = view.reshape(count, 3, 3, 3, side, side)  # image, row, column, channel, y, x
            view = cells.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 3 * side, 3 * side)
        levels[name] = (255 * (view.permute(0, 2, 3, 1).cpu() * std + mean)).numpy()
    return levels


def difference_text(levels: float) -> str:
    """A difference as text. Differences from float32's rounding count as none."""
    return f"{levels:.2f} levels apart" if round(levels, 4) else "equal"


def view_labels(spec: ViewSpec, params: np.ndarray, size: np.ndarray) -> list[str]:
    """The random parameters of each view in `spec.views` as text.

    `params` is `(K,)` of `draws.VIEW_PARAMS`, and `size` is the image's height and width in px.
    """
    weak, aggressive, patches = [], [], []
    for p, crop_spec in zip(params, spec.crops, strict=True):
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
        last = f"{'gray' if p['grayscale'] else 'no gray'}, {blur}"
        lines.append(last + ", solarized" * bool(p["solarize"]))
        operations = [RandOp(op).name.lower() for op in p["rand_op"] if op]
        aggressive.append("\n".join([*lines, ", ".join(operations)] if operations else lines))
        if crop_spec.jigsaw:
            side_px = patch_px(crop_spec.size_px)
            patches.append(f"of the weak view:\nnine patches of {side_px} px")
    return weak + aggressive + patches


def jitter_text(operation: int, factor: float) -> str:
    name = JITTER[operation]
    return f"{name} {factor:+.3f}" if name == "hue" else f"{name} {factor:.2f}"


def windows(image: np.ndarray, params: np.ndarray, tile_px: int) -> Image.Image:
    """The image with all crop windows, scaled to fit into 4/3 tiles by 1 tile."""
    box = (tile_px * 4 // 3, tile_px)
    fitted = ImageOps.contain(Image.fromarray(image), box, Image.Resampling.BOX)
    pen = ImageDraw.Draw(fitted)
    zoom = fitted.height / image.shape[0]
    for p, ink in zip(params, cycle(CROP_INKS), strict=False):
        left, top, width, height = (
            zoom * float(p[name]) for name in ("left", "top", "width", "height")
        )
        pen.rectangle([left, top, left + width - 1, top + height - 1], outline=ink, width=FRAME_PX)
    return fitted


def blank(
    tile_px: int, height: int, columns: int
) -> tuple[Image.Image, ImageDraw.ImageDraw, list[int]]:
    """A white band of the sheet, a pen for it, and the left edges of its columns of views."""
    first = tile_px * 4 // 3 + 2 * GAP_PX + LINE_PX
    edges = [first + k * (tile_px + GAP_PX) for k in range(columns)]
    page = Image.new("RGB", (edges[-1] + tile_px + GAP_PX, height), "white")
    return page, ImageDraw.Draw(page), edges


def heading(tile_px: int, title: str, headings: list[str], inks: list[str]) -> np.ndarray:
    """The band with the title of the sheet and the headings of its columns."""
    page, pen, edges = blank(tile_px, 3 * GAP_PX + 2 * LINE_PX, len(headings))
    pen.text((GAP_PX, GAP_PX), title, INK, HEADING_FONT)
    top = 2 * GAP_PX + LINE_PX
    pen.text((GAP_PX, top), "source", INK, HEADING_FONT)
    for left, text, ink in zip(edges, headings, inks, strict=True):
        pen.text((left, top), text, ink, HEADING_FONT)
    return np.asarray(page)


def block(
    source: Image.Image,
    text: str,
    names: list[str],
    tiles: list[list[np.ndarray]],
    labels: list[str],
    inks: list[str],
) -> np.ndarray:
    """The band of one image: the source with its text, and rows of views with labels below.

    `tiles` contains rows of square tiles `(S, S, 3)`, and `names` are the names of the rows. Each
    column has one of the `labels` and one of the `inks`.
    """
    tile_px = len(tiles[0][0])
    row_px = tile_px + 2 * FRAME_PX + 2
    lines = 1 + max(label.count("\n") for label in labels)
    height = len(names) * row_px + LINE_PX * lines + GAP_PX
    page, pen, edges = blank(tile_px, height, len(labels))
    page.paste(source, (GAP_PX, FRAME_PX))
    pen.text((GAP_PX, FRAME_PX + source.height + FRAME_PX), text, INK, FONT)
    for row, name in enumerate(names):
        top = row * row_px
        row_name = Image.new("RGB", (tile_px, LINE_PX), "white")
        ImageDraw.Draw(row_name).text((tile_px / 2, LINE_PX / 2), name, INK, FONT, anchor="mm")
        left = edges[0] - LINE_PX - 2 * FRAME_PX
        page.paste(row_name.rotate(90, expand=True), (left, top + FRAME_PX))
        for left, pixels, ink in zip(edges, tiles[row], inks, strict=True):
            right, bottom = left + tile_px + FRAME_PX - 1, top + tile_px + 2 * FRAME_PX - 1
            pen.rectangle([left - FRAME_PX, top, right, bottom], outline=ink, width=FRAME_PX)
            page.paste(Image.fromarray(pixels), (left, top + FRAME_PX))
    for left, label in zip(edges, labels, strict=True):
        pen.text((left, len(names) * row_px + FRAME_PX), label, INK, FONT)
    return np.asarray(page)
