"""Runs that are killed, stopped, starved or cut off, compared with an undisturbed run.

Every run has its own processes.
"""

from __future__ import annotations

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from rsa_fast.evaluation.encoders import load_encoder
from rsa_fast.evaluation.evaluate import Evaluation
from rsa_fast.training import checkpoint
from tests.faults.jobs import (
    EPOCH_STEPS,
    Job,
    arguments,
    assert_same_run,
    finish,
    losses,
    newest,
    start,
    state,
    until,
)
from tests.helpers import write_raw_beton

LONG, SHORT = 60, 16  # epochs of 5 steps, on one process and on several
STOPPED = 75
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP]
HEEDS_HUP = ("env", "--default-signal=HUP")  # also where the tests were started with nohup


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> Path:
    """An undisturbed run of one process."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(data, out, "--epochs", LONG)
    return out


@pytest.fixture(scope="module")
def whole_2(data, tmp_path_factory) -> Path:
    """An undisturbed run of two ranks."""
    out = tmp_path_factory.mktemp("whole_2") / "run"
    with Job(data, out, "--epochs", SHORT, "--nproc", 2) as job:
        assert job.end() == 0, job.said
    return out


def test_a_run_killed_20_times_at_random_moments_ends_as_if_never_killed(data, whole, tmp_path):
    moments, reached = random.Random(0), []
    for _ in range(20):
        run = start(data, tmp_path, "--epochs", LONG, "--resume")
        # With 0, the run is killed while it starts.
        mark = newest(tmp_path) + EPOCH_STEPS * moments.choice([0, 1, 1])
        until(lambda run=run, mark=mark: newest(tmp_path) >= mark or run.exitcode is not None)
        time.sleep(moments.uniform(0, 0.15))
        run.kill()
        run.join()
        assert run.exitcode == -signal.SIGKILL
        reached.append(newest(tmp_path))
    assert len(set(reached)) > 8  # The kills came at different steps.
    finish(data, tmp_path, "--epochs", LONG, "--resume")
    assert_same_run(whole, tmp_path)
    assert losses(whole) == losses(tmp_path)  # Losses are recorded at the checkpoints' steps.


def test_a_run_in_block_order_that_is_killed_ends_as_if_never_killed(tmp_path):
    """5 blocks of 9 images, in windows of two: the kill comes within an epoch and a window."""
    data = write_raw_beton(tmp_path / "packed", 40, 200)
    options = ("--epochs", 8, "--set", "order=blocks", "--set", "window_mib=2", "--batch-size", 4)
    options += ("--set", "checkpoint_every_epochs=1", "--set", "backend=native")
    finish(data, tmp_path / "whole", *options)
    for _ in range(3):
        run = start(data, tmp_path / "killed", *options, "--resume")
        mark = newest(tmp_path / "killed") + 10
        until(lambda run=run, mark=mark: newest(tmp_path / "killed") >= mark or not run.is_alive())
        run.kill()
        run.join()
    finish(data, tmp_path / "killed", *options, "--resume")
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_signal_ends_a_run_after_its_step_and_checkpoint_with_code_75(data, whole, tmp_path):
    for number in SIGNALS:
        step = newest(tmp_path)
        with Job(data, tmp_path, "--epochs", LONG, "--resume", prefix=HEEDS_HUP) as job:
            job.wait_for(f"step {step // EPOCH_STEPS * EPOCH_STEPS + 2 * EPOCH_STEPS}/")
            job.process.send_signal(number)
            assert job.end() == STOPPED, job.said
            assert newest(tmp_path) > step
            end = f"stopped after step {newest(tmp_path)}, which is saved; continue with --resume"
            assert f"{number.name}: {end}" in job.said
    finish(data, tmp_path, "--epochs", LONG, "--resume")
    assert_same_run(whole, tmp_path)


# The loaders work with threads or with processes.
@pytest.mark.parametrize("backend", ["native", "torchvision"])
def test_a_signal_to_the_whole_process_group_is_one_to_the_run(data, tmp_path, backend):
    with Job(data, tmp_path, "--epochs", LONG, "--backend", backend, prefix=("setsid",)) as job:
        job.wait_for("step 5/")
        os.killpg(job.process.pid, signal.SIGTERM)
        assert job.end() == STOPPED, job.said


def test_signals_to_the_launcher_stop_all_ranks_at_one_step(data, whole_2, tmp_path):
    out = tmp_path / "run"
    for number in SIGNALS:
        step = newest(out)
        resume = ["--resume"] if step else []
        with Job(data, out, "--epochs", SHORT, "--nproc", 2, *resume, prefix=HEEDS_HUP) as job:
            until(lambda step=step: newest(out) > step)
            job.process.send_signal(number)
            assert job.end() == STOPPED, job.said
            assert (
                job.said.count(f"{number.name}: stopped after step {newest(out)}, which is saved")
                == 2
            )
    with Job(data, out, "--epochs", SHORT, "--nproc", 2, "--resume") as job:
        assert job.end() == 0, job.said
    assert_same_run(whole_2, out)


def test_a_hangup_that_nohup_ignores_is_ignored_by_the_launcher_and_its_ranks(data, tmp_path):
    for processes in (1, 2):
        out, options = tmp_path / str(processes), ["--epochs", 4]
        if processes > 1:
            options += ["--nproc", processes]
        with Job(data, out, *options, prefix=("nohup",)) as job:
            job.wait_for("step 5/")
            for pid in (job.process.pid, *job.ranks()):
                os.kill(pid, signal.SIGHUP)
            assert job.end() == 0, job.said
        assert newest(out) == 4 * EPOCH_STEPS


def test_a_run_whose_terminal_is_closed_is_saved(data, tmp_path):
    """The kernel then sends SIGHUP, and whatever is written to the terminal fails."""
    command = [sys.executable, "-m", "rsa_fast", *arguments(data, tmp_path, "--epochs", 1000)]
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvpe(HEEDS_HUP[0], [*HEEDS_HUP, *command], os.environ | {"OMP_NUM_THREADS": "1"})
    reader = threading.Thread(target=read_until_closed, args=(terminal,), daemon=True)
    reader.start()
    until(lambda: newest(tmp_path) > 0)
    step = newest(tmp_path)
    os.kill(pid, signal.SIGSTOP)  # the last thing that it writes is read
    os.close(terminal)
    os.kill(pid, signal.SIGCONT)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == STOPPED
    assert newest(tmp_path) > step and state(tmp_path)["step"] == newest(tmp_path)


def read_until_closed(terminal: int) -> None:
    with suppress(OSError):
        while os.read(terminal, 4096):
            pass


def test_ranks_that_are_killed_come_back_and_end_as_if_never_killed(data, whole_2, tmp_path):
    out = tmp_path / "run"
    with Job(data, out, "--epochs", SHORT, "--nproc", 2, "--max-restarts", 2) as job:
        for rank in (1, 0):
            step = newest(out)
            until(lambda step=step: newest(out) > step)
            os.kill(job.ranks()[rank], signal.SIGKILL)
            job.wait_for(f"process {rank} was killed by SIGKILL")
        assert job.end() == 0, job.said
    assert_same_run(whole_2, out)


def test_a_restart_before_the_run_has_begun_neither_resumes_another_nor_forgets_to_overwrite_it(
    data, tmp_path
):
    out = tmp_path / "run"
    finish(data, out, "--epochs", 2)
    options = ("--epochs", 2, "--nproc", 2, "--max-restarts", 1)
    with Job(data, out, *options) as job:
        assert job.end() == 1
        assert job.said.count(f"Error: {out} is not empty") == 2, job.said
    with Job(data, out, *options, "--overwrite") as job:
        until(lambda: len(job.ranks()) == 2)
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.end() == 0 and "step 5/" in job.said, job.said


def test_ranks_without_their_launcher_save_and_end(data, tmp_path):
    out = tmp_path / "run"
    with Job(data, out, "--epochs", 1000, "--nproc", 2) as job:
        until(lambda: newest(out) > 0)
        ranks = job.ranks()
        job.process.kill()
        until(lambda: not any(Path(f"/proc/{rank}").exists() for rank in ranks), 60)
        assert f"SIGTERM: stopped after step {newest(out)}, which is saved" in job.said


def test_a_run_goes_on_with_fewer_ranks_and_the_same_global_batches(data, tmp_path):
    out, one = tmp_path / "run", tmp_path / "one"
    settings = ["--epochs", 6]
    # Slow learning does not amplify rounding.
    for item in ("bn=sync", "log_every_steps=1", "base_lr=0.005"):
        settings += ["--set", item]
    finish(data, one, *settings)
    with Job(data, out, *settings, "--nproc", 4) as job:
        job.wait_for("step 8/")
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == STOPPED, job.said
    with Job(data, out, *settings, "--nproc", 2, "--resume") as job:
        job.wait_for("step 18/")
        job.process.send_signal(signal.SIGTERM)
        assert job.end() == STOPPED, job.said
        assert (
            "4 ranks wrote this checkpoint, 2 continue: the global batches are the same, "
            "with 4 images on each rank" in job.said
        )
    with Job(data, out, *settings, "--resume") as job:
        assert job.end() == 0, job.said
        assert (
            "2 ranks wrote this checkpoint, 1 continue: the global batches are the same, "
            "with 8 images on each rank" in job.said
        )
    several, expected = losses(out), losses(one)
    assert list(several) == list(expected) == list(range(1, 31))
    assert [several[step] for step in range(1, 11)] == pytest.approx(
        [expected[step] for step in range(1, 11)], abs=1e-4
    )
    assert list(several.values()) == pytest.approx(list(expected.values()), abs=2e-3)


def test_several_ranks_score_the_encoder_that_is_saved(folder, tmp_path):
    """With bn = local every rank has its own running statistics, and rank 0's are saved."""
    with Job(folder, tmp_path, "--epochs", 6, "--nproc", 2) as job:
        assert job.end() == 0, job.said
    encoder, recipe = load_encoder(checkpoint.paths_in(tmp_path / "checkpoints")[-1])
    scores = Evaluation(folder, recipe, torch.device("cpu"), torch.float32).score(encoder)
    result = json.loads((tmp_path / "result.json").read_text())
    assert {name: result[name] for name in scores} == scores


@contextmanager
def two_hosts():
    """Join two network namespaces by a cable; yield their names and the first one's address."""
    names = [f"rsa-fast-{os.getpid()}-{host}" for host in "ab"]

    def ip(*words: str) -> None:
        done = subprocess.run(["ip", *words], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no network namespaces: ip {' '.join(words)}: {done.stderr.strip()}")

    if not shutil.which("ip"):
        pytest.skip("no network namespaces: the command ip (iproute2) is missing")
    with ExitStack() as after:
        for name in names:
            ip("netns", "add", name)
            after.callback(subprocess.run, ["ip", "netns", "del", name])
        ip(
            "link",
            "add",
            "cable",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "cable",
            "netns",
            names[1],
        )
        for host, name in enumerate(names, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{host}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield names, "10.77.0.1"


def test_two_hosts_on_a_network_agree_with_one(data, whole_2, tmp_path):
    out = tmp_path / "run"
    with two_hosts() as (names, address), ExitStack() as jobs:
        meet = {
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
            "MASTER_ADDR": address,
            "MASTER_PORT": "29500",
        }
        meet["GLOO_SOCKET_IFNAME"] = "cable"
        ranks = [
            jobs.enter_context(
                Job(
                    data,
                    out,
                    "--epochs",
                    SHORT,
                    prefix=("ip", "netns", "exec", name),
                    RANK=str(rank),
                    **meet,
                )
            )
            for rank, name in enumerate(names)
        ]
        assert [rank.end() for rank in ranks] == [0, 0], "\n".join(rank.said for rank in ranks)
    assert_same_run(whole_2, out)


def test_a_rank_that_stops_answering_ends_the_job_and_is_named(data, tmp_path):
    with ExitStack() as jobs:
        started = [
            jobs.enter_context(
                Job(
                    data,
                    tmp_path / str(rank),
                    "--epochs",
                    1000,
                    "--nproc",
                    2,
                    "--set",
                    "timeout_s=15",
                )
            )
            for rank in (0, 1)
        ]
        for rank, job in enumerate(started):
            until(lambda rank=rank: newest(tmp_path / str(rank)) > 0)
            os.kill(job.ranks()[rank], signal.SIGSTOP)
        for rank, job in enumerate(started):
            assert job.end() not in (0, STOPPED)
            # Eight seconds are half of the patience.
            assert f"rank {rank} has been silent for 8 s; it was " in job.said, job.said
            assert (
                f"Error: rank {rank} is silent, it was " in job.said and "Traceback" not in job.said
            ), job.said


@contextmanager
def disk(place: Path, *options: str):
    """Mount a disk in memory; yield a function that mounts it again with other options."""

    def mount(*options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(place)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")

    place.mkdir()
    mount(*options)
    try:
        yield lambda *options: mount("remount", *options)
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_leaves_the_checkpoints_before_and_the_run_resumes(
    data, whole, tmp_path
):
    place = tmp_path / "disk"
    size = checkpoint.paths_in(whole / "checkpoints")[-1].stat().st_size
    with disk(place, f"size={int(2.5 * size)}") as mount_again:
        out = place / "run"
        with Job(data, out, "--epochs", LONG) as job:
            assert job.end() == 1
            last = job.said.splitlines()[-1]
            assert (
                last.startswith(f"Error: {out}/checkpoints/step_000000")
                and "No space left on device" in last
            ), job.said
            assert "continue with --resume; earlier checkpoints are unchanged" in last
        assert newest(out) == state(out)["step"] > 0
        mount_again(f"size={100 * size}")
        finish(data, out, "--epochs", LONG, "--resume")
        assert_same_run(whole, out)


def test_a_disk_too_full_for_a_record_is_named(data, tmp_path):
    with disk(tmp_path / "disk", "size=64k"):
        out = tmp_path / "disk" / "run"
        often = ("--set", "log_every_steps=1", "--set", "checkpoint_every_epochs=1000")
        with Job(data, out, "--epochs", 1000, *often) as job:
            assert job.end() == 1
            fault = (
                f"Error: {out} was not written to: No space left on device. Once it has room, "
                "continue with --resume"
            )
            assert job.said.splitlines()[-1] == fault, job.said


def test_an_out_that_cannot_be_written_is_refused_before_training(data, tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with disk(tmp_path / "disk") as mount_again:
        mount_again("ro")
        for out, fault in (
            (tmp_path / "disk" / "run", "Read-only file system"),
            (file / "run", "Not a directory"),
        ):
            with Job(data, out, "--epochs", LONG) as job:
                assert job.end() == 1
                assert fault in job.said and str(out) in job.said, job.said
                assert "Traceback" not in job.said and "step 5/" not in job.said


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_user_without_a_name_a_home_or_a_writable_installation_trains_and_exports(data):
    number = "23456"
    become = ("setpriv", "--reuid", number, "--regid", number, "--clear-groups")
    if not shutil.which("setpriv"):
        pytest.skip("the command setpriv (util-linux) is missing")
    look = subprocess.run([*become, sys.executable, "-c", "import rsa_fast"])
    if look.returncode:
        pytest.skip("the installation is not readable for other users")
    with TemporaryDirectory() as folder:
        place = Path(folder)
        place.chmod(0o777)
        shutil.copytree(data, place / "data")
        (place / "data").chmod(0o755)
        names = {"HOME": "/nonexistent/home", "LOGNAME": "", "USER": "", "USERNAME": ""}
        env = {"PYTHONDONTWRITEBYTECODE": "1", **names}
        with Job(place / "data", place / "run", "--epochs", 2, prefix=become, **env) as job:
            assert job.end() == 0, job.said
            assert "every start compiles them again" in job.said
        path = checkpoint.paths_in(place / "run" / "checkpoints")[-1]
        command = [*become, sys.executable, "-m", "rsa_fast", "export", "--checkpoint", path]
        command += ["--format", "safetensors", "--out", place / "encoder.safetensors"]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
