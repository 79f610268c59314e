"""What tests of several subjects use: images and features, what is installed, and commands."""

from __future__ import annotations

import io
import json
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from rsa_fast.pipelines.beton import BetonWriter, page_bytes
from rsa_fast.pipelines.packed import ENTRY

ROOT = Path(__file__).parents[1]
NO_DALI = "DALI is not installed: pip install rsa-fast[dali-cu12]"
NO_FFCV = "FFCV is not installed: make setup says what it needs"
DALI = pytest.mark.skipif(find_spec("nvidia.dali") is None, reason=NO_DALI)
FFCV = pytest.mark.skipif(find_spec("ffcv") is None, reason=NO_FFCV)


def natural_image(seed: int, height: int, width: int) -> np.ndarray:
    """Return a `(H, W, 3)` uint8 image with enough structure to tell filters apart.

    It consists of smooth colour fields with edges and noise.
    """
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize(
        (width, height), Image.BICUBIC
    )
    image = np.asarray(coarse).astype(np.int64) + rng.integers(-12, 13, (height, width, 3))
    image[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, form: str = "JPEG", **options: Any) -> bytes:
    """Return the bytes of a file that PIL writes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, form, **options)
    return file.getvalue()


def jpeg(seed: int, height: int = 20, width: int = 20) -> bytes:
    return encoded(natural_image(seed, height, width), quality=92)


def write_folder(
    root: Path, splits: dict[str, int], size: tuple[int, int] = (20, 20), classes: int = 2
) -> Path:
    """Write an ImageFolder of JPEGs with `splits[name]` images per class."""
    for split, per_class in splits.items():
        for label in range(classes):
            folder = root / split / f"class_{label}"
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = natural_image(1000 * label + i + (500 if split != "train" else 0), *size)
                image[..., label % 3] //= 4  # This makes the classes distinguishable.
                Image.fromarray(image).save(folder / f"{i:03}.jpg", quality=95)
    return root


def write_raw_beton(folder: Path, count: int, side_px: int, seed: int = 0) -> Path:
    """Write a train.beton of `count` square images as pixels, labelled 0, 1, 2, 0, 1, ..."""
    entries = np.zeros(count, ENTRY)
    folder.mkdir(exist_ok=True)
    writer = BetonWriter(folder / "train.beton", count, page_bytes(3 * side_px**2), entries[:0])
    for i in range(count):
        data = natural_image(seed + i, side_px, side_px).tobytes()
        file, offset = writer.append(data, i % 3)
        entries[i] = (file, offset, len(data), i % 3, side_px, side_px, True)
    writer.finish(entries)
    writer.close()
    return folder


def read_bytes() -> int:
    """What this process has had read from disks."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def clusters(
    count: int, spread: float, seed: int, classes: int = 3
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return features of eight dimensions around the centre of each class, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.eye(8)[:classes] * 2
    return centres[labels] + spread * torch.randn(count, 8, generator=generator), labels


class Exploit:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def code_of(card: Path, file: str) -> str:
    """Return the code that the card gives for loading a file."""
    return re.search(rf"\n## Load `{file}`\n\n```\w+\n(.+?)\n```", card.read_text(), re.DOTALL)[1]


def invoke(command: click.Command, *words: object, **options: Any) -> Result:
    """Call a command in this process, with words such as paths and numbers."""
    return CliRunner().invoke(command, list(map(str, words)), **options)


def result_of(done: Result) -> Any:
    """Return the JSON in the last line of a command that succeeded."""
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout.splitlines()[-1])
