"""Programs for a fake GPU that load and train from every backend.

`python -m tests.gpuless.backends training FOLDER` trains ImageNet-1K's RSA recipe. Each case takes
three steps of rank 0 of eight, with a damaged image in the second batch, and one more step after a
resume in the middle of the epoch. It prints for each case what the third step waited for, which
images were skipped, and how far the crops in the device's memory are from those of the same backend
on a CPU, in 8-bit levels.

Kernels compute nothing here, so only what the host sends to the device can be compared.

`python -m tests.gpuless.backends planted FOLDER` loads batches with a DALI backend that has one
fault at a time. The checks above have to find each fault.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from rsa_fast.pipelines import VIEWS, Order, Source, ViewSpec, device_ops, open_source, open_views
from rsa_fast.pipelines.beton import BetonWriter
from rsa_fast.pipelines.loading import Job, Loader, Loading
from rsa_fast.pipelines.packed import ENTRY
from rsa_fast.pipelines.transfer import Transfer
from rsa_fast.recipes import Recipe, build_recipe
from rsa_fast.training import checkpoint, engine
from rsa_fast.training.meter import Meter
from rsa_fast.training.metrics import Screen
from tests.gpuless.backend_cases import CASES
from tests.gpuless.programs import RANKS, Watch, as_rank_0_of_8
from tests.helpers import jpeg

dali = importlib.import_module("tests.gpuless.dali_stand_in") if find_spec("nvidia.dali") else None
PER_RANK, STEPS, BAD_STEP = 8, 3, 1
COUNT = PER_RANK * RANKS * 5  # An epoch has five steps; the resume is in the middle.
SIDE_PX = 40


def write_images(data: Path, beton: bool) -> None:
    """Write JPEGs as an image folder or in a .beton file."""
    entries = np.zeros(COUNT, ENTRY)
    data.mkdir(parents=True)
    writer = BetonWriter(data / "train.beton", COUNT, 4096, entries[:0]) if beton else None
    for i in range(COUNT):
        image, label = jpeg(i, SIDE_PX, SIDE_PX), i % 2
        if writer:
            place = writer.append(image, label)
            entries[i] = (*place, len(image), label, SIDE_PX, SIDE_PX, False)
        else:
            (folder := data / "train" / f"class_{label}").mkdir(parents=True, exist_ok=True)
            (folder / f"{i:03}.jpg").write_bytes(image)
    if writer:
        writer.finish(entries)
        writer.close()


def damage(source: Source, data: Path, sample: int) -> None:
    """Make a JPEG's Huffman table impossible, which its header does not show.

    Every decoder refuses it. The file keeps its size and its time, so it is not scanned again.
    """
    if source.beton:
        entry = source.encoded.__self__.entries[sample]
        path, offset = source.beton, int(entry["offset"])
    else:
        path, offset = data / source.manifest.paths[sample], 0
    content, times = path.read_bytes(), path.stat()
    with path.open("r+b") as file:
        file.seek(content.index(b"\xff\xc4", offset) + 5)  # marker, length, table's number
        file.write(b"\xff" * 16)  # how many codes there are of each length
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def levels_of(tensor: torch.Tensor) -> np.ndarray:
    """Copy the memory of `(B, 3, S, S)` uint8 levels, which are stored as `(B, S, S, 3)`."""
    count, channels, height, width = tensor.shape
    memory = ctypes.string_at(tensor.data_ptr(), tensor.numel())
    return np.frombuffer(memory, np.uint8).reshape(count, height, width, channels)


def run_case(folder: Path, name: str, loading: dict[str, str]) -> dict[str, object]:
    """Train one case and return its results."""
    beton = loading["backend"] == "ffcv"
    write_images(data := folder / "data", beton)
    sent: list[dict[str, np.ndarray]] = []  # for each step, the levels that the host sent, by view
    watch, waits, loaders = Watch(), [], []
    pipelines = dali.pipelines if dali else 0
    order = Order(COUNT, PER_RANK * RANKS, 0, 0, RANKS)
    bad = int(order.ids(0, BAD_STEP)[3])

    def open_damaged(*arguments, open=Recipe.open_source, **options) -> Source:
        source = open(*arguments, **options)
        if "pretrain" in arguments:
            damage(source, data, bad)
        return source

    def open_kept(*arguments, **options) -> Loader:
        loaders.append(open_views(*arguments, **options))
        return loaders[-1]

    def finish(transfer: Transfer, levels: dict, params: np.ndarray, finish=Transfer.on_device):
        if transfer.job.device.type == "cuda":
            if dali:
                dali.finish_work()
            sent.append({name: levels_of(view) for name, view in levels.items()})
        return finish(transfer, levels, params)

    def add(meter: Meter, step: int, *arguments, add=Meter.add) -> None:
        add(meter, step, *arguments)
        if step == STEPS - 2:
            waits.append(dali.waits if dali else 0)
            watch.__enter__()
        if step == STEPS - 1:
            watch.__exit__(None, None, None)
            waits.append(dali.waits if dali else 0)

    fields = {"batch_size": PER_RANK * RANKS, "device": "cuda", "precision": "fp16", "width": 8}
    fields |= {"on_bad_image": "skip", "arch": "resnet18", "keep_last": 1, **loading}
    recipe = build_recipe("imagenet1k", "rsa", overrides=fields)
    patched = Recipe.open_source, engine.open_views, Transfer.on_device, Meter.add
    Recipe.open_source, engine.open_views = open_damaged, open_kept
    Transfer.on_device, Meter.add = finish, add
    try:
        engine.train(recipe, data, folder / "run", stop_at_step=STEPS)
        engine.train(recipe, data, folder / "run", resume=True, stop_at_step=STEPS + 1)
    finally:
        Recipe.open_source, engine.open_views, Transfer.on_device, Meter.add = patched
    first, resumed = loaders
    in_memory = recipe.backend == "resident" and recipe.aggressive_on == "device"
    pixels = [loader.images for loader in loaders] if in_memory else []
    return {
        "faults": watch.found["faults"],
        "dali_waits": waits[1] - waits[0],
        "dali_pipelines": (dali.pipelines if dali else 0) - pipelines,
        "skipped": [sorted(first.skipped) == [bad], sorted(resumed.skipped) in ([], [bad])],
        "gaps": [resident_gap(p, data, bad) for p in pixels]
        or gaps(sent, data, folder / "run", recipe.views, loading, order),
    }


def gaps(
    sent: list[dict[str, np.ndarray]],
    data: Path,
    cache: Path | None,
    spec: ViewSpec,
    loading: dict[str, str],
    order: Order,
) -> list[float]:
    """Return, by step, the largest difference of the sent crops from the backend's on a CPU."""
    source, spec = open_source(data, "pretrain", cache=cache), replace(spec, extra=None)
    on_cpu = Loading(loading["backend"], aggressive_on="host", on_bad_image="skip")
    scale, bias = device_ops.affine(spec, torch.device("cpu"))
    found = []
    with open_views(source, spec, frozenset(VIEWS), order, loading=on_cpu) as loader:
        for levels, batch in zip(sent, loader.batches(0), strict=False):
            wanted = {name: ((batch.views[name] - bias) / scale).numpy() for name in levels}
            pairs = ((levels[name].transpose(0, 3, 1, 2), wanted[name]) for name in levels)
            found.append(max(float(np.abs(one - other).max()) for one, other in pairs))
    return found


def resident_gap(pixels: torch.Tensor, data: Path, bad: int) -> float:
    """Return the largest difference of the images in the device's memory from the files."""
    source = open_source(data, "pretrain")
    memory = ctypes.string_at(pixels.data_ptr(), pixels.numel())
    held = np.frombuffer(memory, np.uint8).reshape(COUNT, 3, SIDE_PX, SIDE_PX)
    images = np.stack([source.read(i).transpose(2, 0, 1) for i in range(COUNT) if i != bad])
    return float(np.abs(np.delete(held, bad, 0).astype(np.int64) - images).max())


def training(folder: Path) -> dict[str, dict[str, object]]:
    as_rank_0_of_8()
    # Values are garbage here.
    engine.Loop.stop_at_fault = checkpoint.check_finite = lambda *_: None
    Screen.write = lambda *_: None  # Times mean nothing here.
    if dali:
        dali.install()
    results = {}
    for number, (name, loading) in enumerate(CASES.items()):
        results[name] = run_case(folder / str(number), name, loading)
    return results


def planted(folder: Path) -> dict[str, dict[str, object]]:
    """Return, by fault, the second batch's gap and number of waits, or the error."""
    from rsa_fast.pipelines.dali_views import DaliViews

    class ReleasedEarly(DaliViews):
        def batch_on_gpu(self, crops, ids, params):
            self.pipe.release_outputs()
            self.pipe.release_outputs.side_effect = None  # The next call does nothing.
            return super().batch_on_gpu(crops, ids, params)

    class HostWaits(DaliViews):
        def outputs(self):
            return self.pipe.share_outputs()

    class UnknownKeyword(DaliViews):
        def outputs(self):
            return self.pipe.share_outputs(non_blocking=True)

    dali.install()
    write_images(folder / "data", beton=False)
    source = open_source(folder / "data", "pretrain")
    spec, reads = build_recipe("imagenet1k", "rsa").views, frozenset(VIEWS)
    order, device = Order(COUNT, PER_RANK, 0), torch.device("cuda")
    results = {}
    for kind in (DaliViews, ReleasedEarly, HostWaits, UnknownKeyword):
        sent = []

        def finish(transfer, levels, params, finish=Transfer.on_device, sent=sent):
            dali.finish_work()
            sent.append({name: levels_of(view) for name, view in levels.items()})
            return finish(transfer, levels, params)

        loading = Loading("dali", threads=1, prefetch_batches=1, aggressive_on="device")
        job = Job(source, spec, reads, order, device, torch.float16, loading)
        real, Transfer.on_device = Transfer.on_device, finish
        loader, waits = kind(job), dali.waits
        try:
            next(loader.batches(0))
            gap = gaps(sent, folder / "data", None, spec, {"backend": "dali"}, order)[0]
            results[kind.__name__] = {"gap": gap, "waits": dali.waits - waits}
        except TypeError as error:
            results[kind.__name__] = {"error": str(error)}
        finally:
            Transfer.on_device = real
    return results


if __name__ == "__main__":
    result = globals()[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps(result), flush=True)
    os._exit(0)  # NCCL's threads would wait forever.
