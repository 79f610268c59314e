"""The programs that the tests run on fake GPUs.

`python -m tests.gpuless.programs NAME ARGUMENTS...` calls a function of this file and prints its
result as JSON. Values are garbage there, so nothing may depend on them.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import socket
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from rsa_fast.distributed import max_over_ranks, process_group
from rsa_fast.methods import METHODS
from rsa_fast.pipelines import VIEWS, Batch, Order, open_source, open_views
from rsa_fast.recipes import build_recipe
from rsa_fast.training import engine
from rsa_fast.training.meter import Meter
from rsa_fast.training.metrics import Screen
from rsa_fast.training.step import build_run, train_on, train_step
from tests.gpuless.gpulint import GpuLint

RUNTIME = ctypes.CDLL(None)  # the fake runtime
RUNTIME.ghost_count.restype = RUNTIME.ghost_nccl.restype = ctypes.c_long
RANKS = 8


def lower_half(matrix: torch.Tensor, **_) -> tuple[torch.Tensor, torch.Tensor]:
    """Take the place of torch.linalg.cholesky_ex: cuSOLVER does not start on the fake device.

    The results have the shapes of a factor and of the faults, which are all that counts here.
    """
    return matrix.tril(), matrix.new_zeros(matrix.shape[:-2], dtype=torch.int32)


torch.linalg.cholesky_ex = lower_half  # in W-MSE


class Watch(GpuLint):
    """A context in which a wait for the device is an error.

    When it ends, `found` contains the numbers of kernels, copies and collectives since it was
    entered, the bytes that NCCL reduced, the matrix products, the peak of the device's memory in
    GiB, and the lint's faults.
    """

    def counts(self) -> list[int]:
        return [RUNTIME.ghost_count(0), RUNTIME.ghost_count(1), RUNTIME.ghost_nccl(1)]

    def __enter__(self):
        self.before = self.counts()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_sync_debug_mode("error")
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        torch.cuda.set_sync_debug_mode("default")
        spent = [now - then for now, then in zip(self.counts(), self.before, strict=True)]
        kernels, copies, reduced_bytes = spent
        self.found = {
            "kernels": kernels,
            "copies": copies,
            "collectives": self.collectives,
            "all_reduce_bytes": reduced_bytes,
            "products": dict(sorted(self.products.items())),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
            "faults": dict(self.faults),
        }


def as_rank_0_of_8() -> None:
    """Initialise NCCL without peers: its collectives leave tensors as they are."""
    torch.nn.parallel.distributed._verify_param_shape_across_processes = lambda *_: None
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=RANKS)
    for rank in range(RANKS):  # The heartbeat waits for a first beat of each rank.
        dist.distributed_c10d._get_default_store().set(f"beat/{rank}", "0 training")


def imagenet_steps(folder: str) -> dict[str, dict]:
    """Return what the third step costs, by method, and for RSA also as 16 GB cards run it.

    The cost is counted from the end of the second step to the end of the meter's count of the
    third. The first step allocates. In the second, DDP lays out its buckets again, which waits.
    After the third comes a checkpoint, and another run resumes from it.
    """
    as_rank_0_of_8()
    data, results, watches = images(Path(folder), 3 * 256 * RANKS), {}, []

    def add(meter: Meter, step: int, *arguments, add=Meter.add) -> None:
        add(meter, step, *arguments)
        if step == 1:
            watches.append(Watch().__enter__())
        if step == 2:
            watches[-1].__exit__(None, None, None)

    def restore(run, state, *arguments, restore=engine.restore) -> None:
        restore(run, state, *arguments)
        loaded = [
            *run.method.state_dict().values(),
            *(s["momentum_buffer"] for s in run.optimizer.state.values()),
        ]
        saved = [
            *state["method"].values(),
            *(s["momentum_buffer"] for s in state["optimizer"]["state"].values()),
        ]
        assert all(x.is_cuda for x in loaded) and run.step == 3
        for one, other in zip(loaded, saved, strict=True):
            torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)

    Meter.add, engine.restore = add, restore
    engine.Loop.stop_at_fault = lambda *_: None  # Values are garbage here.
    Screen.write = lambda *_: None  # Times mean nothing here.
    os.fsync = lambda _: None  # A checkpoint has .4 GB, and no disk is tested here.
    own = {"supervised": {"classes": 2}, "rsa recomputed": {"recompute_stages": 1}}
    # With ten crops or nine patches, 256 images take more than 32 GB.
    own |= {"dino": {"batch_size": 64 * RANKS}, "pirl": {"batch_size": 128 * RANKS}}
    own |= {"infomin": {"batch_size": 128 * RANKS}}
    for case in (*METHODS, "rsa recomputed"):
        fields = {
            "batch_size": 256 * RANKS,
            "device": "cuda",
            "precision": "fp16",
            "backend": "native",
            "keep_last": 1,
        }
        recipe = build_recipe("imagenet1k", case.split()[0], overrides=fields | own.get(case, {}))
        out = Path(folder) / case
        gc.collect()
        torch.cuda.empty_cache()
        engine.train(recipe, data, out, stop_at_step=3)
        engine.train(recipe, data, out, resume=True, stop_at_step=4)
        (checkpoint,) = (out / "checkpoints").iterdir()
        assert checkpoint.name == "step_00000004.pt"
        checkpoint.unlink()  # .4 GB
        results[case] = watches[-1].found
    return results


def small_steps(folder: str, beton: str = "") -> dict[str, dict]:
    """Return, by case, what the steps after the second of a network at 32 px cost.

    The cases are precisions, optimisers and backends, and the BatchNorm that a method's ImageNet-1K
    recipe does not have.
    """
    as_rank_0_of_8()
    cases = {
        "sgd fp32": ("rsa", {"precision": "fp32", "backend": "resident"}),
        "lars bf16": ("rsa", {"precision": "bf16", "backend": "resident", "optimizer": "lars"}),
        "native": ("rsa", {"backend": "native", "aggressive_on": "host"}),
        "split": ("moco", {"bn": "split:16"}),
        "accumulate adamw": (
            "byol",
            {"bn": "local", "accumulate": 2, "optimizer": "adamw", "clip_grad_norm": 1.0},
        ),
    }
    cases |= {"ffcv": ("rsa", {"backend": "ffcv"})} if beton else {}
    for model in ("test_vit", "test_efficientnet"):
        cases[f"timm {model}"] = ("rsa", {"arch": f"timm/{model}", "width": 64, "bn": "sync"})
    own = {"w-mse": {"out_dim": 4}, "swav": {"queue_size": 128, "queue_start_epoch": 0}}
    for method in METHODS:
        bn = "local" if build_recipe("imagenet1k", method).bn == "sync" else "sync"
        cases[f"{method} {bn}"] = (method, {"bn": bn, **own.get(method, {})})
    results = {}
    for case, (method, fields) in cases.items():
        fields = {
            "precision": "fp16",
            "batch_size": 64,
            "width": 8,
            "device": "cuda",
            "views.size_px": 16,
            **fields,
        }
        run = build_run(build_recipe("cifar10", method, overrides=fields), 64)
        source = open_source(beton if run.recipe.backend == "ffcv" else folder, "pretrain")
        options = {"device": run.device, "dtype": run.dtype, "loading": run.recipe.loading}
        meter = Meter(64, run.device)
        with open_views(
            source,
            run.recipe.views,
            run.method.reads,
            Order(40, 8, 0, accumulate=run.recipe.accumulate),
            **options,
        ) as loader:
            batches = loader.batches(0)
            for step in (0, 1):
                first = islice(batches, run.recipe.accumulate)
                meter.add(step, train_step(run, *first), run.skipped)
            with Watch(run.dtype) as watch:
                for batch in batches:
                    if loss := train_on(run, batch):
                        meter.add(run.step - 1, loss, run.skipped)
        views = [batch.views[name] for name in run.method.reads]
        assert all(
            v.is_cuda
            and v.dtype == run.dtype
            and v.flatten(0, -4).is_contiguous(memory_format=torch.channels_last)
            for v in views
        )
        assert run.step == 5
        results[case] = watch.found
    return results


def planted_faults() -> dict[str, dict]:
    """Return what the third step of a small run costs, unchanged ("none") and with each fault.

    The faults are in the forward pass.
    """
    kept = []

    def fp32(operation: Callable, *tensors: torch.Tensor) -> None:
        with torch.autocast("cuda", enabled=False):
            operation(*(x.float() for x in tensors))

    faults: dict[str, Callable[[Batch], object]] = {
        "none": lambda batch: None,
        "item": lambda batch: batch.label[0].item(),
        "boolean mask": lambda batch: batch.label[batch.label > 0],
        "waiting copy": lambda batch: torch.ones(1).cuda(),
        "waiting copy of pinned memory": lambda batch: torch.ones(1).pin_memory().cuda(),
        "copy to the host": lambda batch: batch.label.cpu(),
        "index on the host": lambda batch: batch.label[torch.zeros(1, dtype=torch.int64)],
        "pageable-copy": lambda batch: torch.ones(1).to("cuda", non_blocking=True),
        "convolution-of-wrong-type": lambda batch: fp32(F.conv2d, batch.weak_1, batch.weak_1),
        "conv-not-channels_last": lambda batch: F.conv2d(batch.weak_1.contiguous(), batch.weak_1),
        "foreach-mixed-device": lambda batch: torch._foreach_mul_(
            [torch.ones(1), torch.ones(1, device="cuda")], 2
        ),
        "products": lambda batch: fp32(torch.mm, batch.weak_1[0, 0], batch.weak_1[0, 0]),
        "kernels": lambda batch: batch.weak_1.mul_(1),
        "copies": lambda batch: batch.label.clone(),
        "all_reduce_bytes": lambda batch: dist.all_reduce(batch.label),
        "peak_gib": lambda batch: kept.append(torch.empty(2**28, dtype=torch.uint8, device="cuda")),
    }
    as_rank_0_of_8()
    results = {}
    for name, plant in faults.items():
        fields = {
            "optimizer": "lars",
            "bn": "sync",
            "precision": "fp16",
            "width": 8,
            "batch_size": 64,
            "device": "cuda",
        }
        run = build_run(build_recipe("cifar10", "rsa", overrides=fields), 64)
        view = torch.zeros(8, 3, 16, 16, dtype=run.dtype, device="cuda").to(
            memory_format=torch.channels_last
        )
        batch = Batch(torch.zeros(8, dtype=torch.int64, device="cuda"), dict.fromkeys(VIEWS, view))
        for _ in range(2):
            train_step(run, batch)
        run.method.register_forward_pre_hook(
            lambda _, inputs, plant=plant: (plant(inputs[0]), None)[1]
        )
        try:
            with Watch() as watch:
                train_step(run, batch)
            results[name] = watch.found
        except RuntimeError as error:
            results[name] = {"error": str(error)}
    return results


def process_group_of_torchrun() -> dict[str, object]:
    """Return what torchrun's environment makes of a process on a GPU."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    ranks = {"RANK": "0", "LOCAL_RANK": "1", "WORLD_SIZE": "1"}
    os.environ |= ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    with process_group("cuda", 60.0):
        found = {"backend": dist.get_backend(), "device": torch.cuda.current_device()}
        return found | {"highest": max_over_ranks(3)}


def images(folder: Path, count: int) -> Path:
    """Make an image folder of repeated links to the images of another folder."""
    for label in range(2):
        (place := folder / "linked" / "train" / f"class_{label}").mkdir(parents=True)
        files = sorted((folder / "train" / f"class_{label}").iterdir())
        for i in range(count // 2):
            os.link(files[i % len(files)], place / f"{i:05}.jpg")
    return folder / "linked"


if __name__ == "__main__":
    result = globals()[sys.argv[1]](*sys.argv[2:])
    print(json.dumps(result), flush=True)
    os._exit(0)  # NCCL's threads would wait forever.
