"""Measure where a training iteration spends its time, and which setting to change.

    profile({"rsa": recipe, "byol": other}, Path("data"))

An iteration is measured in several modes: its step on a batch in memory, its views alone, and both.
The methods take turns, so a slow minute of the machine affects all of them. The first turn is a
warm-up and is not counted.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity

from rsa_fast.insight.doctor import read_memory_bytes
from rsa_fast.insight.measure import (
    by_step,
    median_ratio,
    open_loader,
    prefetched_batches,
    skip_prefetched,
)
from rsa_fast.insight.timeline import (
    PARTS,
    Timeline,
    mark_parts,
    peak_bytes,
    reset_peak,
    used_bytes,
)
from rsa_fast.pipelines import BACKENDS, Batch, Loader, Loading, Order, Source, open_views
from rsa_fast.pipelines.layouts import Data
from rsa_fast.pipelines.machine import cores
from rsa_fast.recipes import Recipe
from rsa_fast.training.step import (
    Run,
    build_run,
    choose_device,
    for_any_device,
    train_step,
    train_steps,
)

log = logging.getLogger("rsa_fast")

# The modes in the order in which they are measured, with their row titles.
MODES = {
    "step": "step, ready batch",
    "views": "views, page cache",
    "both": "both",
    "cold_views": "views, from the disk",
}
COMPARED_MODES = ("step", "views", "both")
STAGE_IMAGES = 32
EVICT_TRIES = 4
TOLERANCE = 0.05  # two times count as equal if they differ by less
KNOBS = {
    "compute-bound": "precision, batch_size: the loader is fast enough",
    "decode-bound": "threads, up to the cores; "
    "smaller images (rsa-fast convert ffcv --max-resolution); backend dali on a GPU",
    "read-bound": "few large files (rsa-fast convert), with order=blocks if they do not fit in "
    "memory; a local disk (rsa-fast stage); more memory, so that the data fit",
    "host-bound": "threads, prefetch_batches, aggressive_on: try --tune; "
    "a larger batch_size if a GPU waits for launches",
}
# This is for packed data that do not stay in memory. It hardly helps local NVMe disks, on which the
# full order reads 5,100 to 6,100 images/s and blocks read 6,100 to 6,700.
BLOCKS_KNOB = (
    "order=blocks, which reads 1 MiB at a time: up to 6 times the images/s if a disk is limited "
    "in reads per second (hard disks, arrays, network disks); a local NVMe disk (rsa-fast stage), "
    "which needs no blocks; more memory, so that the data fit"
)
SHARED_CORES_KNOB = (
    "threads, backend: the views take less time than the step, but use the same cores"
)


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
    """The limit of an iteration, as a key of `KNOBS`, from times per iteration.

    `read_ms` and `decode_ms` are parts of `views_ms`. Pass `cold_views_ms` if the data do not stay
    in memory. It then replaces `views_ms`, and the additional time counts as reading. `overlaps` is
    true if the step has its own hardware, so that views can be made at the same time. `idle_share`
    is the share of the steps in which that hardware had no work.
    """
    loading_ms = cold_views_ms or views_ms
    if loading_ms <= (1 + TOLERANCE) * step_ms:
        # The step may wait for the views although they do not take longer than the step.
        waits = overlaps and both_ms > (1 + TOLERANCE) * step_ms
        return "host-bound" if waits or idle_share > 0.5 else "compute-bound"
    read_ms += loading_ms - views_ms
    rest_ms = loading_ms - read_ms - decode_ms
    return max((decode_ms, "decode-bound"), (read_ms, "read-bound"), (rest_ms, "host-bound"))[1]


@dataclass
class Subject:
    """A method under measurement and its results so far."""

    run: Run
    loader: Loader  # makes the views that the method reads
    ready: tuple[Batch, ...]  # batches for steps without a loader
    own_bytes: int  # the GPU memory of network, optimiser and loader
    loading: Loading
    timeline: Timeline
    # The parts of an iteration in each mode, with one dictionary per turn.
    parts_ms: dict[str, list[dict[str, float]]] = field(
        default_factory=lambda: {mode: [] for mode in MODES}
    )
    peak_bytes: int = 0
    idle_share: float = 0.0
    cold_fault: str = ""  # the reason why cold views were not measured

    def measure(self, seconds: float) -> None:
        """Measure one turn: every mode for some seconds.

        Cold views come last, so that the other modes find the files in memory.
        """
        self.measure_step(seconds)
        steps = self.measure_views(seconds)
        self.measure_both(seconds)
        self.measure_cold_views(steps)

    def measure_step(self, seconds: float) -> None:
        train_step(self.run, *self.ready)
        with mark_parts(self.run, self.timeline):
            self.record("step", (train_step(self.run, *self.ready) for _ in count()), seconds)
        self.idle_share = statistics.mean(self.timeline.idle or [0])

    def measure_views(self, seconds: float) -> int:
        """Returns the number of steps whose batches were read in this time."""
        with skip_prefetched(self.loader) as batches:
            next(batches)
            return self.record("views", by_step(self.loader, batches), seconds)

    def measure_both(self, seconds: float) -> None:
        device = self.run.device
        with skip_prefetched(self.loader) as batches:
            steps = train_steps(self.run, batches)
            next(steps)
            reset_peak(device)
            used = used_bytes(device)
            self.record("both", steps, seconds)
            # This excludes the memory of other methods on the GPU.
            peak = peak_bytes(device) - used + self.own_bytes
            self.peak_bytes = max(self.peak_bytes, peak)

    def measure_cold_views(self, steps: int) -> None:
        """Read the batches of some steps, and the prefetched ones, just after dropping their files.

        The files are dropped from the page cache. If this is impossible, `cold_fault` is the
        reason.
        """
        order = self.loader.job.order
        if order.blocks:
            self.cold_fault = "order = blocks reads windows ahead, longer than the measurement"
        # An image is cold only once, so at most one epoch can be read.
        steps += math.ceil(prefetched_batches(self.loader) / order.accumulate)
        batches = min(steps, order.count // order.batch_size) * order.accumulate
        ids = np.concatenate([order.ids(0, number) for number in range(batches)])
        files = self.loader.job.source.files(ids.tolist())
        if not self.cold_fault:
            in_memory = BACKENDS[self.loading.backend].resident or not files
            self.cold_fault = "the images are in memory" if in_memory else evict(files)
        if self.cold_fault:
            self.parts_ms["cold_views"].clear()
            return
        with closing(self.loader.batches(0)) as cold_batches:
            first_batches = islice(cold_batches, batches)
            self.record("cold_views", by_step(self.loader, first_batches), math.inf)

    def record(self, mode: str, work: Iterator[object], seconds: float) -> int:
        """Time `work` for some seconds or to its end. Returns the number of items."""
        parts_ms, items = self.timeline.time(work, seconds)
        self.parts_ms[mode].append(parts_ms)
        return items

    def times(self, mode: str) -> list[float]:
        """Milliseconds per iteration in every turn except the first."""
        return [sum(parts.values()) for parts in self.parts_ms[mode][1:]]

    def summary(
        self, stages_us: dict[str, float], in_memory: bool, byol: Subject | None
    ) -> dict[str, Any]:
        """The method's part of the result of `profile`.

        `in_memory` is true if the data stay in the page cache.
        """
        recipe = self.run.recipe
        times = {mode: self.times(mode) for mode in MODES}
        medians = {mode: statistics.median_low(ms) for mode, ms in times.items() if ms}
        cold_views_ms = medians.get("cold_views")
        median_turn = 1 + times["step"].index(medians["step"])
        parts_ms = self.parts_ms["step"][median_turn]
        threads = min(self.loading.threads, cores())
        # Convert microseconds per image on one thread to milliseconds per batch on all threads.
        decodes = not BACKENDS[self.loading.backend].resident
        batch_ms_per_us = 1e-3 * recipe.batch_size / threads if decodes else 0
        bottleneck = verdict(
            step_ms=medians["step"],
            views_ms=medians["views"],
            both_ms=medians["both"],
            read_ms=batch_ms_per_us * stages_us["read"],
            decode_ms=batch_ms_per_us * stages_us["decode"],
            cold_views_ms=None if in_memory else cold_views_ms,
            overlaps=self.run.device.type == "cuda",
            idle_share=self.idle_share,
        )
        stall_share = 1 - median_ratio(times["step"], times["both"])
        shares_cores = bottleneck == "compute-bound" and stall_share > TOLERANCE
        knob = SHARED_CORES_KNOB if shares_cores else KNOBS[bottleneck]
        if bottleneck == "read-bound" and not in_memory and recipe.order == "full":
            packed = self.loader.job.source.extents is not None
            knob = BLOCKS_KNOB if packed else knob
        over_byol = None
        if byol:
            over_byol = {m: median_ratio(times[m], byol.times(m)) for m in COMPARED_MODES}
        return {
            "loading": asdict(self.loading),
            "step_ms": medians["step"],
            "views_ms": medians["views"],
            "both_ms": medians["both"],
            "cold_views_ms": cold_views_ms,
            "range_ms": {mode: [min(ms), max(ms)] for mode, ms in times.items() if ms},
            "parts_ms": {part: parts_ms.get(part, 0.0) for part in PARTS},
            "images_per_s": 1e3 * recipe.batch_size / medians["both"],
            "peak_gib": self.peak_bytes / 2**30,
            "stall_share": stall_share,
            "over_byol": over_byol,
            "cold_fault": self.cold_fault,
            "verdict": bottleneck,
            "knob": knob,
        }


@contextmanager
def open_subject(recipe: Recipe, source: Source) -> Iterator[Subject]:
    used = used_bytes(choose_device(recipe.device))
    run = build_run(recipe, len(source.manifest))
    with open_loader(run, source) as loader:
        own_bytes = used_bytes(run.device) - used
        with closing(loader.batches(0)) as batches:
            ready = (next(batches),) * recipe.accumulate
        yield Subject(
            run=run,
            loader=loader,
            ready=ready,
            own_bytes=own_bytes,
            loading=loader.job.loading,
            timeline=Timeline(run.device),
        )


def profile(
    recipes: dict[str, Recipe],
    data: Data,
    *,
    repeats: int = 5,
    seconds: float = 1.0,
    trace: str | Path | None = None,
) -> dict[str, Any]:
    """Measure named recipes of one dataset on the images under `data`, in `repeats` turns.

    Times are milliseconds per iteration, as medians of the turns. `range_ms` has the lowest and the
    highest time. `parts_ms` are the parts of the step with the median time, and add up to it. Cold
    views include the loader's start, because an image is cold only once. `stages_us` are
    microseconds per image on one thread, for all four views. `stall_share` is 1 - step / both.
    `peak_gib` is the GPU's memory or, on a CPU, that of the whole process. A Chrome trace of three
    iterations of each recipe is written to `trace`.

    Raises the errors of `open_source`, `build_run` and `open_views`.
    """
    recipes = {name: for_any_device(recipe) for name, recipe in recipes.items()}
    recipe = next(iter(recipes.values()))
    source = recipe.open_source(data, "pretrain")
    with ExitStack() as stack:
        subjects = {
            name: stack.enter_context(open_subject(recipe, source))
            for name, recipe in recipes.items()
        }
        run = next(iter(subjects.values())).run
        for turn in range(repeats + 1):
            for name, subject in subjects.items():
                log.info(f"{name}: {f'turn {turn} of {repeats}' if turn else 'warming up'}")
                subject.measure(seconds)
        stages_us, stored_bytes = measure_stages(source, run)
        if trace:
            write_trace(subjects, Path(trace))
    # This is the same share of the memory as in the doctor's check of the page cache.
    in_memory = stored_bytes < 0.8 * read_memory_bytes()
    byol = subjects.get("byol")
    methods = {
        name: subject.summary(stages_us, in_memory, byol) for name, subject in subjects.items()
    }
    summary = {
        "dataset": run.recipe.data_name,
        "device": str(run.device),
        "dtype": str(run.dtype).removeprefix("torch."),
        "batch_size": run.recipe.batch_size,
        "repeats": repeats,
        "stages_us": stages_us,
        "methods": methods,
    }
    if {"rsa", "byol"} <= methods.keys():
        summary["rsa_over_byol"] = methods["rsa"]["over_byol"]["both"]
    return summary


def measure_stages(source: Source, run: Run) -> tuple[dict[str, float], float]:
    """The microseconds per image of each stage of loading, and the bytes of all stored images.

    The stages are reading from the page cache, decoding, making all crops, and the aggressive
    stages of the crops. All run on one thread.
    """
    from rsa_fast.pipelines.host_ops import (
        batch_views,  # imported here, because a GPU can train without numba
    )
    from rsa_fast.pipelines.native_views import NativeViews

    images, spec = len(source.manifest), run.recipe.views
    order = Order(images, min(STAGE_IMAGES, images), run.recipe.seed)
    with open_views(
        source,
        spec,
        frozenset((*spec.names("weak"), *spec.names("aggressive"))),
        order,
        dtype=run.dtype,
        loading=Loading("native", threads=1),
    ) as loader:
        assert isinstance(loader, NativeViews)
        decode = loader.decode
        read_stored = source.encoded or source.read
        ids = order.ids(0, 0).tolist()
        decoded = [decode(i) for i in ids]
        pixels = np.concatenate([image.ravel() for image in decoded])
        offsets = np.cumsum([0, *(image.size for image in decoded[:-1])])
        sizes = source.manifest.sizes[ids]
        places = np.arange(len(ids))
        params = loader.job.params(0, np.array(ids))
        transfer = loader.transfer
        weak, aggressive = transfer.arrays(transfer.take(len(ids)))
        unread = len(weak) * (np.empty((len(ids), 0, 0, 3), transfer.table.dtype),)

        def make_views(aggressive: tuple[np.ndarray, ...]) -> None:
            batch_views(
                pixels=pixels,
                offsets=offsets,
                sizes=sizes,
                ids=places,
                params=params,
                table=transfer.table,
                weak=weak,
                aggressive=aggressive,
            )

        us = fastest_us(
            {
                "read": lambda: [read_stored(i) for i in ids],
                "decode": lambda: [decode(i) for i in ids],
                "crop": lambda: make_views(unread),
                "aggressive": lambda: make_views(aggressive),
            },
            len(ids),
        )
    # The times of decoding include reading, and those of aggressive views include the crops. These
    # are subtracted.
    us["decode"] = max(0.0, us["decode"] - us["read"])
    us["aggressive"] = max(0.0, us["aggressive"] - us["crop"])
    mean_bytes = statistics.mean(size_bytes(read_stored(i)) for i in ids)
    return us, mean_bytes * images


def fastest_us(work: dict[str, Callable[[], object]], images: int) -> dict[str, float]:
    """The microseconds per image of each work, in the fastest of five turns after a warm-up.

    The fastest turn is used, because interruptions can only make a time longer.
    """
    times_us: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(6):
        for name, do in work.items():
            start = time.perf_counter()
            do()
            times_us[name].append(1e6 * (time.perf_counter() - start) / images)
    return {name: min(values[1:]) for name, values in times_us.items()}


def size_bytes(image: bytes | np.ndarray) -> int:
    """The size of an encoded image, or of the pixels of a stored one."""
    return image.nbytes if isinstance(image, np.ndarray) else len(image)


def evict(files: list[Path]) -> str:
    """Drop files from the page cache. Returns why they are still there, or "".

    The kernel does not drop a page that a core is just putting into the cache or writing to the
    disk. A file that stays is therefore tried again.
    """
    for _ in range(EVICT_TRIES):
        drop(files)
        fault = staying(files)
        if not fault:
            break
        time.sleep(0.05)
    return fault


def drop(files: list[Path]) -> None:
    """Ask the system to drop files from the page cache."""
    for path in files:
        with path.open("rb", buffering=0) as file:
            os.fdatasync(file.fileno())  # otherwise pages that are not yet written would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def staying(files: list[Path]) -> str:
    """How many files of a sample are in the page cache, as a text, or "" if none is.

    Only a sample is checked, because the check makes the system read pages that are missing.
    """
    checked = files[::20]
    cached = 0
    for path in checked:
        with path.open("rb", buffering=0) as file:
            try:
                # This raises BlockingIOError if it would have to wait for the disk.
                os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
                cached += 1
            except BlockingIOError:
                pass
            except OSError as error:
                return f"the file system does not report what is in the page cache: {error}"
    if 10 * cached > len(checked):
        return f"{cached} of {len(checked)} files stay in the page cache"
    return ""


def write_trace(subjects: dict[str, Subject], path: Path) -> None:
    """Write three iterations of each method, for Perfetto or chrome://tracing."""
    kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
    with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
        for name, subject in subjects.items():
            with closing(subject.loader.batches(0)) as batches:
                steps = train_steps(subject.run, batches)
                for _ in range(3):
                    with torch.profiler.record_function(f"{name} step"):
                        next(steps)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
