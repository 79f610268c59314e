"""Images for evaluation, the same for every backend: optional resize, centre crop, normalise."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

from pipelines.sources import Source
from pipelines.views import ViewSpec


def plain_image(image: np.ndarray, size_px: int, resize_px: int | None) -> np.ndarray:
    """Resize and crop an image `(H, W, 3)` uint8 to `(size_px, size_px, 3)` uint8.

    Its short side is resized to `resize_px` (bilinear), then the centre is cropped. With None the
    image is not resized, unless it is smaller than the crop: then it is enlarged to fill it.
    """
    short_px = min(image.shape[:2])
    resize_px = resize_px or max(short_px, size_px)
    if image.shape[:2] == (size_px, size_px) and resize_px == size_px:
        return image
    pil = Image.fromarray(image)
    if resize_px != short_px:
        pil = F.resize(pil, resize_px)
    return np.asarray(F.center_crop(pil, [size_px, size_px]))


class PlainImages:
    """One pass over a split in its own order, without augmentation.

    Yields `(images (B, 3, S, S), labels (B,))` on the device. The images are normalised and in
    `dtype`. With several ranks, each reads every `world_size`-th image, starting at `rank`. Raises
    ValueError when the images would be resized to less than the crop.
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
    ) -> None:
        if resize_px and resize_px < spec.size_px:
            raise ValueError(
                f"images resized to {resize_px} px do not fill the centre crop of {spec.size_px} px"
            )
        self.source, self.size_px, self.resize_px = source, spec.size_px, resize_px
        self.batch_size, self.device, self.dtype, self.threads = batch_size, device, dtype, threads
        self.ids = range(rank, len(source.manifest), world_size)
        self.mean, self.std = (
            torch.tensor(x, device=device).view(1, 3, 1, 1) for x in (spec.mean, spec.std)
        )

    @property
    def transform(self) -> str:
        """A description in words of what is done to an image before it is normalised."""
        resize = f"short side to {self.resize_px} px, " if self.resize_px else ""
        return f"{resize}centre crop {self.size_px} px"

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        def read(sample: int) -> np.ndarray:
            return plain_image(self.source.read(sample), self.size_px, self.resize_px)

        labels = torch.from_numpy(self.source.manifest.labels)
        with ThreadPoolExecutor(self.threads) as pool:
            for first in range(0, len(self.ids), self.batch_size):
                ids = self.ids[first : first + self.batch_size]
                pixels = torch.from_numpy(np.stack(list(pool.map(read, ids)))).to(self.device)
                images = (pixels.permute(0, 3, 1, 2) / 255 - self.mean) / self.std
                yield (
                    images.to(self.dtype, memory_format=torch.channels_last),
                    labels[ids].to(self.device),
                )
