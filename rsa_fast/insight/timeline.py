"""How long the parts of a step take, and how much memory: by CUDA events on a GPU, by the host's clock on a CPU."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from rsa_fast.methods.method import Now
from rsa_fast.training.step import Run

# "backward" holds GradScaler's look at the gradients, "other" the schedules, the scaler and the zeroing of gradients.
PARTS = ("forward_online", "forward_target", "loss", "backward", "optimiser", "ema", "other")


class Timeline:
    """When which part of the work began: parts follow each other without a gap or an overlap.

    The device is waited for before and after the work, never within.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.on_gpu = device, device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []  # part; CUDA event, or seconds of the host's clock
        self.idle: list[
            bool
        ] = []  # of each step: had the GPU begun the optimiser when the host had launched all of it?

    def begin(self, part: str) -> None:
        now: Any = time.perf_counter()
        if self.on_gpu:
            if self.marks and self.marks[-1][0] == "optimiser":
                self.idle.append(self.marks[-1][1].query())
            stream = torch.cuda.current_stream(self.device)
            now = stream.record_event(torch.cuda.Event(enable_timing=True))  # type: ignore[no-untyped-call]  # torch gives no types
        self.marks.append((part, now))

    def time(
        self,
        work: Iterator[object],
        seconds: float = math.inf,
    ) -> tuple[dict[str, float], int]:
        """Milliseconds of each part per item of `work`, and how many items: for some seconds, or all of them."""
        self.wait()
        self.marks, self.idle, items = [], [], 0
        ends = time.perf_counter() + seconds
        self.begin("other")
        for _ in work:
            items += 1
            if time.perf_counter() >= ends:
                break
        self.begin("end")
        self.wait()
        parts: dict[str, float] = defaultdict(float)
        for (part, begun), (_, ended) in pairwise(self.marks):
            parts[part] += (
                begun.elapsed_time(ended) if self.on_gpu else 1e3 * (ended - begun)
            ) / items
        return parts, items

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@contextmanager
def watched(run: Run, timeline: Timeline) -> Iterator[None]:
    """Have the steps of `run` mark their parts, by hooks; what a network does without gradient is the target's part."""

    def begin(part: str) -> Callable[..., None]:
        return lambda *_: timeline.begin(part)

    def network(*_: object) -> None:
        timeline.begin("forward_online" if torch.is_grad_enabled() else "forward_target")

    def after_step(now: Now) -> None:
        timeline.begin("ema")
        type(run.method).after_step(run.method, now)
        timeline.begin("other")

    hooks = [
        run.method.register_forward_pre_hook(begin("loss")),
        run.method.register_forward_hook(begin("backward")),
    ]
    for child in run.method.children():
        hooks += [
            child.register_forward_pre_hook(network),
            child.register_forward_hook(begin("loss")),
        ]
    hooks += [
        run.optimizer.register_step_pre_hook(begin("optimiser")),
        run.optimizer.register_step_post_hook(begin("other")),
    ]
    run.method.after_step = after_step  # type: ignore[method-assign]  # `del` below brings the method back
    try:
        yield
    finally:
        del run.method.after_step
        for hook in hooks:
            hook.remove()


def used_bytes(device: torch.device) -> int:
    """Allocated on a GPU; on a CPU 0, as `peak_bytes` is of the whole process there."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Forget the most memory used so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with suppress(OSError):  # where it is not permitted, the most since the process started counts
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The most memory used since `reset_peak`: allocated on the GPU, or resident of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    _, _, most = Path("/proc/self/status").read_text().partition("VmHWM:")  # "  1234 kB ..."
    return 1024 * int(most.split()[0])
