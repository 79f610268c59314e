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
