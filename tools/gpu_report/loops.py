"""Parts of `tools.gpu_report`: whole training loops, a resumed run, and accuracy against time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import islice, repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from pipelines import Source, open_source
from pipelines.manifest import array_manifest
from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.insight.profiling import loading_of, open_loader, ratio, steady
from rsa_fast.insight.timeline import Timeline
from rsa_fast.recipes import Recipe
from rsa_fast.training import checkpoint
from rsa_fast.training.engine import train
from rsa_fast.training.meter import Meter
from rsa_fast.training.metrics import read_metrics
from rsa_fast.training.step import build_run, train_step
from tools.gpu_report.inputs import (
    STEPS,
    WARM_UP_STEPS,
    build,
    check_dali,
    gpu,
    imagenet,
    largest_that_fits,
    photographs,
    ready_batch,
    small,
)
from tools.gpu_report.worker import Case, Row, Settings, SkippedError

TURNS = 5
STOP_AT, END_AT = 3, 6  # steps of the run that is stopped and resumed
CIFAR_IMAGES = 50_000
FITTING = 0.85  # of the time that is left, how much epochs may take: training has to start as well


def loop(settings: Settings) -> list[Case]:
    """The backends that read photographs."""
    gpu()
    ways: dict[str, dict[str, str]] = {
        "native": {"backend": "native"},
        "dali, decoding on the GPU": {"backend": "dali", "decode_on": "gpu"},
        "dali, decoding on the host": {"backend": "dali", "decode_on": "cpu"},
        "ffcv": {"backend": "ffcv"},
    }
    return [Case(name, partial(trained, settings, fields)) for name, fields in ways.items()]


def trained(settings: Settings, fields: dict[str, str], _: float) -> Iterator[Row]:
    """The views of a backend alone, then the training loop on them."""
    if fields["backend"] == "dali":
        check_dali()
    folder = photographs(settings, fields["backend"])
    source = open_source(folder, "pretrain", settings.scratch)

    def work(batch_size: int) -> Row:
        recipe = imagenet(settings, "rsa", batch_size=batch_size, **fields)
        run = build_run(recipe, STEPS * batch_size)
        meter = Meter(batch_size, run.device)
        with open_loader(run, source, loading_of(recipe, source, run.device)) as loader:
            with steady(loader) as batches:
                next(batches)
                began, began_cpu = time.perf_counter(), time.process_time()
                for _ in islice(batches, settings.repeats):
                    pass
                torch.cuda.synchronize(run.device)
                views_s, cpu_s = time.perf_counter() - began, time.process_time() - began_cpu
            with closing(meter.waiting(loader.batches(0))) as batches:
                for batch in islice(batches, WARM_UP_STEPS):
                    train_step(run, batch)
                torch.cuda.synchronize(run.device)
                meter.restart()
                for batch in islice(batches, settings.repeats):
                    meter.add(run.step, train_step(run, batch), run.skipped)
                speed = meter.read()
        images = batch_size * settings.repeats
        row: Row = {
            "recipe": recipe.model_dump(mode="json"),
            "data": str(folder),
            "threads": recipe.threads,
        }
        row |= {"batch_size": batch_size, "precision": recipe.precision}
        row |= {name: speed[name] for name in ("step_ms", "images_per_s", "wait_pct", "peak_gib")}
        return row | {
            "views_per_s": images / views_s,
            "views_per_core_s": images / max(cpu_s, 1e-9),
        }

    wanted = imagenet(settings, "rsa", **fields).batch_size
    yield largest_that_fits(min(wanted, len(source.manifest)), work)


def resident(settings: Settings) -> list[Case]:
    """CIFAR-10's recipe on images of its size."""
    gpu()
    return [Case("rsa", partial(in_memory, settings))]


def in_memory(settings: Settings, _: float) -> Iterator[Row]:
    """The step on a ready batch and the training loop, in turns."""
    recipe = build(settings, "cifar10", "rsa", backend="resident")
    source = small(settings) or random_images(recipe.views.size_px)
    run = build_run(recipe, len(source.manifest))
    ready, timeline = ready_batch(run, run.method.reads), Timeline(run.device)
    times: dict[str, list[float]] = {"step": [], "loop": []}
    loader = open_loader(run, source, loading_of(recipe, source, run.device))
    with loader, closing(loader.batches(0)) as batches:
        for _ in range(TURNS + 1):
            for name, views in {"step": repeat(ready), "loop": batches}.items():
                steps = (train_step(run, batch) for batch in islice(views, settings.repeats))
                times[name].append(sum(timeline.time(steps)[0].values()))
    step_ms, loop_ms = times["step"][1:], times["loop"][1:]  # the first turn warms up
    yield {
        "recipe": recipe.model_dump(mode="json"),
        "threads": recipe.threads,
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "step_ms": statistics.median(step_ms),
        "loop_ms": statistics.median(loop_ms),
        "images_per_s": 1e3 * recipe.batch_size / statistics.median(loop_ms),
        "loop_efficiency": ratio(step_ms, loop_ms),
    }


def random_images(size_px: int) -> Source:
    """As many images as CIFAR-10 has, in memory; their content does not change the work."""
    pixels = np.random.default_rng(0).integers(
        0, 256, (CIFAR_IMAGES, size_px, size_px, 3), dtype=np.uint8
    )
    manifest = array_manifest(
        Path("."), "pretrain", pixels, np.zeros(CIFAR_IMAGES, np.int64), ("none",)
    )
    return Source(manifest, pixels.__getitem__)


def resume(settings: Settings) -> list[Case]:
    """With torch's deterministic algorithms and without."""
    gpu()
    names = {"torch's defaults": False, "deterministic algorithms": True}
    return [
        Case(name, partial(resumed, settings, deterministic))
        for name, deterministic in names.items()
    ]


def resumed(settings: Settings, deterministic: bool, _: float) -> Iterator[Row]:
    """Compare a run stopped in one process and resumed in another with one left alone.

    The latter runs twice, once in each process: how far the two differ is what the algorithms
    themselves change.
    """
    data = photographs(settings)
    images = len(open_source(data, "pretrain", settings.scratch).manifest)
    fields = {
        "batch_size": min(min(settings.batch_sizes), images),
        "backend": "native",
        "keep_last": 1,
    }
    recipe = imagenet(settings, "rsa", **fields, knn_every_epochs=0)
    out = settings.scratch / f"resume-{deterministic}"
    in_process(deterministic, recipe, data, out, [("alone", END_AT), ("stopped", STOP_AT)])
    in_process(deterministic, recipe, data, out, [("stopped", END_AT), ("again", END_AT)])
    alone, stopped, again = (last_weights(out / name) for name in ("alone", "stopped", "again"))
    yield {
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "steps": END_AT,
        "resumed_gap": largest_gap(stopped, alone),
        "again_gap": largest_gap(again, alone),
    }


def in_process(
    deterministic: bool, recipe: Recipe, data: Path, out: Path, runs: list[tuple[str, int]]
) -> None:
    """`legs` in a process of its own, as cuBLAS reads its settings when CUDA starts."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(legs, deterministic, recipe, data, out, runs).result()
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def legs(
    deterministic: bool, recipe: Recipe, data: Path, out: Path, runs: list[tuple[str, int]]
) -> None:
    """Train runs, each up to a step; one that is there already is resumed."""
    torch.use_deterministic_algorithms(deterministic)
    for name, end in runs:
        train(recipe, data, out / name, resume=(out / name).exists(), stop_at_step=end)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """All of the method's tensors in the newest checkpoint of a run."""
    found: dict[str, torch.Tensor] = checkpoint.load_latest(run / "checkpoints")["method"]
    return found


def largest_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two values in the same place; 0 means that all are equal."""
    gap = 0.0
    for name, values in one.items():
        differ = ~((values == other[name]) | (values.isnan() & other[name].isnan()))
        if differ.any():
            gap = max(gap, float((values - other[name]).abs()[differ].max()))
    return gap


def learn(settings: Settings) -> list[Case]:
    """RSA on the caller's small images, or on the demo's."""
    gpu()
    return [Case("rsa", partial(curve, settings))]


def curve(settings: Settings, seconds: float) -> Iterator[Row]:
    """kNN accuracy after every epoch and the minutes since the start, evaluations included.

    The schedules get as many epochs as are expected to fit in `seconds`, at most the recipe's.
    """
    ends_at = time.monotonic() + seconds
    dataset, data = labelled_images(settings)
    recipe = build(settings, dataset, "rsa", knn_every_epochs=1)
    epoch_s = seconds_per_epoch(recipe, data, settings.repeats)
    epochs = int(FITTING * (ends_at - time.monotonic()) / epoch_s)
    epochs = max(1, min(epochs, recipe.epochs))
    recipe = recipe.model_copy(update={"epochs": epochs, "checkpoint_every_epochs": epochs})
    out, began, seen = settings.scratch / "learn", time.monotonic(), 0
    training = ThreadPoolExecutor(1).submit(train, recipe, data, out)
    while True:
        done = training.done()
        records = (
            [r for r in read_metrics(out) if "knn_top1" in r]
            if (out / "metrics.jsonl").is_file()
            else []
        )
        for record in records[seen:]:
            scores = {name: record.get(name) for name in ("knn_top1", "linear_top1")}
            minutes = (time.monotonic() - began) / 60
            yield {
                "case": f"{dataset}, epoch {record['epoch']} of {epochs}",
                "minutes": minutes,
                **scores,
            }
        seen = len(records)
        if done:
            training.result()
            return
        if time.monotonic() > ends_at:
            yield {"note": f"stopped after {seconds:.0f} s, when its time was over"}
            return
        time.sleep(0.2)


def labelled_images(settings: Settings) -> tuple[str, Path]:
    """A dataset's name, whose recipe suits the images, and their folder."""
    if settings.data and small(settings):
        names = {"cifar-100-python": "cifar100", "stl10_binary": "stl10"}
        found = [name for folder, name in names.items() if (settings.data / folder).is_dir()]
        return (found or ["cifar10"])[0], settings.data
    from tools.make_demo import make_demo

    make_demo(settings.scratch / "demo")
    return "demo", settings.scratch / "demo"


def seconds_per_epoch(recipe: Recipe, data: Path, repeats: int) -> float:
    """What an epoch of training and a kNN evaluation take, from some steps and one evaluation.

    Raises SkippedError when there are no labelled training and test images.
    """
    source = open_source(data, "pretrain")
    run = build_run(recipe, len(source.manifest))
    try:
        evaluation = Evaluation(data, recipe, run.device, run.dtype)
    except (FileNotFoundError, ValueError) as error:
        raise SkippedError(str(error)) from error
    loader = open_loader(run, source, loading_of(recipe, source, run.device))
    with loader, closing(loader.batches(0)) as batches:
        for batch in islice(batches, WARM_UP_STEPS):
            train_step(run, batch)
        steps = (train_step(run, batch) for batch in islice(batches, repeats))
        step_ms = sum(Timeline(run.device).time(steps)[0].values())
    began = time.perf_counter()
    evaluation.score(run.method.encoder, ("knn",))
    return run.plan.steps_per_epoch * step_ms / 1e3 + time.perf_counter() - began
