"""What a run will need and give on GPUs that are not here: memory, time, decoding, disk. Predictions, all of them.

    plan(build_recipe("imagenet1k", "rsa"), "v100-32g", gpus=8)["images_per_s"]

The engine's own step runs once on tensors without memory, and every operation leaves its FLOPs, the bytes it moves and what
it allocates. The GPU's time is the sum of max(FLOPs / peak rate, bytes / bandwidth) over the operations, divided by the
efficiency with which others trained a supervised ResNet-50, of which the same sum is known.

How good that is: `ACCURACY`, held by tests. RSA's own code on V100s (paper, Table 7) trained STL-10 in fp32 as fast as this
says, CIFAR-100 in fp32 at 83% of it, and ImageNet-100 in fp16 at 42%, waiting for its images.
Not modelled: what `compile` saves, cuDNN's choice of algorithms, what ranks gather from each other, evaluation, what else
the host has to do.
"""

from __future__ import annotations

import itertools
import os
import time
import weakref
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from pipelines import RESIDENT_BYTES, VIEWS, Batch, Order, Source, open_source, open_views
from rsa_fast.datasets import DATASETS
from rsa_fast.methods.method import Method, build_method
from rsa_fast.recipes import Recipe, build_recipe, nearest, resolve
from rsa_fast.training.optim import build_optimizer
from rsa_fast.training.step import Run, choose_dtype, train_step

GIB, BLOCK = 2**30, 512  # bytes; CUDA's caching allocator hands out multiples of the second
OVERHEAD_GIB = 1.5  # chosen: CUDA's context, cuDNN's workspaces, NCCL's buffers
LOADER_BYTES = (
    1.77 * GIB / (256 * 3 * 224**2)
)  # a view's level: what the allocator reserves for the aggressive stage
LAUNCH_US = 7  # of the host, an operation: PyTorch dispatches a step's 1,970 in 13 ms on a CPU, without a driver
CORES_PER_GPU = 4  # where none are given: an AWS p3.16xlarge has 32 for 8 V100s

ACCURACY = (
    "memory within 2% of the allocator's, or 15 MiB; time, with a V100's efficiency: "
    "8 V100s 15% too fast, an A100 9% too fast, an RTX 3090 22% too slow; "
    "relative to a V100 in Lambda's table, an H100 29%, an H200 59% and a B200 168% too fast"
)
NVIDIA = "NVIDIA/DeepLearningExamples, ResNet50 v1.5 for PyTorch"
TIMM = "timm, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv"
NONE = "none found in channels_last"
LAMBDA = NONE + "; Lambda, whose V100 has 833, has {}"  # lambdal/deeplearning-benchmark, fp16
INFERENCE = NONE + "; NVIDIA's rate of inference is {}, a V100's 3,382"  # in the tables of `NVIDIA`


@dataclass(frozen=True)
class Gpu:
    """Peaks are dense, with tensor cores accumulating in fp32. `resnet50`: images/s of one GPU training in channels_last, by
    precision, as `source` measured them; fp16 by AMP."""

    memory_gib: float  # as torch names it when it is out of memory
    fp16_tflops: float
    fp32_tflops: float  # of convolutions: in TF32 where there is TF32
    memory_gb_s: float
    link_gb_s: float  # to other GPUs of the node, one way
    resnet50: dict[str, float]
    source: str
    jpegs_per_s: float | None = None  # decoded on the GPU; None: no figure found
    bf16: bool = True  # in hardware; NVIDIA has it since Ampere


GPUS = {
    # Tesla V100 SXM2 data sheet.
    "v100-16g": Gpu(15.77, 125, 15.7, 900, 150, {"fp16": 1200, "fp32": 367}, NVIDIA, bf16=False),
    "v100-32g": Gpu(31.75, 125, 15.7, 900, 150, {"fp16": 1156, "fp32": 356}, NVIDIA, bf16=False),
    # T4 data sheet, PCIe 3.0 x16. The bandwidth is from the Turing white paper: the data sheet
    # rounds it to 300 GB/s. torch reports this memory in hpcaitech/Open-Sora issue 697.
    "t4": Gpu(14.75, 65, 8.1, 320, 16, {}, INFERENCE.format("1,198"), bf16=False),
    # A10 data sheet, PCIe 4.0 x16. torch reports this memory in zai-org/CogVLM issue 236.
    "a10": Gpu(21.99, 125, 62.5, 600, 32, {}, LAMBDA.format("638")),
    # A100 SXM4 data sheet; JPEGs: NVIDIA's blog on its hardware decoder, as quoted in DALI issue 5362.
    "a100-40g": Gpu(39.39, 312, 156, 1555, 300, {}, LAMBDA.format("1,396, with PCIe"), 7000),
    "a100-80g": Gpu(79.15, 312, 156, 2039, 300, {"fp16": 2470, "fp32": 938}, NVIDIA, 7000),
    # L4 and L40S data sheets, PCIe 4.0 x16. The L4's gives 242 and 120 TFLOP/s, with sparsity.
    # torch reports this memory in public logs; under older drivers an L4 has 22.16 GiB.
    "l4": Gpu(22.03, 121, 60, 300, 32, {}, NONE),
    "l40s": Gpu(44.52, 362, 183, 864, 32, {}, NONE),
    # H100 SXM5 and H200 SXM data sheets. torch reports the H200's memory in public logs.
    "h100-80g": Gpu(79.1, 989, 494, 3350, 450, {}, LAMBDA.format("2,790")),
    "h200": Gpu(139.8, 989, 494, 4800, 450, {}, LAMBDA.format("3,079")),
    # Blackwell data sheet of October 2025, HGX B200: 4.5 and 2.2 PFLOP/s, with sparsity.
    # CUDA reports this memory in pytorch/ao pull request 4002.
    "b200": Gpu(178.35, 2250, 1100, 7700, 900, {}, LAMBDA.format("3,076")),
    # GA102, Ada and RTX Blackwell white papers, PCIe 4.0 x16; PCIe 5.0 x16 for the RTX 5090.
    # torch reports the RTX 5090's memory in TrajectoryCrafter/TrajectoryCrafter issue 20.
    "rtx-3090": Gpu(23.69, 71, 35.6, 936, 32, {"fp16": 1218}, TIMM),
    "rtx-4090": Gpu(23.64, 165.2, 82.6, 1008, 32, {}, LAMBDA.format("1,301")),
    "rtx-5090": Gpu(31.36, 209.5, 104.8, 1792, 64, {}, NONE),
}

# The driver's names of these cards, without "NVIDIA", "Tesla" and "GeForce". Other versions of the
# same GPU (PCIe, NVL, laptop, MIG slice) have other names and clocks, memory or links: no row.
DEVICES = {
    "V100-SXM2-16GB": "v100-16g",
    "V100-SXM2-32GB": "v100-32g",
    "T4": "t4",
    "A10": "a10",
    "A100-SXM4-40GB": "a100-40g",
    "A100-SXM4-80GB": "a100-80g",
    "L4": "l4",
    "L40S": "l40s",
    "H100 80GB HBM3": "h100-80g",
    "H200": "h200",
    "B200": "b200",
    "RTX 3090": "rtx-3090",
    "RTX 4090": "rtx-4090",
    "RTX 5090": "rtx-5090",
}


class Ledger(TorchDispatchMode):
    """Notes every ATen operation as (part of the step, FLOPs, bytes read and written), and the peak of live memory."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int, int]] = []
        self.live: set[int] = set()
        self.live_bytes = self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "aten":  # prim.device asks, and computes nothing
            return out
        read, written = (
            [t for t in tree_leaves(part) if isinstance(t, Tensor)]
            for part in ((args, kwargs), out)
        )
        for tensor in written:
            self.hold(tensor.untyped_storage())
        if not func.is_view:
            if (
                not written and args
            ):  # _foreach_add_ and its like return nothing and write what comes first
                written = [t for t in tree_leaves(args[0]) if isinstance(t, Tensor)]
            count = flop_registry.get(func.overloadpacket)
            flop = count(*args, **kwargs, out_val=out) if count else 0
            backward = torch._C._current_graph_task_id() != -1
            part = "backward" if backward else "online" if torch.is_grad_enabled() else "target"
            self.operations.append((part, flop, sum(t.nbytes for t in read + written)))
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.live:
            size = -(-storage.nbytes() // BLOCK) * BLOCK
            self.live.add(id(storage))
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self.release, id(storage), size)

    def release(self, key: int, size: int) -> None:
        self.live.remove(key)
        self.live_bytes -= size

    def flop(self, part: str = "") -> int:
        return sum(flop for where, flop, _ in self.operations if part in ("", where))

    def roofline_ms(self, gpu: Gpu, precision: str) -> tuple[float, float]:
        """At peak rates, the time of the operations bound by arithmetic, and of those bound by memory."""
        tflops = gpu.fp32_tflops if precision == "fp32" else gpu.fp16_tflops
        times = [
            (flop / tflops / 1e9, moved / gpu.memory_gb_s / 1e6)
            for _, flop, moved in self.operations
        ]
        return sum(a for a, m in times if a > m), sum(m for a, m in times if a <= m)


def gpu_row(device_name: str, total_gib: float) -> str | None:
    """The key in `GPUS` of the card that `torch.cuda.get_device_name` calls `device_name`, or None.

    `total_gib` is the memory that torch reports. It must be within 10% of the row's: ECC takes 6%
    of a GDDR6 memory, and drivers differ by 2%. A card whose memory was cut or rebuilt has no row.
    """
    name = device_name
    for prefix in ("NVIDIA ", "Tesla ", "GeForce "):
        name = name.removeprefix(prefix)
    row = DEVICES.get(name)
    return row if row and abs(total_gib / GPUS[row].memory_gib - 1) < 0.1 else None


def of_one_rank(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with which one process normalises as each of `world_size` does; SyncBatchNorm is taken for BatchNorm, and
    nothing is compiled."""
    parts = int(recipe.bn.removeprefix("split:")) if recipe.bn.startswith("split:") else world_size
    if parts % world_size:
        raise ValueError(
            f"bn: {recipe.bn} does not divide among {world_size} GPUs: use sync, local, or a multiple of them"
        )
    bn = "local" if parts == world_size else f"split:{parts // world_size}"
    return recipe.model_copy(
        update={"bn": bn, "batch_size": recipe.batch_size // world_size, "compile": False}
    )


@cache
def trace(recipe: Recipe, images: int, precision: str) -> tuple[Ledger, Method]:
    """One `train_step` on `images` in one process, without memory or computation."""
    with torch.device("meta"):
        method = build_method(recipe)
    device = torch.device("cpu")  # CUDA's backward wants a driver, even without memory
    dtype, plan = choose_dtype(precision, device), resolve(recipe, 100 * recipe.batch_size)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        method.to_empty(device=device).train()
        optimizer = build_optimizer(recipe, method, plan.peak_lr)
        scaler = GradScaler(device.type, enabled=dtype == torch.float16)
        shape = (images, 3, recipe.views.size_px, recipe.views.size_px)
        views = {
            name: torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
            for name in sorted(method.reads)
        }
        batch = Batch(torch.zeros(images, dtype=torch.int64), views)
        ledger.operations.clear()
        train_step(Run(recipe, plan, method, method, optimizer, scaler, device, dtype), batch)
    return ledger, method


def efficiency(gpu: Gpu, precision: str) -> tuple[float, str]:
    """The share of the roofline that training ResNet-50 reached on this GPU, or else on a V100, and who measured it."""
    kind = "fp32" if precision == "fp32" else "fp16"
    card = gpu if kind in gpu.resnet50 else GPUS["v100-32g"]
    where = "this GPU" if card is gpu else f"a V100 (of this GPU: {gpu.source})"
    roofline_ms = sum(
        trace(build_recipe("imagenet1k", "supervised"), 256, kind)[0].roofline_ms(card, kind)
    )
    rate = card.resnet50[kind]
    return rate * roofline_ms / 256e3, f"ResNet-50's {rate:,} images/s on {where}: {card.source}"


def photograph(seed: int) -> Image.Image:
    """Smooth colours under grain, in ImageNet's mean size: as JPEG of quality 90 about 110 kB."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (24, 28, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((468, 401), Image.Resampling.BICUBIC))
    return Image.fromarray(
        (smooth + rng.normal(0, 20, (401, 468, 1))).clip(0, 255).astype(np.uint8)
    )


def decode_rate(
    recipe: Recipe, reads: frozenset[str], source: Source | None = None, seconds: float = 1.0
) -> float:
    """Images per second of CPU time that this machine reads, decodes and crops by the native backend: those of `source`, or
    drawn ones of ImageNet's mean size, 468x401 px and 110 kB. A measurement, the only one here."""
    made = (
        reads
        if recipe.aggressive_on == "host"
        else frozenset(VIEWS[VIEWS.index(view) % 2] for view in reads)
    )
    with TemporaryDirectory() as folder:
        for seed in range(8 if source is None else 0):
            photograph(seed).save(f"{folder}/{seed}.jpg", quality=90)
        source = source or open_source(folder, "pretrain")
        order = Order(len(source.manifest), min(8, len(source.manifest)), 0)
        with open_views(
            source, recipe.views, made, order, backend="native", threads=1, prefetch_batches=1
        ) as loader:
            batches = (batch for epoch in itertools.count() for batch in loader.batches(epoch))
            next(batches)  # compiles
            start, images, spent = time.process_time(), 0, 0.0
            while spent < seconds:
                images += len(next(batches).label)
                spent = time.process_time() - start
    return images / spent


def facts(
    recipe: Recipe, data: Path | None, source: Source | None
) -> tuple[int, float, float | None]:
    """Training images, GiB of files, and GiB of pixels if the resident backend will hold them on the GPU."""
    about = DATASETS[recipe.dataset]
    images, file_gib, side_px = about.images, about.file_gib, about.side_px
    pixels = images * 3 * side_px**2 if side_px else None
    if data and source:
        files = (
            os.path.join(place, name)
            for place, _, names in os.walk(data, followlinks=True)
            for name in names
        )
        sizes = source.manifest.sizes.astype(np.int64)
        images, file_gib = len(sizes), sum(map(os.path.getsize, files)) / GIB
        pixels = 3 * int(sizes.prod(1).sum()) if (sizes == sizes[0]).all() else None
    fitting = pixels is not None and pixels <= RESIDENT_BYTES
    resident = fitting if recipe.backend == "auto" else recipe.backend == "resident"
    return images, file_gib, pixels / GIB if resident and pixels else None


def plan(
    recipe: Recipe,
    gpu: str,
    gpus: int = 1,
    nodes: int = 1,
    data: Path | None = None,
    cores: int | None = None,
    network_gbps: float = 100,
) -> dict[str, Any]:
    """What the recipe needs and gives on `nodes` of `gpus` GPUs named in `GPUS` and `cores` CPU cores each.

    Without `data` the dataset is as published. `tflop_per_step` is of one GPU, what starts with `decode` of one node. A batch
    that does not fit in memory is planned all the same, and said; `remedy` is then the setting with which it fits, or None.
    Raises ValueError for an unknown GPU, and for a batch that the images do not fill or that does not divide among the GPUs,
    and for bf16 on a GPU without it.
    """
    if gpu not in GPUS:
        raise ValueError(
            f"no GPU {gpu!r}{nearest(gpu.lower(), GPUS)}: choose from {', '.join(GPUS)}"
        )
    card, world, cores = GPUS[gpu], gpus * nodes, cores or CORES_PER_GPU * gpus
    source = open_source(data, "pretrain") if data else None
    images, file_gib, resident_gib = facts(recipe, data, source)
    order = Order(images, recipe.batch_size, recipe.seed, 0, world)
    batch = order.batch_per_rank
    precision = recipe.precision
    if precision == "auto":
        precision = "bf16" if card.bf16 else "fp16"
    if precision == "bf16" and not card.bf16:
        raise ValueError(f"precision: bf16 is not in a {gpu}'s hardware: use fp16, fp32 or auto")
    alone = of_one_rank(recipe, world)
    ledger, method = trace(alone, batch, precision)
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    gradient_bytes = 4 * trained if world > 1 else 0  # that DDP sums, from buckets of its own

    def gib(images: int, alone: Recipe = alone) -> tuple[float, float]:
        """The most that the step's tensors hold, and with it all that has to be there."""
        tensors = (trace(alone, images, precision)[0].peak_bytes + gradient_bytes) / GIB + (
            resident_gib or 0
        )
        return (
            tensors,
            tensors + OVERHEAD_GIB + LOADER_BYTES * images * 3 * recipe.views.size_px** 2 / GIB,
        )

    (peak_gib, needed_gib), (_, doubled_gib) = gib(batch), gib(2 * batch)
    spare = (card.memory_gib - needed_gib) / (doubled_gib - needed_gib)
    fits = needed_gib <= card.memory_gib
    arithmetic_ms, memory_ms = ledger.roofline_ms(card, precision)
    remedy = None
    for stages in range(recipe.recompute_stages + 1, 1 if fits else 5):
        other = alone.model_copy(update={"recompute_stages": stages})
        if (other_gib := gib(batch, other)[1]) <= card.memory_gib:
            more = (
                sum(trace(other, batch, precision)[0].roofline_ms(card, precision))
                / (arithmetic_ms + memory_ms)
                - 1
            )
            remedy = f"--set recompute_stages={stages} takes {other_gib:.1f} GiB and {more:.0%} more time"
            break
    share, share_from = efficiency(card, precision)
    link_gb_s = card.link_gb_s if nodes == 1 else min(card.link_gb_s, network_gbps / 8)
    limits_ms = {
        "GPU memory bandwidth" if memory_ms > arithmetic_ms else "GPU arithmetic": (
            arithmetic_ms + memory_ms
        )
        / share,
        "kernel launches": len(ledger.operations) * LAUNCH_US / 1e3,
        "all-reduce": 2
        * (world - 1)
        / world
        * gradient_bytes
        / link_gb_s
        / 1e6,  # a ring, during the backward
    }
    decoded_per_s = (
        1e3 * recipe.batch_size / max(limits_ms.values()) / nodes
    )  # what keeps a node's GPUs busy
    per_core = None
    if resident_gib is None:
        per_core = decode_rate(recipe, method.reads, source)
        limits_ms["decoding"] = 1e3 * recipe.batch_size / nodes / cores / per_core
    bottleneck = max(limits_ms, key=limits_ms.__getitem__)
    epoch_min = len(order) * limits_ms[bottleneck] / 60e3
    return {
        "kind": "predicted",
        "dataset": recipe.dataset,
        "method": recipe.method,
        "gpu": gpu,
        "gpus": gpus,
        "nodes": nodes,
        "precision": precision,
        "batch_size": recipe.batch_size,
        "batch_per_gpu": batch,
        "parameters": sum(p.numel() for p in method.parameters()),
        "trained_parameters": trained,
        "gflop_per_image": {
            part: ledger.flop(part) / batch / 1e9 for part in ("online", "target", "backward")
        },
        "tflop_per_step": ledger.flop() / 1e12,
        "peak_gib_per_gpu": peak_gib,
        "needed_gib_per_gpu": needed_gib,
        "gpu_memory_gib": card.memory_gib,
        "fits": fits,
        "remedy": remedy,
        "largest_batch_per_gpu": max(0, int(batch * (1 + spare))),
        "allreduce_mib_per_step": gradient_bytes / 2**20,
        "memory_bound_pct": 100 * memory_ms / (arithmetic_ms + memory_ms),
        "efficiency": share,
        "efficiency_from": share_from,
        "limits_ms": limits_ms,
        "step_ms": limits_ms[bottleneck],
        "images_per_s": 1e3 * recipe.batch_size / limits_ms[bottleneck],
        "epoch_min": epoch_min,
        "run_hours": epoch_min * recipe.epochs / 60,
        "decode_images_per_s": decoded_per_s if per_core else 0,
        "decode_images_per_s_per_core_measured_here": per_core,
        "decode_cores_needed": decoded_per_s / per_core if per_core else 0,
        "cores": cores,
        "decode_gpu_share": decoded_per_s / gpus / card.jpegs_per_s
        if per_core and card.jpegs_per_s
        else None,
        "dataset_gib": file_gib,
        "read_mib_per_s": 1024 * file_gib * decoded_per_s / images if per_core else 0,
        "bottleneck": bottleneck if fits else "GPU memory: the batch does not fit",
    }


def show(found: dict[str, Any]) -> None:
    """A plan as a table on stdout."""
    flop = ", ".join(f"{part} {gflop:.1f}" for part, gflop in found["gflop_per_image"].items())
    limits = ", ".join(f"{name} {ms:.0f}" for name, ms in found["limits_ms"].items())
    fits = (
        "fits"
        if found["fits"]
        else f"DOES NOT FIT; {found['remedy'] or 'nor with recompute_stages=4'}"
    )
    rows = {
        "memory": f"{{needed_gib_per_gpu:.1f}} of {{gpu_memory_gib}} GiB a GPU: {fits}; {{peak_gib_per_gpu:.2f}} in tensors",
        "batch": "{batch_per_gpu} images a GPU in {precision}; at most {largest_batch_per_gpu}",
        "arithmetic": f"{{tflop_per_step:.2f}} TFLOP a step and GPU; GFLOP an image: {flop}",
        "all-reduce": "{allreduce_mib_per_step:.1f} MiB a step",
        "step": f"{{step_ms:.0f}} ms, {{images_per_s:,.0f}} images/s: the longest, in ms, of {limits}",
        "efficiency": "{efficiency:.2f} of the roofline, {memory_bound_pct:.0f}% of it bound by memory; from {efficiency_from}",
        "run": "{epoch_min:.1f} min an epoch, {run_hours:.1f} h in all, without evaluation",
        "decoding": "none, the images stay in the GPU's memory",
        "disk": "{dataset_gib:.1f} GiB a node, as much page cache, or {read_mib_per_s:,.0f} MiB/s from the disk",
        "bottleneck": "{bottleneck}",
        "accuracy": ACCURACY,
    }
    if found["decode_cores_needed"]:
        share = (
            "; or {decode_gpu_share:.0%} of each GPU"
            if found["decode_gpu_share"]
            else "; for this GPU no figure found"
        )
        here = "{decode_images_per_s_per_core_measured_here:,.0f} a core, MEASURED on this machine"
        rows["decoding"] = (
            "{decode_images_per_s:,.0f} images/s a node: {decode_cores_needed:.1f} cores of {cores}, "
            + here
            + share
        )
    table = Table(
        "", "predicted", title="{dataset}/{method} on {nodes} x {gpus} {gpu}".format_map(found)
    )
    for name, text in rows.items():
        table.add_row(name, text.format_map(found))
    Console().print(table)
