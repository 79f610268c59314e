"""Measurements during training: time, losses, collapse and overflows.

Counting a step never waits for the device. Only reading the values does.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Generator, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from rsa_fast.distributed import world_size
from rsa_fast.methods.method import Loss
from rsa_fast.pipelines import Batch

log = logging.getLogger("rsa_fast")

# Collapse is suspected below this `embedding_std`.
COLLAPSE_STD = 0.02
# Healthy runs stay above this value, and above 0.9 if their heads have BatchNorm.
HEALTHY_STD = 0.1
# At the start, heads without BatchNorm embed all images alike, so earlier steps are not checked.
COLLAPSE_FROM_STEP = 200
NEVER = torch.iinfo(torch.int64).max


class Meter:
    """Times the loop and averages the losses between two reads, over all ranks.

    Three attributes describe the whole run, up to the last `update_faults`: `first_bad` is the
    first step whose loss was not finite, `worst_skips` is the largest number of steps in a row that
    the fp16 scaler skipped, and `worst_step` is the last step of that row.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        self.batch_size, self.device = batch_size, device
        self.reads: list[dict[str, float]] = []
        self.embedding_std: float | None = None  # at the last read
        self.first_bad: int | None = None
        self.worst_skips = self.worst_step = 0

        # Counters on the device. `skips` contains the number of all skipped steps, the length of
        # the current row of skipped steps, the length of the longest row, and the last step of the
        # longest row.
        self.bad_step = torch.tensor(NEVER, device=device)
        self.skips = torch.zeros(4, dtype=torch.int64, device=device)
        # The sums of the finite losses, and their number. The first `add` creates the tensor.
        self.totals: Tensor
        self.restart()

    def restart(self) -> None:
        """Restart the clock, because evaluations and checkpoints are not part of a step's time."""
        self.began, self.wait_s, self.steps = time.perf_counter(), 0.0, 0

    def waiting(self, batches: Iterator[Batch]) -> Generator[Batch]:
        """Yield the batches, and measure how long the loop waits for each."""
        while True:
            wait_began = time.perf_counter()
            batch = next(batches, None)
            self.wait_s += time.perf_counter() - wait_began
            if batch is None:
                return
            yield batch

    def add(self, step: int, loss: Loss, skipped: Tensor | None = None) -> None:
        """Count a step, numbered from 0. `skipped` is true if the fp16 scaler skipped it."""
        self.names = ("loss", *loss.parts)
        values = torch.stack([loss.total.detach().float(), *loss.parts.values()])
        finite = values.isfinite().all()
        summands = torch.cat([torch.where(finite, values, 0), finite[None]])
        self.totals = summands if self.steps == 0 else self.totals + summands
        self.bad_step = self.bad_step.minimum(torch.where(finite, NEVER, step))
        if skipped is not None:
            total, row, longest, last_step = self.skips.unbind()
            row = (row + 1) * skipped
            last_step = torch.where(row > longest, step, last_step)
            self.skips = torch.stack([total + skipped, row, longest.maximum(row), last_step])
        self.embeddings = loss.embeddings
        self.steps += 1

    def read(self) -> dict[str, float]:
        """The means of the finite losses since the last read, and the speed.

        Waits for the device.
        """
        means = self.totals[:-1] / self.totals[-1].clamp(min=1)
        values = torch.cat([means, embedding_std(self.embeddings)[None]])
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()
        record = dict(zip((*self.names, "embedding_std"), values.tolist(), strict=True))
        # Only now has the device finished the steps. Before, many may still be in its queue.
        step_s = (time.perf_counter() - self.began) / self.steps
        self.embedding_std = record["embedding_std"]
        skipped_steps = self.update_faults()
        speed = {
            "step_ms": 1e3 * step_s,
            "images_per_s": self.batch_size / step_s,
            "wait_pct": 100 * self.wait_s / (step_s * self.steps),
        }
        self.reads.append(speed)
        if skipped_steps:
            record["skipped_steps"] = skipped_steps
        if self.device.type == "cuda":
            speed["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.restart()
        return {**record, **speed}

    def update_faults(self) -> int:
        """Update `first_bad`, `worst_skips` and `worst_step`. Returns the number of skipped steps.

        Waits for the device and for the other ranks.
        """
        if world_size() > 1:
            dist.all_reduce(self.bad_step, dist.ReduceOp.MIN)
        bad_step = int(self.bad_step)
        self.first_bad = None if bad_step == NEVER else bad_step
        skipped_steps, _, self.worst_skips, self.worst_step = map(int, self.skips.tolist())
        return skipped_steps

    def summary(self) -> dict[str, float | None]:
        """The medians over all reads except the first, because it includes the warm-up.

        If there is only one read, its values are returned.
        """
        reads = self.reads[1:] or self.reads
        medians: dict[str, float | None] = {}
        for name in ("images_per_s", "step_ms", "wait_pct"):
            medians[name] = statistics.median(read[name] for read in reads) if reads else None
        return medians | {"embedding_std": self.embedding_std}


def embedding_std(embeddings: Tensor) -> Tensor:
    """The spread of unit-length embeddings `(B, D)`: a scalar on the device.

    It is the mean over the dimensions of their standard deviation, times sqrt(D) (SimSiam section
    4.1). It is near 1 if the embeddings spread in all directions, and 0 if all are the same.
    """
    spread: Tensor = embeddings.float().std(0).mean() * embeddings.shape[1] ** 0.5
    return spread


def warn_of_collapse(record: dict[str, float]) -> None:
    """Log a warning if the embeddings of all images are nearly the same."""
    step, std = record["step"], record["embedding_std"]
    if step >= COLLAPSE_FROM_STEP and std < COLLAPSE_STD:
        log.warning(
            f"all images are embedded alike at step {step} (embedding_std {std:.3f}): collapse? "
            "Lower the learning rate, or check the recipe"
        )
