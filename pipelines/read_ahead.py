"""The thread that reads the windows of a block order, each before the batches that need it."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from rsa_fast.pipelines.extents import Extents
from rsa_fast.pipelines.order import Order


class ReadAhead:
    """Reads what one rank needs of the current window and the next one, on a thread of its own.

    Together, the ranks of a node read each window once, as each rank reads lanes of its own. The
    window before is dropped from memory, so that two windows are there at any time. The end of an
    epoch is followed by the first window of the next one.
    """

    def __init__(self, extents: Extents, order: Order) -> None:
        self.extents, self.order = extents, order
        self.window: int | None = None
        self.pool = ThreadPoolExecutor(1, "read-ahead")

    def reach(self, epoch: int, number: int) -> None:
        """Say that this rank is about to take batch `number` of `epoch`. Returns at once."""
        window = self.order.window(epoch, number)
        if window != self.window:
            self.window = window
            self.pool.submit(self.walk, window)

    def walk(self, window: int) -> None:
        """Ask the system for the windows, until it is done or another window is reached."""
        for _ in self.advice(window):
            if window != self.window:
                return

    def advice(self, window: int) -> Iterator[None]:
        """What is asked of the system when a window is reached, one run of bytes at a time."""
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
