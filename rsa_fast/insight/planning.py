"""Predict memory, time, decoding and disk of a run on GPUs that are not in this machine.

    plan(build_recipe("imagenet1k", "rsa"), "v100-32g", gpus=8)["images_per_s"]

The engine's own step runs once on tensors without memory. For every operation, the FLOPs, the moved
bytes and the allocated memory are recorded. The GPU's time is the sum of max(FLOPs / peak rate,
bytes / bandwidth) over the operations, divided by an efficiency. The efficiency is the same sum for
a supervised ResNet-50, divided by its published training time.

`ACCURACY` contains the errors of the predictions, which tests check. RSA's own code on V100s
(paper, Table 7) trained STL-10 in fp32 as fast as predicted, CIFAR-100 in fp32 at 83% of the
predicted speed, and ImageNet-100 in fp16 at 42%, because it waited for its images.

The model does not include the time that `compile` saves, cuDNN's choice of algorithms, the data
that ranks gather from each other in training, the evaluation, and other work of the host.
"""

from __future__ import annotations

import itertools
import math
import os
import time
import weakref
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rsa_fast.archs import RESNETS
from rsa_fast.datasets import DATASETS
from rsa_fast.distributed import alone
from rsa_fast.evaluation import linear
from rsa_fast.evaluation.evaluate import KNN_CHUNK, KNN_SETTINGS, embed_in_own_dtype
from rsa_fast.evaluation.features import BATCH_SIZE, BLOCK_ROWS
from rsa_fast.methods import method_class, short_name
from rsa_fast.methods.method import Method, build_method
from rsa_fast.pipelines import Batch, Loading, Order, Source, open_source, open_views
from rsa_fast.pipelines.backends import RESIDENT_BYTES
from rsa_fast.pipelines.layouts import Data
from rsa_fast.pipelines.named import nearest
from rsa_fast.pipelines.views import stage_and_crop, view_name
from rsa_fast.recipes import Recipe, build_recipe, recipe_of_own_encoder, resolve
from rsa_fast.training.optim import build_optimizer
from rsa_fast.training.step import Run, choose_dtype, train_on

# The step is traced on the CPU, where attention has its own operations.
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_backward
COUNT_FLOP = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[ATTENTION],
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        ATTENTION_BACKWARD
    ],
}

GIB = 2**30
BLOCK_BYTES = 512  # CUDA's caching allocator returns multiples of this size
OVERHEAD_GIB = 1.5  # chosen, for CUDA's context, cuDNN's workspaces and NCCL's buffers
# The bytes that the allocator reserves for the aggressive stage per value of a view.
LOADER_BYTES = 1.77 * GIB / (256 * 3 * 224**2)
# The host's time per operation. On a CPU without a driver, PyTorch dispatches the 1,970 operations
# of a step in 13 ms.
LAUNCH_US = 7
CORES_PER_GPU = 4  # the default: an AWS p3.16xlarge has 32 for 8 V100s

ACCURACY = (
    "memory within 2% of the allocator's, or 15 MiB; time, with a V100's efficiency: "
    "8 V100s 15% too fast, an A100 9% too fast, an RTX 3090 22% too slow; "
    "relative to a V100 in Lambda's table, an H100 29%, an H200 59% and a B200 168% too fast"
)
NVIDIA = "NVIDIA/DeepLearningExamples, ResNet50 v1.5 for PyTorch"
TIMM = "timm, results/benchmark-train-amp-nhwc-pt112-cu113-rtx3090.csv"
NONE = "none found in channels_last"
# Lambda's rates are for fp16: lambdal/deeplearning-benchmark.
LAMBDA = NONE + "; Lambda, whose V100 has 833, has {}"
# These rates are in the same tables as `NVIDIA`.
INFERENCE = NONE + "; NVIDIA's rate of inference is {}, a V100's 3,382"


@dataclass(frozen=True)
class GpuSpec:
    """The specification of a GPU. Peaks are dense, with tensor cores that accumulate in fp32."""

    memory_gib: float  # the total that torch reports when it is out of memory
    fp16_tflops: float
    fp32_tflops: float  # for convolutions, in TF32 if the GPU supports it
    memory_gb_s: float
    link_gb_s: float  # to other GPUs of the node, in one direction
    resnet50: dict[str, float]  # images/s in training, channels_last, by precision (fp16 is AMP)
    source: str  # who measured `resnet50`
    jpegs_per_s: float | None = None  # decoded on the GPU; None if no figure was found
    bf16: bool = True  # whether the hardware supports it, as NVIDIA's GPUs do since Ampere


# The numbers of a row are memory_gib, fp16_tflops, fp32_tflops, memory_gb_s and link_gb_s.
GPUS = {
    # Tesla V100 SXM2 data sheet.
    "v100-16g": GpuSpec(
        15.77, 125, 15.7, 900, 150, {"fp16": 1200, "fp32": 367}, NVIDIA, bf16=False
    ),
    "v100-32g": GpuSpec(
        31.75, 125, 15.7, 900, 150, {"fp16": 1156, "fp32": 356}, NVIDIA, bf16=False
    ),
    # T4 data sheet, PCIe 3.0 x16. The bandwidth is from the Turing white paper: the data sheet
    # rounds it to 300 GB/s. torch reports this memory in hpcaitech/Open-Sora issue 697.
    "t4": GpuSpec(14.75, 65, 8.1, 320, 16, {}, INFERENCE.format("1,198"), bf16=False),
    # A10 data sheet, PCIe 4.0 x16. torch reports this memory in zai-org/CogVLM issue 236.
    "a10": GpuSpec(21.99, 125, 62.5, 600, 32, {}, LAMBDA.format("638")),
    # A100 SXM4 data sheet. JPEGs: NVIDIA's blog on its hardware decoder, quoted in DALI issue 5362.
    "a100-40g": GpuSpec(39.39, 312, 156, 1555, 300, {}, LAMBDA.format("1,396, with PCIe"), 7000),
    "a100-80g": GpuSpec(79.15, 312, 156, 2039, 300, {"fp16": 2470, "fp32": 938}, NVIDIA, 7000),
    # L4 and L40S data sheets, PCIe 4.0 x16. The L4's gives 242 and 120 TFLOP/s, with sparsity.
    # torch reports this memory in public logs. With older drivers, an L4 has 22.16 GiB.
    "l4": GpuSpec(22.03, 121, 60, 300, 32, {}, NONE),
    "l40s": GpuSpec(44.52, 362, 183, 864, 32, {}, NONE),
    # H100 SXM5 and H200 SXM data sheets. torch reports the H200's memory in public logs.
    "h100-80g": GpuSpec(79.1, 989, 494, 3350, 450, {}, LAMBDA.format("2,790")),
    "h200": GpuSpec(139.8, 989, 494, 4800, 450, {}, LAMBDA.format("3,079")),
    # Blackwell data sheet of October 2025, HGX B200: 4.5 and 2.2 PFLOP/s, with sparsity.
    # CUDA reports this memory in pytorch/ao pull request 4002.
    "b200": GpuSpec(178.35, 2250, 1100, 7700, 900, {}, LAMBDA.format("3,076")),
    # GA102, Ada and RTX Blackwell white papers, PCIe 4.0 x16, and PCIe 5.0 x16 for the RTX 5090.
    # torch reports the RTX 5090's memory in TrajectoryCrafter/TrajectoryCrafter issue 20.
    "rtx-3090": GpuSpec(23.69, 71, 35.6, 936, 32, {"fp16": 1218}, TIMM),
    "rtx-4090": GpuSpec(23.64, 165.2, 82.6, 1008, 32, {}, LAMBDA.format("1,301")),
    "rtx-5090": GpuSpec(31.36, 209.5, 104.8, 1792, 64, {}, NONE),
}

# The driver's names of these cards, without "NVIDIA", "Tesla" and "GeForce". Other versions of the
# same GPU (PCIe, NVL, laptop, MIG slice) have other names. They have no row, because their clocks,
# memory or links differ.
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
    """Records every ATen operation, and the peak of the memory in use.

    An operation is recorded as (part of the step, FLOPs, bytes read and written).
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int, int]] = []
        self.live: set[int] = set()  # the ids of storages in use
        self.live_bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: OpOverload[..., Any],
        types: tuple[type, ...],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace != "aten":  # for example, prim.device computes nothing
            return out
        inputs = tensors_in((args, kwargs))
        outputs = tensors_in(out)
        for tensor in outputs:
            self.allocate(tensor.untyped_storage())
        if not func.is_view:
            # _foreach_add_ and similar operations return nothing and write to their first argument.
            written = outputs if outputs or not args else tensors_in(args[0])
            count_flop = COUNT_FLOP.get(func.overloadpacket)
            flop = count_flop(*args, **kwargs, out_val=out) if count_flop else 0
            in_backward = torch._C._current_graph_task_id() != -1
            forward = "online" if torch.is_grad_enabled() else "target"
            moved_bytes = sum(tensor.nbytes for tensor in inputs + written)
            self.operations.append(("backward" if in_backward else forward, flop, moved_bytes))
        return out

    def allocate(self, storage: torch.UntypedStorage) -> None:
        """Count a storage as memory in use until it is garbage-collected."""
        if id(storage) not in self.live:
            size = -(-storage.nbytes() // BLOCK_BYTES) * BLOCK_BYTES
            self.live.add(id(storage))
            self.live_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            weakref.finalize(storage, self.release, id(storage), size)

    def release(self, key: int, size: int) -> None:
        self.live.remove(key)
        self.live_bytes -= size

    def flop(self, part: str = "") -> int:
        """The FLOPs of one part of the step, or of all parts."""
        return sum(flop for of_part, flop, _ in self.operations if part in ("", of_part))

    def roofline_ms(self, gpu: GpuSpec, precision: str) -> tuple[float, float]:
        """The times at peak rates of operations bound by arithmetic and those bound by memory."""
        tflops = gpu.fp32_tflops if precision == "fp32" else gpu.fp16_tflops
        times_ms = [
            (flop / tflops / 1e9, moved_bytes / gpu.memory_gb_s / 1e6)
            for _, flop, moved_bytes in self.operations
        ]
        arithmetic_ms = sum(a for a, m in times_ms if a > m)
        memory_ms = sum(m for a, m in times_ms if a <= m)
        return arithmetic_ms, memory_ms


def tensors_in(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def gpu_row(device_name: str, total_gib: float) -> str | None:
    """The key in `GPUS` of the card that `torch.cuda.get_device_name` calls `device_name`, or None.

    `total_gib` is the memory that torch reports. It must be within 10% of the row's memory, because
    ECC takes 6% of a GDDR6 memory, and drivers differ by 2%. A card with a different memory has no
    row.
    """
    name = device_name
    for prefix in ("NVIDIA ", "Tesla ", "GeForce "):
        name = name.removeprefix(prefix)
    row = DEVICES.get(name)
    return row if row and abs(total_gib / GPUS[row].memory_gib - 1) < 0.1 else None


def of_one_rank(recipe: Recipe, world_size: int) -> Recipe:
    """The recipe with which one process does the work of each of `world_size` ranks.

    BatchNorm groups are as large as those of a rank. SyncBatchNorm counts as BatchNorm, and nothing
    is compiled. Raises ValueError when the groups do not divide among the ranks.
    """
    passes = world_size * recipe.accumulate
    groups = int(recipe.bn.removeprefix("split:")) if recipe.bn.startswith("split:") else passes
    if groups % passes:
        turns = f" times {recipe.accumulate} passes" if recipe.accumulate > 1 else ""
        raise ValueError(
            f"bn: {recipe.bn} does not divide among {world_size} GPUs{turns}: "
            "use sync, local, or a multiple of them"
        )
    return recipe.model_copy(
        update={
            "bn": "local" if groups == passes else f"split:{groups // world_size}",
            "batch_size": recipe.batch_size // world_size,
            "compile": False,
        }
    )


@cache
def trace(
    recipe: Recipe, images: int, precision: str, encoder: nn.Module | None = None
) -> tuple[Ledger, Method]:
    """One training step in one process, without memory or computation.

    Each of its passes has `images` images. If there are more than three passes, those between the
    first and the last are the same. Only one of them is then traced, and the others are copied.
    """
    passes = min(recipe.accumulate, 3)
    copies = recipe.accumulate - passes
    recipe = recipe.model_copy(update={"accumulate": passes})
    with torch.device("meta"):
        method = build_method(recipe, encoder)
        method.allocate(DATASETS[recipe.dataset].images or 100 * recipe.batch_size)
    device = torch.device("cpu")  # CUDA's backward pass needs a driver, even without memory
    dtype = choose_dtype(precision, device)
    derived = resolve(recipe, 100 * recipe.batch_size)
    with alone(), FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        to_fake(method, device).train()
        run = Run(
            recipe=recipe,
            derived=derived,
            method=method,
            forward=method,
            optimizer=build_optimizer(recipe, method, derived.peak_lr),
            scaler=GradScaler(device.type, enabled=dtype == torch.float16),
            device=device,
            dtype=dtype,
        )
        views = {}
        for name in sorted(method.reads):
            shape = (images, *recipe.views.shape(name))
            layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
            views[name] = torch.empty(shape, dtype=dtype, memory_format=layout)
        label, ids = (torch.zeros(images, dtype=torch.int64) for _ in range(2))
        batch = Batch(label, views, ids)
        ledger.operations.clear()
        ends = [0]  # the ends of the passes in the list of operations
        for _ in range(passes):
            train_on(run, batch)
            ends.append(len(ledger.operations))
        ledger.operations += copies * ledger.operations[ends[1] : ends[min(2, passes)]]
    return ledger, method


def to_fake(method: Method, device: torch.device) -> Method:
    """Replace the tensors on the device "meta" by fake ones on `device`.

    By default, a parameter only gets the data of its successor. torch 2.9 and older then refuse its
    gradient, because it is on another device.
    """
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        return method.to_empty(device=device)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)


@cache
def trace_evaluation(
    recipe: Recipe, precision: str, encoder: nn.Module | None = None
) -> tuple[int, int]:
    """The peak memory in bytes for the features of a batch, and the number of features.

    Nothing is computed. The peak includes the networks.
    """
    device = torch.device("cpu")
    dtype, size_px = choose_dtype(precision, device), recipe.views.size_px
    with torch.device("meta"):
        method = build_method(recipe, encoder)
    with FakeTensorMode(allow_non_fake_inputs=True), Ledger() as ledger:
        to_fake(method, device).eval()
        pixels = torch.empty(BATCH_SIZE, size_px, size_px, 3, dtype=torch.uint8)
        images = pixels.permute(0, 3, 1, 2) / 255
        batch = images.to(dtype, memory_format=torch.channels_last)
        features = embed_in_own_dtype(method.encoder, batch)
    return ledger.peak_bytes, features.shape[1]


def feature_bytes(dim: int, classes: int, test_images: int) -> int:
    """The peak memory of kNN and of the fast linear classifier in bytes, for `dim` features."""
    test, block = 4 * dim * test_images, 4 * dim * BLOCK_ROWS
    # The cosines and labels of the nearest neighbours of all queries, and several copies for a
    # chunk.
    nearest = 12 * (test_images + 5 * KNN_CHUNK) * max(k for k, _ in KNN_SETTINGS.values())
    # The test set's features, a copy at unit length, and a block of the training set's features.
    knn = 3 * test + 2 * block + nearest + 3 * 4 * KNN_CHUNK * BLOCK_ROWS
    # The weights and momenta of all learning rates and the logits, with temporary copies.
    weights = 4 * len(linear.FAST_LRS) * (dim + 1) * classes
    batch = max(linear.TEST_ROWS, linear.BATCH_SIZE)
    logits = 4 * len(linear.FAST_LRS) * batch * classes
    moments = 5 * block  # the squares are summed in double precision
    fast = 2 * test + max(moments, 5 * weights + 3 * logits + 12 * dim * batch)
    return max(knn, fast)


def efficiency(gpu: GpuSpec, precision: str) -> tuple[float, str]:
    """The share of the roofline that training a ResNet-50 reached, and the source.

    It was measured on this GPU or, if there is no such figure, on a V100.
    """
    kind = "fp32" if precision == "fp32" else "fp16"
    card = gpu if kind in gpu.resnet50 else GPUS["v100-32g"]
    where = "this GPU" if card is gpu else f"a V100 (for this GPU: {gpu.source})"
    ledger, _ = trace(build_recipe("imagenet1k", "supervised"), 256, kind)
    images_per_s = card.resnet50[kind]
    share = images_per_s * sum(ledger.roofline_ms(card, kind)) / 256e3
    return share, f"ResNet-50's {images_per_s:,} images/s on {where}: {card.source}"


def photograph(seed: int) -> Image.Image:
    """Smooth random colours with grain, of ImageNet's mean size: 110 kB as JPEG of quality 90."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (24, 28, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize((468, 401), Image.Resampling.BICUBIC))
    pixels = smooth + rng.normal(0, 20, (401, 468, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def decode_images_per_s(
    recipe: Recipe, reads: frozenset[str], source: Source | None = None, seconds: float = 1.0
) -> float:
    """The number of images that the native backend loads here in a second of CPU time.

    It reads, decodes and crops images of `source`, or random ones of ImageNet's mean size: 468x401
    px and 110 kB. This is the only measurement in this file.
    """
    # Unless "host" makes the aggressive views, a GPU makes them from the weak ones.
    views = reads
    if recipe.aggressive_on != "host":
        views = frozenset(view_name("weak", stage_and_crop(view)[1]) for view in reads)
    with TemporaryDirectory() as folder:
        if source is None:
            for seed in range(8):
                photograph(seed).save(f"{folder}/{seed}.jpg", quality=90)
            source = open_source(folder, "pretrain")
        order = Order(len(source.manifest), min(8, len(source.manifest)), 0)
        with open_views(
            source,
            recipe.views,
            views,
            order,
            loading=Loading("native", threads=1, prefetch_batches=1),
        ) as loader:
            batches = (batch for epoch in itertools.count() for batch in loader.batches(epoch))
            next(batches)  # compiles
            start, images, spent_s = time.process_time(), 0, 0.0
            while spent_s < seconds:
                images += len(next(batches).label)
                spent_s = time.process_time() - start
    return images / spent_s


def dataset_size(recipe: Recipe, source: Source | None) -> tuple[int, float, float]:
    """The number of training images, the GiB of files, and the GiB of pixels in the GPU's memory.

    Without a source, the published numbers of the dataset are used. The last value is 0 unless the
    resident backend will store the images there.
    """
    published = DATASETS[recipe.dataset]
    if not (source or published.images):
        raise ValueError(f"{recipe.dataset} is not a published dataset: give its place by --data")
    images, file_gib, side_px = published.images, published.file_gib, published.side_px
    pixel_bytes = images * 3 * side_px**2 if side_px else None
    if source:
        sizes = source.manifest.sizes.astype(np.int64)
        images, decoded_bytes = len(sizes), 3 * int(sizes.prod(1).sum())
        file_bytes = sum(os.path.getsize(file) for file in source.files(range(images)))
        file_gib = (file_bytes or decoded_bytes) / GIB  # CIFAR's and STL-10's files contain pixels
        pixel_bytes = decoded_bytes if (sizes == sizes[0]).all() else None
    if pixel_bytes is None:
        return images, file_gib, 0.0
    resident = recipe.backend == "resident"
    if recipe.backend == "auto":
        resident = pixel_bytes <= RESIDENT_BYTES
    return images, file_gib, pixel_bytes / GIB if resident else 0.0


def scored_images(recipe: Recipe, data: Data | None) -> tuple[int, int, int]:
    """The numbers of training images, test images and classes from which scores are computed.

    Without data, the published numbers are used. If the data allow no scores, all are 0.
    """
    published = DATASETS[recipe.dataset]
    if data is None:
        return published.images, published.test_images, published.classes
    try:
        train, test = (recipe.open_source(data, split).manifest for split in ("train", "test"))
    except (FileNotFoundError, ValueError):
        return 0, 0, 0
    if not (train.labelled and test.labelled):
        return 0, 0, 0
    return len(train), len(test), len(train.classes)


@dataclass(frozen=True)
class GpuStep:
    """The training step of one GPU. Memory is in GiB."""

    recipe: Recipe  # the result of `of_one_rank`
    images: int  # the number of images in one pass
    precision: str
    world_size: int
    resident_gib: float  # for the images of the resident backend
    encoder: nn.Module | None = None  # the network if the recipe's arch is `own`

    @property
    def ledger(self) -> Ledger:
        return trace(self.recipe, self.images, self.precision, self.encoder)[0]

    @property
    def method(self) -> Method:
        return trace(self.recipe, self.images, self.precision, self.encoder)[1]

    @property
    def trained_parameters(self) -> int:
        return sum(p.numel() for p in self.method.parameters() if p.requires_grad)

    @property
    def gradient_bytes(self) -> int:
        """The size of DDP's buckets, which are summed over the GPUs."""
        return 4 * self.trained_parameters if self.world_size > 1 else 0

    @property
    def peak_gib(self) -> float:
        """The peak memory of all tensors."""
        return (self.ledger.peak_bytes + self.gradient_bytes) / GIB + self.resident_gib

    @property
    def needed_gib(self) -> float:
        """The memory that the GPU needs."""
        # The crops of one size pass through the aggressive stage together. RSA has two, for which
        # the memory was measured.
        pixels: Counter[int] = Counter()
        for crop in self.recipe.views.crops:
            pixels[crop.size_px] += crop.size_px**2
        view_values = self.images * 3 * max(pixels.values()) / 2
        return self.peak_gib + OVERHEAD_GIB + LOADER_BYTES * view_values / GIB

    def evaluation_gib(self, classes: int, test_images: int) -> float:
        """The memory that the GPU needs for the scores, together with the run's state."""
        batch_bytes, dim = trace_evaluation(self.recipe, self.precision, self.encoder)
        model_bytes: int = sum(t.nbytes for t in self.method.state_dict().values())
        values = 2 if self.recipe.optimizer in ("adam", "adamw") else 1  # per parameter
        optimizer_bytes = 4 * self.trained_parameters * values
        peak_bytes = max(batch_bytes, model_bytes + feature_bytes(dim, classes, test_images))
        training_gib = self.needed_gib - self.ledger.peak_bytes / GIB
        return (peak_bytes + optimizer_bytes) / GIB + training_gib

    def fits(self, card: GpuSpec) -> bool:
        return self.needed_gib <= card.memory_gib

    def roofline_ms(self, card: GpuSpec) -> tuple[float, float]:
        return self.ledger.roofline_ms(card, self.precision)

    def limits_ms(self, card: GpuSpec, share: float, link_gb_s: float) -> dict[str, float]:
        """The times of the GPU's work, of its launches, and of summing the gradients.

        They overlap, so the longest is the time of the step. `share` is the `efficiency`.
        """
        arithmetic_ms, memory_ms = self.roofline_ms(card)
        gpu_limit = "GPU memory bandwidth" if memory_ms > arithmetic_ms else "GPU arithmetic"
        # The gradients are summed in a ring during the backward pass.
        ring_bytes = 2 * (self.world_size - 1) / self.world_size * self.gradient_bytes
        return {
            gpu_limit: (arithmetic_ms + memory_ms) / share,
            "kernel launches": len(self.ledger.operations) * LAUNCH_US / 1e3,
            "all-reduce": ring_bytes / link_gb_s / 1e6,
        }


def choose_precision(precision: str, gpu: str) -> str:
    """The precision that `auto` chooses. Raises ValueError for bf16 on a GPU without it."""
    if precision == "auto":
        return "bf16" if GPUS[gpu].bf16 else "fp16"
    if precision == "bf16" and not GPUS[gpu].bf16:
        raise ValueError(
            f"precision = bf16: a {gpu} has no hardware for it; use fp16, fp32 or auto"
        )
    return precision


def find_remedy(step: GpuStep, card: GpuSpec, run_recipe: Recipe) -> str | None:
    """A setting with which a step fits that was too large, and its cost, or None.

    `run_recipe` is the recipe of the run. The step is that of one rank.
    """
    recipe = step.recipe
    for stages in range(recipe.recompute_stages + 1, 5 if recipe.arch in RESNETS else 0):
        smaller = replace(step, recipe=recipe.model_copy(update={"recompute_stages": stages}))
        if smaller.fits(card):
            more = sum(smaller.roofline_ms(card)) / sum(step.roofline_ms(card)) - 1
            return (
                f"--set recompute_stages={stages} takes {smaller.needed_gib:.1f} GiB "
                f"and {more:.0%} more time"
            )
    passes = 2
    while (
        can_accumulate(run_recipe, step.world_size * run_recipe.accumulate * passes)
        and step.images % passes == 0
        and step.images >= 2 * passes
    ):
        accumulate = run_recipe.accumulate * passes
        in_passes = run_recipe.model_copy(update={"accumulate": accumulate})
        of_rank = of_one_rank(in_passes, step.world_size)
        smaller = replace(step, recipe=of_rank, images=step.images // passes)
        if smaller.fits(card):
            return (
                f"--set accumulate={in_passes.accumulate} takes {smaller.needed_gib:.1f} GiB "
                f"in {passes} passes of {smaller.images} images"
            )
        passes *= 2
    return None


def can_accumulate(recipe: Recipe, parts: int) -> bool:
    """Whether a batch can be divided into this number of parts by all ranks and passes."""
    groups = recipe.bn.removeprefix("split:")
    fits_bn = recipe.bn == "local" or (groups.isdigit() and int(groups) % parts == 0)
    return method_class(recipe.method).mean_over_images and fits_bn


def memory_advice(
    recipe: Recipe,
    dtype: torch.dtype,
    world_size: int,
    memory_gib: float | None,
    encoder: nn.Module | None = None,
) -> str:
    """Advice for a run that is out of GPU memory: the planned memory and settings that save some.

    `memory_gib` is the memory of the GPU, or None if it is unknown.
    """
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
    images = recipe.batch_size // (world_size * recipe.accumulate)
    step = GpuStep(
        recipe=of_one_rank(recipe, world_size),
        images=images,
        precision=names[dtype],
        world_size=world_size,
        resident_gib=0.0,
        encoder=encoder,
    )
    # Even if the step should fit according to the plan, another program may use the same GPU.
    most_gib = min(memory_gib or math.inf, 0.99 * step.needed_gib)
    card = replace(GPUS["v100-32g"], memory_gib=most_gib)
    of_gpu = f" of this GPU's {memory_gib:.1f} GiB" if memory_gib else ""
    settings = [f"--batch-size {recipe.batch_size // 2}"]
    stages, remedy = recipe.recompute_stages + 1, find_remedy(step, card, recipe)
    passes = 2 * recipe.accumulate
    if can_accumulate(recipe, world_size * passes) and "accumulate" not in (remedy or ""):
        settings = [f"--set accumulate={passes} trains the same batch in {passes} passes"]
    if remedy:
        settings.insert(0, remedy)
    elif recipe.arch in RESNETS and stages <= 4:
        settings.insert(0, f"--set recompute_stages={stages}")
    return (
        f"The plan for {images} images a GPU in {step.precision} is {step.needed_gib:.1f} "
        f"GiB{of_gpu} (rsa-fast plan). To use less memory: {'; or '.join(settings)}"
    )


def plan(
    recipe: Recipe,
    gpu: str,
    gpus: int = 1,
    nodes: int = 1,
    data: Data | None = None,
    cores: int | None = None,
    network_gbps: float = 100,
    encoder: nn.Module | None = None,
) -> dict[str, Any]:
    """Predict what the recipe needs and how fast it trains on `nodes` nodes.

    Each node has `gpus` GPUs of the kind `gpu`, a key of `GPUS`, and `cores` CPU cores.

    `encoder` replaces the recipe's network, as in `train`.

    Without `data`, the published numbers of the dataset are used. `tflop_per_step` is that of one
    GPU. The fields that start with `decode` are those of one node. If a batch does not fit in
    memory, `fits` is false, and `remedy` is a setting with which it fits, or None. Everything else
    is still predicted.

    Raises ValueError for an unknown GPU, for a batch that the images do not fill or that does not
    divide among the GPUs, and for bf16 on a GPU without it.
    """
    if gpu not in GPUS:
        raise ValueError(
            f"no GPU {gpu!r}{nearest(gpu.lower(), GPUS)}: choose from {', '.join(GPUS)}"
        )
    if encoder is not None:
        recipe = recipe_of_own_encoder(recipe)
    card = GPUS[gpu]
    world_size = gpus * nodes
    cores = cores or CORES_PER_GPU * gpus
    source = None
    if data:
        source = recipe.open_source(data, "pretrain")
    images, file_gib, resident_gib = dataset_size(recipe, source)
    order = Order(
        images,
        recipe.batch_size,
        recipe.seed,
        rank=0,
        world_size=world_size,
        accumulate=recipe.accumulate,
    )
    batch = order.batch_per_rank
    images_per_gpu = batch * recipe.accumulate  # the images of a step on each GPU
    precision = choose_precision(recipe.precision, gpu)
    step = GpuStep(
        recipe=of_one_rank(recipe, world_size),
        images=batch,
        precision=precision,
        world_size=world_size,
        resident_gib=resident_gib,
        encoder=encoder,
    )
    ledger = step.ledger
    scored, tested, classes = scored_images(recipe, data)
    evaluation_gib = step.evaluation_gib(classes, tested) if tested else 0.0
    _, dim = trace_evaluation(step.recipe, precision, encoder)
    feature_gib = (2 if precision != "fp32" else 4) * dim * (scored + tested) / nodes / GIB
    fits = step.fits(card)
    # Memory is assumed to grow linearly with the batch, so two batches give the slope.
    growth_gib = replace(step, images=2 * batch).needed_gib - step.needed_gib
    spare_batches = (card.memory_gib - step.needed_gib) / growth_gib

    share, share_from = efficiency(card, precision)
    link_gb_s = card.link_gb_s if nodes == 1 else min(card.link_gb_s, network_gbps / 8)
    limits_ms = step.limits_ms(card, share, link_gb_s)
    # The number of images per second that keeps a node's GPUs busy.
    decoded_per_s = 1e3 * recipe.batch_size / max(limits_ms.values()) / nodes
    per_core = None
    if not resident_gib:
        per_core = decode_images_per_s(recipe, step.method.reads, source)
        limits_ms["decoding"] = 1e3 * recipe.batch_size / nodes / cores / per_core
    bottleneck = max(limits_ms, key=limits_ms.__getitem__)
    step_ms = limits_ms[bottleneck]
    epoch_min = images // recipe.batch_size * step_ms / 60e3
    decode_gpu_share = None
    if per_core and card.jpegs_per_s:
        decode_gpu_share = decoded_per_s / gpus / card.jpegs_per_s
    arithmetic_ms, memory_ms = step.roofline_ms(card)
    return {
        "kind": "predicted",
        "dataset": recipe.data_name,
        "method": short_name(recipe.method),
        "gpu": gpu,
        "gpus": gpus,
        "nodes": nodes,
        "precision": precision,
        "batch_size": recipe.batch_size,
        "accumulate": recipe.accumulate,
        "batch_per_gpu": batch,
        "parameters": sum(p.numel() for p in step.method.parameters()),
        "trained_parameters": step.trained_parameters,
        "gflop_per_image": {
            part: ledger.flop(part) / images_per_gpu / 1e9
            for part in ("online", "target", "backward")
        },
        "tflop_per_step": ledger.flop() / 1e12,
        "peak_gib_per_gpu": step.peak_gib,
        "needed_gib_per_gpu": step.needed_gib,
        "evaluation_gib_per_gpu": evaluation_gib if tested else None,
        "features_host_gib_per_node": feature_gib if tested else None,
        "gpu_memory_gib": card.memory_gib,
        "fits": fits,
        "remedy": None if fits else find_remedy(step, card, recipe),
        "largest_batch_per_gpu": max(0, int(batch * (1 + spare_batches))),
        "allreduce_mib_per_step": step.gradient_bytes / 2**20,
        "memory_bound_pct": 100 * memory_ms / (arithmetic_ms + memory_ms),
        "efficiency": share,
        "efficiency_from": share_from,
        "limits_ms": limits_ms,
        "step_ms": step_ms,
        "images_per_s": 1e3 * recipe.batch_size / step_ms,
        "epoch_min": epoch_min,
        "run_hours": epoch_min * recipe.epochs / 60,
        "decode_images_per_s": decoded_per_s if per_core else 0,
        "decode_images_per_s_per_core_measured_here": per_core,
        "decode_cores_needed": decoded_per_s / per_core if per_core else 0,
        "cores": cores,
        "decode_gpu_share": decode_gpu_share,
        "dataset_gib": file_gib,
        "read_mib_per_s": 1024 * file_gib * decoded_per_s / images if per_core else 0,
        "bottleneck": bottleneck if fits else "GPU memory: the batch does not fit",
    }


def show(prediction: dict[str, Any]) -> None:
    """Print the result of `plan` as a table on stdout."""
    p = prediction
    limits = ", ".join(f"{name} {ms:.0f}" for name, ms in p["limits_ms"].items())
    passes = f"{p['accumulate']} x " if p["accumulate"] > 1 else ""
    gflop = ", ".join(f"{part} {gflop:.1f}" for part, gflop in p["gflop_per_image"].items())
    fits = "fits" if p["fits"] else f"DOES NOT FIT; {p['remedy'] or 'no setting helps'}"
    decoding = "none, the images stay in the GPU's memory"
    if p["decode_cores_needed"]:
        share = "no figure was found for this GPU"
        if p["decode_gpu_share"]:
            share = f"or {p['decode_gpu_share']:.0%} of each GPU"
        decoding = (
            f"{p['decode_images_per_s']:,.0f} images/s a node: "
            f"{p['decode_cores_needed']:.1f} cores of {p['cores']}, "
            f"{p['decode_images_per_s_per_core_measured_here']:,.0f} a core, "
            f"MEASURED on this machine; {share}"
        )
    scores = "none: the data allow none"
    if p["evaluation_gib_per_gpu"]:
        scores = (
            f"{p['evaluation_gib_per_gpu']:.1f} GiB a GPU, and the features take "
            f"{p['features_host_gib_per_node']:.1f} GiB of a node's memory"
        )
    rows = {
        "memory": f"{p['needed_gib_per_gpu']:.1f} of {p['gpu_memory_gib']} GiB a GPU: {fits}; "
        f"{p['peak_gib_per_gpu']:.2f} in tensors",
        "evaluation": scores,
        "batch": f"{passes}{p['batch_per_gpu']} images a GPU in {p['precision']}; "
        f"at most {p['largest_batch_per_gpu']}",
        "arithmetic": f"{p['tflop_per_step']:.2f} TFLOP a step and GPU; GFLOP an image: {gflop}",
        "all-reduce": f"{p['allreduce_mib_per_step']:.1f} MiB a step",
        "step": f"{p['step_ms']:.0f} ms, {p['images_per_s']:,.0f} images/s: "
        f"the longest, in ms, of {limits}",
        "efficiency": f"{p['efficiency']:.2f} of the roofline, "
        f"{p['memory_bound_pct']:.0f}% of it bound by memory; from {p['efficiency_from']}",
        "run": f"{p['epoch_min']:.1f} min an epoch, {p['run_hours']:.1f} h in all, "
        "without evaluation",
        "decoding": decoding,
        "disk": f"{p['dataset_gib']:.1f} GiB a node, as much page cache, "
        f"or {p['read_mib_per_s']:,.0f} MiB/s from the disk",
        "bottleneck": p["bottleneck"],
        "accuracy": ACCURACY,
    }
    title = "{dataset}/{method} on {nodes} x {gpus} {gpu}".format_map(prediction)
    table = Table("", "predicted", title=title)
    for name, text in rows.items():
        table.add_row(name, text)
    Console().print(table)
