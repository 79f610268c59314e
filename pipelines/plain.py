"""The images for evaluation: resized, cropped and normalised in the same way for all backends."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

from rsa_fast.pipelines.machine import loader_threads
from rsa_fast.pipelines.scan import OnBadImage
from rsa_fast.pipelines.sources import Source
from rsa_fast.pipelines.views import ViewSpec

log = logging.getLogger("rsa_fast")

AHEAD = 2  # batches that are decoded before they are needed

# If the ratio of an image's sides is larger, it is cropped and resized in one operation, which
# gives the same pixels up to rounding. Otherwise an image of 2 x 30,000 px takes 4.6 GB for a crop
# of 224 px.
MAX_ASPECT_RATIO = 32


def plain_image(image: np.ndarray, size_px: int, resize_px: int | None) -> np.ndarray:
    """Resize and crop an image `(H, W, 3)` uint8 to `(size_px, size_px, 3)` uint8.

    Its short side is resized to `resize_px` (bilinear), then the centre is cropped. If `resize_px`
    is None, only an image smaller than the crop is resized. It is enlarged to fill the crop.
    """
    short_px = min(image.shape[:2])
    resize_px = resize_px or max(short_px, size_px)
    if image.shape[:2] == (size_px, size_px) and resize_px == size_px:
        return image
    pil = Image.fromarray(image)
    if resize_px != short_px and max(pil.size) > MAX_ASPECT_RATIO * short_px:
        # The window of the crop in pixels of the image, with the roundings of the two calls below.
        windows = []
        for side in pil.size:
            resized = int(resize_px * side / short_px)
            first = round((resized - size_px) / 2)
            windows.append((first * side / resized, (first + size_px) * side / resized))
        (left, right), (top, bottom) = windows
        box = left, top, right, bottom
        return np.asarray(pil.resize((size_px, size_px), Image.Resampling.BILINEAR, box=box))
    if resize_px != short_px:
        pil = F.resize(pil, resize_px)
    return np.asarray(F.center_crop(pil, [size_px, size_px]))


class PlainImages:
    """One pass over a split in its own order, without augmentation.

    Yields `(images (B, 3, S, S), labels (B,))` on the device. The images are normalised and in
    `dtype`. With several ranks, each reads every `world_size`-th image, starting at `rank`. With 0
    `threads`, a rank decodes on its share of the cores (`machine.loader_threads`). With
    `on_bad_image` "skip", an image that cannot be read is black and its label is -1. Otherwise
    ValueError is raised. It is also raised if images would be resized to less than the crop.
    """

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        resize_px: int | None,
        batch_size: int,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        rank: int = 0,
        world_size: int = 1,
        on_bad_image: OnBadImage = "stop",
    ) -> None:
        if resize_px and resize_px < spec.size_px:
            raise ValueError(
                f"images resized to {resize_px} px do not fill the centre crop of {spec.size_px} px"
            )
        self.source, self.size_px, self.resize_px = source, spec.size_px, resize_px
        self.batch_size, self.device, self.dtype = batch_size, device, dtype
        self.threads = threads or loader_threads()
        self.ids = range(rank, len(source.manifest), world_size)
        self.on_bad_image, self.bad = on_bad_image, dict[int, str]()
        self.mean, self.std = (
            torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (spec.mean, spec.std)
        )

    @property
    def transform(self) -> str:
        """A description of how an image is changed before it is normalised."""
        resize = f"short side to {self.resize_px} px, " if self.resize_px else ""
        return f"{resize}centre crop {self.size_px} px"

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        labels = torch.from_numpy(self.source.manifest.labels)

        def read(sample: int) -> np.ndarray:
            try:
                return plain_image(self.source.read(sample), self.size_px, self.resize_px)
            except ValueError as error:
                if self.on_bad_image == "stop":
                    raise
                if sample not in self.bad:
                    log.warning(f"left out: {error}")
                self.bad[sample] = str(error)
                return np.zeros((self.size_px, self.size_px, 3), np.uint8)

        with ThreadPoolExecutor(self.threads) as pool:
            batches = (
                self.ids[first : first + self.batch_size]
                for first in range(0, len(self.ids), self.batch_size)
            )
            # The threads decode the next batches while the encoder works on this one.
            ahead = deque((ids, pool.map(read, ids)) for ids in islice(batches, AHEAD))
            while ahead:
                ids, decoded = ahead.popleft()
                pixels = torch.from_numpy(np.stack(list(decoded)))
                ahead.extend((ids, pool.map(read, ids)) for ids in islice(batches, 1))
                if self.device.type == "cuda":
                    pixels = pixels.pin_memory()  # so that the copy does not wait for the encoder
                pixels = pixels.to(self.device, non_blocking=True)
                images = (pixels.permute(0, 3, 1, 2) / 255 - self.mean) / self.std
                batch_labels = labels[ids].clone()
                batch_labels[[i for i, sample in enumerate(ids) if sample in self.bad]] = -1
                yield (
                    images.to(self.dtype, memory_format=torch.channels_last),
                    batch_labels.to(self.device),
                )
