"""Convert images to tar shards with DALI's indices.

    python -m tools.to_dali data/imagenet data/imagenet-shards

This writes `train/shard-000000.tar`, `train/shard-000000.idx`, ... and the same below `val/`, with
a `.json` that describes each split. JPEGs are stored unchanged unless `--short-side` reduces them.
The samples are shuffled, so that reading the shards from front to back gives a random order.
After a kill or an error, run the same command again: it continues where it stopped.
"""

from __future__ import annotations

from pathlib import Path

import click

from rsa_fast.pipelines.order import epoch_order
from rsa_fast.pipelines.shards import ShardWriter, open_shards, stored_label
from rsa_fast.tools.convert import PARAMS, Encoding, Format, run


@click.command(params=[*PARAMS])
@click.option(
    "--shard-mb",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Size limit of a shard in 10^6 bytes.",
)
@click.option(
    "--short-side",
    type=click.IntRange(1),
    help="Reduce larger images to this short side in pixels and store them as new JPEGs.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the shuffling.")
def main(
    src: Path,
    dst: Path,
    shard_mb: int,
    short_side: int | None,
    jpeg_quality: int,
    seed: int,
    workers: int,
    overwrite: bool,
    exif_orientation: bool,
) -> None:
    """Convert the images in SRC to tar shards in DST.

    The last line of the output is a JSON object that describes what was written.
    """
    encoding = Encoding("passthrough", shortest_px=short_side, jpeg_quality=jpeg_quality)
    shard_bytes = shard_mb * 10**6
    shards = Format(
        name="shards",
        suffix="",
        writer=lambda path, _, done: ShardWriter(path, shard_bytes, done),
        open=open_shards,
        label=stored_label,
    )
    settings = {
        "shard_bytes": shard_bytes,
        "short_side_px": short_side,
        "jpeg_quality": jpeg_quality,
        "seed": seed,
    }
    run(
        src,
        dst,
        form=shards,
        encoding=encoding,
        order=lambda count: epoch_order(count, seed, 0),
        settings=settings,
        workers=workers,
        overwrite=overwrite,
        exif_orientation=exif_orientation,
    )


if __name__ == "__main__":
    main()
