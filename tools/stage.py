"""Copy .beton files or tar shards to a node's own disk, while training already reads them.

    python -m tools.stage --background data/imagenet-ffcv /local/imagenet
    rsa-fast train --data /local/imagenet ...

DST has links to the files of SRC from the start, so that training can begin at once. Each link is
replaced by the file's copy when the copy is complete. While a file is copied, training reads the
bytes that are already in the copy from there, and the others from SRC. Backend ffcv is an
exception: it maps a file into memory when it starts, so it reads the copy only after the next
start.

After a kill or an error, run the same command again: it continues where it stopped. At the end, the
copies are opened, and their fingerprints are compared with those of SRC.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

from rsa_fast.pipelines.files import json_text, partial_name, write_text
from rsa_fast.pipelines.layouts import has_test_split, open_source, packed_place
from rsa_fast.pipelines.packed import state_of
from rsa_fast.tools.convert import note, sync_folder

PIECE_BYTES = 2**26  # a piece is on the disk before the next one is begun
AGAIN = "delete DST and start again"


def packed_files(src: Path) -> list[str]:
    """The files of the packed splits in `src`, relative to it, with their descriptions.

    The small ones come first. Raises FileNotFoundError if there are none.
    """
    files: set[Path] = set()
    for split in ("train", "test"):
        if place := packed_place(src, split):
            beside = place.with_suffix(".json")
            inside = [place] if place.is_file() else place.iterdir()
            files |= {path for path in [*inside, beside] if path.is_file() and path.name[0] != "."}
    if not files:
        raise FileNotFoundError(
            f"{src} has no .beton files or tar shards: convert it with "
            "rsa-fast convert, or index its shards with rsa-fast convert index"
        )
    below = [path for path in files if path.is_relative_to(src)]
    below.sort(key=lambda path: (path.stat().st_size >= PIECE_BYTES, str(path)))
    return [str(path.relative_to(src)) for path in below]


def fingerprints(data: Path) -> dict[str, str]:
    """The fingerprints of the manifests of the splits, by which a run recognises its data."""
    splits = ["pretrain", *["test"] * has_test_split(data)]
    return {split: open_source(data, split).manifest.fingerprint for split in splits}


def prepare(src: Path, dst: Path) -> dict[str, Any]:
    """Link the files of `src` into `dst`. Returns the plan of the copies, which is saved in `dst`.

    Raises ValueError if `dst` has other files of these names, and OSError if there is too little
    room on its disk.
    """
    files = packed_files(src)
    plan: dict[str, Any] = {
        "source": str(src.resolve()),
        "files": {name: list(state_of((src / name).stat())) for name in files},
        "fingerprints": fingerprints(src),
    }
    record = record_of(dst)
    if record.is_file():
        if json.loads(record.read_text()) != plan:
            raise ValueError(
                f"{dst} was staged from other files than those in {src}: delete it, or choose "
                "another DST"
            )
    elif in_the_way := [name for name in files if os.path.lexists(dst / name)]:
        raise ValueError(f"{dst / in_the_way[0]} already exists: choose another DST")
    present = sum(
        path.lstat().st_size
        for name in files
        for path in (dst / name, partial_of(dst / name))
        if path.exists() and not path.is_symlink()
    )
    needed = sum(size for size, _ in plan["files"].values()) - present
    if needed > (free := shutil.disk_usage(dst).free):
        raise OSError(
            f"the copies in {dst} need {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB "
            "free: make room, or choose another DST"
        )
    record.parent.mkdir(exist_ok=True)
    write_text(record, json_text(plan, indent=1))
    for name in files:
        target = dst / name
        target.parent.mkdir(exist_ok=True)
        if not os.path.lexists(target):
            target.symlink_to(src.resolve() / name)
    return plan


def record_of(dst: Path) -> Path:
    return dst / ".rsa-fast" / "stage.json"


def partial_of(target: Path) -> Path:
    return target.with_name(partial_name(target.name))


def copy(original: Path, target: Path, state: list[int]) -> None:
    """Replace the link `target` by a copy of `original`. Continues an earlier copy.

    Only complete pieces of an earlier copy are used, because they are known to be on the disk.
    Raises ValueError if the size and the modification time of `original` are no longer `state`.
    """
    partial, size = partial_of(target), state[0]
    partial.touch()
    with original.open("rb") as source, partial.open("r+b") as file:
        complete_pieces = (file.seek(0, os.SEEK_END) - 1) // PIECE_BYTES
        done = file.truncate(max(0, complete_pieces) * PIECE_BYTES)
        file.seek(done)
        while done < size:
            end = min(size, (done // PIECE_BYTES + 1) * PIECE_BYTES)
            while done < end:
                sent = os.sendfile(file.fileno(), source.fileno(), done, end - done)
                if not sent:
                    raise ValueError(f"{original} ends at byte {done:,}, before {size:,}: {AGAIN}")
                done += sent
            os.fsync(file.fileno())
        if list(state_of(os.fstat(source.fileno()))) != state:
            raise ValueError(f"{original} was changed while it was copied: {AGAIN}")
    # A run that has opened the original compares these times.
    os.utime(partial, ns=(state[1], state[1]))
    partial.replace(target)
    sync_folder(target.parent)


def copy_all(src: Path, dst: Path, plan: dict[str, Any]) -> None:
    """Copy the files that are still links, and compare the fingerprints of SRC and DST."""
    links = [name for name in plan["files"] if (dst / name).is_symlink()]
    for number, name in enumerate(links, 1):
        copy(src / name, dst / name, plan["files"][name])
        note(f"{number} of {len(links)}: {dst / name}, {plan['files'][name][0] / 1e9:.1f} GB")
    if (copied := fingerprints(dst)) != plan["fingerprints"]:
        raise ValueError(
            f"the copies in {dst} differ from {src} ({copied} instead of "
            f"{plan['fingerprints']}): the disk may be faulty. Delete {dst} and start again"
        )


@click.command()
@click.argument("src", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("dst", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--background",
    is_flag=True,
    help="Return as soon as training can start. A separate process copies and writes to "
    "DST/.rsa-fast/stage.log.",
)
def main(src: Path, dst: Path, background: bool) -> None:
    """Copy the .beton files or tar shards in SRC to DST. Training may already read from DST.

    The last line of the output is a JSON object that describes what was copied.
    """
    try:
        if dst.resolve() == src.resolve():
            raise ValueError(f"{dst} is the source itself: name another folder")
        (dst / ".rsa-fast").mkdir(parents=True, exist_ok=True)
        with (dst / ".rsa-fast" / "stage.lock").open("w") as lock:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ValueError(
                    f"another process is already copying to {dst}: training can start"
                ) from error
            plan = prepare(src, dst)
            note(f"training can start: --data {dst}")
            if not background:
                copy_all(src, dst, plan)
        if background:
            with (dst / ".rsa-fast" / "stage.log").open("w") as log:
                command = [sys.executable, "-m", "rsa_fast.tools.stage", str(src), str(dst)]
                subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    except (ValueError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = f". The disk of {dst} is full: make room and run again" if full else ""
        raise click.ClickException(f"{error}{advice}") from error
    sizes = [size for size, _ in plan["files"].values()]
    click.echo(json.dumps({"path": str(dst), "files": len(sizes), "bytes": sum(sizes)}))


if __name__ == "__main__":
    main()
