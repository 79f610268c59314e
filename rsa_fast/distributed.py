"""The processes that train together: how they start, who this one is, what they gather, and which one went silent.

The contract is torchrun's environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT); without it, that of a SLURM
step. One process without either is a world of one.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

STOP_SIGNALS = (
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGINT,
)  # SLURM's pre-emption sends the first two
STOPPED_EXIT_CODE = 75  # sysexits' EX_TEMPFAIL: a signal stopped the run, --resume goes on
BEAT_S = 1.0
ANSWER_S = 5.0  # that the store, which rank 0 may hold, has for an answer
SILENT_S = 30.0  # without a beat: said on stderr


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank() -> int:
    """Which of this machine's GPUs is this rank's."""
    return int(environment(os.environ).get("LOCAL_RANK", 0))


def environment(env: Mapping[str, str]) -> dict[str, str]:
    """torchrun's variables, from torchrun or else from a SLURM step (srun, one task per GPU); empty for a world of one.

    Raises ValueError when torchrun's are there in part, or when what it starts again would never meet.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in env or "WORLD_SIZE" in env:
        if missing := [name for name in names if name not in env]:
            raise ValueError(
                f"the environment has RANK or WORLD_SIZE but not {', '.join(missing)}: start with torchrun"
            )
        # A store that outlives a restart gives the new ranks the old ones' addresses (pytorch issue 135712).
        if (
            env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
            and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        ):
            raise ValueError(
                "torchrun --max-restarts wants TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: else a restart hangs"
            )
        return {name: env[name] for name in names}
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1:
        port = (
            20_000 + int(env["SLURM_JOB_ID"]) % 10_000
        )  # the same on all nodes, another for another job
        host = env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"])
        values = (
            env["SLURM_PROCID"],
            env["SLURM_LOCALID"],
            env["SLURM_STEP_NUM_TASKS"],
            host,
            env.get("MASTER_PORT", str(port)),
        )
        return dict(zip(names, values, strict=True))
    return {}


def first_host(nodes: str) -> str:
    """The first of a SLURM node list: `gpu[03-05,9],cpu1` is gpu03."""
    return re.sub(r"^([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?.*", r"\1\2\3", nodes)


@contextmanager
def process_group(device: str, timeout_s: float) -> Iterator[Heartbeat]:
    """Join the other ranks, if there are any: NCCL between GPUs, gloo between CPUs.

    Raises ConnectionError when they do not meet, or when one is gone or keeps the others waiting for longer than `timeout_s`:
    then it says which, and at what.
    """
    env = {} if dist.is_initialized() else environment(os.environ)
    if env:
        os.environ.update(env)
        cuda = device != "cpu" and torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(local_rank())
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_s)
            )
        except RuntimeError as error:
            place = f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"
            raise ConnectionError(
                f"rank {env['RANK']} did not meet all {env['WORLD_SIZE']} at {place}: {error}"
            ) from error
    try:
        with Heartbeat(timeout_s) as heartbeat:
            try:
                yield heartbeat
                barrier()  # the store is rank 0's, perhaps: nobody leaves while another needs it
            except RuntimeError as error:
                if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                    raise
                raise ConnectionError(f"{heartbeat.verdict()}\n{error}") from error
    finally:
        if env:
            dist.destroy_process_group()


def launch(processes: int, max_restarts: int, arguments: list[str]) -> int:
    """Run `rsa-fast` with `arguments` in `processes` processes on this machine, by torch's own launcher on a free port; returns
    the exit code.

    When one dies, all are started again from the newest checkpoint, `max_restarts` times.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        max_restarts=max_restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        signals_to_handle="SIGTERM,SIGINT,SIGUSR1,SIGHUP,SIGQUIT",
    )
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # see environment()
    try:
        elastic_launch(config, sys.executable)("-m", "rsa_fast", *arguments)
    except SignalException as stop:  # passed on to the ranks, and they have ended
        return STOPPED_EXIT_CODE if stop.sigval in STOP_SIGNALS else 128 + stop.sigval
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1  # negative: killed by a signal
    return 0


def restarted() -> bool:
    """Whether torchrun started any of the ranks again; every rank calls it. A node counts only its own ranks' failures."""
    return highest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0


def highest(value: int) -> int:
    """The highest of all ranks' values; every rank calls it. Waits for the device."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def barrier() -> None:
    if world_size() > 1:  # a named device, or NCCL warns that it guesses
        dist.barrier(
            device_ids=[torch.cuda.current_device()] if dist.get_backend() == "nccl" else None
        )


def gather(x: Tensor) -> Tensor:
    """Every rank's rows `(b, ...)` as `(world_size b, ...)`, in rank order; equal shapes on all ranks.

    The gradient flows back to the rank each row came from, summed over the ranks that used it.
    """
    if world_size() == 1:
        return x
    everyone: Tensor = Gather.apply(x)  # type: ignore[no-untyped-call]  # torch gives no types
    return everyone


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        everyone = x.new_empty((world_size() * len(x), *x.shape[1:]))
        dist.all_gather_into_tensor(everyone, x.contiguous())
        return everyone

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.contiguous()
        dist.all_reduce(total)  # not reduce-scatter: gloo has none
        return total.chunk(world_size())[rank()]


class Heartbeat:
    """Tells the others what this rank is doing, once a second, and says which of them went silent: a context manager.

    A rank that is stopped, gone, or waits for its files keeps all others waiting in a collective, whose own timeout says
    neither which rank it was nor why. A rank whose launcher is gone, and with it every other's, gets SIGTERM.
    """

    def __init__(self, timeout_s: float) -> None:
        self.doing = "starting"
        self.silent_s = min(SILENT_S, timeout_s / 2)
        self.over = threading.Event()
        self.heard = [
            ("0 starting", time.monotonic())
        ] * world_size()  # by rank, the last beat and when it was new
        work = (self.beat, self.watch) if world_size() > 1 else ()
        self.threads = [threading.Thread(target=target, daemon=True) for target in work]

    def __enter__(self) -> Heartbeat:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for (
            thread
        ) in self.threads:  # one that is in the store while Python ends would abort the process
            thread.join(ANSWER_S)

    def beat(self) -> None:
        """The store may be rank 0's: when that is stopped, this waits for it, whatever its timeout."""
        store, keys = (
            dist.distributed_c10d._get_default_store(),
            [f"beat/{r}" for r in range(world_size())],
        )
        with suppress(RuntimeError):  # the store is gone, and with it the job
            for count in itertools.count():
                store.set(keys[rank()], f"{count} {self.doing}")
                for r, beat in enumerate(store.multi_get(keys)):
                    if beat.decode() != self.heard[r][0]:
                        self.heard[r] = beat.decode(), time.monotonic()
                if self.over.wait(BEAT_S):
                    return

    def watch(self) -> None:
        said: set[int] = set()
        launcher = os.getppid()
        while not self.over.wait(BEAT_S):
            silent = self.silent(self.silent_s)
            if rank() == min(set(range(world_size())) - silent.keys()):  # one says it for all
                for r in silent.keys() - said:
                    print(
                        f"rank {r} has been silent for {self.silent_s:.0f} s; it was {silent[r]}",
                        file=sys.stderr,
                    )
            said = set(silent)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher:
                launcher = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)

    def silent(self, for_s: float) -> dict[int, str]:
        """The ranks not heard for so long, and what each was doing. Who does not hear itself has lost the store, and rank 0."""
        now = time.monotonic()
        found = [r for r, (_, since) in enumerate(self.heard) if now - since > for_s]
        return {r: self.doing_of(r) for r in ([0] if rank() in found else found)}

    def doing_of(self, rank: int) -> str:
        return self.heard[rank][0].partition(" ")[2]

    def verdict(self) -> str:
        """Which ranks are silent, or what each is doing, for the error of a collective that failed."""
        time.sleep(ANSWER_S)  # a rank that died just now is not silent yet
        if silent := self.silent(3 * BEAT_S):
            return "; ".join(f"rank {r} is silent, it was {doing}" for r, doing in silent.items())
        return "; ".join(f"rank {r} is {self.doing_of(r)}" for r in range(world_size()))
