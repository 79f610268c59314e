"""Draw the demo's images: a small labelled folder of JPEGs, which is the same on every machine.

    python -m tools.make_demo data/demo

There are ten classes, each a shape filled with a texture. Every shape and every texture occurs in
two classes, so that neither of them determines the class alone. Colours, position, size, rotation,
the texture's phase, lighting, contrast, background and JPEG quality vary within a class. The crops,
flips and colour changes of the views remove most differences between images of a class. They do not
remove shape and texture.

These choices were made by measuring raw pixels and RSA at the demo's budget. With textures of 8 to
10 px, the network learns fastest and raw pixels score lowest. With vivid colours, a strong light
from one side or rotations by any angle, the network recognises images by these, and no method is
better than chance.
"""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

VERSION = 3  # the version of the drawing code; another version draws other images
SHAPES = ("disc", "square", "triangle", "star", "cross")
TEXTURES = ("stripes", "dots", "checks", "rings", "blotches")
CLASSES = [(i, j % 5) for i in range(5) for j in (i, i + 1)]  # (shape, texture)
TEST_SHARE = 0.2
OVERSAMPLING = 2  # images are drawn larger and then reduced, for smooth edges
CHROMA = 0.06  # the largest difference of a colour's channel from its grey

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def shape_mask(shape: str, x: Array, y: Array) -> Mask:
    """The pixels inside the shape, which fills most of the unit circle of the coordinates."""
    radius, angle = np.hypot(x, y), np.arctan2(y, x)
    if shape == "disc":
        return radius < 0.9
    if shape == "square":
        return np.maximum(abs(x), abs(y)) < 0.8
    if shape == "triangle":
        return np.maximum(abs(x) * 0.866 + y * 0.5, -y) < 0.55
    if shape == "star":
        edge: Array = 0.68 + 0.32 * np.cos(5 * angle)
        return radius < edge
    cross: Mask = (np.minimum(abs(x), abs(y)) < 0.32) & (np.maximum(abs(x), abs(y)) < 0.95)
    return cross


def texture_mask(texture: str, x: Array, y: Array, rng: np.random.Generator) -> Mask:
    """The pixels of the second colour, on coordinates in which a period is one unit."""
    if texture == "stripes":
        return np.sin(2 * np.pi * x) > 0
    if texture == "dots":
        return np.hypot(x % 1 - 0.5, y % 1 - 0.5) < 0.33
    if texture == "checks":
        return (np.floor(2 * x) + np.floor(2 * y)) % 2 > 0
    if texture == "rings":
        return np.sin(2 * np.pi * np.hypot(x, y)) > 0
    return noise(x.shape[0], x.shape[0] // 12, rng) > 0.5


def noise(size: int, cells: int, rng: np.random.Generator) -> Array:
    """Smooth noise `(size, size)` in 0..1 with `cells` independent values along each side."""
    coarse = Image.fromarray(rng.integers(0, 256, (cells, cells), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC)) / 255


def tint(grey: float, rng: np.random.Generator) -> Array:
    """A random pale colour `(3,)` near a grey."""
    return np.clip(grey + rng.uniform(-CHROMA, CHROMA, 3), 0.02, 0.98)


def background(size: int, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Two colours mixed by noise of two scales and a gradient, `(size, size, 3)`."""
    share = 0.6 * noise(size, 4, rng) + 0.4 * noise(size, 16, rng)
    share = share + 0.3 * (x * rng.normal() + y * rng.normal())
    grey = rng.uniform(0.2, 0.8)
    return mix(tint(grey, rng), tint(grey + rng.uniform(-0.25, 0.25), rng), share)


def mix(first: Array, second: Array, share: Array) -> Array:
    """Two colours `(3,)` mixed, with `share` `(size, size)` of the second one."""
    share = np.clip(share, 0, 1)[..., None]
    return first * (1 - share) + second * share


def render(label: int, size_px: int, rng: np.random.Generator) -> Image.Image:
    """One image of a class."""
    size = size_px * OVERSAMPLING
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    shape, texture = SHAPES[CLASSES[label][0]], TEXTURES[CLASSES[label][1]]
    extent = rng.uniform(0.9, 1.15)  # relative to half the image, so that crops show the texture
    centre_x, centre_y = rng.uniform(-0.35, 0.35, 2)
    angle = rng.uniform(-0.3, 0.3)
    u = ((x - centre_x) * np.cos(angle) + (y - centre_y) * np.sin(angle)) / extent
    v = ((y - centre_y) * np.cos(angle) - (x - centre_x) * np.sin(angle)) / extent
    period = rng.uniform(0.25, 0.33)  # the period of the texture, in extents
    phase = rng.uniform(0, 1, 2)
    grey, step = rng.uniform(0.15, 0.85), rng.uniform(0.45, 0.6)
    first, second = tint(grey, rng), tint(grey + (step if grey < 0.5 else -step), rng)
    mask = texture_mask(texture, u / period + phase[0], v / period + phase[1], rng)
    inside = mix(first, second, mask.astype(np.float64))
    canvas = np.where(shape_mask(shape, u, v)[..., None], inside, background(size, x, y, rng))
    sun = rng.uniform(0, 2 * np.pi)  # the direction of the light
    light = 1 + rng.uniform(0, 0.15) * (x * np.cos(sun) + y * np.sin(sun))
    contrast, brightness = rng.uniform(0.6, 1), rng.uniform(-0.22, 0.22)
    canvas = (canvas * light[..., None] - 0.5) * contrast + 0.5 + brightness
    image = Image.fromarray((canvas.clip(0, 1) * 255).astype(np.uint8))
    image = image.resize((size_px, size_px), Image.Resampling.BOX)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
    grain = rng.normal(0, rng.uniform(1, 5), (size_px, size_px, 3))
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8))


def make_demo(
    root: Path, per_class: int = 300, size_px: int = 64, seed: int = 0
) -> dict[str, str | int]:
    """Write `root/train` and `root/test` unless they exist. Returns what `root` contains.

    An interrupted run leaves nothing at `root`. Raises ValueError when `root` contains something
    else.
    """
    settings = {"version": VERSION, "per_class": per_class, "size_px": size_px, "seed": seed}
    test = round(per_class * TEST_SHARE)
    result: dict[str, str | int] = {"root": str(root), "classes": len(CLASSES)}
    result |= {"train": (per_class - test) * 10, "test": test * 10}
    record = root / "demo.json"
    if record.is_file() and json.loads(record.read_text()) == settings:
        return result
    if root.exists():
        raise ValueError(
            f"{root} exists and is not the requested demo data: remove it, or name another folder"
        )
    partial = root.with_name(f"{root.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    for label, (shape, texture) in enumerate(CLASSES):
        name = f"{SHAPES[shape]}_{TEXTURES[texture]}"
        for split in ("train", "test"):
            (partial / split / name).mkdir(parents=True)

        def draw(index: int, label: int = label, name: str = name) -> None:
            rng = np.random.default_rng([seed, label, index])
            path = partial / ("test" if index < test else "train") / name / f"{index:04}.jpg"
            render(label, size_px, rng).save(path, quality=int(rng.integers(85, 96)))

        with ThreadPoolExecutor(2) as pool:  # Two threads take three quarters of the time of one.
            list(pool.map(draw, range(per_class)))
    (partial / "demo.json").write_text(json.dumps(settings))
    partial.rename(root)
    return result


@click.command()
@click.argument("root", type=click.Path(path_type=Path))
@click.option(
    "--per-class",
    default=300,
    show_default=True,
    help="Number of images of each class. A fifth of them is the test split.",
)
@click.option("--size-px", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(root: Path, per_class: int, size_px: int, seed: int) -> None:
    """Draw the demo's images in the folder ROOT."""
    try:
        click.echo(json.dumps(make_demo(root, per_class, size_px, seed)))
    except ValueError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
