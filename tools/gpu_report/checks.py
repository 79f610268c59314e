"""Parts of `tools.gpu_report`: the machine, the values of views, and steps without waits."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import Image

from rsa_fast.insight.measure import open_loader
from rsa_fast.insight.planning import GIB, gpu_row
from rsa_fast.methods import METHODS
from rsa_fast.pipelines import VIEWS, Order, Source, open_source, open_views
from rsa_fast.pipelines.draws import draw
from rsa_fast.pipelines.machine import cores
from rsa_fast.pipelines.torchvision_views import aggressive_view, weak_view
from rsa_fast.recipes import Recipe
from rsa_fast.tools.gpu_report.inputs import (
    STEPS,
    WARM_UP_STEPS,
    check_dali,
    gpu,
    imagenet,
    largest_that_fits,
    nvidia_smi,
    photographs,
)
from rsa_fast.tools.gpu_report.worker import Case, Row, Settings, SkippedError
from rsa_fast.training.meter import Meter
from rsa_fast.training.step import build_run, train_step

ROOT = Path(__file__).resolve().parents[2]  # rsa_fast/tools may be a link
TESTS = Path("tests/rsa_fast/test_gpu.py")
STEADY_STEPS = 3
COMPARED_IMAGES = 256  # the images whose views are compared with PIL's
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "numpy",
    "numba",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "ffcv",
)


def machine(settings: Settings) -> list[Case]:
    """The card, the CPU and the versions."""
    return [Case("machine", describe)]


def describe(_: float) -> Iterator[Row]:
    device = gpu()
    # These operations load cuDNN and cuBLAS, whose memory is then part of the context.
    image = torch.zeros(1, 3, 8, 8, device=device)
    product = torch.nn.functional.conv2d(image, image).flatten()
    product @ product
    free, total = torch.cuda.mem_get_info(device)
    name, properties = torch.cuda.get_device_name(device), torch.cuda.get_device_properties(device)
    versions = {"Python": platform.python_version(), "CUDA": torch.version.cuda}
    cpu_lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line for line in cpu_lines if line.startswith("model name")]
    yield {
        "name": name,
        "total_gib": total / GIB,
        "context_gib": (total - free - torch.cuda.memory_reserved(device)) / GIB,
        "capability": f"{properties.major}.{properties.minor}",
        "plan_row": gpu_row(name, total / GIB),
        "smi": nvidia_smi(),
        "versions": versions | {"cuDNN": cudnn_version()} | package_versions(),
        "cpu": models[0].partition(":")[2].strip() if models else platform.machine(),
        "cores": cores(),
        "memory_gib": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB,
    }


def cudnn_version() -> str:
    try:
        return str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]  # in torch
    except RuntimeError as error:  # this is not the cuDNN that torch was built for
        return f"not usable ({str(error).partition('. ')[0]})"


def package_versions() -> dict[str, str]:
    """The versions of those of `PACKAGES` that are installed."""
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def values(settings: Settings) -> list[Case]:
    """The tests that need a GPU, and the views of every backend against PIL's."""
    gpu()
    ways: dict[str, dict[str, str]] = {
        "resident": {"backend": "resident"},
        "native": {"backend": "native", "aggressive_on": "device"},
        "native, all on the host": {"backend": "native", "aggressive_on": "host"},
        "dali, decoding on the GPU": {"backend": "dali", "decode_on": "gpu"},
        "dali, decoding on the host": {"backend": "dali", "decode_on": "cpu"},
        "ffcv": {"backend": "ffcv"},
    }
    oracle = cache(partial(pil_views, settings))
    cases = [
        Case(name, partial(compare, settings, oracle, fields)) for name, fields in ways.items()
    ]
    return [Case(str(TESTS), run_tests), *cases]


def run_tests(_: float) -> Iterator[Row]:
    """The number of tests that pass, and the names of those that fail."""
    if find_spec("pytest") is None:
        raise SkippedError("pytest is not installed")
    if not (ROOT / TESTS).is_file():
        raise SkippedError(f"there is no {ROOT / TESTS}: run this in a checkout")
    with TemporaryDirectory() as folder:
        results = Path(folder, "results.xml")
        plugins = ("-p", "no:cacheprovider", "-p", "no:xdist")
        command = [sys.executable, "-m", "pytest", *plugins, f"--junitxml={results}", str(TESTS)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if not results.is_file():
            raise RuntimeError(
                f"pytest ended with exit code {done.returncode}: {done.stderr[-500:]}"
            )
        cases = list(ElementTree.parse(results).iter("testcase"))
    bad_tags = {"failure", "error"}
    bad = [case.get("name", "") for case in cases if bad_tags & {child.tag for child in case}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    row: Row = {"tests": len(cases), "passed": len(cases) - len(bad) - skipped}
    yield row | ({"note": f"failed: {', '.join(bad)}"} if bad else {})


def compare(
    settings: Settings,
    oracle: Callable[[], dict[str, np.ndarray]],
    fields: dict[str, str],
    _: float,
) -> Iterator[Row]:
    """The mean and the largest difference of a backend's views from PIL's, over both crops."""
    device, recipe = gpu(), imagenet(settings, "rsa", **fields)
    if recipe.backend == "dali":
        check_dali()
    source = open_source(photographs(settings, recipe.backend), "pretrain", settings.scratch)
    order = first_images(source)
    loader = open_views(
        source,
        recipe.views,
        frozenset(VIEWS),
        order,
        device=device,
        loading=recipe.loading,
    )
    with loader, closing(loader.batches(0)) as batches:
        views = next(batches).views
    mean, std = (
        np.array(x, np.float32).reshape(3, 1, 1) for x in (recipe.views.mean, recipe.views.std)
    )
    row: Row = {"images": order.batch_size}
    for stage in ("weak", "aggressive"):
        gaps = []
        for name in (f"{stage}_1", f"{stage}_2"):
            levels = 255 * (views[name].cpu().numpy() * std + mean)
            gaps.append(np.abs(levels - oracle()[name].transpose(0, 3, 1, 2)))
        row[f"{stage}_mean"] = float(np.mean([gap.mean() for gap in gaps]))
        row[f"{stage}_max"] = float(max(gap.max() for gap in gaps))
    yield row


def first_images(source: Source) -> Order:
    """An order whose first batch has the images that `compare` uses."""
    count = len(source.manifest)
    return Order(count, min(COMPARED_IMAGES, count), seed=0)


def pil_views(settings: Settings) -> dict[str, np.ndarray]:
    """PIL's views `(B, S, S, 3)` uint8 of the images that `compare` loads."""
    spec = imagenet(settings, "rsa").views
    source = open_source(photographs(settings), "pretrain", settings.scratch)
    order = first_images(source)
    ids = order.ids(0, 0)
    params = draw(order.seed, 0, ids, spec, source.manifest.sizes[ids])

    def views(i: int) -> list[np.ndarray]:
        image = Image.fromarray(source.read(int(ids[i])))
        weak = [weak_view(image, p, spec.size_px) for p in params[i]]
        aggressive = [aggressive_view(view, p) for view, p in zip(weak, params[i], strict=True)]
        return [np.asarray(view) for view in (*weak, *aggressive)]

    with ThreadPoolExecutor(cores()) as pool:
        views_by_image = list(pool.map(views, range(len(ids))))
    return {name: np.stack([views[i] for views in views_by_image]) for i, name in enumerate(VIEWS)}


def sync(settings: Settings) -> list[Case]:
    """The recipe of every method, and RSA's recipe with the other backends."""
    gpu()
    cases = [(method, "native") for method in METHODS] + [("rsa", "dali"), ("rsa", "ffcv")]
    return [
        Case(f"{method}, {backend}", partial(check_no_waits, settings, method, backend))
        for method, backend in cases
    ]


def check_no_waits(settings: Settings, method: str, backend: str, _: float) -> Iterator[Row]:
    """Run some steps and their loading. Raises torch's RuntimeError if the host waits in them.

    Raises SkippedError if the method does not accept the settings. W-MSE, for example, does not
    accept a small batch.
    """
    if backend == "dali":
        check_dali()
    labelled = replace(settings, data=None)  # drawn images have the labels for supervised training
    source = open_source(photographs(labelled, backend), "pretrain", settings.scratch)

    def recipe_of(**fields: int) -> Recipe:
        try:
            return imagenet(settings, method, backend=backend, **fields)
        except ValueError as error:
            raise SkippedError(str(error)) from error

    def work(batch_size: int) -> Row:
        recipe = recipe_of(batch_size=batch_size)
        run = build_run(recipe, STEPS * batch_size)
        meter = Meter(batch_size, run.device)
        loader = open_loader(run, source)
        with loader, closing(loader.batches(0)) as batches:
            try:
                for step in range(WARM_UP_STEPS + STEADY_STEPS):
                    if step == WARM_UP_STEPS:
                        torch.cuda.set_sync_debug_mode("error")
                    meter.add(run.step, train_step(run, next(batches)), run.skipped)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return {"batch_size": batch_size, "precision": recipe.precision, "steps": STEADY_STEPS}

    yield largest_that_fits(min(recipe_of().batch_size, len(source.manifest)), work)
