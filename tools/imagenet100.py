"""The 100-class subset of ImageNet, or any other list of classes, of an image folder: as links, or as copies.

python -m tools.imagenet100 data/imagenet data/imagenet100 --classes imagenet100.txt
"""

from __future__ import annotations

import json
import shutil
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import click

from pipelines.sources import images_below
from tools.convert import progress

VERSION = 1  # of the record
SPLITS = ("train", "val", "test")


def read_classes(path: Path) -> list[str]:
    """The class names in a text file, one a line, sorted; blank lines and what follows a # are skipped.

    Raises ValueError when there is none, for one listed twice, and for what is no name of a folder.
    """
    names = sorted(
        name for line in path.read_text().splitlines() if (name := line.split("#")[0].strip())
    )
    if not names:
        raise ValueError(f"{path} lists no class: wanted one wnid a line, such as n01440764")
    if twice := sorted({name for name, following in pairwise(names) if name == following}):
        raise ValueError(f"{path} lists classes twice: {', '.join(twice)}. Remove one line of each")
    if odd := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{path} lists what is no name of a class folder: {', '.join(odd)}")
    return names


def make_subset(src: Path, dst: Path, classes: list[str], copy: bool = False) -> dict[str, Any]:
    """Write the folders of `classes` of every split in `src` to `dst`, or leave them if they are already there; returns
    what lies there.

    Links are absolute: `dst` can then be moved, or made anywhere, and a source of this size stays where it is. An interrupted
    run leaves nothing at `dst`. Raises FileNotFoundError naming all classes that `src` lacks, before anything is written,
    ValueError when `dst` holds something else.
    """
    src = src.resolve()
    record = {"version": VERSION, "source": str(src), "copy": copy, "classes": classes}
    done = dst / "subset.json"
    if done.is_file() and (found := json.loads(done.read_text())).items() >= record.items():
        return {"path": str(dst), "classes": len(classes), **found["images"]}
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(
            f"{dst} exists and is not the subset asked for: remove it, or name another folder"
        )
    splits = [split for split in SPLITS if (src / split).is_dir()]
    if "train" not in splits:
        raise FileNotFoundError(
            f"no train/ in {src}: wanted an image folder, train/<class>/*.JPEG and val/<class>/*.JPEG"
        )
    folders = [Path(split, name) for split in splits for name in classes]
    images = {
        folder: images_below(src / folder, src) if (src / folder).is_dir() else []
        for folder in folders
    }
    if missing := [str(folder) for folder, paths in images.items() if not paths]:
        raise FileNotFoundError(
            f"{src} lacks {len(missing)} class folder(s), or they hold no images: {', '.join(missing)}"
        )
    partial = dst.with_name(f"{dst.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    if copy:
        count = sum(len(paths) for paths in images.values())
        for path in progress(chain.from_iterable(images.values()), "copy", 0, count):
            (partial / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(src / path, partial / path)
    else:
        for folder in folders:
            (partial / folder).parent.mkdir(parents=True, exist_ok=True)
            (partial / folder).symlink_to(src / folder, target_is_directory=True)
    counts = {split: sum(len(images[Path(split, name)]) for name in classes) for split in splits}
    (partial / "subset.json").write_text(json.dumps(record | {"images": counts}))
    partial.rename(dst)
    return {"path": str(dst), "classes": len(classes), **counts}


@click.command()
@click.argument("src", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("dst", type=click.Path(path_type=Path))
@click.option(
    "--classes",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="One wnid a line.",
)
@click.option("--copy", is_flag=True, help="Copy the files; without it, link the class folders.")
def main(src: Path, dst: Path, classes: Path, copy: bool) -> None:
    """Make of the image folder SRC (train/, val/) the subset DST of the classes that a file lists."""
    try:
        click.echo(json.dumps(make_subset(src, dst, read_classes(classes), copy)))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
