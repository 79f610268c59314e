"""Measure the time of a training step's parts, and memory.

Times are measured by CUDA events on a GPU and by the host's clock on a CPU.
"""

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
from rsa_fast.networks import Projected
from rsa_fast.training.step import Run

# "backward" includes clipping and GradScaler's check of the gradients. "other" includes the
# schedules, the scaler and the zeroing of gradients. With `accumulate`, the passes of a step are
# added up.
PARTS = ("forward_online", "forward_target", "loss", "backward", "optimiser", "ema", "other")


class Timeline:
    """Records when each part of the work begins. There are no gaps or overlaps between parts.

    The host waits for the device before and after the work, never during it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        # Each mark is the part that begins, and a CUDA event or the host's clock in seconds.
        self.marks: list[tuple[str, Any]] = []
        # One value per step. It is true if the GPU had already reached the optimiser when the host
        # had launched all of the optimiser's work. The GPU then waits for the host.
        self.idle: list[bool] = []

    def begin(self, part: str) -> None:
        """Mark the end of the current part and the beginning of the next one."""
        now: Any = time.perf_counter()
        if self.on_gpu:
            if self.marks and self.marks[-1][0] == "optimiser":
                self.idle.append(self.marks[-1][1].query())
            stream = torch.cuda.current_stream(self.device)
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            now = stream.record_event(event)  # type: ignore[no-untyped-call]
        self.marks.append((part, now))

    def time(
        self, work: Iterator[object], seconds: float = math.inf
    ) -> tuple[dict[str, float], int]:
        """Iterate over `work` for some seconds or to its end, but over at least one item.

        Returns the milliseconds per item of each part, and the number of items.
        """
        self.wait()
        self.marks = []
        self.idle = []
        items = 0
        deadline = time.perf_counter() + seconds
        self.begin("other")
        for _ in work:
            items += 1
            if time.perf_counter() >= deadline:
                break
        self.begin("end")
        self.wait()
        parts_ms: dict[str, float] = defaultdict(float)
        for (part, start), (_, end) in pairwise(self.marks):
            elapsed_ms = start.elapsed_time(end) if self.on_gpu else 1e3 * (end - start)
            parts_ms[part] += elapsed_ms / items
        return parts_ms, items

    def wait(self) -> None:
        """Wait until the device has done all its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)


@contextmanager
def mark_parts(run: Run, timeline: Timeline) -> Iterator[None]:
    """Hook into the steps of `run`, so that each marks its parts on the timeline.

    A forward pass of a network without gradients counts as the target's.
    """

    def begin(part: str) -> Callable[..., None]:
        return lambda *_: timeline.begin(part)

    running = 0  # the number of running networks, because one can be a part of another

    def begin_network(*_: object) -> None:
        nonlocal running
        running += 1
        if running == 1:
            timeline.begin("forward_online" if torch.is_grad_enabled() else "forward_target")

    def end_network(*_: object) -> None:
        nonlocal running
        running -= 1
        if running == 0:
            timeline.begin("loss")

    def after_step(now: Now) -> None:
        timeline.begin("ema")
        type(run.method).after_step(run.method, now)
        timeline.begin("other")

    hooks = [
        run.method.register_forward_pre_hook(begin("loss")),
        run.method.register_forward_hook(begin("backward")),
    ]
    networks = list(run.method.children())
    # Some methods call the encoder and the projector of a network one after the other.
    networks += [
        part for child in networks if isinstance(child, Projected) for part in child.children()
    ]
    for network in networks:
        hooks.append(network.register_forward_pre_hook(begin_network))
        hooks.append(network.register_forward_hook(end_network))
    hooks.append(run.optimizer.register_step_pre_hook(begin("optimiser")))
    hooks.append(run.optimizer.register_step_post_hook(begin("other")))
    # An attribute of the instance hides the method of its class until it is deleted below.
    run.method.after_step = after_step  # type: ignore[method-assign]
    try:
        yield
    finally:
        del run.method.after_step
        for hook in hooks:
            hook.remove()


def used_bytes(device: torch.device) -> int:
    """The allocated memory of a GPU, or 0 on a CPU, where `peak_bytes` is for the whole process."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Make `peak_bytes` start from the memory that is now in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # Without the permission to write this file, the peak is that since the start of the process.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int:
    """The peak since `reset_peak`, of a GPU's allocated or the process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    _, _, peak = Path("/proc/self/status").read_text().partition("VmHWM:")  # "  1234 kB ..."
    return 1024 * int(peak.split()[0])
