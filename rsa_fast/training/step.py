"""The state of a run, and one optimiser step: `train_step(build_run(recipe, count), batch)`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from pipelines import Batch
from rsa_fast.distributed import local_rank, world_size
from rsa_fast.methods.method import Loss, Method, build_method
from rsa_fast.recipes import Derived, Recipe, resolve
from rsa_fast.training.optim import Sgd, build_optimizer, set_learning_rate


@dataclass
class Run:
    """Everything that a step reads or changes. `step` is the only counter of progress."""

    recipe: Recipe
    derived: Derived
    method: Method
    forward: nn.Module  # the method, or DistributedDataParallel around it
    optimizer: Sgd
    scaler: GradScaler
    device: torch.device
    dtype: torch.dtype
    step: int = 0
    skipped: Tensor | None = None  # bool, on the device: did the fp16 scaler skip the last step?

    def schedule(self, step: int) -> dict[str, float]:
        """The values at `step`, counted from 0: lr, and tau and beta if the method has them."""
        return self.recipe.schedule(step, self.derived)


def build_run(recipe: Recipe, count: int) -> Run:
    """A new run over `count` images. Its networks are on the device and in training mode.

    Their initial parameters depend only on the recipe and its seed.
    """
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.precision, device)
    derived = resolve(recipe, count, world_size())
    torch.manual_seed(recipe.seed)
    method = build_method(recipe).to(device).train()
    optimizer = build_optimizer(recipe, method, derived.peak_lr)
    scaler = GradScaler(device.type, enabled=dtype == torch.float16)
    forward: nn.Module = method
    if world_size() > 1:
        # Buffers are not broadcast: every rank has its own BatchNorm statistics, and the queue is
        # the same on all ranks anyway. The graph is not declared static: DDP would then look for
        # tensors in what forward returns, find none in a Loss, and never reduce a gradient.
        forward = DistributedDataParallel(
            method,
            [device] if device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    return Run(
        recipe=recipe,
        derived=derived,
        method=method,
        forward=forward,
        optimizer=optimizer,
        scaler=scaler,
        device=device,
        dtype=dtype,
    )


def train_step(run: Run, batch: Batch) -> Loss:
    """One optimiser step. Returns the loss, which stays on the device.

    Nothing here waits for the device.
    """
    # The learning rate, tau and beta of this step.
    now = run.schedule(run.step)
    set_learning_rate(run.optimizer, now["lr"])

    # The forward passes in the compute type, and the backward pass. In fp16 the loss is scaled.
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        loss: Loss = run.forward(batch, now)
    run.scaler.scale(loss.total).backward()  # type: ignore[no-untyped-call]  # torch gives no types

    # The update of the weights, which the fp16 scaler skips if a gradient overflowed. It then
    # lowers its scale. `get_scale()` would wait for the device, so the scale is compared there.
    run.scaler.step(run.optimizer)
    scale = run.scaler._scale if run.scaler.is_enabled() else None
    # A copy, because `update` changes the tensor in place.
    scale_before = None if scale is None else scale.clone()
    run.scaler.update()
    run.skipped = None if scale is None or scale_before is None else scale < scale_before
    run.optimizer.zero_grad(set_to_none=True)

    # The update of the target network uses the values of the next step: see
    # `TargetMethod.after_step` for the reason.
    run.step += 1
    run.method.after_step(run.schedule(run.step))
    return loss


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cuda` or `cpu`; `auto` is the GPU if there is one.

    Raises ValueError for `cuda` if there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device: cuda is wanted and torch finds none; "
            "use device=cpu, or check the driver with nvidia-smi"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", local_rank())


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute type called `fp32`, `bf16`, `fp16` or `auto`.

    `auto` is bf16 if the hardware computes in it, else fp16 on a GPU and fp32 on a CPU. A V100 only
    emulates bf16, so it gets fp16.
    """
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return dtypes[precision]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
