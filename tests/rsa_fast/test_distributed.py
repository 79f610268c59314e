"""Two gloo processes equal one at the same global batch, in double precision."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch
import torch.distributed as dist
from torch import nn

from rsa_fast import distributed
from rsa_fast.distributed import first_host, gpu_index, is_launched, launcher_variables
from rsa_fast.methods import METHODS, method_class
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import build_recipe
from rsa_fast.syncbn import SplitBatchNorm, SyncBatchNorm, bn_groups, convert_batchnorm
from rsa_fast.training.step import build_run, train_step
from tests.rsa_fast.ranks import mean, mine, run_ranks
from tests.rsa_fast.small_methods import BATCH, batch_of, fields_of


def steps_of_every_method() -> dict[tuple, tuple]:
    """Take two of the engine's steps on this rank's part of the batch, in double precision.

    Return, by method and `bn`, the losses, and all weights, statistics and queues after the steps.
    """
    results = {}
    cases = [(name, "sync") for name in METHODS]
    cases += [(name, "split:2") for name in ("moco", "ressl", "jcl", "infomin")]
    torch.set_default_dtype(torch.float64)
    try:
        for name, bn in cases:
            # The initial gain of zero would stop the gradient of its block's convolutions.
            options = fields_of(name) | {
                "bn": bn,
                "zero_init_residual": False,
                "precision": "fp32",
                "device": "cpu",
                "peak_lr": 0.01,
            }
            fields = {
                key: value
                for key, value in options.items()
                if key in method_class(name).recipe_type.model_fields
            }
            run, losses = build_run(build_recipe("cifar10", name, overrides=fields), 10 * BATCH), []
            for step in range(2):  # Each step amplifies rounding tenfold.
                whole = batch_of(run.method, step)
                views = {key: mine(view) for key, view in whole.views.items()}
                batch = Batch(mine(whole.label), views, mine(whole.ids))
                losses.append(train_step(run, batch).total.detach())
            results[name, bn] = mean(torch.stack(losses)), run.method.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    return results


def sync_batchnorm() -> list[tuple]:
    """Return outputs, input gradients and running statistics of this rank's part.

    The inputs are 2-D and 4-D, and the layers are affine or not.
    """
    results = []
    for layer, x, weight in batchnorm_cases():
        layer = convert_batchnorm(layer, 1)
        x, weight = mine(x).clone().requires_grad_(), mine(weight)
        out = layer(x)
        (out * weight).sum().backward()
        grads = [p.grad for p in layer.parameters()]
        for grad in grads:
            dist.all_reduce(grad)
        results.append((out.detach(), x.grad, grads, layer.running_mean, layer.running_var))
    return results


def batchnorm_cases():
    """Yield layers, inputs and weights of the outputs: 2-D and 4-D, affine or not."""
    generator = torch.Generator().manual_seed(0)
    for shape in ((8, 5), (4, 5, 3, 2)):
        for affine in (True, False):
            kind = torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d
            layer = kind(5, affine=affine).double()
            if affine:
                torch.nn.init.uniform_(layer.weight, generator=generator)
            # The values are far from zero, so that cancellation would show.
            x = 100 + torch.randn(shape, generator=generator, dtype=torch.float64)
            yield layer, x, torch.randn(shape, generator=generator, dtype=torch.float64)


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_steps_of_every_method_are_the_same_on_two_ranks_as_on_one(tmp_path):
    expected = steps_of_every_method()
    for found in run_ranks(steps_of_every_method, 2, tmp_path):
        for (name, bn), (losses, state) in expected.items():
            found_losses, found_state = found[name, bn]
            close(found_losses, losses)
            assert found_state.keys() == state.keys()
            for key in state:
                # Otherwise each part of a batch has its own statistics.
                if bn == "sync" or "running" not in key:
                    close(found_state[key], state[key])


def test_the_variables_are_torchrun_s_or_else_those_of_a_slurm_step():
    slurm = {
        "SLURM_JOB_ID": "123456",
        "SLURM_STEP_NUM_TASKS": "16",
        "SLURM_STEP_NODELIST": "gpu[03-05,9]n1,cpu1",
    }
    slurm |= {"SLURM_PROCID": "11", "SLURM_LOCALID": "3"}
    from_slurm = {
        "RANK": "11",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "16",
        "MASTER_ADDR": "gpu03n1",
        "MASTER_PORT": "23456",
    }
    torchrun = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }
    assert launcher_variables(slurm) == from_slurm
    assert launcher_variables(slurm | torchrun) == torchrun
    assert launcher_variables(slurm | {"SLURM_STEP_NUM_TASKS": "1"}) == launcher_variables({}) == {}
    for nodes in ("node-7", "node-7,node-9", "node-[7-8,11]"):
        assert first_host(nodes) == "node-7"
    message = "RANK or WORLD_SIZE but not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"
    with pytest.raises(ValueError, match=message):
        launcher_variables(slurm | {"RANK": "0", "WORLD_SIZE": "2"})
    shared = torchrun | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "0"}
    assert launcher_variables(shared) == torchrun
    message = "--max-restarts needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    with pytest.raises(ValueError, match=message):
        launcher_variables(shared | {"TORCHELASTIC_MAX_RESTARTS": "2"})


MEETING = {"MASTER_ADDR": "a", "MASTER_PORT": "1"}
STEP = {
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu03",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}


def test_steps_of_a_job_and_jobs_meet_at_different_ports():
    ports = {
        launcher_variables(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step})["MASTER_PORT"]
        for job in ("123456", "123457", "123458")
        for step in ("0", "1", "2")
    }
    assert len(ports) == 9 and all(20_000 <= int(port) < 30_000 for port in ports)


@pytest.mark.parametrize(
    ("found", "local_rank"),
    [
        ({}, "1"),  # of 8 GPUs, rank 9
        ({"SLURM_LOCALID": "3"}, "3"),
        ({"OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "2"),
        ({"LOCAL_RANK": "5", "SLURM_LOCALID": "3"}, "5"),
    ],
)
def test_a_missing_local_rank_is_slurm_s_or_mpi_s_or_follows_from_the_rank(
    monkeypatch, found, local_rank
):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    env = {"RANK": "9", "WORLD_SIZE": "16", **MEETING, **found}
    assert launcher_variables(env)["LOCAL_RANK"] == local_rank


def test_a_rank_of_one_without_more_variables_trains_alone():
    assert launcher_variables({"RANK": "0", "WORLD_SIZE": "1"}) == {}


@pytest.mark.parametrize(
    ("local_rank", "visible", "index"), [(3, 1, 0), (3, 8, 3), (0, 1, 0), (4, 4, None)]
)
def test_the_gpu_of_a_process_is_the_only_one_it_sees_or_that_of_its_number(
    monkeypatch, local_rank, visible, index
):
    for key, value in {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": local_rank}.items():
        monkeypatch.setenv(key, str(value))
    for key, value in MEETING.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    if index is None:
        with pytest.raises(ValueError, match=r"process 4 of this machine.* sees only 4 GPUs"):
            gpu_index()
    else:
        assert gpu_index() == index


TORCHRUN = {"LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x", **MEETING}


@pytest.mark.parametrize(
    ("env", "launched"),
    [
        ({}, False),
        ({"RANK": "0", "WORLD_SIZE": "1"}, False),  # set by a platform
        ({"RANK": "0", "WORLD_SIZE": "1", **TORCHRUN}, False),
        ({"RANK": "3", "WORLD_SIZE": "8", **TORCHRUN}, True),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", **MEETING}, "WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2", **TORCHRUN}, "WORLD_SIZE=2"),
        (STEP, "SLURM_STEP_NUM_TASKS=4"),
    ],
)
def test_gpus_start_processes_unless_they_have_started_this_one(env, launched):
    if isinstance(launched, str):
        with pytest.raises(
            ValueError, match=rf"already one of \d+ processes \({launched}\): leave"
        ):
            is_launched(env, 8)
    else:
        assert is_launched(env, 8) == launched


def test_a_shell_of_srun_pty_trains_alone_and_a_step_that_it_starts_does_not(monkeypatch):
    shell = STEP | {"SLURM_PTY_PORT": "40000", "SLURM_TASK_PID": "1"}
    monkeypatch.setattr(os, "isatty", lambda fd: True)
    assert launcher_variables(shell) == {}
    assert launcher_variables(shell | {"SLURM_TASK_PID": str(os.getpid())})  # srun --pty rsa-fast
    monkeypatch.setattr(os, "isatty", lambda fd: False)
    assert launcher_variables(shell)["WORLD_SIZE"] == "4"


def test_a_rank_that_waits_for_the_others_says_for_whom(monkeypatch, caplog):
    monkeypatch.setattr(distributed, "MEET_S", 0.2)
    for key, value in STEP.items():
        monkeypatch.setenv(key, value)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    for key, value in meeting.items():
        monkeypatch.setenv(key, value)
    # `process_group` sets these.
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(key, "")
        monkeypatch.delenv(key)
    with (
        pytest.raises(ConnectionError, match="rank 0 did not meet all 4 at localhost"),
        distributed.process_group("cpu", timeout_s=2),
    ):
        pytest.fail("the other ranks are missing")
    assert "rank 0 waits to meet all 4 at localhost" in caplog.text and "srun --pty" in caplog.text


def test_synchronised_batchnorm_equals_batchnorm_of_the_whole_batch(tmp_path):
    ranks = run_ranks(sync_batchnorm, 2, tmp_path)
    for case, (layer, x, weight) in enumerate(batchnorm_cases()):
        x.requires_grad_()
        out = layer(x)
        (out * weight).sum().backward()
        close(torch.cat([rank[case][0] for rank in ranks]), out.detach())
        close(torch.cat([rank[case][1] for rank in ranks]), x.grad)
        for rank in ranks:
            for grad, p in zip(rank[case][2], layer.parameters(), strict=True):
                close(grad, p.grad)
            close(rank[case][3], layer.running_mean)
            close(rank[case][4], layer.running_var)


def test_split_batchnorm_normalises_each_part_as_a_batch_of_its_own():
    layer = nn.BatchNorm2d(5)
    x = torch.randn(8, 5, 3, 2)
    split = convert_batchnorm(copy.deepcopy(layer), 4)
    assert isinstance(split, SplitBatchNorm)
    out, layers = split(x), [copy.deepcopy(layer) for _ in range(4)]
    parts = [one(part) for one, part in zip(layers, x.chunk(4), strict=True)]
    assert torch.equal(out, torch.cat(parts))
    means = torch.stack([one.running_mean for one in layers])
    variances = torch.stack([one.running_var for one in layers])
    torch.testing.assert_close(split.running_mean, means.mean(0))
    torch.testing.assert_close(split.running_var, variances.mean(0))
    assert split.num_batches_tracked == 1
    split.eval()
    layer.load_state_dict(split.state_dict())
    assert torch.equal(split(x), layer.eval()(x))


def test_conversion_keeps_keys_and_leaves_one_process_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4)))
    before = network.state_dict().keys()
    # On one rank, sync, local and plain are the same.
    assert type(convert_batchnorm(network, 1)[1]) is nn.BatchNorm2d
    assert convert_batchnorm(network, 2).state_dict().keys() == before
    assert all(isinstance(layer, SplitBatchNorm) for layer in (network[1], network[2][0]))


@pytest.mark.parametrize(
    ("bn", "ranks", "groups"),
    [("local", 4, 4), ("sync", 4, 1), ("split:8", 4, 8), ("split:8", 1, 8)],
)
def test_groups_of_a_recipe(monkeypatch, bn, ranks, groups):
    monkeypatch.setattr("rsa_fast.syncbn.world_size", lambda: ranks)
    assert bn_groups(bn) == groups


def test_groups_that_do_not_divide_among_the_ranks_are_an_error(monkeypatch):
    monkeypatch.setattr("rsa_fast.syncbn.world_size", lambda: 4)
    with pytest.raises(ValueError, match="bn: split:6 does not divide among 4 ranks"):
        bn_groups("split:6")


def test_synchronised_batchnorm_in_eval_mode_is_batchnorm():
    layer = nn.BatchNorm1d(3).eval()
    other = copy.deepcopy(layer)
    other.__class__ = SyncBatchNorm
    x = torch.randn(4, 3)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize(
    ("idle", "recorded", "threads", "said"),
    [
        (3.9, None, 4, ""),  # a quiet machine
        (2.8, None, 3, "other programs use 1.2 of 4 cores: this one computes with 3 threads"),
        (0.1, None, 1, "use 3.9 of 4 cores: this one computes with 1 thread (OMP_NUM_THREADS"),
        (0.1, 3, 3, "this one computes with 3 threads (as before the run stopped)"),
        (3.9, 2, 2, ""),
        (3.9, 16, 4, ""),  # the run was on a larger machine
    ],
)
def test_one_process_on_a_cpu_leaves_busy_cores_to_others(
    monkeypatch, caplog, idle, recorded, threads, said
):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.setattr(distributed, "cores", lambda: 4)
    monkeypatch.setattr(distributed, "idle_cores", lambda: idle)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    caplog.set_level("INFO", "rsa_fast")
    try:
        with distributed.process_group("cpu", 60, recorded):
            assert torch.get_num_threads() == threads
        assert torch.get_num_threads() == 4
        assert (said in caplog.text) if said else "cores" not in caplog.text
        torch.set_num_threads(1)  # the user's choice, also on an idle machine
        with distributed.process_group("cpu", 60):
            assert torch.get_num_threads() == 1
        monkeypatch.setenv("OMP_NUM_THREADS", "2")  # the user's choice
        torch.set_num_threads(2)
        with distributed.process_group("cpu", 60, recorded):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
