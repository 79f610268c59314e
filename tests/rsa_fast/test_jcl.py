"""JCL. It is compared with the form of its paper, with loops, and with MoCo's loss."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rsa_fast.methods.jcl import joint_nce
from rsa_fast.methods.method import info_nce, unit
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import build_recipe, resolve
from tests.rsa_fast.ranks import mean, mine, run_ranks
from tests.rsa_fast.small_methods import BATCH, dot, rows, small, some_batch

NOW = {"lambda_": 0.7}
KEYS = 4  # of each query
VIEWS = tuple(f"aggressive_{k}" for k in range(1, KEYS + 2))


def keys_of(images: int, count: int = KEYS, dim: int = 3) -> torch.Tensor:
    return torch.stack([rows(images, dim, 10 + seed) for seed in range(count)])  # (M, B, D)


def test_the_loss_is_that_of_the_paper_with_means_and_covariances():
    q, keys, queue, temperature, lambda_ = rows(4, 3, 0), keys_of(4), rows(7, 3, 2).T, 0.2, 0.7
    total = 0.0
    for i in range(4):
        mu = [sum(key[i, d].item() for key in keys) / KEYS for d in range(3)]
        sigma = [[0.0] * 3 for _ in range(3)]
        for key in keys[:, i].tolist():
            for a in range(3):
                for b in range(3):
                    sigma[a][b] += (key[a] - mu[a]) * (key[b] - mu[b]) / KEYS
        query = q[i].tolist()
        spread = dot(query, [dot(line, query) for line in sigma])
        positive = dot(query, mu) / temperature + lambda_ * spread / (2 * temperature**2)
        negatives = [dot(query, other) / temperature for other in queue.T.tolist()]
        total += math.log(sum(math.exp(s) for s in (positive, *negatives))) - positive
        total += lambda_ * spread / (2 * temperature**2)
    loss = joint_nce(q, keys, queue, temperature, lambda_)
    assert loss.item() == pytest.approx(total / 4, abs=1e-12)


def test_one_key_or_equal_keys_make_it_moco_s_loss():
    q, k, queue = rows(4, 3, 0), rows(4, 3, 1), rows(7, 3, 2).T
    expected = info_nce(q, k, queue, 0.2)
    for count in (1, 3):
        loss = joint_nce(q, k.expand(count, 4, 3), queue, 0.2, lambda_=2.0)
        torch.testing.assert_close(loss, expected)


def test_the_order_of_keys_does_not_matter_and_their_spread_does():
    q, keys, queue = rows(4, 3, 0), keys_of(4), rows(7, 3, 2).T
    loss = joint_nce(q, keys, queue, 0.2, 1.0)
    torch.testing.assert_close(joint_nce(q, keys[[2, 0, 3, 1]], queue, 0.2, 1.0), loss)
    assert joint_nce(q, keys, queue, 0.2, 0.0) < loss < joint_nce(q, keys, queue, 0.2, 2.0)


def test_gradients_by_queries_equal_finite_differences():
    q, keys, queue = rows(4, 3, 0).requires_grad_(), keys_of(4), rows(7, 3, 2).T
    assert torch.autograd.gradcheck(lambda q: joint_nce(q, keys, queue, 0.2, 0.7), (q,))


def test_keys_pass_the_target_together_and_their_means_enter_the_queue():
    method, batch = small("jcl"), some_batch(names=VIEWS)
    probe = copy.deepcopy(method)
    query, *others = batch.views.values()
    q = unit(probe.online(query))
    keys = unit(probe.target(torch.cat(others))).view(KEYS, BATCH, -1).detach()
    expected = joint_nce(q, keys, probe.queue, 0.1, NOW["lambda_"])
    expected.backward()
    loss = method(batch, NOW)
    loss.total.backward()
    assert loss.total.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(method.queue[:, :BATCH].T, keys.mean(0), rtol=0, atol=1e-12)
    assert torch.equal(method.queue[:, BATCH:], probe.queue[:, BATCH:])
    assert method.pointer == BATCH and (method.queue[:, :BATCH].norm(dim=0) < 1).all()
    for (name, p), other in zip(method.named_parameters(), probe.parameters(), strict=True):
        assert (p.grad is None) == name.startswith("target")
        if p.grad is not None:
            torch.testing.assert_close(p.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_each_part_of_the_keys_comes_from_every_part_of_the_queries():
    """With two parts, BatchNorm normalises images 0 to 2 and 3 to 5 of the queries apart.

    Each part of the keys is two of the four crops, of all images.
    """
    method, plain = small("jcl", bn="split:2"), small("jcl")
    plain.load_state_dict(method.state_dict())
    batch, parts, order = some_batch(names=VIEWS), [], [0, 3, 1, 4, 2, 5]
    for crops in ((2, 3), (4, 5)):
        images = torch.cat([batch.view(f"aggressive_{k}")[order] for k in crops])
        parts.append(unit(plain.target(images)))
    keys = torch.cat(parts).view(KEYS, BATCH, -1)
    method(batch, NOW)
    expected = keys.mean(0)[torch.tensor(order).argsort()]
    torch.testing.assert_close(method.queue[:, :BATCH].T, expected, rtol=0, atol=1e-12)


def losses_and_queues() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The losses of two steps, averaged over the ranks, and then the queue."""
    results = {}
    for bn in ("sync", "split:2"):
        method, losses = small("jcl", bn=bn), []
        for step in range(2):
            whole = some_batch(step, VIEWS)
            batch = Batch(mine(whole.label), {k: mine(view) for k, view in whole.views.items()})
            losses.append(mean(method(batch, NOW).total.detach()))
        results[bn] = torch.stack(losses), method.queue
    return results


def test_two_ranks_have_the_losses_and_the_queue_of_one(tmp_path):
    expected = losses_and_queues()
    for of_rank in run_ranks(losses_and_queues, 2, tmp_path):
        torch.testing.assert_close(of_rank, expected, rtol=1e-9, atol=1e-12)


def test_lambda_increases_with_every_epoch_and_stays_at_the_end():
    recipe = build_recipe("cifar10", "jcl", overrides={"epochs": 10})
    derived = resolve(recipe, 50_000)
    per_epoch = derived.steps_per_epoch
    steps = {0: 0.2, per_epoch - 1: 0.2, per_epoch: 0.4, 10 * per_epoch - 1: 2.0}
    for step, expected in (steps | {10 * per_epoch: 2.0}).items():
        assert recipe.schedule(step, derived)["lambda_"] == pytest.approx(expected)


@pytest.mark.parametrize(
    "groups",
    [
        [{"name": "crops", "count": 1}],
        [{"name": "query", "count": 1}, {"name": "keys", "count": 4}],
    ],
)
def test_a_query_and_keys_are_one_group_of_crops(groups):
    with pytest.raises(ValueError, match="JCL takes one group of 2 or more crops"):
        build_recipe("cifar10", "jcl", overrides={"views.groups": groups})
    two = build_recipe("cifar10", "jcl", overrides={"views.groups": [{"name": "a", "count": 2}]})
    assert two.views.names("aggressive") == ("aggressive_1", "aggressive_2")
