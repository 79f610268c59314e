"""Inputs of the measurements of `tools.gpu_report`: the GPU, recipes, images and batches."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from rsa_fast.insight.planning import of_one_rank, photograph
from rsa_fast.pipelines import Batch, Source, open_source
from rsa_fast.pipelines.machine import cores
from rsa_fast.recipes import Recipe, build_recipe
from rsa_fast.tools.gpu_report.worker import Settings, SkippedError
from rsa_fast.training.step import Run, choose_device, choose_dtype

NODE_GPUS = 8  # the batch sizes of the ImageNet-1K recipes are for a node of 8 GPUs
SMALL_PX = 96  # images up to this size are trained like CIFAR's; larger ones are photographs
STEPS = 100_000  # length of the schedules, which does not matter, because these runs stop early
WARM_UP_STEPS = 3  # the first step chooses cuDNN's algorithms and allocates the momentum
MAX_CONVERTED = 5000  # if the user has more photographs, they are not converted for FFCV
# The name of each property and its name in nvidia-smi.
SMI = {
    "driver": "driver_version",
    "power limit, W": "power.limit",
    "SM clock, MHz": "clocks.sm",
    "highest SM clock, MHz": "clocks.max.sm",
    "memory clock, MHz": "clocks.mem",
}

Result = TypeVar("Result")


def gpu() -> torch.device:
    """The GPU. Raises SkippedError if there is none."""
    if not torch.cuda.is_available():
        raise SkippedError("torch finds no GPU; `rsa-fast doctor` shows why")
    return choose_device("cuda")


def nvidia_smi() -> dict[str, str]:
    """The first GPU's properties by their names in `SMI`, empty if nvidia-smi does not work."""
    if shutil.which("nvidia-smi") is None:
        return {}
    query = f"--query-gpu={','.join(SMI.values())}"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if done.returncode:
        return {}
    words = done.stdout.partition("\n")[0].split(",")
    return dict(zip(SMI, map(str.strip, words), strict=True))


def free_memory() -> None:
    """Release the memory that earlier measurements have left in torch's and in DALI's pools."""
    gc.collect()
    torch.cuda.empty_cache()
    if dali := sys.modules.get("nvidia.dali.backend"):
        dali.ReleaseUnusedMemory()


def build(settings: Settings, dataset: str, method: str, **fields: Any) -> Recipe:
    """A recipe on the GPU with an explicit precision. `fields` win over the settings' overrides."""
    device = gpu()
    overrides = {"device": "cuda", "threads": cores(), **settings.overrides, **fields}
    recipe = build_recipe(dataset, method, overrides=overrides)
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    precision = names[choose_dtype(recipe.precision, device)]
    return build_recipe(dataset, method, overrides=overrides | {"precision": precision})


def imagenet(settings: Settings, method: str, **fields: Any) -> Recipe:
    """A method's ImageNet-1K recipe with the part of the batch that one GPU of a node has."""
    part = of_one_rank(build_recipe("imagenet1k", method), NODE_GPUS)
    share = {"batch_size": part.batch_size, "bn": part.bn}
    return build(settings, "imagenet1k", method, **(share | fields))


def largest_that_fits(batch_size: int, work: Callable[[int], Result]) -> Result:
    """The result of `work(batch_size)`. The batch size is halved until it fits on the GPU."""
    while True:
        free_memory()
        try:
            return work(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
            batch_size //= 2


def ready_batch(run: Run, reads: Iterable[str]) -> Batch:
    """A batch on the GPU with random views, those named in `reads`."""
    images, views = run.recipe.batch_size, {}
    for name in sorted(reads):
        shape = (images, *run.recipe.views.shape(name))
        view = torch.randn(shape, device=run.device, dtype=run.dtype)
        views[name] = view.to(memory_format=torch.channels_last) if view.ndim == 4 else view
    ids = torch.arange(images, device=run.device)
    return Batch(torch.zeros_like(ids), views, ids)


def photographs(settings: Settings, backend: str = "native") -> Path:
    """A folder of photographs, given by the user or drawn, in the format that a backend reads.

    Raises SkippedError when the user has given too many photographs to convert.
    """
    folder = settings.data if settings.data and not small(settings) else drawn(settings)
    if backend != "ffcv" or open_source(folder, "pretrain").beton:
        return folder
    converted = settings.scratch / ("beton" if settings.data else "drawn-beton")
    if not converted.exists():
        from rsa_fast.tools.to_ffcv import main as to_ffcv

        if (count := len(open_source(folder, "pretrain").manifest)) > MAX_CONVERTED:
            raise SkippedError(
                f"{count:,} images take too long to convert: give a folder of .beton files"
            )
        to_ffcv([str(folder), str(converted), "--write-mode", "passthrough"], standalone_mode=False)
    return converted


def small(settings: Settings) -> Source | None:
    """The user's images if they are small like CIFAR's, otherwise None."""
    source = open_source(settings.data, "pretrain", settings.scratch) if settings.data else None
    return source if source and source.manifest.sizes.max() <= SMALL_PX else None


def drawn(settings: Settings) -> Path:
    """A folder of drawn, labelled JPEGs of ImageNet's mean size, 468x401 px and 110 kB.

    The images are drawn in the first call only.
    """
    folder, partial = settings.scratch / "photographs", settings.scratch / "photographs.partial"
    if folder.exists():
        return folder
    for label in (0, 1):
        (partial / "train" / f"class_{label}").mkdir(parents=True)

    def save(seed: int) -> None:
        path = partial / "train" / f"class_{seed % 2}" / f"{seed:05}.jpg"
        photograph(seed).save(path, quality=90)

    with ThreadPoolExecutor(cores()) as pool:
        list(pool.map(save, range(settings.images)))
    partial.rename(folder)
    return folder


def check_dali() -> None:
    """Raise ImportError if DALI is missing, and SkippedError if it cannot use the GPU."""
    from nvidia.dali import Pipeline, types

    pipe = Pipeline(batch_size=1, num_threads=1, device_id=0)
    with pipe:
        pipe.set_outputs(types.Constant(0, shape=[1], device="gpu"))
    try:
        pipe.build()
    except RuntimeError as error:
        raise SkippedError(f"DALI cannot use this GPU: {error}") from error
