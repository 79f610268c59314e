"""The processes that train together: their start, their communication, and silent ones.

Processes are configured by torchrun's environment variables (RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR, MASTER_PORT), or by those of a SLURM step if torchrun's are missing. A process with
neither trains alone: its world size is 1.
"""

from __future__ import annotations

import itertools
import logging
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
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rsa_fast.pipelines.machine import cores, idle_cores

log = logging.getLogger("rsa_fast")

# SLURM sends the first two to a job that it pre-empts. The last one is sent when the terminal
# closes.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
# The exit code if a signal stopped the run and --resume can continue it: EX_TEMPFAIL of sysexits.
STOPPED_EXIT_CODE = 75
BEAT_S = 1.0  # the time between two heartbeats
ANSWER_S = 5.0  # the time limit for an answer of the store, which may be in the process of rank 0
SILENT_S = 30.0  # a rank without a heartbeat for this long is reported
MEET_S = 10.0  # a rank that waits longer than this for the others to start logs a message
ALONE = "a shell of srun --pty has only one process; start several with srun, torchrun or --gpus"
# The variables in which SLURM and MPI store the number of a process on its machine.
LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID")

# Whether `alone` is active. A ContextVar would break torch.compile, which traces `world_size`.
counts_alone = False


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() and not counts_alone else 1


def rank() -> int:
    """The number of this process among these processes, from 0."""
    return dist.get_rank() if dist.is_initialized() and not counts_alone else 0


@contextmanager
def alone() -> Iterator[None]:
    """A context in which this process counts as the only one, even if there are others.

    The planner traces a step in it, because its tensors cannot be sent to other ranks.
    """
    global counts_alone
    counts_alone = True
    try:
        yield
    finally:
        counts_alone = False


def gpu_index() -> int:
    """The index of this process's GPU among the GPUs that are visible to this process.

    With SLURM's --gpus-per-task=1, each process sees only one GPU, which has the index 0. Raises
    ValueError if there are fewer GPUs than processes on this machine.
    """
    index = int(launcher_variables(os.environ).get("LOCAL_RANK", 0))
    visible = torch.cuda.device_count()
    if visible == 1:
        return 0
    if index >= visible:
        raise ValueError(
            f"process {index} of this machine, counted from 0, sees only {visible} GPUs: start one "
            "process per GPU"
        )
    return index


def launcher_variables(env: Mapping[str, str]) -> dict[str, str]:
    """The five variables of torchrun, read from `env` or derived from those of a SLURM step.

    A SLURM step is started by srun with one task per GPU. The result is empty for a single process.
    If only LOCAL_RANK is missing, it is taken from SLURM or MPI, or else it is the rank modulo the
    number of GPUs.

    Raises ValueError if other variables of torchrun are missing, or if restarted ranks would hang
    with torchrun's configuration.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if "RANK" in env or "WORLD_SIZE" in env:
        missing = [name for name in names if name not in env]
        if missing and env.get("WORLD_SIZE") == "1":
            return {}  # some platforms set only the rank of a single process
        if missing == ["LOCAL_RANK"]:
            by_gpu = int(env["RANK"]) % max(1, torch.cuda.device_count())
            found = (env[name] for name in LOCAL_RANKS if name in env)
            env = {**env, "LOCAL_RANK": next(found, str(by_gpu))}
        elif missing:
            raise ValueError(
                "the environment has RANK or WORLD_SIZE but not "
                f"{', '.join(missing)}: start with torchrun"
            )
        # A store that survives a restart gives the addresses of the old ranks to the new ones
        # (pytorch issue 135712).
        shared_store = env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        if shared_store and env.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
            raise ValueError(
                "torchrun --max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: otherwise a "
                "restart hangs"
            )
        return {name: env[name] for name in names}
    if int(env.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and not in_interactive_shell(env):
        # The port is the same on all machines of a step, and differs between steps and between
        # jobs. Jobs have consecutive numbers, so the ports of a job's steps differ by 101.
        step = int(env["SLURM_JOB_ID"]) + 101 * int(env.get("SLURM_STEP_ID", 0))
        port = 20_000 + step % 10_000
        return {
            "RANK": env["SLURM_PROCID"],
            "LOCAL_RANK": env["SLURM_LOCALID"],
            "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
            "MASTER_ADDR": env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"]),
            "MASTER_PORT": env.get("MASTER_PORT", str(port)),
        }
    return {}


def in_interactive_shell(env: Mapping[str, str]) -> bool:
    """Whether this command was typed into a shell that `srun --pty` opened.

    The shell has the variables of a task, but the other tasks of its step have already ended.
    """
    return (
        ("SLURM_PTY_PORT" in env or "SLURM_PTY_WIN_COL" in env)
        # A step that was started in the shell inherits these variables, but not the terminal.
        and any(map(os.isatty, (0, 1, 2)))
        and env.get("SLURM_TASK_PID") != str(os.getpid())
    )


def first_host(nodes: str) -> str:
    """The first machine of a SLURM node list: `gpu03` for `gpu[03-05,9],cpu1`."""
    return re.sub(r"^([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\]([^,]*))?.*", r"\1\2\3", nodes)


@contextmanager
def process_group(
    device: str, timeout_s: float, torch_threads: int | None = None
) -> Iterator[Heartbeat]:
    """Join the other ranks, if there are any, with NCCL between GPUs or gloo between CPUs.

    A single process on a CPU leaves busy cores to other programs (`use_idle_cores`). A resumed run
    passes the number of its threads as `torch_threads`.

    Raises ConnectionError if the ranks do not all start, or if one of them dies or keeps the others
    waiting for longer than `timeout_s` seconds. The message then names that rank and its last
    activity.
    """
    env = {} if dist.is_initialized() else launcher_variables(os.environ)
    cuda = device != "cpu" and torch.cuda.is_available()
    threads_before = torch.get_num_threads()
    if not (env or cuda or dist.is_initialized()):
        use_idle_cores(torch_threads)
    if env:
        if "RANK" in os.environ and "LOCAL_RANK" not in os.environ:
            log.info(f"LOCAL_RANK is not set: rank {env['RANK']} uses {env['LOCAL_RANK']}")
        os.environ.update(env)
        if cuda:
            torch.cuda.set_device(gpu_index())
        backend, timeout = "nccl" if cuda else "gloo", timedelta(seconds=timeout_s)
        meeting = f"all {env['WORLD_SIZE']} at {env['MASTER_ADDR']}:{env['MASTER_PORT']}"
        try:
            waiting = f"rank {env['RANK']} waits to meet {meeting}: {ALONE}"
            with say_after(MEET_S, waiting), stdout_silenced():
                dist.init_process_group(backend, timeout=timeout)
        except RuntimeError as error:
            raise ConnectionError(f"rank {env['RANK']} did not meet {meeting}: {error}") from error
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and not dist.is_initialized():
        log.info(f"this shell is one task of a SLURM step: training in one process. {ALONE}")
    try:
        with Heartbeat(timeout_s) as heartbeat:
            try:
                yield heartbeat
                # The store may be in the process of rank 0, which must not end before the others.
                barrier()
            except RuntimeError as error:
                if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
                    raise
                raise ConnectionError(f"{heartbeat.verdict()}\n{error}") from error
    finally:
        torch.set_num_threads(threads_before)
        if env:
            dist.destroy_process_group()


def use_idle_cores(recorded: int | None = None) -> None:
    """Limit torch's threads on a CPU to the number of idle cores, but to at least one.

    All threads wait for each other at the end of every operator. If there is one thread for each
    core, a single other busy program therefore costs much more than its share. The number of
    threads changes the last bits of the results, so a resumed run uses the number that it
    `recorded`. torch's own number is never increased. It is the user's choice, or one thread for
    each physical core. If OMP_NUM_THREADS is set, nothing is changed.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return
    available = cores()
    idle = idle_cores()
    chosen = min(torch.get_num_threads(), max(1, round(idle)))
    threads = min(recorded or chosen, available)
    torch.set_num_threads(threads)
    if round(idle) < available:
        why = "as before the run stopped" if recorded else "OMP_NUM_THREADS chooses another number"
        log.info(
            f"other programs use {available - idle:.1f} of {available} cores: this one computes "
            f"with {threads} thread{'s' * (threads > 1)} ({why})"
        )


@contextmanager
def stdout_silenced() -> Iterator[None]:
    """Discard everything that is written to stdout in this context, even by C++.

    gloo writes a line for every rank to stdout, which is for results, and has no setting for it.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def say_after(wait_s: float, text: str) -> Iterator[None]:
    """Log `text` if the block takes longer than `wait_s` seconds."""
    timer = threading.Timer(wait_s, log.warning, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_launched(env: Mapping[str, str], processes: int) -> bool:
    """Whether this process is one of the `processes` that torch's launcher has started.

    A single process still has to start them, even if a platform has set its rank. Raises ValueError
    if this is one of several processes, because each would start `processes` more.
    """
    size = int(launcher_variables(env).get("WORLD_SIZE", 1))
    if size == processes and "TORCHELASTIC_RUN_ID" in env:
        return True
    if size > 1:
        where = "WORLD_SIZE" if "WORLD_SIZE" in env else "SLURM_STEP_NUM_TASKS"
        raise ValueError(
            f"--gpus and --nproc start the processes of one machine, here {processes}, but this is "
            f"already one of {size} processes ({where}={size}): leave out the option to train in "
            f"these {size}, or unset {where} and RANK"
        )
    return False


def check_gpus(count: int) -> None:
    """Raise ValueError if this machine has fewer than `count` GPUs."""
    if (visible := torch.cuda.device_count()) < count:
        advice = f"use at most --gpus {visible}" if visible else "--nproc trains on the CPU"
        raise ValueError(
            f"--gpus {count}: torch finds {visible or 'no'} GPUs; {advice}, or see rsa-fast doctor"
        )


def launch(processes: int, max_restarts: int, arguments: list[str]) -> int:
    """Run `rsa-fast` with `arguments` in `processes` processes on this machine.

    torch's own launcher starts them on a free port. If one process dies, all of them are restarted
    from the newest checkpoint, at most `max_restarts` times. Returns the exit code.
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
    )
    # torch's launcher forwards TERM, INT, HUP and QUIT to the ranks. SLURM also sends USR1.
    signal.signal(signal.SIGUSR1, stop_launcher)
    if signal.SIGHUP not in handled_signals():
        # Otherwise the launcher would handle it. The ranks inherit the mask.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    elastic_log = logging.getLogger("torch.distributed.elastic")
    elastic_log.handlers, elastic_log.propagate = [LauncherHandler()], False
    # Without this, a restart would hang: see `launcher_variables`.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        elastic_launch(config, sys.executable)("-c", rank_program(), *arguments)
    except SignalException as stop:
        # The launcher has forwarded the signal to the ranks, and they have ended.
        return STOPPED_EXIT_CODE if stop.sigval in STOP_SIGNALS else 128 + stop.sigval
    except ChildFailedError as error:
        # The code is negative if a signal killed the process.
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    return 0


class LauncherHandler(logging.Handler):
    """Reports which process failed in a short line, without the launcher's warnings.

    The warnings are about signals that stop a run. The ranks report these themselves.
    """

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno < logging.ERROR:
            return
        if not (isinstance(record.args, tuple) and str(record.msg).startswith("failed (exitcode")):
            log.error(record.getMessage())
            return
        code, local_rank, *_ = record.args
        assert isinstance(code, int)
        if code == STOPPED_EXIT_CODE:
            return
        how = f"ended with exit code {code}"
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
        log.error(f"process {local_rank} {how}; the others are stopped")


def rank_program() -> str:
    """The Python program of a rank, which imports from the same paths as this process.

    `python -m rsa_fast` would search the working directory first, which contains the user's
    modules.
    """
    return (
        f"import sys; sys.path[:] = {sys.path}; "
        "from rsa_fast.cli import main; main(prog_name='rsa-fast')"
    )


def stop_launcher(number: int, frame: FrameType | None) -> None:
    """A signal handler that makes torch's launcher forward the signal and end."""
    from torch.distributed.elastic.multiprocessing.api import SignalException

    raise SignalException(f"got signal {number}", sigval=signal.Signals(number))


def handled_signals() -> list[signal.Signals]:
    """The signals that stop a run: `STOP_SIGNALS`, except for a SIGHUP that nohup made ignored."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [number for number in STOP_SIGNALS if not (ignored and number == signal.SIGHUP)]


def restarted() -> bool:
    """Whether torchrun restarted any rank. Every rank has to call this.

    A machine counts only the failures of its own ranks, so the ranks have to compare.
    """
    return max_over_ranks(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))) > 0


def max_over_ranks(value: int) -> int:
    """The largest `value` of all ranks. Every rank has to call this. Waits for the device."""
    if world_size() == 1:
        return value
    largest = torch.tensor(value, device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest)


def barrier() -> None:
    """Wait until every rank has called this."""
    if world_size() > 1:
        # Without a device, NCCL warns that it has to guess one.
        nccl = dist.get_backend() == "nccl"
        dist.barrier(device_ids=[torch.cuda.current_device()] if nccl else None)


def gather(x: Tensor) -> Tensor:
    """The rows `(b, ...)` of every rank as `(world_size * b, ...)`, in the order of the ranks.

    All ranks must have the same shape. The gradient of a row is summed over all ranks that used it,
    and returns to its rank.
    """
    if world_size() == 1:
        return x
    rows: Tensor = Gather.apply(x)  # type: ignore[no-untyped-call]  # torch gives no types
    return rows


class Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.new_empty((world_size() * len(x), *x.shape[1:]))
        # torch 2.14 calls it all_gather_single, and warns of the old name.
        all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        all_gather(rows, x.contiguous())
        return rows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        # A reduce-scatter would be enough, but gloo has none.
        total = grad.contiguous()
        dist.all_reduce(total)
        return total.chunk(world_size())[rank()]


class Heartbeat:
    """Publishes this rank's activity once a second, and reports silent ranks.

    This is a context manager. If a rank is stopped, dead or waiting for its files, all others wait
    in a collective operation. The timeout of that operation names neither the rank nor the reason,
    but the last heartbeat does.

    A rank whose launcher has ended sends itself a SIGTERM.
    """

    def __init__(self, timeout_s: float) -> None:
        self.doing = "starting"
        self.silent_s = min(SILENT_S, timeout_s / 2)
        self.over = threading.Event()
        # The text of each rank's last heartbeat, and the time when it was received.
        self.last_beats = [("0 starting", time.monotonic())] * world_size()
        work = (self.beat, self.watch) if world_size() > 1 else ()
        self.threads = [threading.Thread(target=target, daemon=True) for target in work]

    def __enter__(self) -> Heartbeat:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        # A thread that is using the store when Python exits would abort the process.
        for thread in self.threads:
            thread.join(ANSWER_S)

    def beat(self) -> None:
        """Publish this rank's heartbeats and receive those of all ranks, until the job is over.

        The store may be in the process of rank 0. If that process is stopped, this thread waits for
        it, whatever the timeout.
        """
        store = dist.distributed_c10d._get_default_store()
        keys = [f"beat/{r}" for r in range(world_size())]
        # A RuntimeError means that the store and the job have ended.
        with suppress(RuntimeError):
            for count in itertools.count():
                store.set(keys[rank()], f"{count} {self.doing}")
                for r, text in enumerate(store.multi_get(keys)):
                    if text.decode() != self.last_beats[r][0]:
                        self.last_beats[r] = text.decode(), time.monotonic()
                if self.over.wait(BEAT_S):
                    return

    def watch(self) -> None:
        """Report silent ranks, and send SIGTERM to this process if its launcher has ended."""
        reported: set[int] = set()
        launcher = os.getppid()
        while not self.over.wait(BEAT_S):
            silent = self.silent(self.silent_s)
            # The lowest rank that is not silent reports for all ranks.
            if rank() == min(set(range(world_size())) - silent.keys()):
                for r in silent.keys() - reported:
                    log.warning(
                        f"rank {r} has been silent for {self.silent_s:.0f} s; it was {silent[r]}"
                    )
            reported = set(silent)
            if "TORCHELASTIC_RUN_ID" in os.environ and os.getppid() != launcher:
                launcher = os.getppid()
                os.kill(os.getpid(), signal.SIGTERM)

    def silent(self, for_s: float) -> dict[int, str]:
        """Ranks without a heartbeat for `for_s` seconds, and their last activity.

        If our own heartbeat is stale, we have lost the store, so we report rank 0, which hosts it.
        """
        now = time.monotonic()
        ranks = [r for r, (_, since) in enumerate(self.last_beats) if now - since > for_s]
        if rank() in ranks:
            ranks = [0]
        return {r: self.doing_of(r) for r in ranks}

    def doing_of(self, rank: int) -> str:
        return self.last_beats[rank][0].partition(" ")[2]

    def verdict(self) -> str:
        """The cause of a failed collective: the silent ranks, or else the activity of each rank."""
        # A rank that has just died is not silent yet.
        time.sleep(ANSWER_S)
        if silent := self.silent(3 * BEAT_S):
            return "; ".join(f"rank {r} is silent, it was {doing}" for r, doing in silent.items())
        return "; ".join(f"rank {r} is {self.doing_of(r)}" for r in range(world_size()))
