"""The positions of a split's images in a few big files, and advice to the system about them.

The operating system only reads ahead in a file that is read from front to back. Training reads the
images in a random order. It therefore advises the system which images will be needed soon
(`read_soon`) and which will not (`drop`). Neither changes the result of a later read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO

import numpy as np

from rsa_fast.pipelines.order import Blocks

# Linux cuts a longer request to the read-ahead of the device, which is 128 KiB by default.
REQUEST_BYTES = 128 * 1024


@dataclass(frozen=True, eq=False)
class Extents:
    """The file, offset and size in bytes of every image, each `(N,)`.

    `opened(number)` returns the open file of a number. The file stays open for as long as the
    caller has a reference to it.
    """

    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    opened: Callable[[int], FileIO]

    @cached_property
    def stored(self) -> np.ndarray:
        """The sample ids `(N,)` in the order in which they are stored."""
        return np.lexsort((self.offset, self.file))

    @cached_property
    def place(self) -> np.ndarray:
        """The position `(N,)` of each sample id in `stored`."""
        return np.argsort(self.stored)

    def subset(self, ids: np.ndarray) -> Extents:
        """The extents of the images `ids` `(n,)`, which get the sample ids 0 to n - 1."""
        return Extents(self.file[ids], self.offset[ids], self.size[ids], self.opened)

    def blocks(self, block_bytes: int, window_bytes: int) -> Blocks:
        """The blocks that begin at multiples of `block_bytes` in each file.

        An image belongs to the block in which its first byte is. The number of images in a window
        is `window_bytes` divided by the average size of an image.
        """
        cells = self.file[self.stored], self.offset[self.stored] // block_bytes
        begins = np.any([np.diff(cell, prepend=-1) != 0 for cell in cells], 0)
        mean_bytes = self.size.mean()
        return Blocks(self.stored, np.cumsum(begins) - 1, max(1, int(window_bytes // mean_bytes)))

    def sorted_by(self, labels: np.ndarray) -> float:
        """How far the images are stored in the order of their `labels` `(N,)`.

        It is Cohen's kappa between the labels of neighbours: 0 for a random order, 1 if all images
        of a class are stored together.
        """
        stored = labels[self.stored]
        by_chance = float(np.square(np.unique(labels, return_counts=True)[1] / len(labels)).sum())
        alike = float((stored[1:] == stored[:-1]).mean())
        return (alike - by_chance) / (1 - by_chance) if by_chance < 1 else 0.0

    def runs(self, ids: np.ndarray) -> Iterator[tuple[int, int, int]]:
        """The images `ids` `(n,)` as runs of bytes: file, first byte, and the byte after the last.

        Bytes between two images that are stored one after the other belong to their run.
        """
        place = np.sort(self.place[ids])
        samples = self.stored[place]
        file, start = self.file[samples], self.offset[samples]
        first = (np.diff(place, prepend=-2) != 1) | (np.diff(file, prepend=-1) != 0)
        last = (np.diff(place, append=-2) != 1) | (np.diff(file, append=-1) != 0)
        end = start + self.size[samples]
        return zip(file[first].tolist(), start[first].tolist(), end[last].tolist(), strict=True)

    def read_soon(self, ids: np.ndarray) -> Iterator[None]:
        """Ask the system to read these images into memory, one run for each `next`.

        The call returns before they are read, unless the queue of the disk is full.
        """
        for number, start, end in self.runs(ids):
            file = self.opened(number)
            for first in range(start, end, REQUEST_BYTES):
                length = min(REQUEST_BYTES, end - first)
                os.posix_fadvise(file.fileno(), first, length, os.POSIX_FADV_WILLNEED)
            yield

    def drop(self, ids: np.ndarray) -> Iterator[None]:
        """Ask the system to drop these images from memory, one run for each `next`."""
        for number, start, end in self.runs(ids):
            file = self.opened(number)
            os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)
            yield


def joined_extents(parts: Sequence[Extents]) -> Extents:
    """The extents of the images of several sources, one after the other."""
    counts = [int(part.file.max(initial=-1)) + 1 for part in parts]
    starts = np.cumsum([0, *counts])

    def opened(number: int) -> FileIO:
        part = int(np.searchsorted(starts, number, side="right")) - 1
        return parts[part].opened(number - int(starts[part]))

    return Extents(
        np.concatenate([part.file + start for part, start in zip(parts, starts, strict=False)]),
        np.concatenate([part.offset for part in parts]),
        np.concatenate([part.size for part in parts]),
        opened,
    )
