"""InstDis, and the memory bank that PIRL has too. They are compared with loops."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from rsa_fast.methods.method import negative_ids, unit
from rsa_fast.pipelines.views import Batch
from rsa_fast.recipes import build_recipe, resolve
from tests.rsa_fast.ranks import mean, mine, run_ranks
from tests.rsa_fast.small_methods import (
    BANK_IMAGES,
    IDS,
    NOW,
    bank_batch,
    bank_by_loops,
    loss_by_loops,
    rows,
    with_bank,
)

WITH_DUPLICATES = torch.tensor([7, 0, 7, 3, 0, 7])


@pytest.mark.parametrize("ids", [IDS, WITH_DUPLICATES], ids=["distinct", "duplicates"])
@pytest.mark.parametrize("negatives", [0, 4, 10, BANK_IMAGES, 99])
def test_a_step_finds_the_old_rows_of_the_images_and_then_moves_them(negatives, ids):
    method, batch = with_bank("inst-dis", negatives=negatives), bank_batch(ids)
    before, probe = method.bank.clone(), copy.deepcopy(method)
    v = unit(probe.online(batch.aggressive_1)).detach()
    others = None
    if negatives in (4, 10):
        others = negative_ids(method.seed, NOW, negatives, BANK_IMAGES).tolist()
    expected = loss_by_loops(v.tolist(), before.tolist(), ids.tolist(), 0.1, others)
    loss = method(batch, NOW)
    assert loss.total.item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(loss.embeddings, v)
    torch.testing.assert_close(method.bank, bank_by_loops(before, v, ids), rtol=0, atol=1e-12)
    elsewhere = [i for i in range(BANK_IMAGES) if i not in ids.tolist()]
    assert torch.equal(method.bank[elsewhere], before[elsewhere])
    # The backward pass after the update needs the old rows.
    loss.total.backward()
    assert not method.bank.requires_grad
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())


def test_of_an_image_s_rows_in_a_batch_the_last_one_counts():
    methods = [with_bank("inst-dis") for _ in range(2)]
    v = rows(6, 5, 0)
    methods[0].update_bank(v, WITH_DUPLICATES)
    methods[1].update_bank(v[[5, 3, 4]], torch.tensor([7, 3, 0]))
    assert torch.equal(methods[0].bank, methods[1].bank)


@pytest.mark.parametrize("negatives", [0, 4])
def test_equal_similarities_have_the_loss_of_a_guess(negatives):
    method = with_bank("inst-dis", negatives=negatives)
    method.bank.copy_(method.bank[:1].clone().expand_as(method.bank))
    choices = 1 + negatives if negatives else BANK_IMAGES
    assert method(bank_batch(IDS), NOW).total.item() == pytest.approx(math.log(choices), abs=1e-12)


@pytest.mark.parametrize("negatives", [0, 4])
def test_gradients_by_the_embeddings_equal_finite_differences(negatives):
    method, batch = with_bank("inst-dis", negatives=negatives), bank_batch(IDS)
    bank = method.bank.clone()

    def losses(v: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        method.bank.copy_(bank)
        return method.bank_losses(batch, [v, w], NOW)

    inputs = [rows(6, 5, seed).requires_grad_() for seed in (0, 1)]
    assert torch.autograd.gradcheck(losses, inputs)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_a_row_turns_steadily_towards_an_embedding_that_stays(momentum):
    method = with_bank("inst-dis", bank_momentum=momentum)
    v, before = rows(6, 5, 0), unit(method.bank)
    cosines = []
    for _ in range(5):
        method.update_bank(v, IDS)
        cosines.append((method.bank[IDS] * v).sum(1))
        torch.testing.assert_close(method.bank.norm(dim=1), torch.ones(BANK_IMAGES).double())
    expected = unit(momentum * before[IDS] + (1 - momentum) * v)
    torch.testing.assert_close(cosines[0], (expected * v).sum(1))
    steps = torch.stack(cosines).diff(dim=0)
    assert (steps > 0).all() if momentum else torch.allclose(cosines[0], torch.ones(6).double())


def test_negatives_are_drawn_evenly_and_depend_on_seed_and_step_only():
    counts = torch.zeros(50)
    for step in range(20):
        drawn = negative_ids(0, {"step": step}, 1000, 50)
        assert drawn.tolist() == negative_ids(0, {"step": float(step)}, 1000, 50).tolist()
        counts += torch.bincount(torch.from_numpy(drawn), minlength=50)
    assert len(counts) == 50 and counts.min() > 300 and counts.max() < 500  # 400 +- 5 sigma
    first = negative_ids(0, {"step": 0}, 1000, 50).tolist()
    assert first[:10] == negative_ids(0, {"step": 0}, 10, 50).tolist()
    for seed, step in ((0, 1), (1, 0)):
        same = sum(map(int.__eq__, first, negative_ids(seed, {"step": step}, 1000, 50).tolist()))
        assert same < 50  # 20 are expected
    recipe = build_recipe("cifar10", "inst-dis")
    assert recipe.schedule(123, resolve(recipe, 50_000))["step"] == 123


def test_the_bank_has_a_row_for_each_image_and_is_saved():
    method, other = with_bank("inst-dis", images=1000), with_bank("inst-dis", images=1000)
    assert method.bank.shape == (1000, 5)
    torch.testing.assert_close(method.bank.norm(dim=1), torch.ones(1000).double())
    assert method.bank.mean(0).abs().max() < 0.1
    method(bank_batch(IDS), NOW)
    assert not torch.equal(method.bank, other.bank)
    other.load_state_dict(method.state_dict())
    assert torch.equal(method.bank, other.bank)


def test_a_batch_without_ids_is_refused():
    batch = bank_batch(IDS)
    batch.ids = None
    with pytest.raises(ValueError, match="no ids, which are its rows in the bank: pass ids="):
        with_bank("inst-dis")(batch, NOW)


def losses_and_banks() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The losses of two steps, averaged over the ranks, and then the bank.

    Image 7 is on both of two ranks, twice on the first.
    """
    results = {}
    for name in ("inst-dis", "pirl"):
        for negatives in (0, 4):
            method, losses = with_bank(name, negatives=negatives, bn="sync"), []
            for step in range(2):
                whole = bank_batch(WITH_DUPLICATES, seed=step)
                views = {key: mine(view) for key, view in whole.views.items()}
                batch = Batch(mine(whole.label), views, mine(whole.ids))
                losses.append(mean(method(batch, {"step": step}).total.detach()))
            results[f"{name}, {negatives}"] = torch.stack(losses), method.bank
    return results


def test_two_ranks_have_the_losses_and_the_bank_of_one(tmp_path):
    expected = losses_and_banks()
    for of_rank in run_ranks(losses_and_banks, 2, tmp_path):
        torch.testing.assert_close(of_rank, expected, rtol=1e-9, atol=1e-12)
