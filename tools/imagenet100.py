"""Make a subset of an image folder, such as ImageNet's 100 classes, from a list of classes.

    python -m tools.imagenet100 data/imagenet data/imagenet100 --classes imagenet100.txt

The subset consists of links to the class folders, or of copies with `--copy`.
"""

from __future__ import annotations

import json
import re
import shutil
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import click

from rsa_fast.pipelines.files import read_list_text
from rsa_fast.pipelines.folders import images_below
from rsa_fast.tools.convert import progress

VERSION = 1  # the format of subset.json, which records how a subset was made
SPLITS = ("train", "val", "test")


def read_classes(path: Path) -> list[str]:
    """The class names in a text file, sorted. It has one per line, and # begins a comment.

    Further columns, after a tab, a comma or a wnid, are not read. Raises ValueError when there is
    no class, when one is listed twice, and when one cannot be the name of a folder.
    """
    lines = (line.split("#")[0].strip() for line in read_list_text(path).splitlines())
    columns = (re.split(r"[\t,]|(?<=^n\d{8})\s", line)[0].strip() for line in lines)
    names = sorted(filter(None, columns))
    if not names:
        raise ValueError(f"{path} lists no class: wanted one wnid per line, such as n01440764")
    if twice := sorted({name for name, following in pairwise(names) if name == following}):
        raise ValueError(f"{path} lists classes twice: {', '.join(twice)}. Remove one line of each")
    if invalid := [name for name in names if Path(name).name != name]:
        raise ValueError(f"{path} lists invalid names of class folders: {', '.join(invalid)}")
    return names


def make_subset(src: Path, dst: Path, classes: list[str], copy: bool = False) -> dict[str, Any]:
    """Write the folders of `classes` of every split in `src` to `dst`. Returns their counts.

    Nothing is done if `dst` already is this subset. Links are absolute, so `dst` can be moved but
    the source must stay where it is. An interrupted run leaves nothing at `dst`. Raises
    FileNotFoundError with the names of all missing class folders, before anything is written.
    Raises ValueError if `dst` contains something else.
    """
    src = src.resolve()
    record = {"version": VERSION, "source": str(src), "copy": copy, "classes": classes}
    record_path = dst / "subset.json"
    existing = json.loads(record_path.read_text()) if record_path.is_file() else {}
    if existing.items() >= record.items():
        return {"path": str(dst), "classes": len(classes), **existing["images"]}
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(
            f"{dst} exists and is not the requested subset: remove it, or name another folder"
        )
    splits = [split for split in SPLITS if (src / split).is_dir()]
    if "train" not in splits:
        raise FileNotFoundError(
            f"no train/ in {src}: wanted an image folder, "
            "train/<class>/*.JPEG and val/<class>/*.JPEG"
        )
    folders = [Path(split, name) for split in splits for name in classes]
    images = {
        folder: images_below(src / folder, src) if (src / folder).is_dir() else []
        for folder in folders
    }
    if missing := [str(folder) for folder, paths in images.items() if not paths]:
        raise FileNotFoundError(
            f"{src} has no images for {len(missing)} class folder(s): {', '.join(missing)}"
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
    help="A text file with one wnid per line.",
)
@click.option("--copy", is_flag=True, help="Copy the images. By default, class folders are links.")
def main(src: Path, dst: Path, classes: Path, copy: bool) -> None:
    """Make DST, a subset of the image folder SRC (train/, val/), from a list of classes."""
    try:
        click.echo(json.dumps(make_subset(src, dst, read_classes(classes), copy)))
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
