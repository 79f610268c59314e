"""Which samples each rank reads at each step: a pure function of (seed, epoch, step, rank, ranks).

In each step, R ranks together read the same samples as one rank with the same global batch size. A
rank that accumulates gradients over N batches reads in turn what N ranks would read at once.
Resuming needs no replay: the samples of any step are computed directly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.draws import sample_keys


@dataclass(frozen=True)
class Order:
    """The reading plan of one rank over `count` samples.

    `batch_size` is the global batch of an optimiser step. Each rank reads its part of it in
    `accumulate` batches, one after the other, so that `len()`, the number of batches per epoch, is
    that of the steps times `accumulate`. The last samples of an epoch, which do not fill a step,
    are left out. They are other samples in every epoch.

    Raises ValueError when the dataset does not fill one step, or when the batch size is not
    divisible by the number of ranks times `accumulate`.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    accumulate: int = 1

    def __post_init__(self) -> None:
        if self.count < self.batch_size:
            raise ValueError(
                f"{self.count} training images do not fill one batch of {self.batch_size}: "
                "add images, or lower --batch-size (it is global)"
            )
        if self.batch_size % (self.world_size * self.accumulate):
            turns = f" times accumulate = {self.accumulate}" if self.accumulate > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size} is global and does not divide among "
                f"{self.world_size} ranks{turns}"
            )

    def __len__(self) -> int:
        return self.count // self.batch_size * self.accumulate

    @property
    def batch_per_rank(self) -> int:
        """The images of one batch, of which this rank reads `accumulate` in a step."""
        return self.batch_size // (self.world_size * self.accumulate)

    def ids(self, epoch: int, number: int) -> np.ndarray:
        """The sample ids `(batch_per_rank,)` of this rank's batch `number`, from 0, of `epoch`."""
        step, turn = divmod(number, self.accumulate)
        # Where this batch would be among those of ranks that do not accumulate.
        place = self.rank * self.accumulate + turn
        first = step * self.batch_size + place * self.batch_per_rank
        return epoch_order(self.count, self.seed, epoch)[first : first + self.batch_per_rank]


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the sample ids, `(count,)` int64, obtained by sorting their hash keys."""
    # The order gets a seed of its own, because the views are drawn from the keys of `seed` itself.
    order_seed = seed ^ 0x6F72646572
    return np.argsort(sample_keys(order_seed, epoch, np.arange(count)), kind="stable")
