"""SimSiam, SimSiam with RSA, SimCLR, MoCo, ReSSL and supervised training.

They are compared with loops, with other code and with finite differences.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torchvision.models.resnet import BasicBlock

from rsa_fast.methods import METHODS
from rsa_fast.methods.method import build_method, info_nce, shuffle, unit
from rsa_fast.methods.ressl import relational
from rsa_fast.methods.simclr import nt_xent
from rsa_fast.methods.simsiam import negative_cosine, projector
from rsa_fast.networks import Encoder
from rsa_fast.pipelines.views import VIEWS, Batch
from rsa_fast.recipes import build_recipe
from tests.rsa_fast.small_methods import (
    BATCH,
    IMAGES,
    NOW,
    batch_of,
    dot,
    fields_of,
    log_softmax,
    rows,
    small,
    some_batch,
)

# --- the losses, pair by pair


def test_nt_xent_is_the_mean_over_all_views_of_finding_the_partner():
    z_1, z_2, temperature = rows(4, 3, 0), rows(4, 3, 1), 0.5
    views = z_1.tolist() + z_2.tolist()
    total = 0.0
    for i, view in enumerate(views):
        partner = (i + 4) % 8
        others = sum(
            math.exp(dot(view, other) / temperature) for j, other in enumerate(views) if j != i
        )
        total -= math.log(math.exp(dot(view, views[partner]) / temperature) / others)
    assert nt_xent(z_1, z_2, temperature).item() == pytest.approx(total / 8, abs=1e-12)


def test_info_nce_is_the_cross_entropy_of_the_key_among_the_queue():
    q, k, queue, temperature = rows(4, 3, 0), rows(4, 3, 1), rows(7, 3, 2).T, 0.1
    total = 0.0
    for query, key in zip(q.tolist(), k.tolist(), strict=True):
        dictionary = [key, *queue.T.tolist()]
        total -= log_softmax([dot(query, other) / temperature for other in dictionary])[0]
    assert info_nce(q, k, queue, temperature).item() == pytest.approx(total / 4, abs=1e-12)


def test_the_relational_loss_is_the_cross_entropy_of_two_distributions_over_the_queue():
    student, teacher, queue = rows(4, 3, 0), rows(4, 3, 1), rows(7, 3, 2).T
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        sharp = log_softmax([dot(t, other) / 0.04 for other in queue.T.tolist()])
        soft = log_softmax([dot(s, other) / 0.1 for other in queue.T.tolist()])
        total -= dot([math.exp(v) for v in sharp], soft)
    loss = relational(student, teacher, queue, temperature=0.1, teacher_temperature=0.04)
    assert loss.item() == pytest.approx(total / 4, abs=1e-12)


def test_losses_equal_lightly_s():
    reason = "lightly is not installed: pip install lightly"
    losses = pytest.importorskip("lightly.loss", reason=reason)
    a, b, bank = rows(8, 16, 0).float(), rows(8, 16, 1).float(), rows(32, 16, 2).float()
    assert nt_xent(a, b, 0.5).item() == pytest.approx(losses.NTXentLoss(0.5)(a, b).item(), abs=1e-5)
    theirs = losses.NegativeCosineSimilarity()
    assert negative_cosine(a, b).item() == pytest.approx(theirs(a, b).item(), abs=1e-5)
    theirs = losses.NTXentLoss(0.1, memory_bank_size=(32, 16))
    theirs.memory_bank.bank = bank
    assert info_nce(a, b, bank.T, 0.1).item() == pytest.approx(theirs(a, b).item(), abs=1e-5)


# --- the methods


def test_simsiam_is_the_negative_cosine_of_predictions_and_fixed_projections():
    method, batch = small("simsiam"), some_batch()
    probe = copy.deepcopy(method)
    z = [probe.online(view) for view in (batch.aggressive_1, batch.aggressive_2)]
    p = [probe.predictor(x) for x in z]
    total = 0.0
    for i in range(BATCH):
        for one, two in ((0, 1), (1, 0)):
            a, b = p[one][i].tolist(), z[two][i].tolist()
            total -= dot(a, b) / math.sqrt(dot(a, a) * dot(b, b)) / 2
    loss = method(batch, {"beta": 0.3})
    assert loss.total.item() == pytest.approx(total / BATCH, abs=1e-12)
    assert -1 <= loss.total.item() <= 1
    loss.total.backward()
    fixed = [x.detach() for x in z]
    cosine = torch.nn.functional.cosine_similarity
    (-(cosine(p[0], fixed[1]).mean() + cosine(p[1], fixed[0]).mean()) / 2).backward()
    for parameter, expected in zip(method.parameters(), probe.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("aa_target", ["pred", "proj"])
def test_simsiam_with_rsa_mixes_weak_and_aggressive_targets(aa_target):
    method, batch, beta = small("simsiam-rsa", aa_target=aa_target), some_batch(), 0.3
    probe = copy.deepcopy(method)
    cosine = torch.nn.functional.cosine_similarity
    z = [probe.online(view) for view in (batch.aggressive_1, batch.aggressive_2)]
    p = [probe.predictor(x) for x in z]
    w = [probe.online(view).detach() for view in (batch.weak_1, batch.weak_2)]
    t = [x.detach() for x in (p if aa_target == "pred" else z)]
    weak = -(cosine(p[0], w[1]) + cosine(p[1], w[0])).mean() / 2
    aggressive = -(cosine(p[0], t[1]) + cosine(p[1], t[0])).mean() / 2
    expected = (1 - beta) * weak + beta * aggressive
    expected.backward()
    loss = method(batch, {"beta": beta})
    loss.total.backward()
    assert loss.total.item() == pytest.approx(expected.item(), abs=1e-12)
    assert loss.parts["weak"].item() == pytest.approx(weak.item(), abs=1e-12)
    for parameter, other in zip(method.parameters(), probe.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_simsiam_with_rsa_at_beta_1_on_projections_is_simsiam():
    batch = some_batch()
    plain, ours = small("simsiam"), small("simsiam-rsa", aa_target="proj")
    ours.load_state_dict(plain.state_dict())
    assert torch.equal(plain(batch, {"beta": 0.0}).total, ours(batch, {"beta": 1.0}).total)


def test_moco_adds_both_directions_on_one_snapshot_of_the_queue_and_then_enqueues_every_key():
    method, batch = small("moco"), some_batch()
    probe = copy.deepcopy(method)
    views = (batch.aggressive_1, batch.aggressive_2)
    q = [unit(probe.online(view)) for view in views]
    k = [unit(probe.target(view)) for view in views]
    expected = info_nce(q[0], k[1], probe.queue, 0.1) + info_nce(q[1], k[0], probe.queue, 0.1)
    loss = method(batch, {"beta": 0.0})
    assert loss.total.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(method.queue[:, : 2 * BATCH].T, torch.cat(k), rtol=0, atol=1e-12)
    assert torch.equal(method.queue[:, 2 * BATCH :], probe.queue[:, 2 * BATCH :])
    assert method.pointer == 2 * BATCH


def test_the_queue_wraps_around_and_is_saved():
    method = small("moco")
    before = method.queue.clone()
    keys = rows(12, 5, 0), rows(12, 5, 1)
    method.enqueue(keys[0])
    method.enqueue(keys[1])  # The last eight wrap around to the front of 16.
    assert method.pointer == 8
    expected = torch.cat([keys[1][4:], keys[0][8:], keys[1][:4]])
    assert torch.equal(method.queue.T, expected) and not torch.equal(method.queue, before)
    other = small("moco")
    other.load_state_dict(method.state_dict())
    assert torch.equal(other.queue, method.queue) and other.pointer == 8
    torch.testing.assert_close(before.norm(dim=0), torch.ones(16, dtype=torch.float64))


def test_ressl_reads_one_aggressive_and_one_weak_view():
    method, batch = small("ressl"), some_batch()
    probe = copy.deepcopy(method)
    student, teacher = unit(probe.online(batch.aggressive_1)), unit(probe.target(batch.weak_2))
    temperatures = {"temperature": 0.1, "teacher_temperature": 0.04}
    expected = relational(student, teacher, probe.queue, **temperatures)
    assert method(batch, {"beta": 0.0}).total.item() == pytest.approx(expected.item(), abs=1e-12)
    torch.testing.assert_close(method.queue[:, :BATCH].T, teacher, rtol=0, atol=1e-12)
    assert method.pointer == BATCH and torch.equal(method.queue[:, BATCH:], probe.queue[:, BATCH:])


def test_the_shuffle_deals_every_part_out_over_all_parts():
    order = shuffle(32, 4, torch.device("cpu"))
    assert sorted(order.tolist()) == list(range(32))
    for part in order.chunk(4):
        assert sorted((part // 8).tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_keys_are_shuffled_for_batchnorm_and_come_back_in_order():
    """Each key is normalised with the images that were shuffled into its part, of two.

    It is returned in its image's row.
    """
    method, images = small("moco", bn="split:2"), some_batch().weak_1
    probe = small("moco")
    probe.load_state_dict(method.state_dict())
    mine, all_keys = method.keys(images)
    order = shuffle(BATCH, 2, images.device).tolist()
    assert order == [0, 3, 1, 4, 2, 5]
    for part in (order[:3], order[3:]):
        expected = unit(probe.target(images[part]))
        torch.testing.assert_close(all_keys[part], expected, rtol=0, atol=1e-12)
    assert torch.equal(mine, all_keys)


def test_supervised_is_the_cross_entropy_of_the_labels():
    method, batch = small("supervised"), some_batch()
    logits = copy.deepcopy(method).classifier(copy.deepcopy(method).encoder(batch.weak_1))
    pairs = list(zip(logits.tolist(), batch.label.tolist(), strict=True))
    total = -sum(log_softmax(row)[label] for row, label in pairs) / BATCH
    loss = method(batch, {"beta": 0.0})
    assert loss.total.item() == pytest.approx(total, abs=1e-12)
    right = sum(row.index(max(row)) == label for row, label in pairs)
    assert loss.parts["train_top1"].item() == pytest.approx(100 * right / BATCH)


# --- what holds for all of them


@pytest.mark.parametrize("name", METHODS)
def test_a_method_needs_only_the_views_it_reads(name):
    method = small(name)
    batch = batch_of(method)
    expected = copy.deepcopy(method)(batch, NOW).total
    for view in set(VIEWS) - method.reads:
        del batch.views[view]
    assert torch.equal(method(batch, NOW).total, expected)


@pytest.mark.parametrize("name", METHODS)
def test_gradients_reach_all_that_learns_and_no_target_queue_or_buffer(name):
    method = small(name)
    batch = batch_of(method)
    loss = method(batch, NOW)
    loss.total.backward()
    for key, parameter in method.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), key
        assert parameter.requires_grad or key.startswith(("target", "teacher")) or "weight_g" in key
        if parameter.grad is not None:
            assert parameter.grad.abs().sum() > 0, key
    constants = (*loss.parts.values(), loss.embeddings, *method.buffers())
    assert not any(constant.requires_grad for constant in constants)
    torch.testing.assert_close(loss.embeddings.norm(dim=1), torch.ones(BATCH, dtype=torch.float64))


# The targets of SimSiam and SwAV's codes depend on what is trained, and have no gradient.
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"simsiam", "simsiam-rsa", "swav"}))
def test_gradients_equal_finite_differences(name):
    """The directions of the trained parameters are random; beta 0 detaches no output of theirs."""
    method, now = small(name), NOW | {"beta": 0.0}
    batch = batch_of(method)
    probe = copy.deepcopy(method)  # Forward changes buffers: each evaluation has a copy.
    probe(batch, now).total.backward()
    learning = [p for p in probe.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(1)
    step = 1e-7  # a longer one crosses the bends of ReLU
    for _ in range(3):
        direction = [
            torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in learning
        ]
        slope = sum(float((p.grad * d).sum()) for p, d in zip(learning, direction, strict=True))
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(method)
            parameters = [p for p in moved.parameters() if p.requires_grad]
            with torch.no_grad():
                for p, d in zip(parameters, direction, strict=True):
                    p.add_(sign * step * d)
            ends.append(moved(batch, now).total.item())
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=2e-4, abs=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_training_from_the_recipe_lowers_the_loss_in_every_row(name):
    """Take a few steps on one batch, with the row's own optimiser and heads at a small width."""
    from rsa_fast.training.step import build_run, train_step

    fields = fields_of(name) | {"arch": "resnet18"}
    fields |= {"precision": "fp32", "epochs": 50, "peak_lr": 0.05, "device": "cpu"}
    run = build_run(build_recipe("cifar10", name, overrides=fields), IMAGES)
    double = batch_of(run.method)
    views = {name: view.float() for name, view in double.views.items()}
    batch = Batch(double.label, views, double.ids)
    # At this rate the loss of VICReg rises and falls by a tenth during the first 20 steps. How it
    # does so depends on the CPU's instructions.
    losses = [train_step(run, batch).total.item() for _ in range(40)]
    assert losses[-1] < losses[0] - 0.1 * abs(losses[0])


@pytest.mark.parametrize("name", ["moco", "ressl"])
def test_the_key_encoder_keeps_a_fixed_momentum(name):
    recipe = build_recipe("cifar10", name)
    from rsa_fast.recipes import resolve

    derived = resolve(recipe, 50_000)
    steps = (0, 100, derived.total_steps)
    assert {recipe.schedule(step, derived)["tau"] for step in steps} == {0.99}


def test_the_predictor_keeps_the_peak_rate_when_told_to():
    from rsa_fast.training.optim import set_learning_rate
    from rsa_fast.training.step import build_run

    for constant in (True, False):
        overrides = {"width": 4, "constant_predictor_lr": constant}
        run = build_run(build_recipe("cifar10", "simsiam", overrides=overrides), 256)
        set_learning_rate(run.optimizer, 0.01)
        rate = {p: group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
        expected = run.derived.peak_lr if constant else 0.01
        assert {rate[p] for p in run.method.predictor.parameters()} == {expected}
        assert {rate[p] for p in run.method.online.parameters()} == {0.01}


def test_heads_have_the_published_shapes():
    def shapes(module: torch.nn.Module) -> list[tuple[int, ...]]:
        return [tuple(p.shape) for name, p in module.named_parameters() if p.ndim > 1]

    assert shapes(projector(512, 2, 2048)) == [(512, 512), (2048, 512)]
    assert shapes(projector(2048, 3, 2048)) == [(2048, 2048)] * 3
    last = projector(2048, 3, 2048)[-1]
    assert not last.affine and not list(last.parameters())
    moco = build_method(build_recipe("cifar10", "moco"))
    assert shapes(moco.online.projector) == [(512, 512), (128, 512)]
    assert moco.queue.shape == (128, 4096)
    ressl = build_method(build_recipe("cifar10", "ressl"))
    assert shapes(ressl.online.projector) == [(2048, 512), (128, 2048)]


@pytest.mark.parametrize("zero", [True, False])
def test_zero_init_residual_is_the_recipe_s(zero):
    modules = Encoder("resnet18", "cifar", width=4, zero_init_residual=zero).modules()
    gains = [block.bn2.weight for block in modules if isinstance(block, BasicBlock)]
    assert all((gain == (0 if zero else 1)).all() for gain in gains)
    assert build_recipe("cifar10", "moco").zero_init_residual is False
    assert build_recipe("cifar10", "rsa").zero_init_residual is True
