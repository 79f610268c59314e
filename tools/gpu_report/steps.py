"""Parts of `tools.gpu_report`: the memory and the time of a training step on a ready batch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch

from rsa_fast.insight.measure import median_ratio
from rsa_fast.insight.planning import GIB
from rsa_fast.insight.timeline import Timeline
from rsa_fast.pipelines import Batch
from rsa_fast.tools.gpu_report.inputs import (
    STEPS,
    WARM_UP_STEPS,
    free_memory,
    gpu,
    imagenet,
    largest_that_fits,
    nvidia_smi,
    ready_batch,
)
from rsa_fast.tools.gpu_report.worker import Case, Row, Settings, SkippedError
from rsa_fast.training.step import Run, build_run, train_step


def memory(settings: Settings) -> list[Case]:
    """RSA and BYOL in both half precisions, by batch size, with and without recomputed stages."""
    gpu()
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    batch_sizes = sorted(settings.batch_sizes, reverse=True)
    precisions = ("fp16", "bf16") if has_bf16 else ("fp16",)
    cases = []
    for combination in product(batch_sizes, precisions, ("rsa", "byol"), (0, 1, 2)):
        batch_size, precision, method, stages = combination
        name = f"{method}, {precision}, batch {batch_size}, recompute_stages {stages}"
        fields = {"precision": precision, "batch_size": batch_size, "recompute_stages": stages}
        cases.append(Case(name, partial(peak, settings, method, fields)))
    return cases if has_bf16 else [*cases, Case("bf16", without_bf16)]


def without_bf16(_: float) -> Iterator[Row]:
    raise SkippedError("the card does not support bf16")


def peak(settings: Settings, method: str, fields: dict[str, Any], _: float) -> Iterator[Row]:
    """The peak memory that a steady step allocates, and the memory that torch has reserved."""
    device = gpu()
    recipe = imagenet(settings, method, **fields)
    row: Row = {"recipe": recipe.model_dump(mode="json")}
    free_memory()
    before = torch.cuda.memory_allocated(device)
    try:
        run = build_run(recipe, STEPS * recipe.batch_size)
        batch = ready_batch(run, run.method.reads)
        for _ in range(WARM_UP_STEPS):
            train_step(run, batch)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        train_step(run, batch)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        yield row | {"note": "does not fit in the GPU's memory"}
        return
    allocated = torch.cuda.max_memory_allocated(device) - before
    yield row | {
        "allocated_gib": allocated / GIB,
        "reserved_gib": torch.cuda.memory_reserved(device) / GIB,
    }


def step(settings: Settings) -> list[Case]:
    """RSA and BYOL in turns, and supervised training, first eager and then compiled.

    Compiling takes minutes.
    """
    gpu()
    return [
        Case(
            f"{' and '.join(methods)}, {mode_name(compiled)}",
            partial(turns, settings, methods, compiled),
        )
        for compiled in (False, True)
        for methods in (("rsa", "byol"), ("supervised",))
    ]


def mode_name(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def turns(settings: Settings, methods: tuple[str, ...], compiled: bool, _: float) -> Iterator[Row]:
    """The step times of several methods, which take turns."""

    def work(batch_size: int) -> list[Row]:
        torch.compiler.reset()
        fields = {"batch_size": batch_size, "compile": compiled}
        recipes = {method: imagenet(settings, method, **fields) for method in methods}
        runs = {method: build_run(recipe, STEPS * batch_size) for method, recipe in recipes.items()}
        batches = {method: ready_batch(run, run.method.reads) for method, run in runs.items()}
        warm_up_s = {method: warm_up(run, batches[method]) for method, run in runs.items()}
        times = step_times(runs, batches, settings.repeats)
        clock_mhz = nvidia_smi().get("SM clock, MHz")  # read at once, before it falls again
        rows = []
        for method, times_ms in times.items():
            low_ms, median_ms, high_ms = statistics.quantiles(times_ms, n=4)
            row: Row = {
                "case": f"{method}, {mode_name(compiled)}",
                "recipe": recipes[method].model_dump(mode="json"),
                "batch_size": batch_size,
                "precision": recipes[method].precision,
                "step_ms": median_ms,
                "low_ms": low_ms,
                "high_ms": high_ms,
                "times_ms": times_ms,
                "images_per_s": 1e3 * batch_size / median_ms,
                "warm_up_s": warm_up_s[method],
                "sm_clock_mhz": clock_mhz,
            }
            if "byol" in times:
                row["over_byol"] = median_ratio(times_ms, times["byol"])
            rows.append(row)
        return rows

    yield from largest_that_fits(max(settings.batch_sizes), work)


def warm_up(run: Run, batch: Batch) -> float:
    """The seconds of the first steps, in which cuDNN tries its algorithms and torch compiles."""
    began = time.perf_counter()
    for _ in range(WARM_UP_STEPS):
        train_step(run, batch)
    torch.cuda.synchronize(run.device)
    return time.perf_counter() - began


def step_times(
    runs: dict[str, Run], batches: dict[str, Batch], repeats: int
) -> dict[str, list[float]]:
    """The milliseconds of `repeats` steps of each run, measured by events without waits between."""
    timeline = Timeline(next(iter(runs.values())).device)
    for _ in range(repeats):
        for name, run in runs.items():
            timeline.begin(name)
            train_step(run, batches[name])
    timeline.begin("end")
    timeline.wait()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for (name, begun), (_, ended) in pairwise(timeline.marks):
        times[name].append(begun.elapsed_time(ended))
    return times
