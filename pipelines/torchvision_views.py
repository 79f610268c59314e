"""The reference: views by PIL and torchvision, op by op, with the parameters `draws` gives. Slow, obvious, the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader

from pipelines.draws import draw
from pipelines.order import Order
from pipelines.sources import Source
from pipelines.views import VIEWS, Batch, ViewSpec

JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)  # by draws' operation numbers


def weak_view(image: Image.Image, p: np.void, size_px: int) -> Image.Image:
    """Stage 1 of `draws.VIEW_PARAMS` row `p`."""
    window = (int(p[name]) for name in ("top", "left", "height", "width"))
    view = F.resized_crop(image, *window, [size_px, size_px])
    return F.hflip(view) if p["flip"] else view


def aggressive_view(weak: Image.Image, p: np.void) -> Image.Image:
    """Stage 2, on the 8-bit result of stage 1."""
    if p["jitter"]:
        for operation in p["order"]:
            weak = JITTER[operation](weak, float(p["factor"][operation]))
    if p["grayscale"]:
        weak = F.rgb_to_grayscale(weak, num_output_channels=3)
    if p["blur_sigma_px"] > 0:
        weak = weak.filter(ImageFilter.GaussianBlur(float(p["blur_sigma_px"])))
    return weak


class TorchvisionViews:
    """Loader with worker processes, one batch per worker; see `pipelines.open_views` for the arguments."""

    def __init__(
        self,
        source: Source,
        spec: ViewSpec,
        reads: frozenset[str],
        order: Order,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
    ) -> None:
        self.source, self.spec, self.reads, self.order = source, spec, reads, order
        self.device, self.dtype, self.threads = device, dtype, threads

    def __len__(self) -> int:
        return len(self.order)

    def __enter__(self) -> TorchvisionViews:
        return self

    def __exit__(self, *_: object) -> None:
        pass  # the workers belong to one epoch's iterator and end with it

    def batches(self, epoch: int, step: int = 0) -> Iterator[Batch]:
        """The batches of `epoch` from `step` on."""
        keys = [(epoch, self.order.ids(epoch, s)) for s in range(step, len(self))]
        for batch in DataLoader(self, sampler=keys, batch_size=None, num_workers=self.threads):
            moved = {name: getattr(batch, name) for name in ("label", *self.reads)}
            yield Batch(**{name: tensor.to(self.device, non_blocking=True) for name, tensor in moved.items()})

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Batch:
        epoch, ids = key
        manifest = self.source.manifest
        params = draw(self.order.seed, epoch, ids, self.spec, manifest.sizes[ids])
        views = {name: [] for name in VIEWS if name in self.reads}
        for sample, pair in zip(ids, params, strict=True):
            image = Image.fromarray(self.source.read(sample))
            for crop, p in enumerate(pair, start=1):
                if not {f"weak_{crop}", f"aggressive_{crop}"} & self.reads:
                    continue
                weak = weak_view(image, p, self.spec.size_px)
                if f"weak_{crop}" in self.reads:
                    views[f"weak_{crop}"].append(self.to_tensor(weak))
                if f"aggressive_{crop}" in self.reads:
                    views[f"aggressive_{crop}"].append(self.to_tensor(aggressive_view(weak, p)))
        stacked = {
            name: torch.stack(tensors).to(self.dtype, memory_format=torch.channels_last) for name, tensors in views.items()
        }
        return Batch(torch.from_numpy(manifest.labels[ids]), **stacked)

    def to_tensor(self, view: Image.Image) -> torch.Tensor:
        return F.normalize(F.to_tensor(view), self.spec.mean, self.spec.std)
