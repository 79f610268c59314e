"""The cores, idle cores and memory that this process may use, and the command of its pip.

Containers are limited by cgroups, version 1 or 2. `os.cpu_count` ignores these limits. The kernel's
number of free pages does not include the page cache, although that memory is available.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

# Messages show the pip of this process, because `pip` may belong to another Python. They name the
# missing library, because rsa-fast[...] is in no package index.
PIP = f"{shlex.quote(sys.executable)} -m pip"
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# The most loader threads per process. More threads only wait for Python's lock: with kernels of
# fixed length, 64 threads make no more images per second from files than 16.
MOST_THREADS = 16
IDLE_WINDOW_S = 0.2  # 20 ticks of the kernel's clock, so idle cores are measured to 0.05


def cores() -> int:
    """The number of cores that the affinity and the CPU quota of the cgroup allow, at least 1."""
    quota, _ = read_cgroups((PROC / "self" / "cgroup").read_text())
    return max(1, int(min(len(os.sched_getaffinity(0)), quota)))


def loader_threads() -> int:
    """This rank's share of the allowed cores, at least 1 and at most `MOST_THREADS`.

    A launcher such as torchrun lets all ranks of a machine use all cores. SLURM reports how many
    cores each of its tasks has.
    """
    own = min(cores(), int(os.environ.get("SLURM_CPUS_PER_TASK", cores())))
    return min(MOST_THREADS, max(1, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def idle_cores() -> float:
    """How many of the allowed cores nobody used in the last `IDLE_WINDOW_S` seconds, on average."""
    ticks, started = idle_ticks(), time.perf_counter()
    time.sleep(IDLE_WINDOW_S)
    seconds = (idle_ticks() - ticks) / os.sysconf("SC_CLK_TCK")
    return min(cores(), seconds / (time.perf_counter() - started))


def idle_ticks(proc: Path = PROC) -> int:
    """The ticks that the allowed cores were idle since the start of the machine."""
    allowed = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    rows = (line.split() for line in (proc / "stat").read_text().splitlines())
    # The columns are user, nice, system, idle and iowait. A core that waits for a disk is idle.
    return sum(int(row[4]) + int(row[5]) for row in rows if row[0] in allowed)


def available_memory_bytes(proc: Path = PROC, root: Path = CGROUPS) -> int:
    """The memory in bytes that this process can still take, within the limits of its cgroups.

    The page cache counts as available, because the kernel gives it up when memory is needed.
    """
    lines = (line.split() for line in (proc / "meminfo").read_text().splitlines())
    available = [next(1024 * int(line[1]) for line in lines if line[0] == "MemAvailable:")]
    for folder in cgroup_folders((proc / "self" / "cgroup").read_text(), root):
        limits = read_limits(folder, "memory.max", "memory.limit_in_bytes")
        if limits and math.isfinite(limits[0]):
            usages = (folder / file for file in ("memory.current", "memory.usage_in_bytes"))
            used = next(int(path.read_text()) for path in usages if path.is_file())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            # In version 1, only the totals include the child groups, which the usage also includes.
            scope = "total_" if "total_active_file" in stat else ""
            page_cache = sum(int(stat[f"{scope}{kind}_file"]) for kind in ("active", "inactive"))
            available.append(max(0, int(limits[0]) - used + page_cache))
    return min(available)


def read_cgroups(groups: str, root: Path = CGROUPS) -> tuple[float, float]:
    """The cores and the bytes of memory that cgroups allow this process.

    `groups` is the text of /proc/self/cgroup, v1 or v2. The limits of parent groups count too.
    """
    cores = memory = math.inf
    for folder in cgroup_folders(groups, root):
        if cpu := read_limits(folder, "cpu.max", "cpu.cfs_quota_us", "cpu.cfs_period_us"):
            quota_us, period_us = cpu
            cores = min(cores, quota_us / period_us)
        memory = min([memory, *read_limits(folder, "memory.max", "memory.limit_in_bytes")])
    return cores, memory


def cgroup_folders(groups: str, root: Path) -> Iterator[Path]:
    """The folders of the groups in the text `groups` and of their parents. Some may not exist."""
    for _, controllers, group in (line.split(":", 2) for line in groups.splitlines()):
        for path in (Path(group), *Path(group).parents):
            yield root / controllers / path.relative_to("/")


def read_limits(folder: Path, *files: str) -> list[float]:
    """The numbers in those of the files that exist. "max", -1 and 0 mean no limit."""
    paths = [folder / file for file in files]
    words = " ".join(path.read_text() for path in paths if path.is_file()).split()
    return [float(word) if word.isdigit() and word != "0" else math.inf for word in words]
