"""Read the windows of a block order on a thread, each before the batches that need it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from rsa_fast.pipelines.extents import Extents
from rsa_fast.pipelines.order import Order


class ReadAhead:
    """Reads one rank's part of the current window and of the next one, on its own thread.

    Each rank reads its own lanes, so the ranks of a node together read each window once. The
    previous window is dropped, so two windows are in memory at any time. The last window of an
    epoch is followed by the first window of the next epoch.
    """

    def __init__(self, extents: Extents, order: Order) -> None:
        self.extents, self.order = extents, order
        self.window: int | None = None
        self.pool = ThreadPoolExecutor(1, "read-ahead")

    def reach(self, epoch: int, number: int) -> None:
        """Report that this rank is about to take batch `number` of `epoch`. Returns at once."""
        window = self.order.window(epoch, number)
        if window != self.window:
            self.window = window
            self.pool.submit(self.walk, window)

    def walk(self, window: int) -> None:
        """Ask the system to read the windows. Stop early if another window is reached."""
        for _ in self.advice(window):
            if window != self.window:
                return

    def advice(self, window: int) -> Iterator[None]:
        """Advise the system when a window is reached, one run of bytes for each `next`."""
        needed = [self.order.window_ids(each) for each in (window, window + 1)]
        over = self.order.window_ids(window - 1) if window else needed[0]
        return chain(
            self.extents.drop(np.setdiff1d(over, np.concatenate(needed))),
            *map(self.extents.read_soon, needed),
        )

    def close(self) -> None:
        """End the thread."""
        self.window = None
        self.pool.shutdown()
