"""DINO, compared with loops, with lightly, with torch's weight norm and with finite differences."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils.parametrizations import weight_norm

from rsa_fast.methods.dino import Head
from rsa_fast.methods.method import Method
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import build_recipe
from rsa_fast.training.step import train_step
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

NOW = {"tau": 0.99, "frozen": 0.0}


def dino(**overrides) -> Method:
    """Return a method whose teacher and centre are not those of the start."""
    method = small("dino", **MULTI_CROP["dino"] | overrides)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in method.target.parameters():
            p.add_(0.1 * p.abs().mean() * torch.randn(p.shape, generator=generator).double())
        method.centre.copy_(0.1 * torch.randn(5, generator=generator))
    return method


def scores_of(network: torch.nn.Module, batch: Batch, crops: int) -> torch.Tensor:
    """Return the scores of the first two or all four crops, from passes for each size of crop."""
    views, encoder = [batch.views[f"aggressive_{k}"] for k in (1, 2, 3, 4)], network.encoder
    features = [encoder(torch.cat(views[:2]))]
    features += [encoder(torch.cat(views[2:]))] if crops == 4 else []
    head = network.projector
    z = head.mlp(torch.cat(features))
    z, weight = z / z.norm(dim=1, keepdim=True), head.last.weight
    scores = z @ (weight / weight.norm(dim=1, keepdim=True)).T
    return scores.view(crops, len(views[0]), -1)


def loss_by_hand(teacher: list, student: list, centre: list[float]) -> float:
    crops, total = len(student), 0.0
    for t in range(len(teacher)):
        for s in range(crops):
            if s == t:
                continue
            for target, prediction in zip(teacher[t], student[s], strict=True):
                sharp = [(x - c) / 0.04 for x, c in zip(target, centre, strict=True)]
                p = [math.exp(v) for v in log_softmax(sharp)]
                total -= dot(p, log_softmax([x / 0.1 for x in prediction]))
    return total / len(teacher[0]) / (2 * crops - 2)


@pytest.mark.parametrize("head_bn", [True, False])
def test_dino_is_the_cross_entropy_of_a_teacher_crop_and_every_other_student_crop(head_bn):
    method, batch = dino(head_bn=head_bn), some_crops()
    kinds = [type(layer).__name__ for layer in method.online.projector.mlp]
    hidden = ["Linear", *(["BatchNorm1d"] if head_bn else []), "GELU"]
    assert kinds == [*hidden, *hidden, "Linear"]
    probe = copy.deepcopy(method)
    teacher = scores_of(probe.target, batch, 2)
    student = scores_of(probe.online, batch, 4)
    loss = method(batch, NOW)
    expected = loss_by_hand(teacher.tolist(), student.tolist(), probe.centre.tolist())
    assert loss.total.item() == pytest.approx(expected, rel=1e-9)
    # The centre has moved after its use.
    centre = [
        0.9 * c + 0.1 * sum(row[k] for crop in teacher.tolist() for row in crop) / (2 * BATCH)
        for k, c in enumerate(probe.centre.tolist())
    ]
    assert method.centre.tolist() == pytest.approx(centre, rel=1e-9)
    # A number added to a teacher's score and to its centre changes nothing.
    shift = torch.tensor([0.3, -0.2, 0.0, 0.7, 0.1], dtype=torch.float64)
    moved = loss_by_hand(
        (teacher + shift).tolist(), student.tolist(), (probe.centre + shift).tolist()
    )
    assert moved == pytest.approx(expected, rel=1e-9)


def test_the_loss_and_the_centre_equal_lightly_s():
    reason = "lightly is not installed: pip install lightly"
    losses = pytest.importorskip("lightly.loss", reason=reason)
    method, theirs = dino(), losses.DINOLoss(5, warmup_teacher_temp_epochs=0).double()
    theirs.center.copy_(method.centre)
    for seed in range(3):
        batch, probe = some_crops(seed), copy.deepcopy(method)
        teacher, student = scores_of(probe.target, batch, 2), scores_of(probe.online, batch, 4)
        expected = theirs(list(teacher), list(student)).item()
        # lightly's temperature is a tensor in float32.
        assert method(batch, NOW).total.item() == pytest.approx(expected, rel=1e-5)
        torch.testing.assert_close(method.centre, theirs.center.flatten())


def test_the_centre_is_the_decaying_mean_of_the_teacher_s_scores():
    run, means = multi_crop_run("dino"), []
    for step in range(6):
        batch, teacher = float_crops(step), copy.deepcopy(run.method.target)
        means.append(scores_of(teacher, batch, 2).mean((0, 1)).detach())
        train_step(run, batch)
    expected = sum(0.1 * 0.9**age * mean for age, mean in enumerate(reversed(means)))
    torch.testing.assert_close(run.method.centre, expected, rtol=1e-4, atol=1e-6)


def test_equal_scores_cost_the_logarithm_of_their_number():
    method = dino()
    with torch.no_grad():
        method.centre.zero_()
        for network in (method.online, method.target):
            network.projector.last.weight.copy_(network.projector.last.weight[:1].expand(5, -1))
    assert method(some_crops(), NOW).total.item() == pytest.approx(math.log(5), rel=1e-12)


def test_the_teacher_reads_the_first_two_crops_only():
    method, batch = dino(), some_crops()
    assert method.reads == {f"aggressive_{k}" for k in (1, 2, 3, 4)}
    centres = {}
    for changed in (None, "aggressive_1", "aggressive_2", "aggressive_3", "aggressive_4"):
        views = batch.views | ({changed: some_crops(1).views[changed]} if changed else {})
        probe = copy.deepcopy(method)
        probe(Batch(batch.label, views), NOW)
        centres[changed] = probe.centre
    for changed, centre in centres.items():
        same = torch.allclose(centre, centres[None], rtol=1e-9, atol=0)
        assert same == (changed in (None, "aggressive_3", "aggressive_4")), changed


def test_gradients_equal_finite_differences_and_none_reaches_the_teacher():
    method, batch = dino(), some_crops()
    probe = copy.deepcopy(method)
    probe(batch, NOW).total.backward()
    for name, p in probe.named_parameters():
        assert (p.grad is None) == name.startswith("target"), name
    gradients = {name: p.grad for name, p in probe.named_parameters() if p.grad is not None}
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert not probe.centre.requires_grad
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        direction = {  # in proportion to the weights, of which those of the head are small
            name: 0.01 * torch.randn(gradient.shape, generator=generator).double()
            for name, gradient in gradients.items()
        }
        slope = sum(float((gradients[name] * d).sum()) for name, d in direction.items())
        ends = []
        for sign in (1, -1):
            moved = copy.deepcopy(method)
            parameters = dict(moved.named_parameters())
            with torch.no_grad():
                for name, d in direction.items():
                    parameters[name].add_(sign * STEP * d)
            ends.append(moved(batch, NOW).total.item())
        assert (ends[0] - ends[1]) / (2 * STEP) == pytest.approx(slope, rel=1e-4)


def test_the_last_layer_is_a_weight_norm_with_a_gain_of_1():
    torch.manual_seed(0)
    head = Head(8, 12, 6, 5, bn=False).double()
    theirs = weight_norm(torch.nn.Linear(6, 5, bias=False).double(), dim=0)
    with torch.no_grad():
        theirs.parametrizations.weight.original0.fill_(1)
        theirs.parametrizations.weight.original1.copy_(head.last.weight)
    x = torch.randn(7, 8).double()
    z, scores = head(x)
    expected = theirs(F.normalize(head.mlp(x), dim=1))
    torch.testing.assert_close(scores, expected)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(7).double())
    scores.square().sum().backward()
    expected.square().sum().backward()
    found = theirs.parametrizations.weight.original1.grad
    torch.testing.assert_close(head.last.weight.grad, found)
    shapes = [tuple(p.shape) for p in head.parameters()]
    assert shapes == [(12, 8), (12,), (12, 12), (12,), (6, 12), (6,), (5, 6)]
    copied = copy.deepcopy(head)
    copied.load_state_dict(head.state_dict())
    assert torch.equal(copied(x)[1], scores) and scores.dtype == torch.float64


def test_scores_are_float32_under_autocast():
    method, batch = dino().float(), some_crops()
    views = {name: view.bfloat16() for name, view in batch.views.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = method(Batch(batch.label, views), NOW)
        assert method.online.projector(torch.randn(3, 32))[1].dtype == torch.float32
    assert loss.total.dtype == method.centre.dtype == torch.float32


# --- in a run


def test_the_last_layer_stays_in_the_first_epoch_and_the_teacher_follows_from_the_start():
    run = multi_crop_run("dino", weight_decay=0.1)
    start = copy.deepcopy(run.method)
    for step in range(6):  # an epoch has four
        before = copy.deepcopy(run.method.target)
        train_step(run, float_crops(step))
        last, first = run.method.online.projector.last.weight, start.online.projector.last.weight
        assert torch.equal(last, first) == (step < 4)
        tau = run.schedule(step + 1)["tau"]
        for old, new, online in zip(
            before.parameters(),
            run.method.target.parameters(),
            run.method.online.parameters(),
            strict=True,
        ):
            torch.testing.assert_close(new, tau * old + (1 - tau) * online)
    state = run.method.state_dict()
    other = multi_crop_run("dino").method
    other.load_state_dict(state)
    assert torch.equal(other.centre, run.method.centre) and other.centre.any()


def test_the_row_of_imagenet_1k_is_the_published_command():
    recipe = build_recipe("imagenet1k", "dino")
    assert recipe.highest_lr == pytest.approx(0.06) and recipe.min_lr == 1e-6
    assert (recipe.clip_each_grad_norm, recipe.decay_exclude) == (3, "norm_and_bias")
    assert (recipe.out_dim, recipe.head_bn, recipe.bn) == (65_536, False, "sync")
    crops = recipe.views.crops
    assert [crop.size_px for crop in crops] == [224, 224, *[96] * 8]
    assert [crop.blur_p for crop in crops] == [1, 0.1, *[0.5] * 8]
    assert [crop.solarize_p for crop in crops] == [0, 0.2, *[0] * 8]
    assert [crop.crop_area for crop in crops] == [(0.14, 1)] * 2 + [(0.05, 0.14)] * 8
    assert {crop.interpolation for crop in crops} == {"bicubic"}
    assert len(build_recipe("cifar10", "dino").views.crops) == 2
