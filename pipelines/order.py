"""Which samples each rank reads at each step: a pure function of (seed, epoch, step, rank, world size).

The union of what R ranks read in a step is what one rank with the same global batch reads, and resuming is a jump.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pipelines.draws import keys


@dataclass(frozen=True)
class Order:
    """The reading plan of one rank over `count` samples. `batch_size` is global; `len()` is the steps per epoch.

    The remainder of an epoch that does not fill a batch is dropped; which samples those are changes every epoch.
    Raises ValueError when the dataset does not fill one batch or the batch does not divide among the ranks.
    """

    count: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.count < self.batch_size:
            raise ValueError(
                f"{self.count} training images do not fill one batch of {self.batch_size}: "
                "add images, or lower --batch-size (it is global)"
            )
        if self.batch_size % self.world_size:
            raise ValueError(
                f"batch_size {self.batch_size} is global and does not divide among {self.world_size} ranks"
            )

    def __len__(self) -> int:
        return self.count // self.batch_size

    @property
    def batch_per_rank(self) -> int:
        return self.batch_size // self.world_size

    def ids(self, epoch: int, step: int) -> np.ndarray:
        """The sample ids `(batch_per_rank,)` this rank reads at `step` of `epoch`."""
        first = step * self.batch_size + self.rank * self.batch_per_rank
        return epoch_order(self.count, self.seed, epoch)[first : first + self.batch_per_rank]


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """`(count,)` int64: a permutation of the sample ids, by sorting their hashes."""
    order_seed = seed ^ 0x6F72646572  # the views are drawn from the hashes of `seed` itself
    return np.argsort(keys(order_seed, epoch, np.arange(count)), kind="stable")
