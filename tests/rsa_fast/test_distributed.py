"""Two gloo processes against one, at the same global batch, in double precision."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import batchnorm_cases, cases, gradients, run_ranks
from test_other_methods import some_batch
from torch import nn

from rsa_fast.syncbn import SplitBatchNorm, SyncBatchNorm, bn_groups, convert_batchnorm


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_a_step_of_every_method_is_the_same_on_two_ranks_as_on_one(tmp_path):
    ranks = run_ranks("one_step_of_every_method", 2, tmp_path)
    for name, bn, method in cases():
        loss = method(some_batch(), 0.3)
        loss.total.backward()
        for totals, grads, queue in (rank[name, bn] for rank in ranks):
            close(totals, loss.total.detach())
            expected = gradients(method)
            assert grads.keys() == expected.keys()
            for key in grads:
                close(grads[key], expected[key])
            if queue is not None:
                close(queue, method.queue)


def test_synchronised_batchnorm_equals_batchnorm_of_the_whole_batch(tmp_path):
    ranks = run_ranks("sync_batchnorm", 2, tmp_path)
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
    out, alone = split(x), [copy.deepcopy(layer) for _ in range(4)]
    assert torch.equal(out, torch.cat([one(part) for one, part in zip(alone, x.chunk(4), strict=True)]))
    torch.testing.assert_close(split.running_mean, torch.stack([one.running_mean for one in alone]).mean(0))
    torch.testing.assert_close(split.running_var, torch.stack([one.running_var for one in alone]).mean(0))
    assert split.num_batches_tracked == 1
    split.eval()
    layer.load_state_dict(split.state_dict())
    assert torch.equal(split(x), layer.eval()(x))


def test_conversion_keeps_keys_and_leaves_one_process_alone():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm1d(4)))
    before = network.state_dict().keys()
    assert type(convert_batchnorm(network, 1)[1]) is nn.BatchNorm2d  # one rank: sync, local and plain are the same
    assert convert_batchnorm(network, 2).state_dict().keys() == before
    assert all(isinstance(layer, SplitBatchNorm) for layer in (network[1], network[2][0]))


@pytest.mark.parametrize(("bn", "ranks", "groups"), [("local", 4, 4), ("sync", 4, 1), ("split:8", 4, 8), ("split:8", 1, 8)])
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
