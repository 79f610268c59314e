from __future__ import annotations

import numpy as np
import pytest

from rsa_fast.pipelines.extents import Extents
from rsa_fast.pipelines.order import (
    Blocks,
    Order,
    block_order,
    count_windows,
    epoch_order,
    lanes_of,
)


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
    with pytest.raises(ValueError, match="cannot be divided among 3 ranks"):
        Order(100, 8, 0, rank=0, world_size=3)
    with pytest.raises(ValueError, match="cannot be divided among 2 ranks times accumulate = 3"):
        Order(100, 8, 0, rank=0, world_size=2, accumulate=3)


def stored_at_random(count: int, mean_bytes: int = 110_000, files: int = 3) -> Extents:
    """Images of various sizes in a few files, whose ids are not in the order of storage."""
    rng = np.random.default_rng(0)
    size = rng.integers(mean_bytes // 2, 3 * mean_bytes // 2, count)
    file = np.arange(count) * files // count
    offset = np.cumsum(size) - size
    ids = rng.permutation(count)
    return Extents(file[ids], offset[ids], size[ids], opened=open)


COUNT, BATCH, CLASSES = 400_000, 1024, 1000
MEAN_BYTES = 110_000


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    """Blocks of 1 MiB and windows of 1 GiB, about 9 and 9,700 images."""
    return stored_at_random(COUNT, MEAN_BYTES).blocks(2**20, 2**30)


@pytest.fixture(scope="module")
def epochs(blocks) -> np.ndarray:
    """The block orders of some epochs, `(12, COUNT)`."""
    return np.stack([block_order(blocks, BATCH, 0, epoch) for epoch in range(12)])


def in_batches(ids: np.ndarray) -> np.ndarray:
    return ids[: COUNT // BATCH * BATCH].reshape(-1, BATCH)


def test_a_block_order_visits_every_sample_once(epochs):
    assert all((np.sort(ids) == np.arange(COUNT)).all() for ids in epochs)
    # The same, where a batch has an odd size, and where the window is smaller than a batch.
    for count, batch, window in ((1001, 7, 50), (1001, 96, 3), (64, 64, 10**6)):
        small = Blocks(np.arange(count)[::-1], np.arange(count) // 9, window)
        assert (np.sort(block_order(small, batch, 1, 2)) == np.arange(count)).all()


def test_blocks_are_neighbours_in_one_file_and_begin_in_its_pieces():
    extents = stored_at_random(1000)
    blocks = extents.blocks(2**20, 2**28)
    for block in np.split(blocks.stored, np.flatnonzero(np.diff(blocks.numbers)) + 1):
        assert len(set(extents.file[block])) == 1
        assert len(set(extents.offset[block] // 2**20)) == 1
        assert (np.diff(extents.offset[block]) > 0).all()
    assert (np.diff(blocks.numbers) <= 1).all() and blocks.numbers[0] == 0
    pieces = {*zip(extents.file.tolist(), (extents.offset // 2**20).tolist(), strict=True)}
    assert blocks.numbers[-1] + 1 == len(pieces)
    assert blocks.window_samples == 2**28 // extents.size.mean()


def test_a_batch_of_blocks_has_as_many_classes_as_independent_draws(epochs):
    labels = np.random.default_rng(1).integers(0, CLASSES, COUNT)
    counts = np.stack(
        [np.bincount(labels[ids], minlength=CLASSES) for ids in in_batches(epochs[0])]
    )
    chi2 = (np.square(counts - BATCH / CLASSES) / (BATCH / CLASSES)).sum(1)
    assert (chi2 / (CLASSES - 1)).mean() < 1.02


def test_an_image_meets_less_than_one_of_its_block_in_its_batch(blocks, epochs):
    block = np.empty(COUNT, np.int64)
    block[blocks.stored] = blocks.numbers
    mates = []
    for ids in in_batches(epochs[0]):
        counts = np.unique(block[ids], return_counts=True)[1]
        mates.append((counts * (counts - 1)).sum() / BATCH)
    assert np.mean(mates) < 1
    assert np.mean(mates) == pytest.approx(blocks.mates(BATCH), rel=0.1)


def test_the_positions_of_two_epochs_are_unrelated(blocks, epochs):
    positions = np.argsort(epochs, 1)
    r = np.corrcoef(positions)[np.triu_indices(len(epochs), 1)]
    # The images of a block stay near each other, so one pair has this standard error, .0047 here,
    # which is why the mean of 66 pairs is compared.
    error = 1 / np.sqrt(blocks.numbers[-1] + 1)
    assert abs(r.mean()) < 0.002
    assert abs(r).max() < 4 * error and r.std() == pytest.approx(error, rel=0.2)


@pytest.mark.parametrize("batch", [64, 96])
@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 1), (2, 1), (4, 2), (8, 1), (3, 1)])
def test_ranks_share_out_the_blocks_and_a_jump_equals_a_walk(batch, world_size, accumulate):
    if batch % (world_size * accumulate):
        pytest.skip("the batch does not divide")
    blocks = stored_at_random(2000).blocks(2**20, 2**25)
    whole = Order(2000, batch, 3, blocks=blocks)
    ranks = [Order(2000, batch, 3, r, world_size, accumulate, blocks) for r in range(world_size)]
    for step in (17, 0, 5):  # in any order: nothing is remembered
        read = [
            rank.ids(1, step * accumulate + turn) for rank in ranks for turn in range(accumulate)
        ]
        assert (np.concatenate(read) == whole.ids(1, step)).all()


def windows_of(order: Order, epoch: int) -> list[np.ndarray]:
    windows = count_windows(order.blocks, order.batch_size)
    return [order.window_ids(epoch * windows + w) for w in range(windows)]


def test_the_windows_of_an_epoch_are_what_its_batches_read(epoch=1):
    blocks = stored_at_random(2000).blocks(2**20, 2**25)
    for rank in range(2):
        order = Order(2000, 64, 3, rank, 2, accumulate=2, blocks=blocks)
        windows = windows_of(order, epoch)
        assert len(windows) == count_windows(blocks, 64) == 7
        assert max(map(len, windows)) <= blocks.window_samples // 2 + order.batch_size
        first = order.window(epoch, 0)
        read: list[list[int]] = [[] for _ in windows]
        for number in range(len(order)):
            read[order.window(epoch, number) - first] += order.ids(epoch, number).tolist()
        assert [sorted(ids) for ids in read] == [sorted(ids.tolist()) for ids in windows]
    assert order.window(epoch, len(order)) == order.window(epoch + 1, 0) == first + 7


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_an_epoch_reads_every_byte_once_in_long_runs_on_each_of_several_nodes(world_size):
    extents = stored_at_random(40_000, 25_000)
    blocks = extents.blocks(2**20, 2**26)
    file_bytes, total, runs = int(extents.size.sum()), 0, 0
    for rank in range(world_size):
        order = Order(40_000, 256, 0, rank, world_size, blocks=blocks)
        read = [run for ids in windows_of(order, 0) for run in extents.runs(ids)]
        node_bytes = sum(end - start for _, start, end in read)
        assert node_bytes <= 1.05 * file_bytes / world_size
        total, runs = total + node_bytes, runs + len(read)
    assert 0.98 * file_bytes < total <= 1.05 * file_bytes
    # Each border of the windows in a lane can cut a block in two.
    cuts = lanes_of(256) * count_windows(blocks, 256)
    assert runs <= blocks.numbers[-1] + 1 + cuts


def test_blocks_stored_by_class_are_recognised():
    extents = stored_at_random(2000)
    rng = np.random.default_rng(0)
    for weights in ([1] * 10, [1] * 500, [19, 1]):
        labels = rng.choice(len(weights), 2000, p=np.array(weights) / sum(weights))
        assert abs(extents.sorted_by(labels)) < 0.1
        by_class = np.empty_like(labels)
        by_class[extents.stored] = np.sort(labels)
        assert extents.sorted_by(by_class) > 0.7
    assert extents.sorted_by(np.zeros(2000, int)) == 0
