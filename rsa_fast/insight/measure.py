"""Tools to measure a training loop: a loader with long epochs, and a ratio of times.

A measurement opens the loader and skips the batches that were prefetched before it started:

    with open_loader(run, source) as loader, skip_prefetched(loader) as batches:
        train_step(run, next(batches))
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice

import numpy as np

from rsa_fast.pipelines import Batch, Loader, Loading, Order, Source, open_views
from rsa_fast.training.step import Run


class EndlessOrder(Order):
    """An order whose epochs have 1000 steps, even if there are few images.

    The start and the end of an epoch then have almost no effect on a measurement.
    """

    def __len__(self) -> int:
        return 1000 * self.accumulate

    def ids(self, epoch: int, number: int) -> np.ndarray:
        return super().ids(*self.in_own_epochs(epoch, number))

    def window(self, epoch: int, number: int) -> int:
        return super().window(*self.in_own_epochs(epoch, number))

    def in_own_epochs(self, epoch: int, number: int) -> tuple[int, int]:
        """The epoch of the images, and the batch's number in it, for a batch of a long epoch."""
        epochs, number = divmod(number, super().__len__())
        return len(self) * epoch + epochs, number


def open_loader(run: Run, source: Source, loading: Loading | None = None) -> Loader:
    """Open a loader of exactly the views that the run's method reads, in an `EndlessOrder`.

    Without `loading`, the recipe's settings are used.
    """
    recipe = run.recipe
    order = recipe.order_of(source, kind=EndlessOrder)
    return open_views(
        source,
        recipe.views,
        run.method.reads,
        order,
        device=run.device,
        dtype=run.dtype,
        loading=loading or recipe.loading,
    )


def prefetched_batches(loader: Loader) -> int:
    """An upper limit on the batches that a backend prefetches. DALI's has two queues of them."""
    return 3 * loader.job.loading.prefetch_batches + 2


@contextmanager
def skip_prefetched(loader: Loader) -> Iterator[Iterator[Batch]]:
    """The loader's batches, without those that it may have prefetched before the measurement.

    The first `next` reads and drops the prefetched batches.
    """
    with closing(loader.batches(0)) as batches:
        yield islice(batches, prefetched_batches(loader), None)


def by_step(loader: Loader, batches: Iterator[Batch]) -> Iterator[Batch]:
    """The last batch of every optimiser step. The other batches are dropped."""
    accumulate = loader.job.order.accumulate
    return islice(batches, accumulate - 1, None, accumulate)


def median_ratio(times: list[float], other_times: list[float]) -> float:
    """The median of time / other time. The two times of a pair were measured close together."""
    return statistics.median(a / b for a, b in zip(times, other_times, strict=True))
