"""From images to tar shards with DALI's indices: `train/shard-000000.tar` and `.idx` ..., `val/`, each split with a `.json`.

    python -m tools.to_dali data/imagenet data/imagenet-shards

JPEGs are kept as they are unless `--short-side` reduces them; samples are shuffled, so that reading in order is reading at
random. Run it again after a kill or an error and it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

import click

from pipelines.order import epoch_order
from pipelines.shards import ShardWriter, open_shards, stored_label
from tools.convert import PARAMS, Encoding, Format, run


@click.command(params=[*PARAMS])
@click.option(
    "--shard-mb",
    type=click.IntRange(1),
    default=1000,
    show_default=True,
    help="Largest shard, in 10^6 bytes.",
)
@click.option(
    "--short-side",
    type=click.IntRange(1),
    help="Reduce images to this short side in pixels, as new JPEGs.",
)
@click.option("--seed", default=0, show_default=True, help="Of the shuffling.")
def main(
    src: Path,
    dst: Path,
    shard_mb: int,
    short_side: int | None,
    jpeg_quality: int,
    seed: int,
    workers: int,
    overwrite: bool,
) -> None:
    """Convert the images in SRC to tar shards in DST. The last line printed is a JSON object of what lies there."""
    encoding = Encoding("passthrough", shortest_px=short_side, jpeg_quality=jpeg_quality)
    shard_bytes = shard_mb * 10**6
    shards = Format(
        "shards",
        "",
        lambda path, _, done: ShardWriter(path, shard_bytes, done),
        open_shards,
        stored_label,
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
        shards,
        encoding,
        lambda count: epoch_order(count, seed, 0),
        settings=settings,
        workers=workers,
        overwrite=overwrite,
    )


if __name__ == "__main__":
    main()
