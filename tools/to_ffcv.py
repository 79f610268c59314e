"""From images to FFCV's .beton: `train.beton`, `val.beton`, each with a `.json` that says what it is.

    python -m tools.to_ffcv data/imagenet data/imagenet-ffcv --max-resolution 500 --compress-probability 0.5

Knobs and defaults are those of ffcv-imagenet's write_imagenet.sh, and `--write-mode passthrough` keeps JPEGs as they are.
Run it again after a kill or an error and it goes on where it was.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click
import numpy as np

from pipelines.beton import MAX_SIDE_PX, BetonWriter, open_beton, page_bytes
from tools.convert import PARAMS, WRITE_MODES, Encoding, Format, run


def writer(path: Path, sizes: np.ndarray, done: np.ndarray) -> BetonWriter:
    """A writer whose pages hold the largest image even as pixels: what a JPEG will take is not known before it is made."""
    if (largest_px := sizes.max(initial=0)) > MAX_SIDE_PX:
        raise ValueError(
            f"the format takes sides up to {MAX_SIDE_PX} px, an image has {largest_px}: use --max-resolution"
        )
    return BetonWriter(
        path, len(sizes), page_bytes(3 * sizes.astype(np.int64).prod(-1).max(initial=1)), done
    )


BETON = Format(
    "beton", ".beton", writer, open_beton, lambda packed, sample: packed.entries["label"][sample]
)


@click.command(params=[*PARAMS])
@click.option(
    "--max-resolution",
    type=click.IntRange(1),
    default=500,
    show_default=True,
    help="Longest side in pixels.",
)
@click.option(
    "--compress-probability",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="For proportion.",
)
@click.option(
    "--smart-threshold",
    type=click.IntRange(1),
    help="For smart: pixel bytes above which an image is JPEG.",
)
@click.option(
    "--write-mode",
    type=click.Choice(WRITE_MODES),
    default="proportion",
    show_default=True,
    help="proportion: some JPEG, the rest pixels; passthrough: JPEGs as they are, not resized, all else as JPEG.",
)
@click.option(
    "--seed", default=0, show_default=True, help="For proportion: which images become JPEG."
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
) -> None:
    """Convert the images in SRC to .beton files in DST. The last line printed is a JSON object of what lies there."""
    if write_mode == "smart" and smart_threshold is None:
        raise click.UsageError(
            "--write-mode smart needs --smart-threshold: ffcv without one stores pixels only, which is raw"
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
        BETON,
        encoding,
        np.arange,
        settings=asdict(encoding),
        workers=workers,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    main()
