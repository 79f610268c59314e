"""Decode every image of a dataset before training, and repair what can be repaired.

    python -m tools.verify data/imagenet          # list bad images
    python -m tools.verify data/imagenet --fix    # repair bad images or move them away

The output is a table and, on the last line, one JSON object. The exit code is 1 if there are bad
images. --fix keeps all originals.

Known limit: damage that a decoder accepts is not detected, such as changed pixels in a BMP, because
there is no checksum of the pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import click
import numpy as np
from PIL import ExifTags, Image, ImageFile
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from rsa_fast.pipelines.files import write_whole
from rsa_fast.pipelines.folders import counts_of, images_below
from rsa_fast.pipelines.layouts import has_test_split, has_train_folder, open_source, packed_place
from rsa_fast.pipelines.machine import cores
from rsa_fast.pipelines.manifest import MAX_PIXELS, Paths
from rsa_fast.pipelines.scan import header_size
from rsa_fast.pipelines.sources import Source, exif_orientation, open_image, to_rgb
from rsa_fast.tools.convert import in_order, note, progress

BAD = {"corrupt": "cannot be decoded", "truncated": "ends too early", "empty": "has no bytes"}
NOTES = {
    "duplicate": "same bytes as another image",
    "not_rgb": "grayscale, CMYK, palette, alpha or 16 bits: converted when read",
    "over_large": "more than --max-pixels: slow to decode",
}
# The folder of the originals, below the data. It is hidden, so that no listing of images finds it.
ORIGINALS = Path(".rsa-fast", "replaced")
UNREAD = f", more than the {MAX_PIXELS:,} pixels that training reads"
# Images of up to this many times MAX_PIXELS are reduced. More would take tens of GB of memory.
REPAIRABLE = 4
MAX_SHOWN = 100  # the most paths of each kind in the JSON object; --report has all
JPEG_QUALITY = 95

Findings = dict[str, dict[str, str]]  # kind -> path -> detail


def verify_images(data: Path, paths: Paths, workers: int, max_pixels: int) -> Findings:
    """Decode the image files `paths` below `data`. Returns what is wrong with them."""

    def inspect_chunk(samples: np.ndarray) -> list[tuple[bytes, dict[str, str]]]:
        return [inspect(data / paths[int(sample)], max_pixels) for sample in samples]

    findings: Findings = {kind: {} for kind in (*BAD, *NOTES)}
    first: dict[bytes, int] = {}  # digest -> the first sample that has it
    inspected = in_order(inspect_chunk, np.arange(len(paths)), workers)
    results = progress(inspected, "verify", 0, len(paths))
    for sample, (digest, faults) in enumerate(results):
        is_bad = bool(faults.keys() & BAD.keys())
        if not is_bad and (original := first.setdefault(digest, sample)) != sample:
            faults["duplicate"] = f"same bytes as {paths[original]}"
        for kind, detail in faults.items():
            findings[kind][paths[sample]] = detail
    return findings


def inspect(path: Path, max_pixels: int) -> tuple[bytes, dict[str, str]]:
    """The SHA-256 of a file, and the details of every kind in `BAD` or `NOTES` that applies to it.

    A bad file has one kind only. Duplicates are found by `verify_images`.
    """
    data = b""
    try:
        data = path.read_bytes()
        if isinstance(header := header_size(path), str):
            if unread := unread_size(data):
                return hashlib.sha256(data).digest(), {"over_large": f"{unread}{UNREAD}"}
            raise ValueError(header)
        with no_warnings(), open_image(io.BytesIO(data)) as image:
            notes = {}
            deep = ", 16 bits" if any(";16" in str(tile) for tile in image.tile) else ""
            if image.mode != "RGB" or deep:
                notes["not_rgb"] = image.mode + deep
            if image.width * image.height > max_pixels:
                notes["over_large"] = f"{image.width}x{image.height} px"
            to_rgb(image)
    except Exception as error:  # damaged bytes make decoders raise exceptions of any type
        if str(error) == "empty file":
            kind = "empty"
        else:
            kind = "truncated" if "truncated" in str(error).lower() else "corrupt"
        notes = {kind: str(error)}
    return hashlib.sha256(data).digest(), notes


@contextmanager
def pil_of_any_size() -> Iterator[None]:
    """Let PIL open images that are too large for training. The process must have one thread."""
    bound = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = REPAIRABLE * MAX_PIXELS // 2  # PIL refuses more than twice this number
    try:
        with no_warnings():
            yield
    finally:
        Image.MAX_IMAGE_PIXELS = bound


@contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def unread_size(data: bytes) -> str:
    """The size of an image whose only fault is too many pixels, otherwise an empty string."""
    try:
        with pil_of_any_size(), open_image(io.BytesIO(data)) as image:
            too_large = image.width * image.height > MAX_PIXELS
            return f"{image.width}x{image.height} px" if too_large else ""
    except Exception:  # as in `inspect`
        return ""


def verify_source(data: Path, workers: int) -> tuple[int, Findings]:
    """Read every sample of a dataset that does not consist of image files.

    Returns the number of samples, and the findings of those that fail, by their name `split/id`.
    """
    findings: Findings = {"corrupt": {}}
    count = 0
    for split in ("pretrain", "test") if has_test_split(data) else ("pretrain",):
        source = open_source(data, split)
        samples = np.arange(len(source.manifest))
        count += len(samples)

        def read_chunk(samples: np.ndarray, source: Source = source) -> list[str]:
            return [read_fault(source, int(sample)) for sample in samples]

        faults = in_order(read_chunk, samples, workers)
        for sample, fault in enumerate(progress(faults, f"verify {split}", 0, len(samples))):
            if fault:
                findings["corrupt"][f"{split}/{sample}"] = fault
    return count, findings


def read_fault(source: Source, sample: int) -> str:
    """What is wrong with one sample, or an empty string."""
    try:
        size = source.read(sample).shape[:2]
    except Exception as error:  # as in `inspect`
        return str(error)
    expected = tuple(int(side) for side in source.manifest.sizes[sample])
    if size == expected:
        return ""
    return f"decodes to {size} px (height, width), but has {expected} in the manifest"


def fix(
    data: Path, findings: Findings, workers: int, max_pixels: int
) -> tuple[list[str], list[str]]:
    """Re-encode truncated, non-RGB and over-large images. Move away what cannot be repaired.

    Returns the paths of the repaired images and of those moved away. All originals are kept in the
    folder `originals_of`. Raises ValueError, before anything is changed, if a linked folder leads
    to a file outside of `data`.
    """
    to_fix = (paths for kind, paths in findings.items() if kind != "duplicate")
    paths = sorted(set(chain.from_iterable(to_fix)))
    inside = {
        folder: folder.resolve().is_relative_to(data.resolve())
        for folder in {(data / path).parent for path in paths}
    }
    if outside := [path for path in paths if not inside[(data / path).parent]]:
        raise ValueError(
            f"links lead to {len(outside)} file(s) to fix outside of {data}: "
            f"{outside[0]} is {(data / outside[0]).resolve()}. Run --fix on their own folder"
        )
    lost = findings["corrupt"].keys() | findings["empty"].keys()
    originals = originals_of(data, paths)
    if paths:
        note(f"the originals are kept in {originals}")

    def fix_chunk(samples: np.ndarray) -> list[bool]:
        return [
            replace(data, paths[sample], originals, paths[sample] not in lost, max_pixels)
            for sample in samples
        ]

    done = list(progress(in_order(fix_chunk, np.arange(len(paths)), workers), "fix", 0, len(paths)))
    repaired = [path for path, is_repaired in zip(paths, done, strict=True) if is_repaired]
    return repaired, sorted(set(paths) - set(repaired))


def originals_of(data: Path, paths: list[str]) -> Path:
    """The folder for the originals of the images `paths`.

    It is inside `data`. If `data` consists of class folders, it is beside `data`, because
    torchvision's ImageFolder would treat a folder inside as a class.
    """
    if any("/" in path for path in paths) and not has_train_folder(data):
        resolved = data.resolve()
        return resolved.with_name(f"{resolved.name}.replaced")
    return data / ORIGINALS


def replace(data: Path, path: str, originals: Path, repairable: bool, max_pixels: int) -> bool:
    """Replace an image by a repaired one, or move it away if that fails.

    The original is kept below the folder `originals`. Returns whether the image was repaired.
    """
    image, original = data / path, originals / path
    original.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    # An earlier --fix may have kept an original of this name.
    while original.exists() or original.is_symlink():
        number += 1
        original = originals / f"{path}.{number}"
    content = repaired_content(image, max_pixels) if repairable else None
    if content is None:
        shutil.move(image, original)
        return False
    shutil.copy2(image, original)  # a copy, so that an image has this name at every moment
    write_whole(image, lambda file: file.write(content))
    return True


def repaired_content(path: Path, max_pixels: int) -> bytes | None:
    """The decodable part of an image, encoded as 8-bit RGB of at most `max_pixels`, or None.

    The result is a JPEG if the file has a JPEG's suffix. Otherwise it is a PNG, whatever the
    suffix, because readers look at the content. It has the EXIF orientation of the image.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        with pil_of_any_size():
            opened = open_image(io.BytesIO(path.read_bytes()))
            scale = math.sqrt(min(max_pixels, MAX_PIXELS) / (opened.width * opened.height))
            size = (max(1, int(opened.width * scale)), max(1, int(opened.height * scale)))
            tags = Image.Exif()
            if (orientation := exif_orientation(opened)) != 1:
                tags[ExifTags.Base.Orientation] = orientation
            if scale < 1:
                opened.draft("RGB", size)  # a JPEG is then decoded at a half or less of its sides
            image = Image.fromarray(to_rgb(opened))
    except Exception:  # as in `inspect`
        return None
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = False
    if scale < 1:
        image = image.resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if path.suffix.lower() in (".jpg", ".jpeg"):
        image.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0, exif=tags if tags else b"")
    else:
        image.save(buffer, "PNG", exif=tags if tags else b"")
    return buffer.getvalue()


def show(data: Path, findings: Findings) -> None:
    """Print a table with a row for each kind."""
    table = Table("", "images", "what", Column("the first", overflow="fold"), title=str(data))
    for kind, paths in findings.items():
        first = next((f"{path}: {detail}" for path, detail in paths.items()), "")
        # A file name may be invalid UTF-8, and it may look like markup.
        plain = Text(first.encode("utf-8", "replace").decode())
        table.add_row(kind, f"{len(paths):,}", (BAD | NOTES)[kind], plain)
    Console().print(table)


@click.command()
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--fix",
    "fixing",
    is_flag=True,
    help="Repair image files or move them away. All originals are kept.",
)
@click.option("--workers", default=cores, show_default="all cores", type=click.IntRange(1))
@click.option(
    "--max-pixels",
    default=25_000_000,
    show_default=True,
    help="Images with more pixels are over-large.",
    type=click.IntRange(1),
)
@click.option(
    "--report",
    "report_path",
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
    report_path: Path | None,
) -> None:
    """Decode every image below PATH, or every sample of a converted dataset.

    Corrupt, truncated and empty files are bad, and so are images that are too large for training.
    If there are bad files, the exit code is 1. All other findings are notes, because training
    accepts such images: duplicates (identical bytes), images that are not RGB (converted when read)
    and over-large images (slow).

    --fix encodes non-RGB images, over-large images and the decodable part of truncated images
    again, under the same names. It moves corrupt and empty files away. The originals are kept in
    PATH/.rsa-fast/replaced/, or in PATH.replaced/ if PATH contains class folders. The exit code is
    0, because no bad file is left.
    """
    try:
        ignored: Counter[str] = Counter()
        files = Paths(images_below(path, path, ignored))
        if packed_place(path, "train") or packed_place(path, "test") or not files:
            if fixing:
                raise ValueError(
                    f"{path} is not a folder of image files: "
                    "use --fix on the images it was made from, then convert again"
                )
            count, findings = verify_source(path, workers)
        else:
            if ignored:
                note(f"ignored, because they are not images: {counts_of(ignored)}")
            count, findings = len(files), verify_images(path, files, workers, max_pixels)
        show(path, findings)
        counts = {kind: len(paths) for kind, paths in findings.items()}
        bad = sum(counts[kind] for kind in BAD if kind in counts)
        bad += sum(detail.endswith(UNREAD) for detail in findings.get("over_large", {}).values())
        report = {"path": str(path), "images": count, "bad": bad, "counts": counts}
        result = report | {"paths": {kind: list(p)[:MAX_SHOWN] for kind, p in findings.items()}}
        report["paths"] = findings
        if fixing:
            repaired, moved = fix(path, findings, workers, max_pixels)
            for name in moved:
                click.echo(f"moved away, because it cannot be repaired: {name}", err=True)
            result |= {"repaired": len(repaired), "moved_away": len(moved)}
            report |= {"repaired": repaired, "moved_away": moved}
        if report_path:
            content = json.dumps(report, indent=1).encode()
            write_whole(report_path, lambda file: file.write(content))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(result))
    context.exit(1 if bad and not fixing else 0)


if __name__ == "__main__":
    main()
