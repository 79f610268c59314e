"""A run's state and one optimiser step: `train_step(build_run(recipe, count), batch)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from pipelines import Batch
from rsa_fast.distributed import local_rank, world_size
from rsa_fast.methods.method import Loss, Method, build_method
from rsa_fast.recipes import Plan, Recipe, resolve
from rsa_fast.training.optim import Sgd, build_optimizer, set_learning_rate


@dataclass
class Run:
    """Everything a step reads or changes. `step` is the only clock."""

    recipe: Recipe
    plan: Plan
    method: Method
    forward: nn.Module  # the method, or DDP around it
    optimizer: Sgd
    scaler: GradScaler
    device: torch.device
    dtype: torch.dtype
    step: int = 0
    skipped: Tensor | None = None  # whether fp16's scaler left the last step out, on the device

    def schedule(self, step: int) -> dict[str, float]:
        """What changes with the step, counted from 0: lr, and tau and beta where the method has them."""
        return self.recipe.schedule(step, self.plan)


def build_run(recipe: Recipe, count: int) -> Run:
    """A fresh run over `count` images: networks seeded by the recipe, on the device, in training mode."""
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.precision, device)
    plan = resolve(recipe, count, world_size())
    torch.manual_seed(recipe.seed)
    method = build_method(recipe).to(device).train()
    optimizer = build_optimizer(recipe, method, plan.peak_lr)
    scaler = GradScaler(device.type, enabled=dtype == torch.float16)
    forward: nn.Module = method
    if world_size() > 1:
        # Buffers are not broadcast: each rank has its own statistics, and all the same queue. The graph is not declared static:
        # DDP would look for tensors in what forward returns, find none in a Loss, and never reduce a gradient.
        forward = DistributedDataParallel(
            method,
            [device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    return Run(recipe, plan, method, forward, optimizer, scaler, device, dtype)


def train_step(run: Run, batch: Batch) -> Loss:
    """One optimiser step; returns the loss on the device. Nothing here waits for the device."""
    now = run.schedule(run.step)
    set_learning_rate(run.optimizer, now["lr"])
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        loss: Loss = run.forward(batch, now)
    run.scaler.scale(loss.total).backward()  # type: ignore[no-untyped-call]  # torch gives no types
    run.scaler.step(run.optimizer)
    # get_scale() would wait for the device. `update` changes this tensor in place.
    scale = run.scaler._scale if run.scaler.is_enabled() else None
    before = None if scale is None else scale.clone()
    run.scaler.update()
    run.skipped = None if scale is None or before is None else scale < before
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.method.after_step(run.schedule(run.step))  # the next step's: see TargetMethod.after_step
    return loss


def choose_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError when cuda is wanted and missing."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: cuda is wanted and torch finds none; use device=cpu, or check the driver with nvidia-smi"
        )
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", local_rank())


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute type; V100s emulate bf16, which `auto` does not count as having it."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return named[precision]
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
