"""SwAV, compared with loops, with lightly and with finite differences."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rsa_fast.methods.method import Method, cross_view_entropy, joint_features, unit
from rsa_fast.methods.swav import sinkhorn
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import build_recipe, resolve
from rsa_fast.training.step import train_step
from tests.rsa_fast.ranks import mine, run_ranks
from tests.rsa_fast.small_methods import (
    BATCH,
    MULTI_CROP,
    STEP,
    dot,
    float_crops,
    log_softmax,
    multi_crop_run,
    small,
    some_crops,
)

NOW = {"queue": 0.0, "frozen": 0.0}


def swav(**overrides) -> Method:
    return small("swav", **MULTI_CROP["swav"] | overrides)


def random_scores(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(*shape, generator=generator, dtype=torch.float64) - 1


def codes_by_hand(scores: list[list[float]], epsilon: float) -> list[list[float]]:
    """Normalise as SwAV's main_swav.py, with all divisors: a row of q for each prototype."""
    samples, prototypes = len(scores), len(scores[0])
    q = [[math.exp(scores[n][k] / epsilon) for n in range(samples)] for k in range(prototypes)]
    total = sum(map(sum, q))
    q = [[value / total for value in row] for row in q]
    for _ in range(3):
        q = [[value / sum(row) / prototypes for value in row] for row in q]
        sums = [sum(row[n] for row in q) for n in range(samples)]
        q = [[row[n] / sums[n] / samples for n in range(samples)] for row in q]
    return [[samples * row[n] for row in q] for n in range(samples)]


def codes_by_logarithms(scores: list[list[float]], epsilon: float) -> list[list[float]]:
    """Subtract the logarithms of the sums: no exponential overflows or vanishes."""

    def log_sum(values: list[float]) -> float:
        largest = max(values)
        return largest + math.log(sum(math.exp(value - largest) for value in values))

    logs = [[value / epsilon for value in row] for row in scores]
    for _ in range(3):
        sums = [log_sum(list(column)) for column in zip(*logs, strict=True)]
        logs = [[value - total for value, total in zip(row, sums, strict=True)] for row in logs]
        logs = [[value - log_sum(row) for value in row] for row in logs]
    return [[math.exp(value) for value in row] for row in logs]


# --- the codes


def test_codes_equal_those_of_the_published_order_of_divisions():
    scores = random_scores(9, 4)
    expected = codes_by_hand(scores.tolist(), 0.05)
    for row, other in zip(sinkhorn(scores, 0.05).tolist(), expected, strict=True):
        assert row == pytest.approx(other, rel=1e-9, abs=1e-15)
    both = sinkhorn(torch.stack([scores, random_scores(9, 4, seed=1)]), 0.05)  # two crops apart
    torch.testing.assert_close(both[0], sinkhorn(scores, 0.05))
    assert sinkhorn(scores.float(), 0.05).dtype == torch.float32


@pytest.mark.parametrize("epsilon", [0.05, 0.01, 0.001])
def test_no_epsilon_overflows_in_float32(epsilon):
    scores = random_scores(9, 4)
    expected = codes_by_logarithms(scores.tolist(), epsilon)
    for row, other in zip(sinkhorn(scores.float(), epsilon).tolist(), expected, strict=True):
        assert row == pytest.approx(other, abs=2e-6 / epsilon * 0.05)
        assert sum(row) == pytest.approx(1, abs=1e-6)


def test_codes_share_the_samples_out_among_the_prototypes():
    scores = 0.1 * random_scores(64, 4)
    scores[:, 0] += 1.5  # the best prototype of every sample
    shares = sinkhorn(scores, 0.05).sum(0)
    assert shares.tolist() == pytest.approx([16] * 4, abs=2)
    # A number added to all scores of a prototype, or of all samples, changes nothing.
    moved = scores + torch.tensor([0.3, -0.2, 0.0, 0.7], dtype=torch.float64)
    torch.testing.assert_close(sinkhorn(moved, 0.05), sinkhorn(scores, 0.05))
    same = random_scores(1, 4).expand(6, 4)
    torch.testing.assert_close(sinkhorn(same, 0.05), torch.full((6, 4), 0.25).double())


# --- the loss


def loss_by_hand(codes: list, scores: list, temperature: float = 0.1) -> float:
    crops, total = len(scores), 0.0
    for i in (0, 1):
        for v in range(crops):
            if v != i:
                for code, row in zip(codes[i], scores[v], strict=True):
                    total -= dot(code, log_softmax([s / temperature for s in row]))
    return total / len(scores[0]) / (crops - 1) / 2


def test_the_loss_is_the_mean_over_the_pairs_of_a_code_and_another_crop():
    scores = random_scores(5, 6, 4)
    codes = sinkhorn(scores[:2], 0.05)
    found = cross_view_entropy(codes, (scores / 0.1).log_softmax(-1))
    expected = loss_by_hand(codes.tolist(), scores.tolist())
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_the_loss_equals_lightly_s():
    reason = "lightly is not installed: pip install lightly"
    losses = pytest.importorskip("lightly.loss", reason=reason)
    for crops in (2, 5):
        scores, queue = random_scores(crops, 6, 4), random_scores(2, 8, 4, seed=1)
        codes = sinkhorn(torch.cat([scores[:2], queue], 1), 0.05)[:, :6]
        found = cross_view_entropy(codes, (scores / 0.1).log_softmax(-1))
        theirs = losses.SwaVLoss()(list(scores[:2]), list(scores[2:]), list(queue))
        assert found.item() == pytest.approx(theirs.item(), rel=1e-9)


def test_equal_scores_cost_the_logarithm_of_the_number_of_prototypes():
    method = swav()
    with torch.no_grad():
        method.prototypes.weight.copy_(
            method.prototypes.weight[:1].expand_as(method.prototypes.weight)
        )
    assert method(some_crops(), NOW).total.item() == pytest.approx(math.log(7), rel=1e-12)


# --- the method


def scores_of(method: Method, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings and scores of the four crops, from two joint passes of the encoder."""
    views, encoder = [batch.views[f"aggressive_{k}"] for k in (1, 2, 3, 4)], method.encoder
    features = torch.cat([encoder(torch.cat(views[:2])), encoder(torch.cat(views[2:]))])
    z = unit(method.online.projector(features))
    return z.view(4, len(views[0]), -1), (z @ method.prototypes.weight.T).view(4, len(views[0]), -1)


def with_unit_prototypes(method: Method) -> Method:
    probe = copy.deepcopy(method)
    probe.prototypes.weight.data = unit(probe.prototypes.weight.data)
    return probe


@pytest.mark.parametrize("used", [0.0, 1.0])
def test_swav_codes_the_first_two_crops_with_the_queue_and_then_fills_it(used):
    method, batch = swav(), some_crops()
    with torch.no_grad():
        method.queue.copy_(unit(random_scores(2 * 16, 5, seed=2)).view(2, 16, 5))
    probe = with_unit_prototypes(method)
    z, scores = scores_of(probe, batch)
    codes = []
    for i in (0, 1):
        past = (probe.queue[i] @ probe.prototypes.weight.T).tolist() if used else []
        codes.append(codes_by_hand(past + scores[i].tolist(), 0.05)[-BATCH:])
    loss = method(batch, {"queue": used, "frozen": 0.0})
    assert loss.total.item() == pytest.approx(loss_by_hand(codes, scores.tolist()), rel=1e-9)
    torch.testing.assert_close(loss.embeddings, z[0])
    expected = torch.cat([z[:2], probe.queue], 1)[:, :16]
    torch.testing.assert_close(method.queue, expected, rtol=0, atol=1e-12)
    assert not method.queue.requires_grad
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(7).double())


def test_two_crops_of_one_size_are_the_default_and_others_are_read_from_the_recipe():
    method = small("swav", prototypes=7)
    assert method.reads == {"aggressive_1", "aggressive_2"}
    assert swav().reads == {f"aggressive_{k}" for k in (1, 2, 3, 4)}
    batch = some_crops()
    views = [batch.views[f"aggressive_{k}"] for k in (1, 2)]
    probe = with_unit_prototypes(method)
    z = unit(probe.online.projector(probe.encoder(torch.cat(views))))
    scores = (z @ probe.prototypes.weight.T).view(2, BATCH, 7)
    codes = [codes_by_hand(one.tolist(), 0.05) for one in scores]
    found = method(batch, NOW).total.item()
    assert found == pytest.approx(loss_by_hand(codes, scores.tolist()), rel=1e-9)


def test_gradients_equal_finite_differences_and_none_flows_into_codes():
    """The codes are constants: in the differences, they are those of the unmoved method."""
    method, batch = with_unit_prototypes(swav()), some_crops()
    probe = copy.deepcopy(method)
    probe(batch, NOW).total.backward()
    codes = sinkhorn(scores_of(copy.deepcopy(method), batch)[1][:2].detach(), 0.05)
    generator = torch.Generator().manual_seed(1)
    gradients = {name: p.grad for name, p in probe.named_parameters()}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    for _ in range(3):
        direction = {
            name: torch.randn(g.shape, generator=generator).double()
            for name, g in gradients.items()
        }
        slope = sum(float((gradients[name] * d).sum()) for name, d in direction.items())
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(method)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    p.add_(sign * STEP * direction[name])
                log_p = (scores_of(moved, batch)[1] / 0.1).log_softmax(-1)
                ends.append(cross_view_entropy(codes, log_p).item())
        assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(slope, rel=1e-6)


def test_the_loss_is_float32_under_autocast():
    method, batch = swav().float(), some_crops()
    views = {name: view.bfloat16() for name, view in batch.views.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(Batch(batch.label, views), NOW)
    assert loss.total.dtype == loss.embeddings.dtype == method.queue.dtype == torch.float32


# --- in a run


@pytest.mark.parametrize("optimizer", ["sgd", "larc"])
def test_prototypes_keep_their_directions_in_the_first_epoch(optimizer):
    run = multi_crop_run("swav", optimizer=optimizer, queue_size=0, weight_decay=0.1)
    start = unit(run.method.prototypes.weight.detach().clone())
    for step in range(6):  # an epoch has four
        train_step(run, float_crops(step))
        moved = (unit(run.method.prototypes.weight) - start).abs().max().item()
        assert moved < 1e-6 if step < 4 else moved > 1e-5


def test_the_queue_has_the_newest_embeddings_first_and_is_used_from_its_epoch_on_once_full():
    """It has 16 places for batches of 6: it is full after three steps."""
    run = multi_crop_run("swav", queue_size=16, queue_start_epoch=0)
    assert [run.schedule(step)["queue"] for step in range(5)] == [0, 0, 0, 1, 1]
    later = multi_crop_run("swav", queue_size=16, queue_start_epoch=1)
    assert [later.schedule(step)["queue"] for step in (3, 4, 5)] == [0, 1, 1]
    assert multi_crop_run("swav", queue_size=0, queue_start_epoch=0).schedule(0)["queue"] == 1
    seen: list[torch.Tensor] = []
    for step in range(4):
        probe = with_unit_prototypes(run.method)
        seen.insert(0, scores_of(probe, float_crops(step))[0][:2].detach())
        train_step(run, float_crops(step))
        expected = torch.cat([*seen, torch.zeros(2, 16, 5)], 1)[:, :16]
        torch.testing.assert_close(run.method.queue, expected, rtol=0, atol=1e-5)
    assert torch.equal(multi_crop_run("swav", queue_size=16).method.queue, torch.zeros(2, 16, 5))
    other = multi_crop_run("swav", queue_size=16).method
    other.load_state_dict(run.method.state_dict())
    assert torch.equal(other.queue, run.method.queue)


def multi_crop_steps() -> dict[str, tuple]:
    """Return the losses and the state of five steps on this rank's part of the batch, by method."""
    results = {}
    torch.set_default_dtype(torch.float64)
    try:
        for run in (
            multi_crop_run("swav", queue_size=16, queue_start_epoch=0, bn="sync"),
            multi_crop_run("dino", bn="sync"),
        ):
            losses = []
            for step in range(5):
                whole = some_crops(step)
                views = {name: mine(view) for name, view in whole.views.items()}
                losses.append(train_step(run, Batch(mine(whole.label), views)).total)
            results[run.recipe.method] = torch.stack(losses), run.method.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    return results


def test_two_ranks_equal_one_with_a_queue_or_a_centre_and_many_crops(tmp_path):
    expected, ranks = multi_crop_steps(), run_ranks(multi_crop_steps, 2, tmp_path)
    for name, (expected_losses, expected_state) in expected.items():
        (one, state), (other, other_state) = (results[name] for results in ranks)
        torch.testing.assert_close((one + other) / 2, expected_losses, rtol=1e-6, atol=0)
        for key, value in expected_state.items():
            torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-7, msg=f"{name} {key}")
            assert torch.equal(state[key], other_state[key]), f"{name} {key}"
        shared = state["queue" if name == "swav" else "centre"]
        assert shared.any()


# --- the recipe


def test_the_row_of_imagenet_1k_is_the_published_one():
    recipe = build_recipe("imagenet1k", "swav")
    derived = resolve(recipe, 1_281_167)
    rates = [recipe.schedule(step, derived)["lr"] for step in (0, 3_120, derived.total_steps)]
    assert rates == pytest.approx([0.3, 4.8, 0.0048])
    frozen = [recipe.schedule(step, derived)["frozen"] for step in (0, 311, 312)]
    assert derived.steps_per_epoch == 312 and frozen == [1, 1, 0]
    assert (recipe.optimizer, recipe.bn, recipe.prototypes) == ("larc", "sync", 3000)
    assert build_recipe("imagenet100", "swav").highest_lr == pytest.approx(0.6)


@pytest.mark.parametrize("name", ["swav", "dino"])
def test_too_few_crops_and_parts_of_joint_batches_are_refused(name):
    one = [{"name": "global", "count": 1}]
    with pytest.raises(ValueError, match=r"views.groups has 1 crop, wanted 2 or more"):
        build_recipe("cifar10", name, overrides={"views.groups": one})
    with pytest.raises(ValueError, match=r"bn = split:2 cuts a batch .*: use sync or local"):
        build_recipe("cifar10", name, overrides={"bn": "split:2"})


def test_consecutive_views_of_one_size_pass_together_and_keep_their_order():
    passes = []

    def encoder(images: torch.Tensor) -> torch.Tensor:
        passes.append(tuple(images.shape))
        return images.mean((1, 2, 3))[:, None]

    views = [torch.full((2, 3, side, side), float(k)) for k, side in enumerate((8, 8, 6, 6, 6, 8))]
    found = joint_features(encoder, views)
    assert passes == [(4, 3, 8, 8), (6, 3, 6, 6), (2, 3, 8, 8)]
    assert found.flatten().tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
