"""The fake CUDA runtime does what the tests on it rely on, and is built once."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests import fake_gpu
from tests.fake_gpu import on_fake_gpu
from tests.gpuless.ghost import build

RUNTIME = """
import ctypes, json, torch

runtime = ctypes.CDLL(None)
found = {"devices": torch.cuda.device_count(), "capability": torch.cuda.get_device_capability()}

there = torch.arange(5).cuda()
found["round trip"] = there.clone().cpu().tolist()

stream, event, pinned = torch.cuda.Stream(), torch.cuda.Event(), torch.ones(4).pin_memory()
found["pinned"] = [pinned.is_pinned(), torch.ones(4).is_pinned()]
torch.cuda.synchronize()
runtime.ghost_reset()
there.add_(1)
there.clone()
pinned.to("cuda", non_blocking=True)
event.record(stream)
torch.cuda.synchronize()
found["counts"] = [runtime.ghost_count(i) for i in range(4)]

block = torch.empty(3 << 29, dtype=torch.uint8, device="cuda:2")
try:
    torch.empty_like(block)
except torch.OutOfMemoryError:
    found["allocated_gib"] = torch.cuda.memory_allocated(2) / 2**30
print(json.dumps(found))
"""


def test_devices_memory_copies_and_counters_are_as_described(monkeypatch):
    monkeypatch.setenv("GHOST_N", "3")
    monkeypatch.setenv("GHOST_GIB", "2")
    assert json.loads(on_fake_gpu("-c", RUNTIME)) == {
        "devices": 3,
        "capability": [7, 0] if torch.version.cuda.startswith("12.") else [7, 5],
        "round trip": [0, 1, 2, 3, 4],
        "pinned": [True, False],
        "counts": [1, 2, 1, 1],  # kernels, copies, waits, events
        "allocated_gib": 1.5,  # The second block of 1.5 GiB does not fit.
    }


@pytest.mark.skipif(fake_gpu.missing() is not None, reason=str(fake_gpu.missing()))
def test_processes_that_build_at_once_build_once(tmp_path, monkeypatch):
    builds, compile_in = [], build.compile_in
    monkeypatch.setattr(
        build, "compile_in", lambda place: (builds.append(place), compile_in(place))
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(4) as threads:  # Each opens the lock itself, as a process does.
        (library,) = set(threads.map(lambda _: build.build(), range(4)))
    assert len(builds) == 1 and library.is_file()
    assert {path.name for path in (tmp_path / "rsa-fast").iterdir()} == {
        "ghost.lock",
        library.parent.name,
    }


def test_an_interrupted_build_leaves_nothing_that_a_later_one_would_take(tmp_path, monkeypatch):
    def interrupted(place: Path) -> None:
        (place / build.LIBRARY).touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(build, "compile_in", interrupted)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        build.build()
    assert [path.name for path in (tmp_path / "rsa-fast").iterdir()] == ["ghost.lock"]


def test_without_a_cache_folder_a_temporary_one_of_this_user_is_taken(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert build.cache_folder().parent == tmp_path
    monkeypatch.setattr(build.os, "getuid", lambda: -1)  # The folder is someone else's now.
    with pytest.raises(PermissionError, match="set XDG_CACHE_HOME to a folder of yours"):
        build.cache_folder()


@pytest.mark.parametrize(
    ("place", "name", "value", "reason"),
    [
        (platform, "machine", lambda: "arm64", "Linux on x86_64, not for Linux on arm64"),
        (torch.version, "cuda", None, "is built without CUDA"),
        (shutil, "which", lambda tool: None, r"no g\+\+"),
        (build, "include_folders", list, "no headers"),
    ],
)
def test_where_it_cannot_work_a_skip_names_the_reason(monkeypatch, place, name, value, reason):
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(shutil, "which", lambda tool: tool)
    monkeypatch.setattr(place, name, value)
    with pytest.raises(pytest.skip.Exception, match=reason):
        on_fake_gpu("-c", "raise AssertionError")
