"""Convert images to FFCV's format: `train.beton` and `val.beton`, each described by a `.json`.

    python -m tools.to_ffcv data/imagenet data/imagenet-ffcv --max-resolution 500

The options and their defaults are those of ffcv-imagenet's write_imagenet.sh. In addition,
`--write-mode passthrough` stores JPEGs unchanged. The images are shuffled as by `tools.to_dali`, so
that neighbours in the file belong to random classes. After a kill or an error, run the same command
again: it continues where it stopped.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from rsa_fast.pipelines.beton import MAX_SIDE_PX, BetonWriter, open_beton, page_bytes
from rsa_fast.pipelines.order import epoch_order
from rsa_fast.tools.convert import PARAMS, WRITE_MODES, Encoding, Format, run


def writer(path: Path, sizes: np.ndarray, done: np.ndarray) -> BetonWriter:
    """A writer for images of at most `sizes` `(N, 2)` that continues after the entries `done`.

    Its pages are large enough for the pixels of the largest image, because the size of a JPEG is
    not known before it is encoded. Raises ValueError when a side is too long for the format.
    """
    if (largest_px := sizes.max(initial=0)) > MAX_SIDE_PX:
        raise ValueError(
            f"an image has a side of {largest_px} px, but the format allows {MAX_SIDE_PX} px: "
            "use --max-resolution"
        )
    largest_bytes = 3 * sizes.astype(np.int64).prod(-1).max(initial=1)
    return BetonWriter(path, len(sizes), page_bytes(largest_bytes), done)


BETON = Format(
    name="beton",
    suffix=".beton",
    writer=writer,
    open=open_beton,
    label=lambda packed, sample: packed.entries["label"][sample],
)


@click.command(params=[*PARAMS])
@click.option(
    "--max-resolution",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Reduce larger images to this long side in pixels.",
)
@click.option(
    "--compress-probability",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="For proportion: the share of images that become JPEGs.",
)
@click.option(
    "--smart-threshold",
    type=click.IntRange(1),
    help="For smart: images with more bytes of pixels than this become JPEGs.",
)
@click.option(
    "--write-mode",
    type=click.Choice(WRITE_MODES),
    default="proportion",
    show_default=True,
    help="How images are stored. proportion: some as JPEGs, the others as pixels. passthrough: "
    "JPEGs unchanged and not resized, all other images as JPEGs.",
)
@click.option(
    "--seed",
    default=0,
    show_default=True,
    help="Seed of the shuffling and, for proportion, of the selection of the images for JPEG.",
)
def main(
    src: Path,
    dst: Path,
    max_resolution: int,
    compress_probability: float,
    jpeg_quality: int,
    smart_threshold: int | None,
    write_mode: str,
    seed: int,
    workers: int,
    overwrite: bool,
    exif_orientation: bool,
) -> None:
    """Convert the images in SRC to .beton files in DST.

    The last line of the output is a JSON object that describes what was written.
    """
    if write_mode == "smart" and smart_threshold is None:
        raise click.UsageError(
            "--write-mode smart needs --smart-threshold: "
            "without it, ffcv stores only pixels, as --write-mode raw does"
        )
    encoding = Encoding(
        write_mode,
        longest_px=None if write_mode == "passthrough" else max_resolution,
        jpeg_quality=jpeg_quality,
        compress_probability=compress_probability,
        smart_threshold_bytes=smart_threshold,
        seed=seed,
    )
    run(
        src,
        dst,
        form=BETON,
        encoding=encoding,
        order=lambda count: epoch_order(count, seed, 0),
        settings=asdict(encoding) | {"order": "shuffled"},
        workers=workers,
        overwrite=overwrite,
        exif_orientation=exif_orientation,
    )


if __name__ == "__main__":
    main()
