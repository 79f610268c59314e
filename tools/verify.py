"""Decode everything before a training run does, and repair what can be repaired.

    python -m tools.verify data/imagenet                  a table and, last, one JSON object; exit code 1 if anything is bad
    python -m tools.verify data/imagenet --fix            repaired in place, or moved away; all originals are kept

What the decoder lets pass, such as changed bytes inside the pixels of a BMP, is not found: no checksum says what they were.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import click
import numpy as np
from PIL import Image, ImageFile
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from pipelines.files import write_whole
from pipelines.manifest import Paths, header_size
from pipelines.sources import (
    BINARY_FOLDERS,
    Source,
    images_below,
    open_source,
    packed_place,
    to_rgb,
)
from tools.convert import in_order, progress

BAD = {"corrupt": "cannot be decoded", "truncated": "ends too early", "empty": "no bytes at all"}
NOTES = {
    "duplicate": "same bytes as another image",
    "not_rgb": "grayscale, CMYK, palette, alpha or 16 bits: converted when read",
    "over_large": "more than --max-pixels: slow to decode",
}
KEPT = Path(".rsa-fast", "replaced")  # below the data; hidden, so no listing of images finds it
SHOWN = 100  # paths of a kind in the JSON object; --report has all
JPEG_QUALITY = 95

Findings = dict[str, dict[str, str]]  # kind -> path -> what was found


def verify_images(data: Path, paths: Paths, workers: int, max_pixels: int) -> Findings:
    """Decode the image files `paths` below `data`."""

    def inspect_chunk(samples: np.ndarray) -> list[tuple[bytes, dict[str, str]]]:
        return [inspect(data / paths[int(sample)], max_pixels) for sample in samples]

    found: Findings = {kind: {} for kind in (*BAD, *NOTES)}
    first: dict[bytes, int] = {}
    results = progress(
        in_order(inspect_chunk, np.arange(len(paths)), workers), "verify", 0, len(paths)
    )
    for sample, (digest, faults) in enumerate(results):
        if (
            not faults.keys() & BAD.keys()
            and (original := first.setdefault(digest, sample)) != sample
        ):
            faults["duplicate"] = f"same bytes as {paths[original]}"
        for kind, detail in faults.items():
            found[kind][paths[sample]] = detail
    return found


def inspect(path: Path, max_pixels: int) -> tuple[bytes, dict[str, str]]:
    """SHA-256 of a file, and what is wrong or worth noting by kind (but for duplicates). A bad file has one kind only."""
    data = b""
    try:
        data = path.read_bytes()
        if isinstance(header := header_size(path), str):
            raise ValueError(header)
        with no_warnings(), Image.open(io.BytesIO(data)) as image:
            notes = {}
            deep = ", 16 bits" if any(";16" in str(tile) for tile in image.tile) else ""
            if image.mode != "RGB" or deep:
                notes["not_rgb"] = image.mode + deep
            if image.width * image.height > max_pixels:
                notes["over_large"] = f"{image.width}x{image.height} px"
            to_rgb(image)
    except (
        Exception
    ) as error:  # on damaged bytes decoders raise whatever their authors did not think of
        kind = (
            "empty"
            if str(error) == "empty file"
            else "truncated"
            if "truncated" in str(error).lower()
            else "corrupt"
        )
        notes = {kind: str(error)}
    return hashlib.sha256(data).digest(), notes


@contextmanager
def no_warnings() -> Iterator[None]:
    """Silences warnings; `catch_warnings(action="ignore")` came with Python 3.11."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def verify_source(data: Path, workers: int) -> tuple[int, Findings]:
    """Read every sample of a set that is not plain image files; returns how many, and those that fail as `split/id`."""
    found: Findings = {"corrupt": {}}
    count = 0
    test = packed_place(data, "test") or any(
        (data / name).is_dir() for name in ("val", "test", *BINARY_FOLDERS)
    )
    for split in ("pretrain", "test") if test else ("pretrain",):
        source = open_source(data, split)
        samples = np.arange(len(source.manifest))
        count += len(samples)

        def read_chunk(samples: np.ndarray, source: Source = source) -> list[str]:
            return [read_fault(source, int(sample)) for sample in samples]

        for sample, fault in enumerate(
            progress(in_order(read_chunk, samples, workers), f"verify {split}", 0, len(samples))
        ):
            if fault:
                found["corrupt"][f"{split}/{sample}"] = fault
    return count, found


def read_fault(source: Source, sample: int) -> str:
    """What is wrong with one sample; empty if nothing is."""
    try:
        size = source.read(sample).shape[:2]
    except Exception as error:  # as in `inspect`
        return str(error)
    expected = tuple(int(side) for side in source.manifest.sizes[sample])
    return (
        ""
        if size == expected
        else f"decodes to {size} px (height, width), the manifest says {expected}"
    )


def fix(data: Path, found: Findings, workers: int, max_pixels: int) -> tuple[list[str], list[str]]:
    """Re-encode what is truncated, not RGB or over-large; move away what is bad beyond that. Returns both lists of paths.

    Every original lies in `data/.rsa-fast/replaced/` afterwards. Raises ValueError, before anything is changed, when a file
    lies outside `data`, behind a linked folder.
    """
    paths = sorted(
        set(chain.from_iterable(paths for kind, paths in found.items() if kind != "duplicate"))
    )
    inside = {
        folder: folder.resolve().is_relative_to(data.resolve())
        for folder in {(data / path).parent for path in paths}
    }
    if outside := [path for path in paths if not inside[(data / path).parent]]:
        raise ValueError(
            f"{len(outside)} file(s) to fix lie outside {data}, behind links: {outside[0]} is {(data / outside[0]).resolve()}. "
            "Run --fix where they lie"
        )
    lost = found["corrupt"].keys() | found["empty"].keys()

    def fix_chunk(samples: np.ndarray) -> list[bool]:
        return [
            replace(data, paths[sample], paths[sample] not in lost, max_pixels)
            for sample in samples
        ]

    done = list(progress(in_order(fix_chunk, np.arange(len(paths)), workers), "fix", 0, len(paths)))
    fixed = [path for path, repaired in zip(paths, done, strict=True) if repaired]
    return fixed, sorted(set(paths) - set(fixed))


def replace(data: Path, path: str, repairable: bool, max_pixels: int) -> bool:
    """Put a repaired image in place of one, keeping the original; or, when that fails, move it away. Returns which."""
    image, kept = data / path, data / KEPT / path
    kept.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while kept.exists() or kept.is_symlink():  # of an earlier --fix
        number += 1
        kept = data / KEPT / f"{path}.{number}"
    content = repaired(image, max_pixels) if repairable else None
    if content is None:
        shutil.move(image, kept)
        return False
    shutil.copy2(image, kept)  # not moved: at no moment is the name without an image
    write_whole(image, lambda file: file.write(content))
    return True


def repaired(path: Path, max_pixels: int) -> bytes | None:
    """An image, as far as it can be decoded, as 8-bit RGB of at most `max_pixels`; None when it cannot be decoded at all.

    A JPEG where the name says so, else a PNG whatever the name says: readers go by the content.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with no_warnings():
            image = Image.fromarray(to_rgb(Image.open(io.BytesIO(path.read_bytes()))))
    except Exception:  # as in `inspect`
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    scale = math.sqrt(max_pixels / (image.width * image.height))
    if scale < 1:
        image = image.resize(
            (max(1, int(image.width * scale)), max(1, int(image.height * scale))),
            Image.Resampling.LANCZOS,
        )
    buffer = io.BytesIO()
    if path.suffix.lower() in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)
    else:
        image.save(buffer, "PNG")
    return buffer.getvalue()


def show(data: Path, found: Findings) -> None:
    table = Table("", "images", "what", Column("the first", overflow="fold"), title=str(data))
    for kind, paths in found.items():
        first = next((f"{path}: {detail}" for path, detail in paths.items()), "")
        plain = Text(
            first.encode("utf-8", "replace").decode()
        )  # a name may be no UTF-8, and look like markup
        table.add_row(kind, f"{len(paths):,}", (BAD | NOTES)[kind], plain)
    Console().print(table)


@click.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--fix",
    "fixing",
    is_flag=True,
    help="Repair image files, move away what cannot be; keep all originals.",
)
@click.option("--workers", default=os.cpu_count(), show_default="all cores", type=click.IntRange(1))
@click.option(
    "--max-pixels",
    default=25_000_000,
    show_default=True,
    help="Above it, an image is over-large.",
    type=click.IntRange(1),
)
@click.option(
    "--report",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write all findings to this file as JSON.",
)
@click.pass_context
def main(
    context: click.Context,
    path: Path,
    fixing: bool,
    workers: int,
    max_pixels: int,
    report: Path | None,
) -> None:
    """Decode every image under PATH: train/, val/ and test/, or one flat folder, or a converted set.

    Bad, exit code 1: corrupt, truncated and empty files. The rest are notes and exit code 0, for training takes them:
    duplicates (identical bytes), images that are not RGB (converted when read), over-large ones (slow).

    --fix encodes truncated (as far as they go), non-RGB and over-large images anew under their names, and moves corrupt and
    empty ones away. The originals are in PATH/.rsa-fast/replaced/. The exit code is then 0: nothing bad is left.
    """
    try:
        roots = [path / name for name in ("train", "val", "test") if (path / name).is_dir()] or [
            path
        ]
        files = Paths(chain.from_iterable(images_below(root, path) for root in roots))
        if packed_place(path, "train") or packed_place(path, "test") or not files:
            if fixing:
                raise ValueError(
                    f"{path} is not a folder of image files: --fix the images it was made from, then convert again"
                )
            count, found = verify_source(path, workers)
        else:
            count, found = len(files), verify_images(path, files, workers, max_pixels)
        show(path, found)
        counts = {kind: len(paths) for kind, paths in found.items()}
        bad = sum(counts[kind] for kind in BAD if kind in counts)
        full = {"path": str(path), "images": count, "bad": bad, "counts": counts, "paths": found}
        result = full | {"paths": {kind: list(paths)[:SHOWN] for kind, paths in found.items()}}
        if fixing:
            fixed, moved = fix(path, found, workers, max_pixels)
            for name in moved:
                click.echo(f"moved away, it cannot be repaired: {name}", err=True)
            result |= {"repaired": len(fixed), "moved_away": len(moved)}
            full |= {"repaired": fixed, "moved_away": moved}
        if report:
            report.write_text(json.dumps(full, indent=1))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(result))
    context.exit(1 if bad and not fixing else 0)


if __name__ == "__main__":
    main()
