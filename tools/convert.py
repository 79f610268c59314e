"""What `to_ffcv` and `to_dali` share: encode in parallel, write in order, survive a kill, verify, then give the final name.

While it goes, everything of a split lies in `DST/<split>.partial/`: what was asked for (`plan.json`), the images so far and
a journal of them (`journal`). An image counts as written once the journal says so, and the journal never runs ahead of the
disk, so whatever a kill leaves is cut back to the journal and the result is that of a run never interrupted.
"""

from __future__ import annotations

import errno
import fcntl
import gc
import io
import json
import multiprocessing
import os
import shutil
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipelines.draws import keys
from pipelines.packed import ENTRY, VERSION, Packed
from pipelines.sources import Source, open_source, to_rgb

Result = TypeVar("Result")

WRITE_MODES = ("proportion", "jpg", "raw", "smart", "passthrough")
JOURNAL = np.dtype(
    [("entry", ENTRY), ("crc32", "<u4"), ("psnr_db", "<f4")]
)  # no PSNR (NaN): raw, or its own bytes
# PIL's nearest to ffcv's area filter (cv2.INTER_AREA): 0.87 levels from it on 60 photographs; BOX, which counts a pixel
# whole where its centre falls, 2.80, BILINEAR 1.14, LANCZOS 1.90
RESIZE_FILTER = Image.Resampling.HAMMING
CHUNK = 8  # images a worker takes at a time
SYNC_EVERY_S = 2.0  # at most so much work is lost by a kill
REFRESH_EVERY_S = 0.2  # of the progress bar
PARAMS: list[click.Parameter] = [  # of both commands
    click.Argument(["src"], type=click.Path(path_type=Path, exists=True, file_okay=False)),
    click.Argument(["dst"], type=click.Path(path_type=Path, file_okay=False)),
    click.Option(
        ["--jpeg-quality"],
        type=click.IntRange(1, 100),
        default=90,
        show_default=True,
        help="Of new JPEGs.",
    ),
    click.Option(
        ["--workers"],
        type=click.IntRange(1),
        default=os.cpu_count(),
        help="Processes; all cores by default.",
    ),
    click.Option(
        ["--overwrite"],
        is_flag=True,
        help="Delete what DST holds of these splits, and start afresh.",
    ),
]


@dataclass(frozen=True)
class Encoding:
    """How images are stored; at most one of the two limits is set.

    `write_mode`: jpg, raw, smart (JPEG above `smart_threshold_bytes` of pixels) and proportion (JPEG with
    `compress_probability`, by a hash of seed and sample) as ffcv's RGBImageField; passthrough keeps the bytes of JPEGs that
    need no resizing and are grayscale or RGB, all else becomes JPEG.
    """

    write_mode: str
    longest_px: int | None = None
    shortest_px: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 0.5
    smart_threshold_bytes: int | None = None
    seed: int = 0

    def sizes(self, sizes: np.ndarray) -> np.ndarray:
        """`(..., 2)` heights and widths as stored: never enlarged, rounded down as ffcv does, but in whole numbers, where
        ffcv's floats lose a pixel for some sizes."""
        limit = self.longest_px or self.shortest_px
        if limit is None:
            return sizes
        side = (sizes.max if self.longest_px else sizes.min)(-1, keepdims=True)
        return np.where(side > limit, np.maximum(1, sizes.astype(np.int64) * limit // side), sizes)

    def stores_raw(self, sample: int, pixels: np.ndarray) -> bool:
        match self.write_mode:
            case "raw":
                return True
            case "smart":
                assert self.smart_threshold_bytes is not None, "smart needs smart_threshold_bytes"
                return pixels.nbytes <= self.smart_threshold_bytes
            case "proportion":  # a seed of its own, apart from those of the order and the views
                share = (
                    float(keys(self.seed ^ 0x726177, 0, np.array([sample]))[0] >> np.uint64(11))
                    * 2.0**-53
                )
                return share >= self.compress_probability
        return False


@dataclass(frozen=True)
class Encoded:
    """One image as it will be stored."""

    data: bytes
    height: int
    width: int
    raw: bool
    psnr_db: float = np.nan


class Writer(Protocol):
    """Appends images in order; built on a path it goes on behind the entries already there."""

    def append(self, data: bytes, label: int) -> tuple[int, int]: ...
    def sync(self) -> None: ...
    def finish(self, entries: np.ndarray) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Format:
    """A storage format: `writer(path, sizes, done)` for images of at most `sizes`, `open(path)`, `label(packed, sample)`."""

    name: str
    suffix: str  # of the split's file; empty for a folder
    writer: Callable[[Path, np.ndarray, np.ndarray], Writer]
    open: Callable[[Path], Packed]
    label: Callable[[Packed, int], int]


def run(
    src: Path,
    dst: Path,
    form: Format,
    encoding: Encoding,
    order: Callable[[int], np.ndarray],
    *,
    settings: dict[str, Any],
    workers: int,
    overwrite: bool,
) -> None:
    """Convert train and, where there is one, the test split (as val); print what was written as one JSON object.

    `order(count)` gives the samples in the order of writing; the keyword arguments are those of
    `convert`. Every image's header is checked before anything is written. Errors are click's, for
    the command line.
    """
    try:
        if dst.resolve() == src.resolve():
            raise ValueError(f"{dst} is the source itself: name another folder")
        sources = {"train": open_source(src, "train", cache=dst)}
        if any((src / name).is_dir() for name in ("val", "test")):
            sources["val"] = open_source(src, "test", cache=dst)
        else:
            note(f"{src} has no val/ or test/: only train is converted")
        written = {
            split: convert(
                source,
                dst,
                split,
                form,
                encoding,
                order(len(source.manifest)),
                settings=settings,
                workers=workers,
                overwrite=overwrite,
            )
            for split, source in sources.items()
        }
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(json.dumps(written))


def convert(
    source: Source,
    dst: Path,
    split: str,
    form: Format,
    encoding: Encoding,
    order: np.ndarray,
    *,
    settings: dict[str, Any],
    workers: int,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one split to `dst`, or go on with what an earlier run left; returns the description without the class names.

    `settings` are what decides the bytes, recorded and compared. Raises ValueError when `dst` holds the same split made
    from another source or by other settings (unless `overwrite`), or naming an image that cannot be read; OSError when
    the disk is full. Both leave what is done for the next run.
    """
    plan = {
        "format": form.name,
        "version": VERSION,
        "split": split,
        "count": len(order),
        "classes": list(source.manifest.classes),
        "settings": settings,
        "source_fingerprint": source.manifest.fingerprint,
    }
    work, final, description = (
        dst / f"{split}.partial",
        dst / f"{split}{form.suffix}",
        dst / f"{split}.json",
    )
    if overwrite:
        remove(description, work, final)
    if description.exists():
        found = agreed(description, plan)
        if not final.exists():
            raise ValueError(
                f"{description} is there but {final} is not: put it back, or use --overwrite"
            )
        remove(work)  # a kill came between the last rename and this
        note(f"{final} is complete: left alone")
        return summary(final, found)
    if final.exists() and not (work / description.name).exists():
        raise ValueError(
            f"{final} is in the way and no conversion of ours wrote it: move it, or use --overwrite"
        )
    work.mkdir(parents=True, exist_ok=True)
    if (work / "plan.json").exists():
        agreed(work / "plan.json", plan)
        note(f"going on with {work}")
    else:
        write_json(work / "plan.json", plan)
    with (work / "journal").open("a+b") as journal:
        try:
            fcntl.lockf(
                journal, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # of this process: gone with it, whatever its end
        except OSError as error:
            raise ValueError(f"another run is writing {work}: wait for it or end it") from error
        if not (work / description.name).exists():
            payload = work / final.name
            try:
                records = fill(source, payload, form, encoding, order, journal, workers)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                free = shutil.disk_usage(dst).free / 1e9
                message = f"the disk of {dst} is full ({free:.1f} GB free). Make room and run again: {work} is kept"
                raise OSError(message) from error
            verify(source, payload, form, order, records, workers)
            write_json(work / description.name, plan | outcome(payload, records))
        if (work / final.name).exists():
            (work / final.name).rename(final)
        (work / description.name).rename(description)  # last: what has a description is complete
        sync_folder(dst)
    remove(work)
    return summary(final, json.loads(description.read_text()))


def fill(
    source: Source,
    payload: Path,
    form: Format,
    encoding: Encoding,
    order: np.ndarray,
    journal: io.BufferedRandom,
    workers: int,
) -> np.ndarray:
    """Encode and write what the journal lacks; returns all records `(N,)` of `JOURNAL`."""
    records = np.zeros(len(order), JOURNAL)
    journal.seek(0)
    found = journal.read()  # by this handle: closing another of the same file would drop the lock
    done = records[: len(found) // JOURNAL.itemsize]  # a record cut short is not counted
    done[:] = np.frombuffer(found[: done.nbytes], JOURNAL)
    journal.truncate(done.nbytes)
    writer = form.writer(payload, encoding.sizes(source.manifest.sizes), done["entry"])
    written = saved = len(done)
    saved_at = time.monotonic()

    def save() -> None:
        nonlocal saved, saved_at
        writer.sync()
        journal.write(records[saved:written].tobytes())
        journal.flush()
        os.fsync(journal.fileno())
        saved, saved_at = written, time.monotonic()

    def encode_chunk(samples: np.ndarray) -> list[Encoded]:
        return [encode(source, int(sample), encoding) for sample in samples]

    images = progress(
        in_order(encode_chunk, order[written:], workers), "write", written, len(order)
    )
    with (
        closing(writer),
        closing(images),
    ):  # the workers end now, whatever keeps an error's frames alive
        for image in images:
            label = int(source.manifest.labels[order[written]])
            file, offset = writer.append(image.data, label)
            entry = (file, offset, len(image.data), label, image.height, image.width, image.raw)
            records[written] = (entry, zlib.crc32(image.data), image.psnr_db)
            written += 1
            if time.monotonic() - saved_at > SYNC_EVERY_S:
                save()
        save()
        writer.finish(records["entry"])
    return records


def encode(source: Source, sample: int, encoding: Encoding) -> Encoded:
    """One image as it will be stored. Raises ValueError naming it when it cannot be read or is not what the scan saw."""
    scanned = source.manifest.sizes[sample]
    height, width = encoding.sizes(scanned).tolist()
    same_size = [height, width] == scanned.tolist()
    if encoding.write_mode == "passthrough" and same_size and (data := plain_jpeg(source, sample)):
        return Encoded(data, height, width, raw=False)
    pixels = source.read(sample)
    if list(pixels.shape[:2]) != scanned.tolist():
        raise ValueError(
            f"{name(source, sample)} was {scanned} pixels when scanned, now {pixels.shape[:2]}: start again"
        )
    if not same_size:
        pixels = np.asarray(
            Image.fromarray(pixels).resize((width, height), RESIZE_FILTER, reducing_gap=None)
        )
    if encoding.stores_raw(sample, pixels):
        return Encoded(pixels.tobytes(), height, width, raw=True)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=encoding.jpeg_quality)
    return Encoded(
        buffer.getvalue(), height, width, False, psnr_db(pixels, to_rgb(Image.open(buffer)))
    )


def plain_jpeg(source: Source, sample: int) -> bytes | None:
    """The image's own bytes where they are a JPEG that every decoder takes (not CMYK); what is damaged, `read` names."""
    try:
        data = source.encoded(sample) if source.encoded else b""
        with Image.open(io.BytesIO(data)) as image:
            plain = image.format == "JPEG" and image.mode in ("L", "RGB")
            return (
                data if plain and image.size[::-1] == tuple(source.manifest.sizes[sample]) else None
            )
    except OSError:
        return None


def psnr_db(wanted: np.ndarray, found: np.ndarray) -> float:
    """Peak signal-to-noise ratio of 8-bit images in dB, at most 100: equal images have no noise."""
    error = np.square(wanted.astype(np.float32) - found).mean()
    return min(100.0, float(10 * np.log10(255**2 / max(error, 1e-6))))


def verify(
    source: Source,
    payload: Path,
    form: Format,
    order: np.ndarray,
    records: np.ndarray,
    workers: int,
) -> None:
    """Read every image back as a training run will. Raises ValueError naming what is not as encoded."""
    packed = form.open(payload)
    if not np.array_equal(packed.entries, records["entry"]):
        raise ValueError(
            f"the tables of {payload} are not as written: the disk may be faulty; --overwrite restarts"
        )

    def check_chunk(samples: np.ndarray) -> list[int]:
        for sample in samples:
            check(int(sample))
        return list(samples)

    def check(sample: int) -> None:
        data = packed.stored(sample)
        original = name(source, int(order[sample]))
        if (
            zlib.crc32(data) != records["crc32"][sample]
            or form.label(packed, sample) != records["entry"]["label"][sample]
        ):
            raise ValueError(
                f"{packed.name(sample)} ({original}) is not as written: the disk may be faulty; --overwrite restarts"
            )
        try:
            packed.decode(sample, data)
        except ValueError as error:
            raise ValueError(
                f"{original} of the source is damaged: replace or delete it, then --overwrite ({error})"
            ) from error

    for _ in progress(
        in_order(check_chunk, np.arange(len(order)), workers), "verify", 0, len(order)
    ):
        pass


def name(source: Source, sample: int) -> str:
    return source.manifest.paths[sample] if source.manifest.paths else f"image {sample}"


def outcome(payload: Path, records: np.ndarray) -> dict[str, Any]:
    psnr = records["psnr_db"][~np.isnan(records["psnr_db"])].astype(float)
    raw = int(records["entry"]["raw"].sum())
    files = [payload] if payload.is_file() else sorted(payload.iterdir())
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "jpg": len(records) - raw,
        "raw": raw,
        "reencoded": len(psnr),
        "psnr_db": {"median": round(np.median(psnr), 2), "min": round(psnr.min(), 2)}
        if len(psnr)
        else None,
    }


def in_order(
    work: Callable[[np.ndarray], list[Result]], samples: np.ndarray, workers: int
) -> Generator[Result, None, None]:
    """What `work` makes of each chunk of `samples`, in their order, by forked worker processes.

    An exception of a worker is raised here at once, and so is a worker's death (ChildProcessError).
    """
    gc.collect()  # a worker that inherits a dead DALI pipeline and collects it waits for threads that it does not have
    context = multiprocessing.get_context(
        "fork"
    )  # the source, a million paths, is shared and not sent
    pool = ProcessPoolExecutor(
        workers, context, initializer=start_worker, initargs=(os.getpid(), work)
    )
    waiting: deque[Future[list[Result]]] = deque()
    try:
        for first in range(0, len(samples), CHUNK):
            waiting.append(pool.submit(work_on, samples[first : first + CHUNK]))
            if (
                len(waiting) > 2 * workers
            ):  # as much as a fast worker may be ahead of a slow one, and memory may hold
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker died, killed for want of memory perhaps: run again, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[np.ndarray], list[Any]]  # of this worker process


def start_worker(parent: int, work: Callable[[np.ndarray], list[Any]]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=leave_with, args=(parent,), daemon=True).start()


def leave_with(parent: int) -> None:
    """End this worker when its parent was killed: nothing else would tell it."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def work_on(samples: np.ndarray) -> list[Any]:
    return _work(samples)


def progress(
    items: Iterable[Result], title: str, done: int, total: int
) -> Generator[Result, None, None]:
    """Pass `items` on, showing on stderr how many are done of `total`, how fast, and how long the rest will take."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    shown_at = 0.0
    with Progress(
        *columns, console=Console(stderr=True), auto_refresh=False
    ) as bar:  # by a thread, beside which we fork
        task = bar.add_task(title, total=total, completed=done, rate="")
        for item in items:
            yield item
            done += 1
            if done == total or time.monotonic() - shown_at > REFRESH_EVERY_S:
                speed, shown_at = bar.tasks[task].speed, time.monotonic()
                bar.update(
                    task,
                    completed=done,
                    rate=f"{speed:,.0f} images/s" if speed else "",
                    refresh=True,
                )


def agreed(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The JSON object at `path`. Raises ValueError saying where it is not what `plan` asks for."""
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        then, now = (flat({key: each[key] for key in plan}) for each in (found, plan))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not of a conversion: move it away, or use --overwrite"
        ) from error
    changed = [
        f"{key} was {then.get(key)}, now {now.get(key)}"
        for key in now | then
        if then.get(key) != now.get(key)
    ]
    if changed:
        shown = "; ".join(text if len(text) < 200 else f"{text[:200]}..." for text in changed)
        raise ValueError(
            f"{path} is of other settings or another source: {shown}. Use the same, another DST, or --overwrite"
        )
    return found


def flat(plan: dict[str, Any]) -> dict[str, Any]:
    return {**plan, **plan["settings"], "settings": None}


def summary(final: Path, description: dict[str, Any]) -> dict[str, Any]:
    return {"path": str(final)} | {
        key: value for key, value in description.items() if key != "classes"
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_suffix(".tmp")
    with partial.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Put renames on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def remove(*places: Path) -> None:
    for place in places:
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)


def note(message: str) -> None:
    click.echo(message, err=True)
