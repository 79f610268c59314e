"""What is watched while training: time, losses, collapse, overflow. It touches the device only when read."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Generator, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from pipelines import Batch
from rsa_fast.distributed import world_size
from rsa_fast.methods.method import Loss

COLLAPSE_STD = (
    0.02  # of embedding_std; healthy runs stay above .1, those whose heads have BatchNorm above .9
)
COLLAPSE_FROM_STEP = 200  # heads without BatchNorm start alike
NEVER = torch.iinfo(torch.int64).max


class Meter:
    """Times the loop and averages losses between two reads, over all ranks. `first_bad` is the first step whose loss was not
    finite, `worst_skips` the longest row of steps that fp16's scaler left out, `worst_step` its last; all over the whole run,
    as last looked."""

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self.reads: list[dict[str, float]] = []
        self.embedding_std: float | None = None  # at the last read
        self.first_bad: int | None = None
        self.worst_skips = self.worst_step = 0
        self.bad_step = torch.tensor(NEVER, device=device)
        self.skips = torch.zeros(
            4, dtype=torch.int64, device=device
        )  # all, in this row, in the longest, its last step
        self.totals: (
            Tensor  # the sums of the finite losses, and their count; set by the first `add`
        )
        self.restart()

    def restart(self) -> None:
        """Forget the time since the last read: evaluation and checkpoints are not steps."""
        self.began, self.wait_s, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterator[Batch]) -> Generator[Batch]:
        """The batches, with the time spent waiting for each counted."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def add(self, step: int, loss: Loss, skipped: Tensor | None = None) -> None:
        """Count a step, numbered from 0; `skipped` says whether fp16's scaler left it out."""
        self.names = ("loss", *loss.parts)
        values = torch.stack([loss.total.detach().float(), *loss.parts.values()])
        finite = values.isfinite().all()
        counted = torch.cat([torch.where(finite, values, 0), finite[None]])
        self.totals = counted if self.steps == 0 else self.totals + counted
        self.bad_step = self.bad_step.minimum(torch.where(finite, NEVER, step))
        if skipped is not None:
            row = (self.skips[1] + 1) * skipped
            last = torch.where(row > self.skips[2], step, self.skips[3])
            self.skips = torch.stack(
                [self.skips[0] + skipped, row, self.skips[2].maximum(row), last]
            )
        self.embeddings = loss.embeddings
        self.steps += 1

    def read(self) -> dict[str, float]:
        """Means over the finite losses since the last read; waits for the device."""
        means = self.totals[:-1] / self.totals[-1].clamp(min=1)
        values = torch.cat([means, embedding_std(self.embeddings)[None]])
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()
        step_s = (time.perf_counter() - self.began) / self.steps
        record = dict(zip((*self.names, "embedding_std"), values.tolist(), strict=True))
        self.embedding_std = record["embedding_std"]
        skipped = self.look()
        speed = {
            "step_ms": 1e3 * step_s,
            "images_per_s": self.batch_size / step_s,
            "wait_pct": 100 * self.wait_s / (step_s * self.steps),
        }
        self.reads.append(speed)
        if skipped:
            record["skipped_steps"] = skipped
        if self.device.type == "cuda":
            speed["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.restart()
        return {**record, **speed}

    def look(self) -> int:
        """Bring `first_bad`, `worst_skips` and `worst_step` up to date; returns how many steps were left out. Waits for the
        device and the other ranks."""
        if world_size() > 1:
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        bad, skips = int(self.bad_step), [int(count) for count in self.skips.tolist()]
        skipped, _, self.worst_skips, self.worst_step = skips
        self.first_bad = None if bad == NEVER else bad
        return skipped

    def summary(self) -> dict[str, float | None]:
        """Medians over the reads, the first left out when there are more: it holds the warm-up."""
        reads = self.reads[1:] or self.reads
        names = ("images_per_s", "step_ms", "wait_pct")
        middle = {
            name: statistics.median(read[name] for read in reads) if reads else None
            for name in names
        }
        return middle | {"embedding_std": self.embedding_std}


def embedding_std(embeddings: Tensor) -> Tensor:
    """Mean over the dimensions of the standard deviation of unit-length rows `(B, D)`, times sqrt(D): near 1 when they
    spread in all directions, 0 when all are the same (SimSiam section 4.1)."""
    spread: Tensor = embeddings.float().std(0).mean() * embeddings.shape[1] ** 0.5
    return spread


def warn_of_collapse(record: dict[str, float]) -> None:
    if record["step"] >= COLLAPSE_FROM_STEP and record["embedding_std"] < COLLAPSE_STD:
        found = f"all images are embedded alike at step {record['step']} (embedding_std {record['embedding_std']:.3f})"
        print(f"{found}: collapse? Lower the learning rate, or check the recipe", file=sys.stderr)
