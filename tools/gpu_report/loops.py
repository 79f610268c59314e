"""Parts of `tools.gpu_report`: training loops, a resumed run, and accuracy against time."""

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

from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.insight.measure import median_ratio, open_loader, skip_prefetched
from rsa_fast.insight.timeline import Timeline
from rsa_fast.pipelines import Source, open_source
from rsa_fast.pipelines.manifest import array_manifest
from rsa_fast.recipes import Recipe
from rsa_fast.tools.gpu_report.inputs import (
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
from rsa_fast.tools.gpu_report.worker import Case, Row, Settings, SkippedError
from rsa_fast.training import checkpoint
from rsa_fast.training.engine import train
from rsa_fast.training.meter import Meter
from rsa_fast.training.metrics import read_metrics
from rsa_fast.training.step import build_run, train_step

TURNS = 5
STOP_AT, END_AT = 3, 6  # steps of the run that is stopped and resumed
CIFAR_IMAGES = 50_000
EPOCHS_SHARE = 0.85  # the share of the time that is planned for epochs; the rest is for the start


def loop(settings: Settings) -> list[Case]:
    """The backends that read photographs."""
    gpu()
    ways: dict[str, dict[str, str]] = {
        "native": {"backend": "native"},
        "dali, decoding on the GPU": {"backend": "dali", "decode_on": "gpu"},
        "dali, decoding on the host": {"backend": "dali", "decode_on": "cpu"},
        "ffcv": {"backend": "ffcv"},
    }
    return [
        Case(name, partial(from_photographs, settings, fields)) for name, fields in ways.items()
    ]


def from_photographs(settings: Settings, fields: dict[str, str], _: float) -> Iterator[Row]:
    """The speed of a backend's views alone, and then the speed of the training loop with them."""
    if fields["backend"] == "dali":
        check_dali()
    folder = photographs(settings, fields["backend"])
    source = open_source(folder, "pretrain", settings.scratch)

    def work(batch_size: int) -> Row:
        recipe = imagenet(settings, "rsa", batch_size=batch_size, **fields)
        run = build_run(recipe, STEPS * batch_size)
        meter = Meter(batch_size, run.device)
        with open_loader(run, source) as loader:
            with skip_prefetched(loader) as batches:
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
        speeds = {name: speed[name] for name in ("step_ms", "images_per_s", "wait_pct", "peak_gib")}
        return {
            "recipe": recipe.model_dump(mode="json"),
            "data": str(folder),
            "threads": recipe.threads,
            "batch_size": batch_size,
            "precision": recipe.precision,
            **speeds,
            "views_per_s": images / views_s,
            "views_per_core_s": images / max(cpu_s, 1e-9),
        }

    batch_size = imagenet(settings, "rsa", **fields).batch_size
    yield largest_that_fits(min(batch_size, len(source.manifest)), work)


def resident(settings: Settings) -> list[Case]:
    """RSA's CIFAR-10 recipe on images of CIFAR-10's size."""
    gpu()
    return [Case("rsa", partial(from_memory, settings))]


def from_memory(settings: Settings, _: float) -> Iterator[Row]:
    """The times of a step on a ready batch and of a step in the training loop, taken in turns."""
    recipe = build(settings, "cifar10", "rsa", backend="resident")
    source = small(settings) or random_images(recipe.views.size_px)
    run = build_run(recipe, len(source.manifest))
    ready, timeline = ready_batch(run, run.method.reads), Timeline(run.device)
    times: dict[str, list[float]] = {"step": [], "loop": []}
    loader = open_loader(run, source)
    with loader, closing(loader.batches(0)) as batches:
        for _ in range(TURNS + 1):
            for name, views in {"step": repeat(ready), "loop": batches}.items():
                steps = (train_step(run, batch) for batch in islice(views, settings.repeats))
                times[name].append(sum(timeline.time(steps)[0].values()))
    step_ms, loop_ms = times["step"][1:], times["loop"][1:]  # the first turn is a warm-up
    yield {
        "recipe": recipe.model_dump(mode="json"),
        "threads": recipe.threads,
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "step_ms": statistics.median(step_ms),
        "loop_ms": statistics.median(loop_ms),
        "images_per_s": 1e3 * recipe.batch_size / statistics.median(loop_ms),
        "loop_efficiency": median_ratio(step_ms, loop_ms),
    }


def random_images(size_px: int) -> Source:
    """As many images in memory as CIFAR-10 has. Their content does not change the work."""
    shape = (CIFAR_IMAGES, size_px, size_px, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    manifest = array_manifest("pretrain", pixels, np.zeros(CIFAR_IMAGES, np.int64), ("none",))
    return Source(manifest, pixels.__getitem__)


def resume(settings: Settings) -> list[Case]:
    """A resumed run with torch's deterministic algorithms and without."""
    gpu()
    names = {"torch's defaults": False, "deterministic algorithms": True}
    return [
        Case(name, partial(compare_resumed, settings, deterministic))
        for name, deterministic in names.items()
    ]


def compare_resumed(settings: Settings, deterministic: bool, _: float) -> Iterator[Row]:
    """Compare a run that was stopped and resumed in another process with an uninterrupted run.

    The uninterrupted run is done twice, once in each process. The difference between the two shows
    how much the algorithms themselves vary.
    """
    data = photographs(settings)
    images = len(open_source(data, "pretrain", settings.scratch).manifest)
    fields = {
        "batch_size": min(min(settings.batch_sizes), images),
        "backend": "native",
        "keep_last": 1,
        "knn_every_epochs": 0,
    }
    recipe = imagenet(settings, "rsa", **fields)
    out = settings.scratch / f"resume-{deterministic}"
    alone, stopped, again = out / "alone", out / "stopped", out / "again"
    in_process(deterministic, recipe, data, [(alone, END_AT), (stopped, STOP_AT)])
    in_process(deterministic, recipe, data, [(stopped, END_AT), (again, END_AT)])
    expected = last_weights(alone)
    yield {
        "batch_size": recipe.batch_size,
        "precision": recipe.precision,
        "steps": END_AT,
        "resumed_gap": largest_gap(last_weights(stopped), expected),
        "again_gap": largest_gap(last_weights(again), expected),
    }


def in_process(
    deterministic: bool, recipe: Recipe, data: Path, runs: list[tuple[Path, int]]
) -> None:
    """Call `train_runs` in a new process, because cuBLAS reads its settings when CUDA starts."""
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            pool.submit(train_runs, deterministic, recipe, data, runs).result()
    finally:
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)


def train_runs(
    deterministic: bool, recipe: Recipe, data: Path, runs: list[tuple[Path, int]]
) -> None:
    """Train in each folder up to the given step. A run that exists already is resumed."""
    torch.use_deterministic_algorithms(deterministic)
    for out, end in runs:
        train(recipe, data, out, resume=out.exists(), stop_at_step=end)


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    """All of the method's tensors in the newest checkpoint of a run."""
    weights: dict[str, torch.Tensor] = checkpoint.load_latest(run / "checkpoints")["method"]
    return weights


def largest_gap(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two values in the same position. 0 means that all are equal."""
    gap = 0.0
    for name, values in one.items():
        differ = ~((values == other[name]) | (values.isnan() & other[name].isnan()))
        if differ.any():
            gap = max(gap, float((values - other[name]).abs()[differ].max()))
    return gap


def learn(settings: Settings) -> list[Case]:
    """RSA on the user's small images, or on the demo's."""
    gpu()
    return [Case("rsa", partial(curve, settings))]


def curve(settings: Settings, seconds: float) -> Iterator[Row]:
    """The kNN accuracy after every epoch, and the minutes since the start, evaluations included.

    The run has as many epochs as are expected to fit in `seconds`, but not more than the recipe.
    """
    ends_at = time.monotonic() + seconds
    dataset, data = labelled_images(settings)
    recipe = build(settings, dataset, "rsa", knn_every_epochs=1)
    epoch_s = seconds_per_epoch(recipe, data, settings.repeats)
    epochs = int(EPOCHS_SHARE * (ends_at - time.monotonic()) / epoch_s)
    epochs = max(1, min(epochs, recipe.epochs))
    recipe = recipe.model_copy(update={"epochs": epochs, "checkpoint_every_epochs": epochs})
    out, began, reported = settings.scratch / "learn", time.monotonic(), 0
    training = ThreadPoolExecutor(1).submit(train, recipe, data, out)
    while True:
        done = training.done()
        records = read_metrics(out) if (out / "metrics.jsonl").is_file() else []
        evaluations = [record for record in records if "knn_top1" in record]
        for record in evaluations[reported:]:
            yield {
                "case": f"{dataset}, epoch {record['epoch']} of {epochs}",
                "minutes": (time.monotonic() - began) / 60,
                "knn_top1": record["knn_top1"],
                "linear_top1": record.get("linear_top1"),
            }
        reported = len(evaluations)
        if done:
            training.result()
            return
        if time.monotonic() > ends_at:
            yield {"note": f"stopped after {seconds:.0f} s, because its time was over"}
            return
        time.sleep(0.2)


def labelled_images(settings: Settings) -> tuple[str, Path]:
    """The name of a dataset whose recipe suits the images, and the folder of the images."""
    if settings.data and small(settings):
        for folder, dataset in (("cifar-100-python", "cifar100"), ("stl10_binary", "stl10")):
            if (settings.data / folder).is_dir():
                return dataset, settings.data
        return "cifar10", settings.data
    from rsa_fast.tools.make_demo import make_demo

    make_demo(settings.scratch / "demo")
    return "demo", settings.scratch / "demo"


def seconds_per_epoch(recipe: Recipe, data: Path, repeats: int) -> float:
    """The time of an epoch and its kNN evaluation, estimated from some steps and one evaluation.

    Raises SkippedError when there are no labelled training and test images.
    """
    source = recipe.open_source(data, "pretrain")
    run = build_run(recipe, len(source.manifest))
    try:
        evaluation = Evaluation(data, recipe, run.device, run.dtype)
    except (FileNotFoundError, ValueError) as error:
        raise SkippedError(str(error)) from error
    loader = open_loader(run, source)
    with loader, closing(loader.batches(0)) as batches:
        for batch in islice(batches, WARM_UP_STEPS):
            train_step(run, batch)
        steps = (train_step(run, batch) for batch in islice(batches, repeats))
        step_ms = sum(Timeline(run.device).time(steps)[0].values())
    began = time.perf_counter()
    evaluation.score(run.method.encoder, ("knn",))
    return run.derived.steps_per_epoch * step_ms / 1e3 + time.perf_counter() - began
