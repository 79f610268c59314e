"""Where the time of a training iteration goes, and what to change: `profile({"rsa": recipe, "byol": other}, Path("data"))`.

An iteration is measured as its step on a batch made before, as its views alone, and as both. Methods take turns, so that a
slow minute slows all; the first turn warms up and is dropped.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from pipelines import VIEWS, Batch, Order, Source, choose_backend, open_source, open_views
from pipelines.loading import Loader
from rsa_fast.insight.doctor import read_cgroups
from rsa_fast.insight.timeline import PARTS, Timeline, peak_bytes, reset_peak, used_bytes, watched
from rsa_fast.recipes import Loading, Recipe
from rsa_fast.training.step import Run, build_run, choose_device, train_step

MODES = {
    "step": "step, ready batch",
    "views": "views, page cache",
    "both": "both",
    "cold_views": "views, from the disk",
}
COMPARED = ("step", "views", "both")
STAGE_IMAGES = 32
TOLERANCE = 0.05  # within which two times count as equal
KNOBS = {
    "compute-bound": "precision, batch_size: the loader has time to spare",
    "decode-bound": "threads, up to the cores; smaller images (tools.to_ffcv --max-resolution); backend dali on a GPU",
    "read-bound": "few large files (tools.to_ffcv, tools.to_dali), a local disk, memory that holds the data",
    "host-bound": "threads, prefetch_batches, aggressive_on: try --tune; a larger batch_size if a GPU waits for launches",
}
SHARED = "threads, backend: the views take less time than the step, but take it from the same cores"


def verdict(
    step_ms: float,
    views_ms: float,
    both_ms: float,
    read_ms: float,
    decode_ms: float,
    cold_views_ms: float | None = None,
    overlaps: bool = False,
    idle_share: float = 0.0,
) -> str:
    """What an iteration waits for, a key of `KNOBS`, from times per iteration.

    `read_ms` and `decode_ms` are parts of `views_ms`; `cold_views_ms` counts instead of it where the data do not stay in
    memory. `overlaps` says that the step has hardware of its own, `idle_share` in how many steps that ran out of work.
    """
    loading_ms = cold_views_ms or views_ms
    if loading_ms <= (1 + TOLERANCE) * step_ms:
        waits = (
            overlaps and both_ms > (1 + TOLERANCE) * step_ms
        )  # though the views take no longer than the step
        return "host-bound" if waits or idle_share > 0.5 else "compute-bound"
    read_ms += loading_ms - views_ms
    rest_ms = loading_ms - read_ms - decode_ms
    return max((decode_ms, "decode-bound"), (read_ms, "read-bound"), (rest_ms, "host-bound"))[1]


def ratio(one: list[float], other: list[float]) -> float:
    """Median over the turns of one / other, each pair taken close in time."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


class Repeated(Order):
    """An order with many steps per epoch over few images, so that what starts and ends with an epoch weighs nothing."""

    def __len__(self) -> int:
        return 1000

    def ids(self, epoch: int, step: int) -> np.ndarray:
        epochs, step = divmod(step, super().__len__())
        return super().ids(len(self) * epoch + epochs, step)


def loading_of(recipe: Recipe, source: Source, device: torch.device) -> Loading:
    """The recipe's loading fields, with what `auto` stands for."""
    loading = recipe.loading
    if recipe.backend == "auto":
        loading["backend"] = choose_backend(source, device)[0]
    if recipe.aggressive_on == "auto":
        loading["aggressive_on"] = "device" if device.type == "cuda" else "host"
    return loading


def open_loader(run: Run, source: Source, loading: Loading) -> Loader:
    """Of the views that the run's method reads, and no others."""
    order = Repeated(len(source.manifest), run.recipe.batch_size, run.recipe.seed)
    return open_views(
        source,
        run.recipe.views,
        run.method.reads,
        order,
        device=run.device,
        dtype=run.dtype,
        **loading,
    )


def made_ahead(loader: Loader) -> int:
    """No backend makes more batches ahead: DALI's has two queues of them."""
    return 3 * loader.job.prefetch_batches + 2


@contextmanager
def steady(loader: Loader) -> Iterator[Iterator[Batch]]:
    """The loader's batches; the first `next` also takes those that could be made ahead before anything was waited for."""
    with closing(loader.batches(0)) as batches:
        yield islice(batches, made_ahead(loader), None)


@dataclass
class Subject:
    """A method under measurement: its network, a loader of the views it reads, a batch made before; and what was measured."""

    run: Run
    loader: Loader
    ready: Batch
    own_bytes: int  # on the GPU, of network, optimiser and loader
    loading: Loading
    parts_ms: dict[str, list[dict[str, float]]] = field(
        default_factory=lambda: {mode: [] for mode in MODES}
    )  # by turn
    peak_bytes: int = 0
    idle_share: float = 0.0
    cold_fault: str = ""  # why cold views were not measured

    def measure(self, data: Path, seconds: float) -> None:
        """One turn: every mode for some seconds; cold views last, so that the others find the files in memory."""
        run, timeline = self.run, Timeline(self.run.device)

        def record(mode: str, work: Iterator[object], limit_s: float = seconds) -> int:
            parts_ms, items = timeline.time(work, limit_s)
            self.parts_ms[mode].append(parts_ms)
            return items

        train_step(run, self.ready)
        with watched(run, timeline):
            record("step", (train_step(run, self.ready) for _ in count()))
        self.idle_share = statistics.mean(timeline.idle or [0])
        with steady(self.loader) as batches:
            next(batches)
            items = record("views", batches)
        with steady(self.loader) as batches:
            train_step(run, next(batches))
            reset_peak(run.device)
            used = used_bytes(run.device)
            record("both", (train_step(run, batch) for batch in batches))
            self.peak_bytes = max(self.peak_bytes, peak_bytes(run.device) - used + self.own_bytes)
        source, order = self.loader.job.source, self.loader.job.order
        steps = min(
            items + made_ahead(self.loader), order.count // order.batch_size
        )  # an image is cold once
        files = stored_files(
            source, data, np.concatenate([order.ids(0, step) for step in range(steps)])
        )
        held = self.loading["backend"] == "resident" or not files
        self.cold_fault = self.cold_fault or ("the images are in memory" if held else evict(files))
        if self.cold_fault:
            self.parts_ms["cold_views"].clear()
        else:
            with closing(self.loader.batches(0)) as batches:
                record("cold_views", islice(batches, steps), math.inf)

    def times(self, mode: str) -> list[float]:
        """Milliseconds per iteration in every turn but the first."""
        return [sum(parts.values()) for parts in self.parts_ms[mode][1:]]

    def report(
        self, stages_us: dict[str, float], in_memory: bool, byol: Subject | None
    ) -> dict[str, Any]:
        run, times = self.run, {mode: self.times(mode) for mode in MODES}
        step_ms, views_ms, both_ms = (statistics.median_low(times[mode]) for mode in COMPARED)
        cold_views_ms = statistics.median_low(times["cold_views"]) if times["cold_views"] else None
        parts = self.parts_ms["step"][1 + times["step"].index(step_ms)]
        stall_share = 1 - ratio(times["step"], times["both"])
        threads = min(run.recipe.threads, len(os.sched_getaffinity(0)))
        per_batch = (
            0 if self.loading["backend"] == "resident" else 1e-3 * run.recipe.batch_size / threads
        )
        bound = verdict(
            step_ms=step_ms,
            views_ms=views_ms,
            both_ms=both_ms,
            read_ms=per_batch * stages_us["read"],
            decode_ms=per_batch * stages_us["decode"],
            cold_views_ms=None if in_memory else cold_views_ms,
            overlaps=run.device.type == "cuda",
            idle_share=self.idle_share,
        )
        return {
            "loading": self.loading,
            "step_ms": step_ms,
            "views_ms": views_ms,
            "both_ms": both_ms,
            "cold_views_ms": cold_views_ms,
            "range_ms": {mode: [min(ms), max(ms)] for mode, ms in times.items() if ms},
            "parts_ms": {part: parts.get(part, 0.0) for part in PARTS},
            "images_per_s": 1e3 * run.recipe.batch_size / both_ms,
            "peak_gib": self.peak_bytes / 2**30,
            "stall_share": stall_share,
            "over_byol": {mode: ratio(times[mode], byol.times(mode)) for mode in COMPARED}
            if byol
            else None,
            "cold_fault": self.cold_fault,
            "verdict": bound,
            "knob": SHARED
            if bound == "compute-bound" and stall_share > TOLERANCE
            else KNOBS[bound],
        }


@contextmanager
def open_subject(recipe: Recipe, source: Source) -> Iterator[Subject]:
    used = used_bytes(choose_device(recipe.device))
    run = build_run(recipe, len(source.manifest))
    loading = loading_of(recipe, source, run.device)
    with open_loader(run, source, loading) as loader:
        own_bytes = used_bytes(run.device) - used
        with closing(loader.batches(0)) as batches:
            ready = next(batches)
        yield Subject(run, loader, ready, own_bytes, loading)


def profile(
    recipes: dict[str, Recipe],
    data: Path,
    *,
    repeats: int = 5,
    seconds: float = 1.0,
    trace: Path | None = None,
) -> dict[str, Any]:
    """Measure named recipes of one dataset on the images under `data`, in `repeats` turns.

    Times are milliseconds per iteration, medians of the turns, with the lowest and the highest in `range_ms`. `parts_ms` are of
    the turn with the median step and add up to it. Cold views include the loader's start, as an image is cold once.
    `stages_us` are microseconds per image, for all four views, on one thread. `stall_share` is 1 - step / both. `peak_gib` is
    of the GPU or, on a CPU, of the whole process. `trace` is where to write a Chrome trace of three iterations of each.

    Raises as `open_source`, `build_run` and `open_views` do.
    """
    source = open_source(data, "pretrain")
    with ExitStack() as opened:
        subjects = {
            name: opened.enter_context(open_subject(recipe, source))
            for name, recipe in recipes.items()
        }
        run = next(iter(subjects.values())).run
        for turn in range(repeats + 1):
            for name, subject in subjects.items():
                print(
                    f"{name}: {f'turn {turn} of {repeats}' if turn else 'warming up'}",
                    file=sys.stderr,
                )
                subject.measure(data, seconds)
        stages_us, stored_bytes = measure_stages(source, run)
        if trace:
            write_trace(subjects, trace)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    in_memory = stored_bytes < 0.8 * min(
        memory, read_cgroups(Path("/proc/self/cgroup").read_text())[1]
    )
    methods = {
        name: subject.report(stages_us, in_memory, subjects.get("byol"))
        for name, subject in subjects.items()
    }
    report = {
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "batch_size": run.recipe.batch_size,
    }
    report |= {"repeats": repeats, "stages_us": stages_us, "methods": methods}
    if {"rsa", "byol"} <= methods.keys():
        report["rsa_over_byol"] = methods["rsa"]["over_byol"]["both"]
    return report


def measure_stages(source: Source, run: Run) -> tuple[dict[str, float], float]:
    """Microseconds per image, on one thread and from the page cache, of reading, decoding, making both crops, and both
    aggressive stages; and the bytes of all images as they are stored."""
    from pipelines.host_ops import batch_views  # numba, without which a GPU can train
    from pipelines.native_views import NativeViews

    order = Order(len(source.manifest), min(STAGE_IMAGES, len(source.manifest)), run.recipe.seed)
    with open_views(
        source,
        run.recipe.views,
        frozenset(VIEWS),
        order,
        backend="native",
        threads=1,
        dtype=run.dtype,
    ) as loader:
        assert isinstance(loader, NativeViews)
        ids, landing, stored = (
            order.ids(0, 0).tolist(),
            loader.landing,
            source.encoded or source.read,
        )
        images = [loader.decode(i) for i in ids]
        pixels, offsets = (
            np.concatenate([image.ravel() for image in images]),
            np.cumsum([0, *(i.size for i in images[:-1])]),
        )
        drawn = (
            pixels,
            offsets,
            source.manifest.sizes[ids],
            np.arange(len(ids)),
            loader.job.params(0, np.array(ids)),
        )
        views, unread = (
            landing.arrays(landing.slot(len(ids))),
            np.empty((len(ids), 0, 0, 3), landing.table.dtype),
        )
        work: dict[str, Callable[[], object]] = {
            "read": lambda: [stored(i) for i in ids],
            "decode": lambda: [loader.decode(i) for i in ids],
            "crop": lambda: batch_views(*drawn, landing.table, views[0], views[1], unread, unread),
            "aggressive": lambda: batch_views(*drawn, landing.table, *views),
        }
        times: dict[str, list[float]] = {stage: [] for stage in work}
        for _ in range(6):  # the first warms up
            for stage, do in work.items():
                began = time.perf_counter()
                do()
                times[stage].append(1e6 * (time.perf_counter() - began) / len(ids))
    us = {stage: min(values[1:]) for stage, values in times.items()}  # what comes between only adds
    us["decode"], us["aggressive"] = (
        max(0.0, us["decode"] - us["read"]),
        max(0.0, us["aggressive"] - us["crop"]),
    )
    return us, statistics.mean(size_bytes(stored(i)) for i in ids) * len(source.manifest)


def size_bytes(image: bytes | np.ndarray) -> int:
    """The size of an encoded image, or of the pixels of a stored one."""
    return image.nbytes if isinstance(image, np.ndarray) else len(image)


def stored_files(source: Source, data: Path, ids: np.ndarray) -> list[Path]:
    """The files that some images are read from while training."""
    if source.manifest.paths:
        return [data / source.manifest.paths[i] for i in ids]
    return [source.beton] if source.beton else list(data.rglob("*.tar")) if source.encoded else []


def evict(files: list[Path]) -> str:
    """Have the system drop files from its page cache; returns why they are still there, or nothing."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.fdatasync(file.fileno())  # what is not yet written stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    looked_at, stay = files[::20], 0  # not at all: a look has the system read what is not there
    for path in looked_at:
        with path.open("rb", buffering=0) as file:
            try:
                os.preadv(
                    file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT
                )  # fails rather than wait for the disk
                stay += 1
            except BlockingIOError:
                pass
            except OSError as error:
                return f"the file system does not tell what is in the page cache: {error}"
    return (
        f"{stay} of {len(looked_at)} files stay in the page cache"
        if 10 * stay > len(looked_at)
        else ""
    )


def write_trace(subjects: dict[str, Subject], path: Path) -> None:
    """Three iterations of each method, for Perfetto or chrome://tracing."""
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for name, subject in subjects.items():
            with closing(subject.loader.batches(0)) as batches:
                for batch in islice(batches, 3):
                    with torch.profiler.record_function(f"{name} step"):
                        train_step(subject.run, batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
