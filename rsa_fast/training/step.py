"""The state of a run, and one optimiser step: `train_step(build_run(recipe, count), batch)`.

With `accumulate`, a step takes several batches: `train_step` takes them together, and `train_on`
one after the other, so that only one has to be on the device.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from rsa_fast.distributed import gpu_index, rank, world_size
from rsa_fast.methods.method import Loss, Method, build_method
from rsa_fast.pipelines import Batch
from rsa_fast.pipelines.draws import hash_keys
from rsa_fast.recipes import Derived, Recipe, recipe_of_own_encoder, resolve
from rsa_fast.training.optim import build_optimizer, clip_each_grad_norm_, set_learning_rate

RecipeT = TypeVar("RecipeT", bound=Recipe)

NETWORK_DRAWS = 0x6E6574776F726B  # makes these random numbers independent of the views


@dataclass
class Run:
    """Everything that a step reads or changes. `step` is the only counter of progress."""

    recipe: Recipe
    derived: Derived
    method: Method
    forward: nn.Module  # the method, or DistributedDataParallel around it
    optimizer: Optimizer
    scaler: GradScaler
    device: torch.device
    dtype: torch.dtype
    step: int = 0
    skipped: Tensor | None = None  # bool, on the device: did the fp16 scaler skip the last step?
    losses: list[Loss] = field(default_factory=list)  # the losses of the step's batches up to now

    def schedule(self, step: int) -> dict[str, float]:
        """The values at `step`, counted from 0: lr, and those of the method, such as tau."""
        return self.recipe.schedule(step, self.derived)


def build_run(recipe: Recipe, count: int, encoder: nn.Module | None = None) -> Run:
    """A new run over `count` images. Its networks are on the device and in training mode.

    Their initial parameters depend only on the recipe and its seed. If the module `encoder` is
    given, a copy of it, with its weights, replaces the network that the recipe names. The recipe of
    the run records this.
    """
    if encoder is not None:
        recipe = recipe_of_own_encoder(recipe)
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.precision, device)
    derived = resolve(recipe, count, world_size())
    torch.manual_seed(recipe.seed)
    method = build_method(recipe, encoder)
    method.allocate(count)
    method.to(device).train()
    optimizer = build_optimizer(recipe, method, derived.peak_lr, method.lr_ratios())
    scaler = GradScaler(device.type, enabled=dtype == torch.float16)
    forward: nn.Module = method
    if world_size() > 1:
        # Buffers are not broadcast: every rank has its own BatchNorm statistics, and the queue is
        # the same on all ranks anyway. The graph is not declared static. Otherwise DDP would look
        # for tensors in the result of forward, find none in a Loss, and never reduce a gradient.
        with warnings.catch_warnings():
            # torch 2.13 deprecates broadcast_buffers. Its successor copies the buffers once at the
            # start, and earlier versions do not have it.
            warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
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


def train_step(run: Run, *batches: Batch) -> Loss:
    """Do one optimiser step on as many batches as the recipe's `accumulate`.

    Returns the loss, as `train_on` does. Raises ValueError if the number of batches differs.
    """
    if len(batches) != run.recipe.accumulate:
        raise ValueError(
            f"a step of this run takes {run.recipe.accumulate} batches, found {len(batches)}"
        )
    (loss,) = train_steps(run, iter(batches))
    return loss


def train_steps(run: Run, batches: Iterator[Batch]) -> Iterator[Loss]:
    """The losses of optimiser steps on `batches`. Each step takes `accumulate` of them."""
    for batch in batches:
        if (loss := train_on(run, batch)) is not None:
            yield loss


def train_on(run: Run, batch: Batch) -> Loss | None:
    """Train on one batch. After the last batch of a step, the optimiser makes its step.

    Returns the loss of the step if it is done, and otherwise None. The loss is the mean over the
    step's batches, with the embeddings of the last one. It stays on the device, and nothing here
    waits for the device.
    """
    # The values of this step: the learning rate, tau and beta.
    now = run.schedule(run.step)
    set_learning_rate(run.optimizer, now["lr"])
    passes = run.recipe.accumulate
    last = len(run.losses) == passes - 1
    if not run.losses:
        seed_dropout(run)

    # Run the forward pass in the compute type, and the backward pass. In fp16 the loss is scaled.
    # Several ranks average their gradients only in the last pass of a step.
    with (
        run.forward.no_sync()
        if isinstance(run.forward, DistributedDataParallel) and not last
        else nullcontext()
    ):
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            loss: Loss = run.forward(batch, now)
        run.scaler.scale(loss.total).backward()  # type: ignore[no-untyped-call]
    run.losses.append(replace(loss, total=loss.total.detach()))
    if not last:
        return None
    run.method.after_backward(now)

    loss = mean_loss(run.losses)
    run.losses.clear()
    update(run)
    return loss


def seed_dropout(run: Run) -> None:
    """Seed the random numbers of a network in a step, such as dropout masks.

    They depend on the run's seed, the step and the rank, so a resumed run gets the same. The
    ResNets and the methods of this package use no such numbers.
    """
    seed = int(hash_keys(run.recipe.seed ^ NETWORK_DRAWS, run.step, rank())[0])
    torch.default_generator.manual_seed(seed)
    if run.device.type == "cuda":
        torch.cuda.manual_seed(seed)


def mean_loss(losses: list[Loss]) -> Loss:
    """The loss of a step, the mean over its batches, with the embeddings of the last one."""
    if len(losses) == 1:
        return losses[0]
    return Loss(
        total=torch.stack([loss.total for loss in losses]).mean(),
        embeddings=losses[-1].embeddings,
        parts={
            name: torch.stack([loss.parts[name] for loss in losses]).mean()
            for name in losses[-1].parts
        },
    )


def update(run: Run) -> None:
    """Update the weights by the gradients, and end the step."""
    params = [p for group in run.optimizer.param_groups for p in group["params"]]

    # The gradients of several passes add up to a sum, but the step needs their mean. They are
    # divided only here, so that fp16 overflows and rounds in each pass as on each of several ranks.
    if run.recipe.accumulate > 1:
        torch._foreach_div_([p.grad for p in params if p.grad is not None], run.recipe.accumulate)
    if run.recipe.clip_grad_norm or run.recipe.clip_each_grad_norm:
        run.scaler.unscale_(run.optimizer)
    if run.recipe.clip_each_grad_norm:
        clip_each_grad_norm_(params, run.recipe.clip_each_grad_norm)
    if run.recipe.clip_grad_norm:
        clip_grad_norm_(params, run.recipe.clip_grad_norm, foreach=True)

    # Update the weights. The fp16 scaler skips this if a gradient overflowed, and then lowers its
    # scale. `get_scale()` would wait for the device, so the scale is compared on the device.
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


def for_any_device(recipe: RecipeT) -> RecipeT:
    """The recipe with the device `auto` if it demands a GPU.

    The recipe names the device on which the run was trained. Later work, such as scoring its
    encoder, may be done on another machine.
    """
    return recipe.model_copy(update={"device": "auto"}) if recipe.device == "cuda" else recipe


def choose_device(name: str) -> torch.device:
    """The device called `auto`, `cuda` or `cpu`; `auto` is the GPU if there is one.

    Raises ValueError for `cuda` if there is no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "device = cuda, but torch finds no GPU: use device=cpu, or check the driver with "
            "nvidia-smi"
        )
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda", gpu_index())


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
