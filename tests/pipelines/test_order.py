from __future__ import annotations

import numpy as np
import pytest

from pipelines.order import Order, epoch_order


def test_an_epoch_visits_every_sample_once():
    assert (np.sort(epoch_order(1001, 3, 5)) == np.arange(1001)).all()


def test_epochs_and_seeds_give_unrelated_orders():
    orders = [epoch_order(2000, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (orders[one] == orders[other]).mean() < 0.01
        assert abs(np.corrcoef(orders[one], orders[other])[0, 1]) < 0.1


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_out_the_batch_of_one_rank(world_size):
    whole = Order(103, 8, seed=1)
    for step in range(len(whole)):
        ranks = [Order(103, 8, 1, rank, world_size).ids(2, step) for rank in range(world_size)]
        assert (np.concatenate(ranks) == whole.ids(2, step)).all()


@pytest.mark.parametrize(("ranks", "accumulate"), [(1, 4), (2, 2), (2, 3), (3, 1)])
def test_a_rank_that_accumulates_reads_in_turn_what_as_many_ranks_read_at_once(ranks, accumulate):
    count, batch, seed, epoch = 103, 12, 3, 2
    virtual = [
        Order(count, batch, seed, rank, ranks * accumulate) for rank in range(ranks * accumulate)
    ]
    for rank in range(ranks):
        order = Order(count, batch, seed, rank, ranks, accumulate)
        expected = []
        for step in range(count // batch):
            for turn in range(accumulate):
                expected.append(virtual[rank * accumulate + turn].ids(epoch, step).tolist())
        assert len(order) == len(expected)
        assert [order.ids(epoch, i).tolist() for i in range(len(order))] == expected
        assert {len(ids) for ids in expected} == {order.batch_per_rank}


def test_the_dropped_remainder_changes_every_epoch():
    order = Order(10, 8, seed=0)
    assert len(order) == 1
    dropped = {
        tuple(sorted(set(range(10)) - set(order.ids(epoch, 0).tolist()))) for epoch in range(20)
    }
    assert len(dropped) > 5


def test_too_few_images_and_an_indivisible_batch_are_errors():
    with pytest.raises(ValueError, match=r"7 training images do not fill one batch of 8"):
        Order(7, 8, 0)
    with pytest.raises(ValueError, match="does not divide among 3 ranks"):
        Order(100, 8, 0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="does not divide among 2 ranks times accumulate = 3"):
        Order(100, 8, 0, rank=0, world_size=2, accumulate=3)
