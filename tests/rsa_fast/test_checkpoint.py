from __future__ import annotations

import copy
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZIP_STORED, ZipFile

import pytest
import torch

from rsa_fast.training import checkpoint
from tests.fake_gpu import on_fake_gpu
from tests.helpers import Exploit

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def state(step: int, numel: int = 3) -> dict:
    return {"step": step, "recipe": {"seed": 0}, "method": {"w": torch.full((numel,), float(step))}}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def file_limit(limit_bytes: int):
    """Limit the size of files, as on a full disk: one write is cut, the next is an OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def gate(monkeypatch):
    """Hold back every write that began until the gate is set; `gate.writes` counts these."""
    gate, write_whole = threading.Event(), checkpoint.write_whole
    gate.writes = 0

    def held(*arguments) -> None:
        gate.writes += 1
        assert gate.wait(30)
        write_whole(*arguments)

    monkeypatch.setattr(checkpoint, "write_whole", held)
    yield gate
    gate.set()


def test_a_checkpoint_comes_back_and_only_the_newest_stay(tmp_path):
    for step in (5, 10, 100):
        checkpoint.save(tmp_path, state(step), keep_last=2)
    assert names(tmp_path) == ["step_00000010.pt", "step_00000100.pt"]
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded["step"] == 100 and torch.equal(loaded["method"]["w"], torch.full((3,), 100.0))


def test_newest_is_by_number_whatever_the_digits(tmp_path):
    for name in ("step_9999.pt", "step_10000.pt", "step_00000300.pt", "step_best.pt"):
        torch.save(state(1), tmp_path / name)
    assert [path.name for path in checkpoint.paths_in(tmp_path)] == [
        "step_00000300.pt",
        "step_9999.pt",
        "step_10000.pt",
    ]


@pytest.mark.parametrize("kept_bytes", [0, 100, -1])
def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path, kept_bytes):
    for step in (5, 10):
        newest = checkpoint.save(tmp_path, state(step), keep_last=3)
    newest.write_bytes(newest.read_bytes()[:kept_bytes])
    with pytest.warns(UserWarning, match=r"step_00000010\.pt is damaged"):
        assert checkpoint.load_latest(tmp_path)["step"] == 5


def test_one_flipped_bit_of_a_weight_is_found(tmp_path):
    for step in (5, 10):
        newest = checkpoint.save(tmp_path, state(step, numel=1000), keep_last=3)
    content = bytearray(newest.read_bytes())
    content[content.index(torch.full((500,), 10.0).numpy().tobytes()) + 1000] ^= 1
    newest.write_bytes(content)
    # torch does not notice the damage.
    assert torch.load(newest, weights_only=True)["method"]["w"].unique().numel() == 2
    with pytest.warns(
        UserWarning, match="the checksum of its part .* is wrong; trying the previous one"
    ):
        assert checkpoint.load_latest(tmp_path)["step"] == 5


def test_a_resumed_run_keeps_its_own_checkpoint_rather_than_a_damaged_later_one(tmp_path):
    for step in (5, 10):
        newest = checkpoint.save(tmp_path, state(step), keep_last=2)
    newest.write_bytes(b"")
    checkpoint.save(tmp_path, state(7), keep_last=1)
    assert names(tmp_path) == ["step_00000007.pt"]


def test_no_checkpoint_and_foreign_files_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="no undamaged checkpoint"):
        checkpoint.load_latest(tmp_path)
    torch.save({"weights": torch.zeros(1)}, tmp_path / "step_1.pt")
    with pytest.raises(ValueError, match="lacks method, recipe, step"):
        checkpoint.load(tmp_path / "step_1.pt")


def test_a_checkpoint_that_would_run_code_is_refused_and_runs_none(tmp_path, monkeypatch):
    marker, path = tmp_path / "marker", tmp_path / "run" / "step_9.pt"
    checkpoint.save(path.parent, state(5), keep_last=1)
    torch.save({**state(9), "method": Exploit(marker)}, path)
    with pytest.raises(
        ValueError,
        match=r"step_9\.pt is damaged or not .*: it contains calls of posix\.mkdir; only tensors",
    ):
        checkpoint.load(path)
    with pytest.warns(UserWarning, match=r"posix\.mkdir"):
        assert checkpoint.load_latest(path.parent)["step"] == 5
    monkeypatch.setattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda path: [])
    # The file is refused even if torch overlooks its globals.
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        checkpoint.load(path)
    assert not marker.exists()
    torch.load(path, weights_only=False)
    assert marker.exists()  # Without the check it runs.


@pytest.mark.parametrize(
    ("renamed", "added", "compression"),
    [
        ("../{}", None, ZIP_STORED),
        ("{}", "../escaped", ZIP_STORED),
        ("{}", "step_5/data/../../../escaped", ZIP_STORED),
        ("/{}", None, ZIP_STORED),
        ("{}", None, ZIP_DEFLATED),  # A small file could fill the memory.
    ],
)
def test_a_zip_with_tricks_is_refused_and_writes_nothing(tmp_path, renamed, added, compression):
    path, hostile = tmp_path / "step_5.pt", tmp_path / "run" / "step_6.pt"
    torch.save(state(5, numel=1000), path)
    hostile.parent.mkdir()
    with ZipFile(path) as source, ZipFile(hostile, "w", compression) as target:
        for part in source.namelist():
            target.writestr(renamed.format(part), source.read(part))
        if added:
            target.writestr(added, "x")
    with pytest.raises(
        ValueError, match=r"step_6\.pt is damaged or not .* is compressed or leads out of the file"
    ):
        checkpoint.load(hostile)
    assert names(tmp_path) == ["run", "step_5.pt"] and names(hostile.parent) == ["step_6.pt"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_what_changes_after_save_does_not_reach_the_file(tmp_path, gate, device):
    w = torch.randn(64, 3, 7, 7, device=device).to(memory_format=torch.channels_last)
    part, momentum, count = (
        torch.nn.Parameter(w[:2, 0]),
        torch.randn(1000, device=device),
        torch.tensor(3, device=device),
    )
    live = {
        "step": 0,
        "recipe": {"betas": (0.9, 0.99)},
        "method": {"w": w, "part": part},
        "optimizer": [{0: momentum}, count],
    }
    with checkpoint.Writer(tmp_path, keep_last=5) as writer:
        for live["step"] in (1, 2):
            expected = copy.deepcopy(live)
            gate.clear()
            writer.save(live)
            with torch.no_grad():
                for tensor in (w, part, momentum, count):
                    tensor.add_(1)
            live["recipe"]["betas"] = (0, live["step"])
            live["optimizer"][0][live["step"]] = torch.ones(1)
            gate.set()
            writer.wait()
            found = checkpoint.load_latest(tmp_path)
            assert_same(found, expected)
            assert found["method"]["w"].stride() == w.stride()


def assert_same(found, expected) -> None:
    """Compare nested dictionaries and sequences of tensors, bit for bit, and plain values."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected.cpu()) and found.dtype == expected.dtype
    elif isinstance(expected, dict | list | tuple):
        assert type(found) is type(expected) and len(found) == len(expected)
        for key in expected if isinstance(expected, dict) else range(len(expected)):
            assert_same(found[key], expected[key])
    else:
        assert found == expected


def test_a_second_save_waits_for_the_first_and_leaving_for_the_last(tmp_path, gate):
    with checkpoint.Writer(tmp_path, keep_last=5) as writer:
        writer.save(state(1))
        second = threading.Thread(target=writer.save, args=(state(2),))
        second.start()
        second.join(0.2)
        assert second.is_alive() and gate.writes == 1 and names(tmp_path) == []
        gate.set()
        second.join(30)
        writer.wait()
        assert checkpoint.load(tmp_path / "step_00000001.pt")["step"] == 1
        gate.clear()
        writer.save(state(3))
        threading.Timer(0.2, gate.set).start()
    assert names(tmp_path) == [f"step_0000000{step}.pt" for step in (1, 2, 3)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoint")]


def test_a_tensor_that_changes_its_shape_or_type_between_saves_is_saved_as_it_is(tmp_path):
    with checkpoint.Writer(tmp_path, keep_last=5) as writer:
        for step, w in enumerate(
            [
                torch.ones(3),
                torch.ones(3, dtype=torch.float64),
                torch.eye(3).T,
                torch.ones(1).expand(3),
            ]
        ):
            writer.save({**state(step), "method": w})
            writer.wait()
            found = checkpoint.load_latest(tmp_path)["method"]
            assert torch.equal(found, w) and found.dtype == w.dtype


@pytest.mark.parametrize("limit_bytes", [0, 1_000_000])
def test_a_full_disk_is_an_error_at_the_next_save_and_leaves_the_checkpoints_before(
    tmp_path, limit_bytes
):
    with checkpoint.Writer(tmp_path, keep_last=1) as writer:
        writer.save(state(1))
        writer.wait()
        with file_limit(limit_bytes):
            writer.save(state(2, numel=1_000_000))
            with pytest.raises(
                OSError,
                match=r"step_00000002\.pt was not written: File too large\. Once .* has room",
            ) as error:
                writer.save(state(3))
        assert not isinstance(error.value, FileNotFoundError) and names(tmp_path) == [
            "step_00000001.pt"
        ]
        assert checkpoint.load_latest(tmp_path)["step"] == 1
        writer.save(state(4))  # There is room again.
    assert names(tmp_path) == ["step_00000004.pt"]


def test_a_folder_that_goes_away_is_an_error_on_leaving(tmp_path):
    with (
        pytest.raises(
            OSError, match=r"was not written: No such file or directory\. Once .* exists"
        ),
        checkpoint.Writer(tmp_path / "a", keep_last=1) as writer,
    ):
        shutil.rmtree(tmp_path / "a")
        writer.save(state(1))
    assert names(tmp_path) == []


def test_a_failed_write_does_not_hide_the_error_that_ended_training(tmp_path):
    with (
        pytest.warns(UserWarning, match="was not written"),
        pytest.raises(FloatingPointError, match="the loss"),
        checkpoint.Writer(tmp_path, keep_last=1) as writer,
        file_limit(0),
    ):
        writer.save(state(1))
        assert writer.writing.exception()  # Wait: the limit ends before the writer does.
        raise FloatingPointError("the loss")


def test_a_state_that_cannot_be_written_is_named_by_its_own_error(tmp_path):
    with (
        pytest.raises(Exception, match="local object") as error,
        checkpoint.Writer(tmp_path, keep_last=1) as writer,
    ):
        writer.save({**state(1), "recipe": lambda: None})
    assert not isinstance(error.value, OSError) and names(tmp_path) == []


KILLED = """
import sys
from pathlib import Path
import torch
from rsa_fast.training import checkpoint
w = torch.empty(4_000_000)
with checkpoint.Writer(Path(sys.argv[1]), keep_last=2) as writer:
    for step in range(1, 10_000):
        writer.save({"step": step, "recipe": {}, "method": {"w": w.fill_(step)}})
"""


@pytest.mark.parametrize("attempt", range(2))
def test_kill_during_a_write_leaves_a_whole_checkpoint(tmp_path, attempt):
    writer = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)])
    try:
        deadline = time.monotonic() + 60
        # The kill comes while a later checkpoint is written.
        while not (checkpoint.paths_in(tmp_path) and list(tmp_path.glob(".*"))):
            assert writer.poll() is None and time.monotonic() < deadline
            time.sleep(0.001 * attempt)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    loaded = checkpoint.load_latest(tmp_path)
    assert loaded["step"] >= 1 and (loaded["method"]["w"] == loaded["step"]).all()


def test_opening_a_writer_removes_what_a_killed_run_left_and_nothing_else(tmp_path):
    kept = [
        checkpoint.save(tmp_path, state(1), keep_last=1).name,
        ".notes.partial",
        "step_2.partial",
    ]
    for name in (*kept[1:], ".step_00000002.pt.partial"):
        (tmp_path / name).touch()
    with checkpoint.Writer(tmp_path, keep_last=1):
        assert names(tmp_path) == sorted(kept)


SNAPSHOT_WITHOUT_SYNC = """
import sys
from pathlib import Path
import torch
from rsa_fast.training import checkpoint
w = torch.zeros(8, 4, 3, 3, device="cuda").to(memory_format=torch.channels_last)
count = torch.zeros((), dtype=torch.int64, device="cuda")
live = {"step": 1, "recipe": {}, "method": {"w": w, "count": count}}
with checkpoint.Writer(Path(sys.argv[1]), keep_last=2) as writer:
    torch.cuda.set_sync_debug_mode("error")
    for live["step"] in (1, 2):
        writer.save(live)
        places = {buffer.data_ptr() for buffer in writer.buffers.values()}
        assert live["step"] == 1 or places == before
        before = places
    torch.cuda.set_sync_debug_mode("default")
    assert all(buffer.is_pinned() for buffer in writer.buffers.values()) and len(places) == 2
found = checkpoint.load_latest(Path(sys.argv[1]))
assert found["step"] == 2 and found["method"]["w"].stride() == w.stride()
print("no sync")
"""


def test_a_snapshot_of_a_gpu_never_makes_the_host_wait(tmp_path):
    assert "no sync" in on_fake_gpu("-c", SNAPSHOT_WITHOUT_SYNC, tmp_path)
