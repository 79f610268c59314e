"""Which samples each rank reads at each step: a pure function of (seed, epoch, step, rank, ranks).

The full order is one random permutation of an epoch's samples. The block order is also a
permutation, but it reads the storage in long pieces (`block_order`).

In each step, R ranks together read the same samples as one rank with the same global batch size. A
rank that accumulates gradients over N batches reads the samples of N ranks, one batch after the
other. Resuming needs no replay, because the samples of any step are computed directly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from rsa_fast.pipelines.draws import hash_keys, sample_keys

# The orders use seeds of their own, because the views are drawn from the keys of the seed itself.
ORDER_SALT, BLOCK_SALT = 0x6F72646572, 0x626C6F636B
MAX_LANES = 64  # up to this many nodes can each read their own part of the storage


@dataclass(frozen=True, eq=False)
class Blocks:
    """The storage of N samples, cut into blocks of neighbours.

    `stored` `(N,)` are the sample ids in the order in which they are stored. `numbers` `(N,)` are
    the numbers of their blocks, which start at 0 and increase. `window_samples` is the largest
    number of samples in a window. The samples of a window are read and mixed together.
    """

    stored: np.ndarray
    numbers: np.ndarray
    window_samples: int

    def mates(self, batch_size: int) -> float:
        """How many other images of its block an image has in its batch, on average."""
        counts = np.bincount(self.numbers)
        others = float((counts * (counts - 1)).sum() / len(self.numbers))
        return others * batch_size / max(batch_size, min(self.window_samples, len(self.numbers)))


@dataclass(frozen=True)
class Order:
    """The reading plan of one rank over `count` samples.

    `batch_size` is the global batch size of an optimiser step. Each rank reads its part of a step
    in `accumulate` batches, one after the other. `len()` is the number of batches per epoch: the
    steps times `accumulate`. The last samples of an epoch are left out if they do not fill a step.
    They are other samples in every epoch. With `blocks` the order is that of `block_order`,
    otherwise it is the full one.

    Raises ValueError if the dataset does not fill one step, or if the batch size is not divisible
    by the number of ranks times `accumulate`.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1
    blocks: Blocks | None = None

    def __post_init__(self) -> None:
        if self.count < self.batch_size:
            raise ValueError(
                f"{self.count} training images do not fill one batch of {self.batch_size}: "
                "add images, or lower --batch-size (it is global)"
            )
        if self.batch_size % (self.world_size * self.accumulate):
            turns = f" times accumulate = {self.accumulate}" if self.accumulate > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size} is global and cannot be divided among "
                f"{self.world_size} ranks{turns}"
            )

    def __len__(self) -> int:
        return self.steps * self.accumulate

    @property
    def steps(self) -> int:
        """The number of optimiser steps in an epoch."""
        return self.count // self.batch_size

    @property
    def batch_per_rank(self) -> int:
        """The number of images in a batch. A rank reads `accumulate` batches in a step."""
        return self.batch_size // (self.world_size * self.accumulate)

    def ids(self, epoch: int, number: int) -> np.ndarray:
        """The sample ids `(batch_per_rank,)` of this rank's batch `number`, from 0, of `epoch`."""
        step, turn = divmod(number, self.accumulate)
        # The rank that would read this batch if the ranks did not accumulate.
        place = self.rank * self.accumulate + turn
        first = step * self.batch_size + place * self.batch_per_rank
        return self.epoch_ids(epoch)[first : first + self.batch_per_rank]

    def epoch_ids(self, epoch: int) -> np.ndarray:
        """The sample ids of an epoch on all ranks, `(count,)`. The last ones may be left out."""
        if self.blocks is None:
            return epoch_order(self.count, self.seed, epoch)
        return block_order(self.blocks, self.batch_size, self.seed, epoch)

    def window(self, epoch: int, number: int) -> int:
        """The window of this rank's batch `number` of `epoch`, counted from the first epoch on."""
        assert self.blocks
        windows = count_windows(self.blocks, self.batch_size)
        return epoch * windows + number // self.accumulate * windows // self.steps

    def window_ids(self, window: int) -> np.ndarray:
        """The sample ids `(n,)` that this rank reads from a window, counted as by `window`."""
        assert self.blocks
        windows = count_windows(self.blocks, self.batch_size)
        epoch, in_epoch = divmod(window, windows)
        first, end = (-(-self.steps * edge // windows) for edge in (in_epoch, in_epoch + 1))
        ids = self.epoch_ids(epoch)[first * self.batch_size : end * self.batch_size]
        return ids.reshape(end - first, self.world_size, -1)[:, self.rank].ravel()


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the sample ids, `(count,)` int64, obtained by sorting their hash keys."""
    return np.argsort(sample_keys(seed ^ ORDER_SALT, epoch, np.arange(count)), kind="stable")


@lru_cache(maxsize=2)  # a window may be read ahead from the next epoch
def block_order(blocks: Blocks, batch_size: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the sample ids, `(N,)` int64, that reads the storage block by block.

    The blocks are put in a random order, and the sequence is cut into lanes of equal length. A
    batch consists of equal parts of all lanes, in the order of the lanes. Each rank therefore reads
    some lanes, and the other ranks read the others. Each lane is cut into windows, which contain
    the same steps in all lanes. Within a window, the samples of a lane are put in a random order.
    Both random orders are obtained by sorting hash keys. The number of lanes depends only on the
    global batch size, so the order does not depend on the number of ranks. The samples that do not
    fill a step come last.
    """
    steps, lanes = len(blocks.stored) // batch_size, lanes_of(batch_size)
    block_keys = hash_keys(seed ^ BLOCK_SALT, epoch, np.arange(blocks.numbers[-1] + 1))
    places = np.argsort(np.argsort(block_keys, kind="stable"))
    sequence = blocks.stored[np.argsort(places[blocks.numbers], kind="stable")]
    used = sequence[: steps * batch_size].reshape(lanes, -1)
    step = np.arange(used.shape[1]) // (batch_size // lanes)
    window = np.broadcast_to(step * count_windows(blocks, batch_size) // steps, used.shape)
    keys = sample_keys(seed ^ ORDER_SALT, epoch, used)
    used = np.take_along_axis(used, np.lexsort((keys, window)), 1)
    by_step = used.reshape(lanes, steps, -1).swapaxes(0, 1)
    return np.append(by_step, sequence[steps * batch_size :])


def lanes_of(batch_size: int) -> int:
    """The largest power of two, up to `MAX_LANES`, that divides the global batch."""
    return math.gcd(batch_size, MAX_LANES)


def count_windows(blocks: Blocks, batch_size: int) -> int:
    """The number of windows in an epoch. Each has at most `window_samples`, but at least a step."""
    steps = len(blocks.stored) // batch_size
    return min(steps, -(-steps * batch_size // blocks.window_samples))
