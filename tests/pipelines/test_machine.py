"""What a process may use: the allowed cores, and the memory that is available within its cgroup."""

from __future__ import annotations

import os
from importlib import import_module

import numpy as np
import pytest
import torch

from rsa_fast.pipelines import Loading, Source, ViewSpec, machine
from rsa_fast.pipelines.manifest import array_manifest
from rsa_fast.pipelines.plain import PlainImages
from rsa_fast.recipes import build_recipe
from tests.forks import fork

MEMINFO = "MemTotal: 1000 kB\nMemFree: 100 kB\nMemAvailable: 900 kB\n"  # mostly page cache
V1 = "total_active_file 3072\ntotal_inactive_file 1024\nactive_file 1\ninactive_file 1\n"
V2 = "active_file 3072\ninactive_file 1024\nfile 999999\n"


@pytest.mark.parametrize(
    ("groups", "files", "available"),
    [
        ("0::/", {}, 900 * 1024),
        (
            "0::/",
            {"memory.max": "65536", "memory.current": "61440", "memory.stat": V2},
            65536 - 61440 + 4096,
        ),
        ("0::/a", {"a/memory.max": "max"}, 900 * 1024),
        (
            "0::/a/b",  # The parent is the tighter limit.
            {
                "a/memory.max": "8192",
                "a/memory.current": "8000",
                "a/memory.stat": V2,
                "a/b/memory.max": "16384",
                "a/b/memory.current": "0",
                "a/b/memory.stat": V2,
            },
            8192 - 8000 + 4096,
        ),
        (
            "4:memory:/docker/x",  # A container sees its own group as the root.
            {
                "memory/memory.limit_in_bytes": "65536",
                "memory/memory.usage_in_bytes": "61440",
                "memory/memory.stat": V1,
            },
            65536 - 61440 + 4096,
        ),
        (
            "4:memory:/",
            {
                "memory/memory.limit_in_bytes": "9223372036854771712",
                "memory/memory.usage_in_bytes": "61440",
                "memory/memory.stat": V1,
            },
            900 * 1024,
        ),
    ],
)
def test_page_cache_is_available_and_the_tightest_limit_counts(tmp_path, groups, files, available):
    proc, root = tmp_path / "proc", tmp_path / "cgroup"
    contents = {proc / "meminfo": MEMINFO, proc / "self" / "cgroup": groups}
    for path, text in (contents | {root / name: text for name, text in files.items()}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert machine.available_memory_bytes(proc, root) == available


@pytest.mark.parametrize(("quota", "cores"), [(float("inf"), 3), (2.5, 2), (0.5, 1), (64.0, 3)])
def test_cores_are_those_of_the_affinity_and_the_quota(monkeypatch, quota, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 2, 5})
    monkeypatch.setattr(machine, "read_cgroups", lambda groups: (quota, 0.0))
    assert machine.cores() == cores


@pytest.mark.parametrize("tool", ["verify", "to_ffcv", "to_dali"])
def test_tools_take_one_process_per_allowed_core(tool, tmp_path):
    process = fork(print_workers_on_one_core, tool, log=tmp_path / "log")
    process.join()
    assert (tmp_path / "log").read_text() == "1\n"


def print_workers_on_one_core(tool: str) -> None:
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    command = import_module(f"rsa_fast.tools.{tool}").main
    context = command.make_context("tool", ["."] if tool == "verify" else [".", "dst"])
    print(context.params["workers"])


@pytest.mark.parametrize(
    ("cores", "env", "threads"),
    [
        (1, {}, 1),
        (6, {}, 6),
        (64, {}, machine.MOST_THREADS),
        (64, {"LOCAL_WORLD_SIZE": "8"}, 8),
        (4, {"LOCAL_WORLD_SIZE": "8"}, 1),
        (64, {"SLURM_CPUS_PER_TASK": "10"}, 10),  # eight tasks that see all cores
        (10, {"SLURM_CPUS_PER_TASK": "10"}, 10),  # eight tasks that are bound to their own
        (64, {"SLURM_CPUS_PER_TASK": "64", "LOCAL_WORLD_SIZE": "8"}, 8),  # torchrun in one task
    ],
)
def test_a_rank_loads_on_its_share_of_the_allowed_cores(monkeypatch, cores, env, threads):
    for name in ("LOCAL_WORLD_SIZE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(machine, "cores", lambda: cores)
    pixels, labels = np.zeros((1, 2, 2, 3), np.uint8), np.zeros(1, np.int64)
    source = Source(array_manifest("train", pixels, labels, ("a",)), pixels.__getitem__)
    assert Loading().threads == threads
    recipes = [build_recipe("demo", "rsa", overrides={"threads": count}) for count in (0, 3)]
    assert [recipe.loading.threads for recipe in recipes] == [threads, 3]
    spec = ViewSpec(2, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for recipe in recipes:
        images = PlainImages(
            source, spec, None, 1, torch.device("cpu"), torch.float32, recipe.threads
        )
        assert images.threads == recipe.loading.threads


def test_idle_cores_are_the_idle_ticks_of_the_allowed_cores(tmp_path, monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2})
    stat = "cpu 9 9 9 999 9 0\ncpu0 5 0 5 100 7 0\ncpu1 5 0 5 1000 7 0\ncpu2 5 0 5 10 1 0\nintr 1\n"
    (tmp_path / "stat").write_text(stat)
    assert machine.idle_ticks(tmp_path) == 100 + 7 + 10 + 1
    # Of two cores, one is idle for all of the time, and the other for half of it.
    now, ticks = iter([10.0, 10.2]), iter([1000, 1030])
    monkeypatch.setattr(machine, "idle_ticks", lambda: next(ticks))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    monkeypatch.setattr("os.sysconf", lambda _: 100)
    monkeypatch.setattr(machine, "cores", lambda: 2)
    assert machine.idle_cores() == pytest.approx(1.5)
