"""Small runs of `rsa-fast train` in their own processes, for tests to interrupt.

Each run takes only seconds.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import torch

from rsa_fast.cli import main
from rsa_fast.training import checkpoint
from tests.forks import fork
from tests.tiny_runs import NETWORK, same, set_options

EPOCH_STEPS = 5  # 40 images in batches of 8
SETTINGS = NETWORK | {
    "precision": "fp32",
    "base_lr": 0.5,
    "knn_every_epochs": 0,
    "log_every_steps": EPOCH_STEPS,
    "device": "cpu",
}
PATIENCE_S = 240  # An idle machine needs ten seconds.


def arguments(data: Path, out: Path, *options: object) -> list[str]:
    names = ["--dataset", "cifar10", "--method", "rsa", "--batch-size", "8"]
    places = ["--data", str(data), "--out", str(out)]
    return ["train", *names, *places, *set_options(SETTINGS), *map(str, options)]


def start(data: Path, out: Path, *options: object) -> ForkServerProcess:
    return fork(rsa_fast, arguments(data, out, *options), log=log_of(out))


def rsa_fast(words: list[str]) -> None:
    main(words)


def log_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.log")


def finish(data: Path, out: Path, *options: object) -> None:
    """Train to the end."""
    process = start(data, out, *options)
    process.join(PATIENCE_S)
    assert process.exitcode == 0, log_of(out).read_text()


class Job:
    """`python -m rsa_fast train` as a context manager that leaves no process behind.

    `said` is what the run has written to stderr.
    """

    def __init__(
        self, data: Path, out: Path, *options: object, prefix: tuple[str, ...] = (), **env: str
    ) -> None:
        self.log = tempfile.NamedTemporaryFile("r", suffix=".log")  # noqa: SIM115
        command = [*prefix, sys.executable, "-m", "rsa_fast", *arguments(data, out, *options)]
        settings = os.environ | {"OMP_NUM_THREADS": "1"} | env
        with open(self.log.name, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=log, env=settings
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in [*self.ranks(), self.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    @property
    def said(self) -> str:
        return Path(self.log.name).read_text()

    def wait_for(self, text: str, times: int = 1) -> None:
        """Wait until stderr contains `text` this many times."""
        until(lambda: self.said.count(text) >= times or self.process.poll() is not None)
        assert self.said.count(text) >= times, self.said

    def end(self) -> int:
        """Wait for the end of the run and return its exit code."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {PATIENCE_S} s:\n{self.said}") from None

    def ranks(self) -> list[int]:
        """Return the process ids of a launcher's ranks, in the order of the ranks."""
        found = {}
        for pid in children(self.process.pid):
            with suppress(OSError):
                variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
                found |= {int(line[5:]): pid for line in variables if line.startswith("RANK=")}
        return [found[rank] for rank in sorted(found)]


def children(pid: int) -> Iterator[int]:
    with suppress(OSError):
        yield from map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def until(true, patience_s: float = PATIENCE_S) -> None:
    end = time.monotonic() + patience_s
    while not true() and time.monotonic() < end:
        time.sleep(0.002)


def newest(out: Path) -> int:
    """Return the step of the newest checkpoint, or 0 if there is none."""
    found = checkpoint.paths_in(out / "checkpoints")
    return int(found[-1].stem.removeprefix("step_")) if found else 0


def state(out: Path) -> dict:
    return checkpoint.load_latest(out / "checkpoints")


def losses(out: Path) -> dict[int, float]:
    records = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def assert_same_run(one: Path, other: Path) -> None:
    """Check that weights, target, momenta and step are equal bit for bit."""
    first, second = state(one), state(other)
    assert first["step"] == second["step"]
    assert same(first["method"], second["method"])
    momenta = [
        [entry["momentum_buffer"] for entry in s["optimizer"]["state"].values()]
        for s in (first, second)
    ]
    assert momenta[0] and all(map(torch.equal, *momenta))
