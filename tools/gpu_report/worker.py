"""The process in which the parts of `tools.gpu_report` run, and the class that controls it.

A part is a function `part(settings) -> list[Case]`, named as "module:function". A case is one
measurement. Parts run in a separate process for three reasons: a fault on a GPU also affects later
calls, a library can crash, and a driver can hang. This module imports only the standard library, so
that a missing library skips a part but does not end the report.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

Row = dict[str, Any]  # the results of a case: JSON values by name
# A message has a kind and a value. "begins" (the name of a case), "row" (a Row with its "case"),
# "left_out" (names of cases), "skipped" (a reason) and "fault" (a Row) describe the running part.
# "over" (None) ends it.
Message = tuple[str, Any]

# A module of these packages that cannot be imported is a fault and not a missing library.
OUR_PACKAGES = ("rsa_fast", "tools")
TRACEBACK_LINES = 12


@dataclass(frozen=True)
class Settings:
    """The inputs and the sizes of all measurements."""

    scratch: Path  # an existing folder for data and runs
    data: Path | None  # images of the user
    batch_sizes: tuple[int, ...]
    images: int  # the number of photographs to draw if the user has none
    repeats: int  # steps or batches in each measurement
    overrides: dict[str, Any]  # fields of every recipe


@dataclass(frozen=True)
class Case:
    """One measurement. `work(seconds)` yields rows and should take at most `seconds`."""

    name: str
    work: Callable[[float], Iterable[Row]]


class SkippedError(Exception):
    """A measurement that this machine cannot do. The message is the reason."""


class Worker:
    """A process that runs one part after another."""

    def __init__(self, settings: Settings) -> None:
        context = get_context("spawn")  # a fork would inherit the threads' locks
        self.connection, child_end = context.Pipe()
        self.process = context.Process(target=serve, args=(child_end, settings, os.getpid()))
        self.process.start()
        child_end.close()

    def run(
        self, place: str, share_s: float, ends_at: float, killed_at: float
    ) -> Iterator[Message]:
        """Run the part at `place` and yield its messages. Times are those of `time.monotonic()`.

        No case begins after `ends_at`, or after the part has run for `share_s` seconds (without
        imports). At `killed_at` the process is killed. After a message "fault" the process has
        ended.
        """
        try:
            self.connection.send((place, share_s, ends_at))
            while self.connection.poll(max(0.0, killed_at - time.monotonic())):
                kind, value = self.connection.recv()
                if kind == "over":
                    return
                yield kind, value
            kind, text = "TimeoutError", "it exceeded its share of the time and was killed"
        except (EOFError, OSError):
            self.process.join()
            kind, text = "ProcessError", f"its process ended with exit code {self.process.exitcode}"
        self.close()
        yield "fault", {"type": kind, "message": text, "traceback": ""}

    def close(self) -> None:
        """End the process and all processes that it started."""
        if self.connection.closed:
            return
        try:
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:  # the process has no group of its own yet
            self.process.kill()
        self.process.join()
        self.connection.close()


def serve(
    connection: Connection[Message, tuple[str, float, float]], settings: Settings, parent: int
) -> None:
    """The main function of the worker's process: run the parts that the connection names."""
    os.setsid()
    Thread(target=end_with_parent, args=(parent,), daemon=True).start()
    # Libraries print to stdout, which is only for the table.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    with suppress(EOFError, OSError):
        while True:
            place, share_s, ends_at = connection.recv()
            for message in run_part(place, settings, share_s, ends_at):
                connection.send(message)
            connection.send(("over", None))
    os._exit(0)  # the thread of a case that ran out of time must not keep the process alive


def end_with_parent(parent: int) -> None:
    """End this process and all processes that it started when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def run_part(place: str, settings: Settings, share_s: float, ends_at: float) -> Iterator[Message]:
    """Run the cases of a part one by one. An exception ends its case, not the part."""
    try:
        module, _, name = place.partition(":")
        part = getattr(import_module(module), name)
        ends_at = min(ends_at, time.monotonic() + share_s)
        cases: list[Case] = part(settings)
    except Exception as error:
        yield classify(error)
        return
    for number, case in enumerate(cases):
        seconds = (ends_at - time.monotonic()) / (len(cases) - number)
        if seconds <= 0:
            yield "left_out", [case.name for case in cases[number:]]
            return
        yield "begins", case.name
        try:
            for row in case.work(seconds):
                values = {key: jsonable(value) for key, value in row.items()}
                yield "row", {"case": case.name} | values
        except Exception as error:
            kind, value = classify(error)
            yield "row", {"case": case.name, kind: value}


def classify(error: Exception) -> Message:
    """An exception as a message: "skipped" (a reason), "note" (the result itself) or "fault"."""
    if isinstance(error, SkippedError):
        return "skipped", str(error)
    # For a missing library the backends raise a ValueError from the ImportError.
    missing = error if isinstance(error, ImportError) else error.__cause__
    if isinstance(missing, ImportError):
        package = (missing.name or "").partition(".")[0]
        if package not in OUR_PACKAGES:
            return "skipped", str(missing)
    # This text is in torch.OutOfMemoryError and in the exceptions of cuDNN and DALI.
    if "out of memory" in str(error):
        return "note", "does not fit in the GPU's memory"
    lines = "".join(traceback.format_exception(error)).splitlines()[-TRACEBACK_LINES:]
    return "fault", {
        "type": type(error).__name__,
        "message": str(error),
        "traceback": "\n".join(lines),
    }


def jsonable(value: Any) -> Any:
    """A value, or None for infinity and NaN, which JSON does not have."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
