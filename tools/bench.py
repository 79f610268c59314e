"""Measure the speed of the views and of the training step.

    python -m tools.bench views                          # resident and torchvision/PIL, 32 px
    python -m tools.bench backends --data data/imagenet  # every backend and decoding, 224 px
    python -m tools.bench step                           # RSA and BYOL, bf16 and fp32
    python -m tools.bench training --data data/imagenet  # the loop on files, waits for views
    python -m tools.bench all --data data/imagenet       # all of these, each in its own process

Each command prints a table and, on the last line, one JSON object. The speeds of one run are
compared as ratios, because ratios differ less between machines than the speeds do. Variants take
turns, so that a slow minute slows all of them, and the figures are medians over the turns. Nothing
else should run on the machine. `backends` also prints the CPU time per image, which other programs
change less.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from simplejpeg import decode_jpeg as decode_by_simplejpeg
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision.io import ImageReadMode, decode_jpeg

from rsa_fast.insight.measure import EndlessOrder, median_ratio, open_loader
from rsa_fast.pipelines import (
    VIEWS,
    AggressiveOn,
    Batch,
    CropGroup,
    Loading,
    Order,
    Source,
    ViewSpec,
    open_source,
    open_views,
)
from rsa_fast.pipelines.draws import draw
from rsa_fast.pipelines.loading import Loader
from rsa_fast.pipelines.machine import cores
from rsa_fast.pipelines.manifest import array_manifest
from rsa_fast.pipelines.workers import FORKS
from rsa_fast.recipes import build_recipe
from rsa_fast.tools.to_ffcv import main as to_ffcv
from rsa_fast.training.meter import Meter
from rsa_fast.training.step import Run, build_run, choose_device, choose_dtype, train_step

CIFAR = build_recipe("cifar10", "rsa").views
data_option = click.option(
    "--data",
    type=click.Path(path_type=Path, exists=True),
    required=True,
    help="An image folder with train/.",
)


def smooth_images(count: int, size_px: int) -> Source:
    """`count` smooth colour images in memory. Their content does not change the work."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    size, smooth = (size_px, size_px), Image.Resampling.BICUBIC
    pixels = np.stack([np.asarray(Image.fromarray(c).resize(size, smooth)) for c in coarse])
    manifest = array_manifest("pretrain", pixels, np.zeros(count, np.int64), ("none",))
    return Source(manifest, pixels.__getitem__)


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def show(title: str, rows: list[tuple[str, str]], result: dict[str, float]) -> None:
    """Print the rows as a table, and the result as JSON."""
    table = Table("", "median (lowest to highest)", title=title)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    click.echo(json.dumps({key: round(value, 4) for key, value in result.items()}))


def spread(values: list[float], unit: str) -> str:
    """The median, the lowest and the highest value as text."""
    return f"{statistics.median(values):,.1f} {unit} ({min(values):,.1f} to {max(values):,.1f})"


@click.group()
def main() -> None:
    """Benchmarks. Nothing else should run on the machine."""


@main.command()
@click.option("--batch-size", default=256, show_default=True)
@click.option("--turns", default=5, show_default=True)
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
def views(batch_size: int, turns: int, dtype: str) -> None:
    """Measure images per second with four views each, on 2 threads or worker processes."""
    source = smooth_images(40 * batch_size, CIFAR.size_px)
    order = Order(len(source.manifest), batch_size, seed=0)
    variants: dict[str, tuple[str, AggressiveOn]] = {
        "torchvision": ("torchvision", "host"),
        "resident": ("resident", "host"),
        "resident-device": ("resident", "device"),
    }
    rates: dict[str, list[float]] = {name: [] for name in variants}
    loaders = {
        name: open_views(
            source,
            CIFAR,
            frozenset(VIEWS),
            order,
            dtype=getattr(torch, dtype),
            loading=Loading(backend, threads=2, aggressive_on=where),
        )
        for name, (backend, where) in variants.items()
    }
    for turn in range(turns):
        for name, loader in loaders.items():
            rates[name].append(batch_size * batches_per_s(loader, turn))
    ids, sizes = np.arange(256), np.full((256, 2), 32)
    draw_ms = [1e3 * seconds_of(lambda: draw(0, 0, ids, CIFAR, sizes)) for _ in range(100)]
    medians = {name: statistics.median(values) for name, values in rates.items()}
    rows = [
        (f"{name}, four views, {dtype}", spread(values, "images/s"))
        for name, values in rates.items()
    ]
    rows.append(("drawing 2 x 256 views, one core", spread(draw_ms, "ms")))
    result = {f"{name.replace('-', '_')}_images_per_s": value for name, value in medians.items()}
    result["resident_host_ratio"] = medians["resident"] / medians["torchvision"]
    result["resident_device_ratio"] = medians["resident-device"] / medians["torchvision"]
    result["draw_ms"] = statistics.median(draw_ms)
    show(f"views at {CIFAR.size_px} px, batch {batch_size}", rows, result)


def batches_per_s(loader: Loader, epoch: int, warm_up: int = 8, seconds: float = math.inf) -> float:
    """Batches per second, measured for some seconds or to the end of the epoch.

    The first `warm_up` batches are not counted, because the loader prepares some in advance.
    """
    with closing(batch for batch in loader.batches(epoch)) as batches:
        return speed_of(batches, warm_up, seconds)[0]


def speed_of(batches: Iterator[object], warm_up: int, seconds: float) -> tuple[float, float]:
    """Batches per second, and CPU seconds per batch, without the first `warm_up`."""
    for _ in range(warm_up):
        next(batches)
    began, cpu_began, count = time.perf_counter(), cpu_s(), 0
    for _ in batches:
        count += 1
        if time.perf_counter() - began > seconds:
            break
    return count / (time.perf_counter() - began), (cpu_s() - cpu_began) / count


def cpu_s() -> float:
    """The CPU seconds that this process and its living worker processes have taken."""
    ticks = 0
    for worker in multiprocessing.active_children():
        stat = Path(f"/proc/{worker.pid}/stat").read_text()
        after_name = stat.rpartition(")")[2].split()
        ticks += int(after_name[11]) + int(after_name[12])  # user and system
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def cpu_in_words() -> str:
    """The CPU, the number of its cores, and its vector instructions.

    The name of a CPU is not enough: several generations have the name "AMD EPYC".
    """
    entries = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        entries[name.strip()] = value.strip()
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_vbmi", "avx512_bf16")
    flags = [flag for flag in wanted if flag in entries.get("flags", "").split()]
    return (
        f"{entries.get('model name', 'CPU')}, family {entries.get('cpu family', '?')}, model "
        f"{entries.get('model', '?')}, {cores()} cores, "
        f"{' '.join(flags) or 'none of AVX2, AVX-512'}"
    )


@main.command()
@data_option
@click.option("--size", default=224, show_default=True, help="Side of the views in pixels.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--seconds", default=4.0, show_default=True, help="Length of each measurement.")
@click.option(
    "--dtype", default="bfloat16", show_default=True, help="float32, bfloat16 or float16."
)
def backends(
    data: Path, size: int, batch_size: int, turns: int, seconds: float, dtype: str
) -> None:
    """Measure images per second of every backend on 2 CPU threads, decoding included.

    The files are read from the page cache. The CPU time per image is printed beside the rate. It
    depends less on other work on the machine.

    One view is what a linear evaluation needs. Multi-crop is SwAV's 2 x 224 and 6 x 96 px, and in
    proportion at another `--size`. It is measured on `native` and on the torchvision backend, where
    PIL makes all crops from one decode, as in solo-learn's transform. If lightly is installed, its
    transforms for multi-crop and for BYOL's two views are also measured.
    """
    source = open_source(data, "train")
    if source.encoded is None:
        raise click.UsageError(f"{data} contains pixels: wanted a folder of image files")
    spec = replace(build_recipe("imagenet1k", "rsa").views, size_px=size)
    every, weak, byol = frozenset(VIEWS), frozenset(VIEWS[:2]), frozenset(VIEWS[2:])
    one = frozenset(VIEWS[:1])
    local = CropGroup("local", 6, size_px=round(size * 96 / 224), crop_area=(0.05, 0.14))
    crops = replace(spec, groups=(CropGroup("global", 2, crop_area=(0.14, 1.0)), local))
    multi = frozenset(crops.names("aggressive"))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        sources = {"": source}
        for name, mode in (
            ("ffcv500", ["jpg", "--max-resolution", "500"]),
            ("ffcv_passthrough", ["passthrough"]),
        ):
            to_ffcv([str(data), f"{folder}/{name}", "--write-mode", *mode], standalone_mode=False)
            sources[name] = open_source(f"{folder}/{name}", "train")
        rows: dict[str, tuple[str, str, ViewSpec, frozenset[str]]] = {
            "torchvision": ("torchvision", "", spec, every),
            "torchvision_multi_crop": ("torchvision", "", crops, multi),
            "native": ("native", "", spec, every),
            "native_one_view": ("native", "", spec, one),
            "native_byol": ("native", "", spec, byol),
            "native_multi_crop": ("native", "", crops, multi),
            "ffcv500": ("ffcv", "ffcv500", spec, every),
            "ffcv500_one_view": ("ffcv", "ffcv500", spec, one),
            "ffcv_passthrough": ("ffcv", "ffcv_passthrough", spec, every),
            "dali_cpu_weak": ("dali", "", spec, weak),
            "dali_cpu": ("dali", "", spec, every),
        }
        order = EndlessOrder(len(source.manifest), min(batch_size, len(source.manifest)), seed=0)
        loaders = {
            name: opened.enter_context(
                open_views(
                    sources[which],
                    row_spec,
                    reads,
                    order,
                    dtype=getattr(torch, dtype),
                    loading=Loading(backend, threads=2),
                )
            )
            for name, (backend, which, row_spec, reads) in rows.items()
        }
        files = [source.encoded(i) for i in range(len(source.manifest))]
        peers = lightly_loaders(source, crops, order.batch_size)
        decoders = {
            "decode_limit": decode_by_torchvision,
            "decode_simplejpeg": decode_by_simplejpeg,
        }
        names = (*decoders, *rows, *peers)
        rates: dict[str, list[float]] = {name: [] for name in names}
        cpu_ms: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(turns):
            for name, decode in decoders.items():
                per_s, image_s = decoding_speed(files, decode, seconds)
                rates[name].append(per_s)
                cpu_ms[name].append(1e3 * image_s)
            for name, loader in (loaders | peers).items():
                endless = loader.batches(turn) if isinstance(loader, Loader) else iter(loader)
                per_s, batch_s = speed_of(endless, warm_up=8, seconds=seconds)
                del endless  # ends the work ahead, and the worker processes
                rates[name].append(order.batch_size * per_s)
                cpu_ms[name].append(1e3 * batch_s / order.batch_size)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result = {f"{name}_images_per_s": value for name, value in medians.items()}
    result |= {f"{name}_cpu_ms": statistics.median(values) for name, values in cpu_ms.items()}
    result |= {
        f"{name}_ratio": medians[name] / medians["torchvision"]
        for name in rows
        if name != "torchvision"
    }
    result["native_of_decode_limit"] = medians["native"] / medians["decode_limit"]
    for peer in ("torchvision_multi_crop", *peers):
        views_of = "multi_crop" if peer.endswith("multi_crop") else "byol"
        result[f"native_over_{peer}"] = medians[f"native_{views_of}"] / medians[peer]
    # The time per pixel of the views, without decoding: multi-crop relative to BYOL's two views.
    pixels = sum(crop.size_px**2 for crop in crops.crops) / (2 * size**2)
    views_s = {
        name: 1 / medians[name] - 1 / medians["decode_limit"]
        for name in ("native_multi_crop", "native_byol")
    }
    result["multi_crop_pixel_cost"] = views_s["native_multi_crop"] / views_s["native_byol"] / pixels
    title = f"{size} px, batch {order.batch_size}, {dtype}; 4 views, weak: 2, byol: 2 aggressive"
    table = [
        (name, f"{spread(values, 'images/s')}, {statistics.median(cpu_ms[name]):.2f} ms of CPU")
        for name, values in rates.items()
    ]
    show(f"{title}; {cpu_in_words()}", table, result)


def lightly_loaders(source: Source, spec: ViewSpec, batch_size: int) -> dict[str, DataLoader[Any]]:
    """lightly's transforms of the source's files in 2 worker processes each, as users run them.

    They make the multi-crop views of `spec`, and BYOL's two views in the size of its first crop.
    The batches do not end. The dictionary is empty if lightly is not installed.
    """
    if find_spec("lightly") is None:
        return {}
    from lightly.transforms.byol_transform import (
        BYOLTransform,
        BYOLView1Transform,
        BYOLView2Transform,
    )
    from lightly.transforms.swav_transform import SwaVTransform

    (first, last), groups = (spec.crops[0], spec.crops[-1]), spec.groups
    normalize = {"mean": list(spec.mean), "std": list(spec.std)}
    multi_crop = SwaVTransform(
        crop_sizes=(first.size_px, last.size_px),
        crop_counts=(groups[0].count, groups[1].count),
        crop_min_scales=(first.crop_area[0], last.crop_area[0]),
        crop_max_scales=(first.crop_area[1], last.crop_area[1]),
        cj_strength=0.5,  # lightly's jitter is twice as strong as MoCo v2's
        normalize=normalize,
    )
    byol = BYOLTransform(
        BYOLView1Transform(input_size=first.size_px, normalize=normalize),
        BYOLView2Transform(input_size=first.size_px, normalize=normalize),
    )

    class Files(Dataset[Any]):
        def __init__(self, transform: Callable[[Image.Image], Any]) -> None:
            self.transform = transform

        def __getitem__(self, sample: int) -> Any:
            assert source.file is not None
            return self.transform(Image.open(source.file(sample)).convert("RGB"))

    samples = RandomSampler(range(len(source.manifest)), num_samples=10**9, replacement=True)
    return {
        name: DataLoader(
            Files(transform),
            batch_size,
            sampler=samples,
            num_workers=2,
            multiprocessing_context=FORKS,
        )
        for name, transform in {"lightly_byol": byol, "lightly_multi_crop": multi_crop}.items()
    }


def decode_by_torchvision(jpeg: bytearray) -> object:
    return decode_jpeg(torch.frombuffer(jpeg, dtype=torch.uint8), ImageReadMode.RGB)


def decoding_speed(
    files: list[bytes], decode: Callable[[bytearray], object], seconds: float
) -> tuple[float, float]:
    """Images per second, and CPU seconds per image, when two threads only decode JPEGs to RGB."""
    jpegs = [bytearray(file) for file in files if file.startswith(b"\xff\xd8")]
    deadline, cpu_began = time.perf_counter() + seconds, cpu_s()

    def work(part: int) -> int:
        decoded = 0
        while time.perf_counter() < deadline:
            decode(jpegs[(2 * decoded + part) % len(jpegs)])
            decoded += 1
        return decoded

    with ThreadPoolExecutor(2) as pool:
        decoded = sum(pool.map(work, range(2)))
    return decoded / seconds, (cpu_s() - cpu_began) / decoded


@main.command()
@click.option("--width", default=64, show_default=True, help="Channels of ResNet-18's first stage.")
@click.option("--batch-size", default=64, show_default=True)
@click.option("--turns", default=7, show_default=True)
def step(width: int, batch_size: int, turns: int) -> None:
    """Measure training steps of ResNet-18 at 32 px."""
    source = smooth_images(20 * batch_size, CIFAR.size_px)
    order = Order(len(source.manifest), batch_size, seed=0)

    def run_of(method: str, precision: str = "auto") -> Run:
        fields = {"width": width, "batch_size": batch_size, "precision": precision}
        return build_run(build_recipe("cifar10", method, overrides=fields), len(source.manifest))

    rsa, byol, looped = run_of("rsa"), run_of("byol"), run_of("rsa")
    contiguous = run_of("rsa", precision="fp32")
    layout = torch.contiguous_format
    contiguous.method.to(memory_format=layout)  # type: ignore[call-overload]
    with open_views(
        source, CIFAR, frozenset(VIEWS), order, device=rsa.device, dtype=rsa.dtype
    ) as loader:
        ready = next(loader.batches(0))
        plain = {name: view.float().contiguous() for name, view in ready.views.items()}
        plain_batch = Batch(ready.label, plain)
        endless = (batch for epoch in range(10**6) for batch in loader.batches(epoch))
        variants = {
            "RSA step, ready batch": lambda: train_step(rsa, ready),
            "BYOL step (AA), ready batch": lambda: train_step(byol, ready),
            "RSA step with the loop's views": lambda: train_step(looped, next(endless)),
            "RSA step, fp32 contiguous": lambda: train_step(contiguous, plain_batch),
        }
        times: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(turns + 2):
            for name, work in variants.items():
                elapsed_ms = 1e3 * seconds_of(partial(synchronised, work, rsa.device))
                if turn >= 2:  # the first two turns are a warm-up
                    times[name].append(elapsed_ms)
    ready_ms, byol_ms, loop_ms, contiguous_ms = times.values()
    result = {
        "loop_efficiency": median_ratio(ready_ms, loop_ms),
        "rsa_over_byol": median_ratio(ready_ms, byol_ms),
        "bf16_channels_last_speedup": median_ratio(contiguous_ms, ready_ms),
        "step_ms": statistics.median(ready_ms),
        "images_per_s": 1e3 * batch_size / statistics.median(ready_ms),
    }
    precision = str(choose_dtype("auto", choose_device("auto"))).removeprefix("torch.")
    title = f"ResNet-18, width {width}, 32 px, batch {batch_size}, {precision} unless named"
    show(title, [(name, spread(values, "ms")) for name, values in times.items()], result)


@main.command()
@data_option
@click.option("--arch", default="resnet50", show_default=True)
@click.option("--size", default=224, show_default=True, help="Side of the views in pixels.")
@click.option("--batch-size", default=16, show_default=True)
@click.option("--turns", default=3, show_default=True)
@click.option("--seconds", default=12.0, show_default=True, help="Length of each measurement.")
def training(data: Path, arch: str, size: int, batch_size: int, turns: int, seconds: float) -> None:
    """Measure the training loop of the ImageNet-1K recipes with each backend for files.

    The figures are RSA's step time relative to BYOL's, and the share of time spent waiting for
    views.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as opened:
        to_ffcv([str(data), folder], standalone_mode=False)
        loops: dict[tuple[str, str], tuple[Run, Loader]] = {}
        for backend in ("native", "dali", "ffcv"):
            source = open_source(folder if backend == "ffcv" else data, "pretrain")
            for method in ("rsa", "byol"):
                fields = {
                    "arch": arch,
                    "views.size_px": size,
                    "batch_size": batch_size,
                    "bn": "local",
                    "backend": backend,
                }
                recipe = build_recipe("imagenet1k", method, overrides=fields)
                run = build_run(recipe, len(source.manifest))
                loader = open_loader(run, source)
                loops[backend, method] = run, opened.enter_context(loader)
        readings: dict[tuple[str, str], list[dict[str, float]]] = {name: [] for name in loops}
        for turn in range(turns):
            for name, (run, loader) in loops.items():
                meter = Meter(batch_size, run.device)
                with closing(meter.waiting(loader.batches(turn))) as batches:
                    train_step(run, next(batches))
                    meter.restart()
                    while time.perf_counter() - meter.began < seconds:
                        meter.add(run.step, train_step(run, next(batches)))
                    readings[name].append(meter.read())
    step_ms = {name: [read["step_ms"] for read in reads] for name, reads in readings.items()}
    wait_pct = {name: [read["wait_pct"] for read in reads] for name, reads in readings.items()}
    result: dict[str, float] = {}
    rows: list[tuple[str, str]] = []
    for backend, method in loops:
        times, waits = step_ms[backend, method], wait_pct[backend, method]
        result[f"{backend}_{method}_step_ms"] = statistics.median(times)
        result[f"{backend}_{method}_wait_pct"] = statistics.median(waits)
        rows.append((f"{backend} {method}", f"{spread(times, 'ms')}, waits {spread(waits, '%')}"))
    for backend, _ in loops:
        over_byol = median_ratio(step_ms[backend, "rsa"], step_ms[backend, "byol"])
        result[f"{backend}_rsa_over_byol"] = over_byol
    show(f"{arch}, {size} px, batch {batch_size}", rows, result)


@main.command("all")
@data_option
@click.option("--json", "plain", is_flag=True, help="Print the JSON object only.")
def everything(data: Path, plain: bool) -> None:
    """Measure all speeds in docs/results.md.

    Each benchmark runs in its own process, because the memory and threads of one slow the next.
    """
    figures = {}
    on_files = ["--data", str(data)]
    on_arrays: list[str] = []
    benchmarks = {"views": on_arrays, "step": on_arrays, "backends": on_files, "training": on_files}
    for name, arguments in benchmarks.items():
        command = [sys.executable, "-m", "rsa_fast.tools.bench", name, *arguments]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        *table_lines, last = done.stdout.splitlines()
        figures[name] = json.loads(last)
        if not plain:
            click.echo("\n".join(table_lines))
    click.echo(json.dumps(figures))


def synchronised(work: Callable[[], object], device: torch.device) -> None:
    """Call `work` and wait until the device has finished it."""
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
