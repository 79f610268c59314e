"""Training: build a run, step through it, write it down, resume it exactly.

    result = train(build_recipe("cifar10", "rsa"), data=Path("data/cifar10"), out=Path("runs/a"))

A run folder holds `recipe.yaml`, `env.json`, `metrics.jsonl`, `result.json` and `checkpoints/`.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipelines import Batch, Order, open_source, open_views
from rsa_fast import checkpoint
from rsa_fast.evaluate import Evaluation
from rsa_fast.methods import Loss, Method, build_method
from rsa_fast.metrics import Metrics, environment
from rsa_fast.optim import Sgd, build_optimizer, set_learning_rate
from rsa_fast.recipes import RECORD_FIELDS, SPEED_FIELDS, Plan, Recipe, dump_yaml, resolve

COLLAPSE_STD = 0.02  # of embedding_std; healthy runs stay above .1, those whose heads have BatchNorm above .9
COLLAPSE_FROM_STEP = 200  # heads without BatchNorm start alike
RUN_FILES = ("recipe.yaml", "env.json", "metrics.jsonl", "result.json", "checkpoints", ".rsa-fast")


@dataclass
class Run:
    """Everything a step reads or changes. `step` is the only clock."""

    recipe: Recipe
    plan: Plan
    method: Method
    optimizer: Sgd
    scaler: torch.amp.GradScaler
    device: torch.device
    dtype: torch.dtype
    step: int = 0

    def schedule(self, step: int) -> dict[str, float]:
        """What changes with the step, counted from 0: lr, and tau and beta where the method has them."""
        return self.recipe.schedule(step, self.plan)


def build_run(recipe: Recipe, count: int) -> Run:
    """A fresh run over `count` images: networks seeded by the recipe, on the device, in training mode."""
    device = choose_device(recipe.device)
    dtype = choose_dtype(recipe.precision, device)
    plan = resolve(recipe, count)
    torch.manual_seed(recipe.seed)
    method = build_method(recipe).to(device).train()
    optimizer = build_optimizer(recipe, method, plan.peak_lr)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    return Run(recipe, plan, method, optimizer, scaler, device, dtype)


def train_step(run: Run, batch: Batch) -> Loss:
    """One optimiser step; returns the loss on the device. Nothing here waits for the device."""
    now = run.schedule(run.step)
    set_learning_rate(run.optimizer, now["lr"])
    with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
        loss = run.method(batch, now.get("beta", 0.0))
    run.scaler.scale(loss.total).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.method.after_step(run.schedule(run.step).get("tau", 1.0))  # the next step's tau: see TargetMethod.after_step
    return loss


def train(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    init_from: Path | None = None,
    stop_at_step: int | None = None,
) -> dict[str, Any]:
    """Train a recipe on the images under `data` into the folder `out`; returns the result that is also in `result.json`.

    `resume` goes on from the newest whole checkpoint in `out`, bit for bit as if never stopped; `init_from` starts a new
    run from another's weights; `stop_at_step` checkpoints and returns early. Raises FileExistsError when `out` is not
    empty and neither resumed nor overwritten, ValueError when the recipe or the data of a resumed run changed.
    """
    source = open_source(data, "pretrain", cache=out)
    recipe.check_labels(source.manifest.labelled, len(source.manifest.classes))
    order = Order(len(source.manifest), recipe.batch_size, recipe.seed)
    run = build_run(recipe, len(source.manifest))
    prepare_folder(out, resume, overwrite)
    if resume:
        restore(run, checkpoint.load_latest(out / "checkpoints"), source.manifest.fingerprint)
    elif init_from:
        run.method.load_state_dict(checkpoint.load(init_from)["method"])
    (out / "recipe.yaml").write_text(dump_yaml(recipe))
    (out / "env.json").write_text(json.dumps(environment(), indent=1))
    evaluation = open_evaluation(data, recipe, run, out)
    announce(run, len(source.manifest))

    stop = min(stop_at_step or run.plan.total_steps, run.plan.total_steps)
    per_epoch = run.plan.steps_per_epoch
    loading = {name: getattr(recipe, name) for name in SPEED_FIELDS} | {"device": run.device, "dtype": run.dtype}
    with (
        open_views(source, recipe.views, run.method.reads, order, **loading) as loader,
        Metrics(out, run.plan.total_steps, run.step) as metrics,
    ):
        if evaluation and run.step == 0 and recipe.knn_every_epochs:
            metrics.write({"step": 0, "epoch": 0, **evaluation.score(run.method.encoder, ("knn",))})
        meter = Meter(recipe.batch_size)
        while run.step < stop:
            epoch = run.step // per_epoch
            for batch in meter.waiting(loader.batches(epoch, run.step % per_epoch)):
                meter.add(train_step(run, batch))
                if run.step % recipe.log_every_steps == 0 or run.step == stop:
                    record = {"step": run.step, **meter.read(run.device), **run.schedule(run.step - 1)}
                    metrics.write(record)
                    warn_of_collapse(record)
                if run.step == stop:
                    break
            done = run.step // per_epoch
            if run.step == stop or done % recipe.checkpoint_every_epochs == 0:
                save(run, out, source.manifest.fingerprint)
            if evaluation and recipe.knn_every_epochs and run.step < stop and done % recipe.knn_every_epochs == 0:
                metrics.write({"step": run.step, "epoch": done, **evaluation.score(run.method.encoder, ("knn",))})
            meter.restart()
        scores = evaluation.score(run.method.encoder) if evaluation and run.step == run.plan.total_steps else {}
        if scores:
            metrics.write({"step": run.step, "epoch": recipe.epochs, **scores})
    result = {"out": str(out), "method": recipe.method, "dataset": recipe.dataset, "step": run.step, **meter.summary()}
    result |= {"knn_top1": None, "knn20_top1": None, "linear_top1": None, **scores}
    (out / "result.json").write_text(json.dumps(result))
    return result


class Meter:
    """Times the loop and averages the loss between two reads, touching the device only when read."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.reads: list[dict[str, float]] = []
        self.embedding_std: float | None = None  # at the last read
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last read: evaluation and checkpoints are not steps."""
        self.began, self.wait_s, self.steps, self.totals = time.perf_counter(), 0.0, 0, None

    def waiting(self, batches):
        """The batches, with the time spent waiting for each counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, loss: Loss) -> None:
        self.names = ("loss", *loss.parts)
        values = torch.stack([loss.total.detach(), *loss.parts.values()])
        self.totals = values if self.totals is None else self.totals + values
        self.embeddings = loss.embeddings
        self.steps += 1

    def read(self, device: torch.device) -> dict[str, float]:
        """Means since the last read. Raises FloatingPointError when the loss is not finite."""
        values = torch.cat([self.totals / self.steps, embedding_std(self.embeddings)[None]])
        means = dict(zip((*self.names, "embedding_std"), values.tolist(), strict=True))  # waits for the device
        step_s = (time.perf_counter() - self.began) / self.steps
        self.embedding_std = means["embedding_std"]
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the loss is {means['loss']}: lower the learning rate or add warm-up epochs")
        speed = {
            "step_ms": 1e3 * step_s,
            "images_per_s": self.batch_size / step_s,
            "wait_pct": 100 * self.wait_s / (step_s * self.steps),
        }
        if device.type == "cuda":
            speed["peak_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        self.reads.append(speed)
        self.restart()
        return {**means, **speed}

    def summary(self) -> dict[str, float | None]:
        """Medians over the reads, the first left out when there are more: it holds the warm-up."""
        reads = self.reads[1:] or self.reads
        names = ("images_per_s", "step_ms", "wait_pct")
        middle = {name: statistics.median(read[name] for read in reads) if reads else None for name in names}
        return middle | {"embedding_std": self.embedding_std}


def embedding_std(embeddings: Tensor) -> Tensor:
    """Mean over the dimensions of the standard deviation of unit-length rows `(B, D)`, times sqrt(D): near 1 when they
    spread in all directions, 0 when all are the same (SimSiam section 4.1)."""
    return embeddings.std(0).mean() * embeddings.shape[1] ** 0.5


def warn_of_collapse(record: dict[str, float]) -> None:
    if record["step"] >= COLLAPSE_FROM_STEP and record["embedding_std"] < COLLAPSE_STD:
        found = f"all images are embedded alike at step {record['step']} (embedding_std {record['embedding_std']:.3f})"
        print(f"{found}: collapse? Lower the learning rate, or check the recipe", file=sys.stderr)


def prepare_folder(out: Path, resume: bool, overwrite: bool) -> None:
    """Make `out`, or refuse it. Overwriting removes a run's own files and nothing else."""
    import shutil

    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file: --out wants a folder")
    found = [path.name for path in out.iterdir() if path.name != ".rsa-fast"] if out.is_dir() else []
    if found and overwrite:
        for name in RUN_FILES:
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif found and not resume:
        raise FileExistsError(f"{out} is not empty: go on with --resume, start again with --overwrite, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def save(run: Run, out: Path, fingerprint: str) -> Path:
    state = {
        "step": run.step,
        "recipe": run.recipe.model_dump(mode="json"),
        "data": fingerprint,
        "method": run.method.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
    }
    return checkpoint.save(out / "checkpoints", state, run.recipe.keep_last)


def restore(run: Run, state: dict[str, Any], fingerprint: str) -> None:
    """Put a checkpoint into a fresh run. Raises ValueError with the difference when recipe or data are not the same."""
    now, then = run.recipe.model_dump(mode="json"), state["recipe"]
    differ = [key for key in now if key not in (*SPEED_FIELDS, *RECORD_FIELDS) and now[key] != then.get(key)]
    if differ:
        rows = "\n".join(f"  {key}: {then.get(key)!r} in the checkpoint, {now[key]!r} now" for key in differ)
        raise ValueError(f"the recipe is not the one this run was started with:\n{rows}")
    if state["data"] != fingerprint:
        raise ValueError("the training images are not the ones this run was started with (names, labels, bytes or sizes)")
    run.method.load_state_dict(state["method"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.scaler.load_state_dict(state["scaler"])
    run.step = state["step"]


def open_evaluation(data: Path, recipe: Recipe, run: Run, out: Path) -> Evaluation | None:
    try:
        return Evaluation(data, recipe, run.device, run.dtype, out)
    except (FileNotFoundError, ValueError) as error:
        print(f"no kNN or linear evaluation in this run: {error}", file=sys.stderr)
        return None


def announce(run: Run, count: int) -> None:
    """The derived numbers, on stderr, before the first step."""
    numbers = {"images": count, **asdict(run.plan), "device": str(run.device), "dtype": str(run.dtype).removeprefix("torch.")}
    numbers["parameters"] = sum(p.numel() for p in run.method.parameters() if p.requires_grad)
    print("  ".join(f"{key} {value}" for key, value in numbers.items()), file=sys.stderr)
    if run.plan.warmup_steps >= run.plan.total_steps:
        print(f"the learning rate only warms up: warmup_epochs is {run.recipe.warmup_epochs}", file=sys.stderr)


def choose_device(wanted: str) -> torch.device:
    """`auto` is the GPU where there is one. Raises ValueError when cuda is wanted and missing."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: cuda is wanted and torch finds none; use device=cpu, or check the driver with nvidia-smi")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True
    return torch.device("cuda")


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute type; V100s emulate bf16, which `auto` does not count as having it."""
    named = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if precision != "auto":
        return named[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32
