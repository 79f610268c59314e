"""The conversion that `to_ffcv` and `to_dali` share.

Images are encoded in parallel and written in order. The result is read back, and only then gets its
final name.

During the conversion all files of a split are in `DST/<split>.partial/`: the settings
(`plan.json`), the images written so far, and a journal of them (`journal`). An image counts as
written when it is in the journal. It is on the disk before its journal record is. After a kill,
everything that is not in the journal is cut off. The result is therefore the same as without the
kill.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
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
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rsa_fast.pipelines.draws import sample_keys
from rsa_fast.pipelines.files import write_whole
from rsa_fast.pipelines.layouts import has_test_split, inventory, open_source
from rsa_fast.pipelines.machine import cores
from rsa_fast.pipelines.packed import ENTRY, VERSION, Packed
from rsa_fast.pipelines.sources import Source, open_image, to_rgb
from rsa_fast.pipelines.workers import FORKS

Result = TypeVar("Result")

WRITE_MODES = ("proportion", "jpg", "raw", "smart", "passthrough")
# One record per image. The PSNR is NaN for images stored as pixels or with their original bytes.
JOURNAL = np.dtype([("entry", ENTRY), ("crc32", "<u4"), ("psnr_db", "<f4")])
# PIL's filter that is closest to ffcv's area filter (cv2.INTER_AREA). On 60 photographs HAMMING
# differs from it by 0.87 levels, BILINEAR by 1.14 and LANCZOS by 1.90. BOX differs by 2.80, because
# it counts a pixel fully where its centre falls.
RESIZE_FILTER = Image.Resampling.HAMMING
CHUNK = 8  # images per task of a worker
SYNC_EVERY_S = 2.0  # a kill loses at most the work of this time
REFRESH_EVERY_S = 0.2  # how often the progress bar is drawn
# The arguments and options that both commands have.
PARAMS: list[click.Parameter] = [
    click.Argument(["src"], type=click.Path(path_type=Path, exists=True, file_okay=False)),
    click.Argument(["dst"], type=click.Path(path_type=Path, file_okay=False)),
    click.Option(
        ["--jpeg-quality"],
        type=click.IntRange(1, 100),
        default=90,
        show_default=True,
        help="Quality of new JPEGs.",
    ),
    click.Option(
        ["--exif-orientation"],
        is_flag=True,
        help="Turn images upright by their EXIF orientation, which is ignored otherwise.",
    ),
    click.Option(
        ["--workers"],
        type=click.IntRange(1),
        default=cores,
        help="Number of processes, by default one per core.",
    ),
    click.Option(
        ["--overwrite"],
        is_flag=True,
        help="Delete these splits in DST and start again.",
    ),
]


@dataclass(frozen=True)
class Encoding:
    """How images are stored. At most one of `longest_px` and `shortest_px` is set.

    The write modes jpg, raw, smart and proportion are those of ffcv's RGBImageField. smart stores a
    JPEG when an image has more than `smart_threshold_bytes` of pixels. proportion stores a JPEG
    with `compress_probability`, decided by a hash of the seed and the sample. passthrough keeps the
    bytes of JPEGs that need no resizing and are grayscale or RGB. Other images become JPEGs.
    """

    write_mode: str
    longest_px: int | None = None
    shortest_px: int | None = None
    jpeg_quality: int = 90
    compress_probability: float = 0.5
    smart_threshold_bytes: int | None = None
    seed: int = 0

    def sizes(self, sizes: np.ndarray) -> np.ndarray:
        """The stored heights and widths `(..., 2)` of images of these `sizes`. Images never grow.

        Sizes are rounded down as in ffcv, but exactly: ffcv's floats lose a pixel for some sizes.
        """
        limit = self.longest_px or self.shortest_px
        if limit is None:
            return sizes
        side = (sizes.max if self.longest_px else sizes.min)(-1, keepdims=True)
        return np.where(side > limit, np.maximum(1, sizes.astype(np.int64) * limit // side), sizes)

    def stores_raw(self, sample: int, pixels: np.ndarray) -> bool:
        """Whether a sample is stored as pixels, not as a JPEG."""
        match self.write_mode:
            case "raw":
                return True
            case "smart":
                assert self.smart_threshold_bytes is not None, "smart needs smart_threshold_bytes"
                return pixels.nbytes <= self.smart_threshold_bytes
            case "proportion":
                # The seed is changed so that the choice does not depend on the order and the views.
                key = sample_keys(self.seed ^ 0x726177, 0, np.array([sample]))[0]
                share = float(key >> np.uint64(11)) * 2.0**-53
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
    """Appends images in order, after the entries that its file already has."""

    def append(self, data: bytes, label: int) -> tuple[int, int]: ...
    def sync(self) -> None: ...
    def finish(self, entries: np.ndarray) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class Format:
    """A storage format.

    `writer(path, sizes, done)` makes a writer for images of the stored `sizes` `(N, 2)`, of which
    `done` entries are written. `open(path)` reads a finished split. `label(packed, sample)` is the
    label that is stored with a sample.
    """

    name: str
    suffix: str  # the suffix of the split's file; empty for a folder
    writer: Callable[[Path, np.ndarray, np.ndarray], Writer]
    open: Callable[[Path], Packed]
    label: Callable[[Packed, int], int]


def run(
    src: Path,
    dst: Path,
    *,
    form: Format,
    encoding: Encoding,
    order: Callable[[int], np.ndarray],
    settings: dict[str, Any],
    workers: int,
    overwrite: bool,
    exif_orientation: bool,
) -> None:
    """Convert the training split and, if there is one, the test split, which is named val.

    Prints what was written as one JSON object. `order(count)` gives the samples in the order of
    writing. `exif_orientation` is that of `open_source`, and the other keyword arguments are those
    of `convert`. The headers of all images are checked before anything is written. Errors are
    raised as click's exceptions, for the command line.
    """
    open_images = partial(open_source, src, cache=dst, exif_orientation=exif_orientation)
    try:
        if dst.resolve() == src.resolve():
            raise ValueError(f"{dst} is the source itself: name another folder")
        sources = {"train": open_images("train")}
        if has_test_split(src):
            sources["val"] = open_images("test")
        else:
            note(f"{src} has no val/ or test/: only train is converted")
        note(inventory(sources["train"], sources.get("val")))
        written = {
            split: convert(
                source,
                dst,
                split,
                form=form,
                encoding=encoding,
                order=order(len(source.manifest)),
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
    *,
    form: Format,
    encoding: Encoding,
    order: np.ndarray,
    settings: dict[str, Any],
    workers: int,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write one split to `dst`, or continue an earlier run. Returns the summary of the split.

    `settings` are all options that change the bytes. They are recorded. An existing split with
    other settings or from another source raises ValueError, unless `overwrite` is set. An image
    that cannot be read raises ValueError with its name, and a full disk raises OSError. After
    either error the next run continues with what was written.
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
    work, final = dst / f"{split}.partial", dst / f"{split}{form.suffix}"
    description = dst / f"{split}.json"
    if overwrite:
        remove(description, work, final)
    if description.exists():
        recorded = read_matching(description, plan)
        if not final.exists():
            raise ValueError(
                f"{description} exists but {final} does not: put it back, or use --overwrite"
            )
        # The folder still exists if the process was killed after the last rename.
        remove(work)
        note(f"{final} is complete: left unchanged")
        return summary(final, recorded)
    if final.exists() and not (work / description.name).exists():
        raise ValueError(
            f"{final} exists but was not written by rsa-fast convert: move it, or use --overwrite"
        )
    work.mkdir(parents=True, exist_ok=True)
    if (work / "plan.json").exists():
        read_matching(work / "plan.json", plan)
        note(f"continuing with {work}")
    else:
        write_json(work / "plan.json", plan)
    with (work / "journal").open("a+b") as journal:
        try:
            # The lock belongs to this process and ends with it, even if it is killed.
            fcntl.lockf(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"another run is writing {work}: wait for it or end it") from error
        if not (work / description.name).exists():
            payload = work / final.name
            try:
                records = fill(
                    source,
                    payload,
                    form=form,
                    encoding=encoding,
                    order=order,
                    journal=journal,
                    workers=workers,
                )
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                free_gb = shutil.disk_usage(dst).free / 1e9
                raise OSError(
                    f"the disk of {dst} is full ({free_gb:.1f} GB free). "
                    f"Make room and run again to continue with {work}"
                ) from error
            verify(source, payload, form=form, order=order, records=records, workers=workers)
            write_json(work / description.name, plan | statistics(payload, records))
        if (work / final.name).exists():
            (work / final.name).rename(final)
        # The description is renamed last: a split that has one is complete.
        (work / description.name).rename(description)
        sync_folder(dst)
    remove(work)
    return summary(final, json.loads(description.read_text()))


def fill(
    source: Source,
    payload: Path,
    *,
    form: Format,
    encoding: Encoding,
    order: np.ndarray,
    journal: io.BufferedRandom,
    workers: int,
) -> np.ndarray:
    """Encode and write the images not in the journal. Returns all `JOURNAL` records `(N,)`."""
    records = np.zeros(len(order), JOURNAL)
    # The journal is read by this handle, because closing another one of the file drops the lock.
    journal.seek(0)
    earlier = journal.read()
    done = records[: len(earlier) // JOURNAL.itemsize]  # an incomplete record is not counted
    done[:] = np.frombuffer(earlier[: done.nbytes], JOURNAL)
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

    encoded = in_order(encode_chunk, order[written:], workers)
    images = progress(encoded, "write", written, len(order))
    # Closing `images` ends the workers at once, even if a traceback keeps the generator alive.
    with closing(writer), closing(images):
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
    """One image as it will be stored.

    Raises ValueError with its name if it cannot be read, or if its size has changed since the scan
    of the source.
    """
    scanned = source.manifest.sizes[sample]
    height, width = encoding.sizes(scanned).tolist()
    same_size = [height, width] == scanned.tolist()
    if encoding.write_mode == "passthrough" and same_size and (data := plain_jpeg(source, sample)):
        return Encoded(data, height, width, raw=False)
    pixels = source.read(sample)
    if list(pixels.shape[:2]) != scanned.tolist():
        raise ValueError(
            f"{image_name(source, sample)} had {scanned} pixels when scanned, and now has "
            f"{pixels.shape[:2]}: start again"
        )
    image = Image.fromarray(pixels)
    if not same_size:
        image = image.resize((width, height), RESIZE_FILTER, reducing_gap=None)
        pixels = np.asarray(image)
    if encoding.stores_raw(sample, pixels):
        return Encoded(pixels.tobytes(), height, width, raw=True)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=encoding.jpeg_quality)
    decoded = to_rgb(open_image(buffer))
    return Encoded(buffer.getvalue(), height, width, raw=False, psnr_db=psnr_db(pixels, decoded))


def plain_jpeg(source: Source, sample: int) -> bytes | None:
    """The image's own bytes if they are a JPEG that every decoder accepts, otherwise None.

    A CMYK JPEG is not accepted by every decoder. For a damaged image, `source.read` raises the
    error that names it.
    """
    try:
        data = source.encoded(sample) if source.encoded else b""
        with open_image(io.BytesIO(data)) as image:
            plain = image.format == "JPEG" and image.mode in ("L", "RGB")
            unchanged = image.size[::-1] == tuple(source.manifest.sizes[sample])
            return data if plain and unchanged else None
    except (OSError, ValueError):
        return None


def psnr_db(original: np.ndarray, decoded: np.ndarray) -> float:
    """The peak signal-to-noise ratio of two 8-bit images in dB. It is 100 if they are equal."""
    error = np.square(original.astype(np.float32) - decoded).mean()
    return min(100.0, float(10 * np.log10(255**2 / max(error, 1e-6))))


def verify(
    source: Source,
    payload: Path,
    *,
    form: Format,
    order: np.ndarray,
    records: np.ndarray,
    workers: int,
) -> None:
    """Read every image back as a training run will.

    Raises ValueError with the name of an image that differs from what was encoded.
    """
    packed = form.open(payload)
    if not np.array_equal(packed.entries, records["entry"]):
        raise ValueError(
            f"the tables of {payload} differ from what was written: the disk may be faulty. "
            "Restart with --overwrite"
        )

    def check_chunk(samples: np.ndarray) -> list[int]:
        for sample in samples:
            check(int(sample))
        return list(samples)

    def check(sample: int) -> None:
        data = packed.stored(sample)
        original = image_name(source, int(order[sample]))
        same_bytes = zlib.crc32(data) == records["crc32"][sample]
        if not same_bytes or form.label(packed, sample) != records["entry"]["label"][sample]:
            raise ValueError(
                f"{packed.name(sample)} ({original}) differs from what was written: the disk may "
                "be faulty. Restart with --overwrite"
            )
        try:
            packed.decode(sample, data)
        except ValueError as error:
            raise ValueError(
                f"{original} of the source is damaged ({error}): replace or delete it, then "
                "restart with --overwrite"
            ) from error

    checked = in_order(check_chunk, np.arange(len(order)), workers)
    for _ in progress(checked, "verify", 0, len(order)):
        pass


def image_name(source: Source, sample: int) -> str:
    return source.manifest.paths[sample] if source.manifest.paths else f"image {sample}"


def statistics(payload: Path, records: np.ndarray) -> dict[str, Any]:
    """Bytes, numbers of images and PSNR of a split, for its description."""
    psnr = records["psnr_db"][~np.isnan(records["psnr_db"])].astype(float)
    raw = int(records["entry"]["raw"].sum())
    files = [payload] if payload.is_file() else sorted(payload.iterdir())
    return {
        "bytes": sum(file.stat().st_size for file in files),
        "jpg": len(records) - raw,
        "raw": raw,
        "reencoded": len(psnr),
        "psnr_db": psnr_summary(psnr) if len(psnr) else None,
    }


def psnr_summary(psnr: np.ndarray) -> dict[str, float]:
    return {"median": round(float(np.median(psnr)), 2), "min": round(float(psnr.min()), 2)}


def in_order(
    work: Callable[[np.ndarray], list[Result]], samples: np.ndarray, workers: int
) -> Generator[Result, None, None]:
    """Apply `work` to chunks of `samples` in forked processes. Yields the results in order.

    An exception in a worker is raised here at once. A worker that dies raises ChildProcessError.
    """
    pool = ProcessPoolExecutor(
        workers, FORKS, initializer=start_worker, initargs=(os.getpid(), work)
    )
    waiting: deque[Future[list[Result]]] = deque()
    try:
        for first in range(0, len(samples), CHUNK):
            waiting.append(pool.submit(work_on, samples[first : first + CHUNK]))
            # This limits how far a fast worker gets ahead of a slow one, and so the memory used.
            if len(waiting) > 2 * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except BrokenProcessPool as error:
        raise ChildProcessError(
            "a worker process died, perhaps for lack of memory: run again with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[np.ndarray], list[Any]]  # the function of this worker process


def start_worker(parent: int, work: Callable[[np.ndarray], list[Any]]) -> None:
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    threading.Thread(target=end_with_parent, args=(parent,), daemon=True).start()


def end_with_parent(parent: int) -> None:
    """End this worker when its parent has ended. A killed parent cannot end its workers itself."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def work_on(samples: np.ndarray) -> list[Any]:
    return _work(samples)


def progress(
    items: Iterable[Result], title: str, done: int, total: int
) -> Generator[Result, None, None]:
    """Yield `items` with a progress bar on stderr. `done` of the `total` items were done before.

    The bar shows how many are done, the speed and the time that is left.
    """
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    shown_at = 0.0
    # Refreshing automatically would start a thread, and we fork.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task(title, total=total, completed=done, rate="")
        for item in items:
            yield item
            done += 1
            if done == total or time.monotonic() - shown_at > REFRESH_EVERY_S:
                speed, shown_at = bar.tasks[task].speed, time.monotonic()
                rate = f"{speed:,.0f} images/s" if speed else ""
                bar.update(task, completed=done, rate=rate, refresh=True)


def read_matching(path: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The JSON object at `path`. Raises ValueError with the differences if it does not match."""
    try:
        recorded: dict[str, Any] = json.loads(path.read_text())
        then, now = (flat({key: each[key] for key in plan}) for each in (recorded, plan))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} was not written by a conversion: move it away, or use --overwrite"
        ) from error
    changes = [
        f"{key} was {then.get(key)}, now {now.get(key)}"
        for key in now | then
        if then.get(key) != now.get(key)
    ]
    if changes:
        shown = "; ".join(text if len(text) < 200 else f"{text[:200]}..." for text in changes)
        raise ValueError(
            f"{path} was made with other settings or from another source: {shown}. "
            "Use the same settings and source, another DST, or --overwrite"
        )
    return recorded


def flat(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan with its settings on the top level."""
    return {**plan, **plan["settings"], "settings": None}


def summary(final: Path, description: dict[str, Any]) -> dict[str, Any]:
    """The path of a split and its description without the class names."""
    rest = {key: value for key, value in description.items() if key != "classes"}
    return {"path": str(final)} | rest


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, lambda file: file.write(json.dumps(content, indent=1).encode()))


def sync_folder(folder: Path) -> None:
    """Make sure that renames in this folder are on the disk."""
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
