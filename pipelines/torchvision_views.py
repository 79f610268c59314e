"""The reference: views by PIL and torchvision, op by op, with the parameters `draws` gives. Slow, obvious, the oracle."""

from __future__ import annotations

import signal
from collections.abc import Generator

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter
from torch.utils.data import DataLoader, Dataset

from pipelines.loading import Loader
from pipelines.views import VIEWS, Batch

Delivery = tuple[Batch | ValueError, dict[int, str]]  # what a worker hands over: `__getitem__`
JITTER = (
    F.adjust_brightness,
    F.adjust_contrast,
    F.adjust_saturation,
    F.adjust_hue,
)  # by draws' operation numbers


def weak_view(image: Image.Image, p: np.void, size_px: int) -> Image.Image:
    """Stage 1 of `draws.VIEW_PARAMS` row `p`."""
    window = (int(p[name]) for name in ("top", "left", "height", "width"))
    view: Image.Image = F.resized_crop(image, *window, [size_px, size_px])
    if p["flip"]:
        view = F.hflip(view)
    return view


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


def ignore_signals(worker: int) -> None:
    """A signal to all processes is for the one that trains, which needs this one to finish its step."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TorchvisionViews(Loader, Dataset[Delivery]):
    """Loader with worker processes, one batch per worker; the workers belong to one epoch's iterator and end with it."""

    def batches(self, epoch: int, step: int = 0) -> Generator[Batch]:
        keys = [(epoch, self.job.order.ids(epoch, s)) for s in range(step, len(self))]
        deliveries = DataLoader(
            self,
            sampler=keys,
            batch_size=None,
            num_workers=self.job.threads,
            worker_init_fn=ignore_signals,
        )
        for batch, skipped in deliveries:
            for sample, fault in skipped.items():
                self.skip(sample, fault)
            if isinstance(batch, ValueError):
                raise batch
            device = self.job.device
            views = {name: view.to(device, non_blocking=True) for name, view in batch.views.items()}
            yield Batch(batch.label.to(device, non_blocking=True), views)

    def close(self) -> None:
        """Nothing to do: the worker processes end with their epoch's iterator."""

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Delivery:
        """What a worker hands over: a batch or, without the traceback that raising it there would add, why there is none."""
        try:
            return self.make(*key), dict(self.skipped)
        except ValueError as error:
            return error, dict(self.skipped)

    def make(self, epoch: int, ids: np.ndarray) -> Batch:
        job = self.job
        views: dict[str, list[torch.Tensor]] = {name: [] for name in VIEWS if name in job.reads}
        samples, pixels = zip(
            *(self.readable(int(sample), job.read) for sample in ids), strict=True
        )
        ids = np.array(samples)
        for image, pair in zip(map(Image.fromarray, pixels), job.params(epoch, ids), strict=True):
            for crop in job.crops:
                weak = weak_view(image, pair[crop], job.spec.size_px)
                if VIEWS[crop] in views:
                    views[VIEWS[crop]].append(self.to_tensor(weak))
                if VIEWS[2 + crop] in views:
                    views[VIEWS[2 + crop]].append(self.to_tensor(aggressive_view(weak, pair[crop])))
        stacked = {
            name: torch.stack(tensors).to(job.dtype, memory_format=torch.channels_last)
            for name, tensors in views.items()
        }
        return Batch(torch.from_numpy(job.source.manifest.labels[ids]), stacked)

    def to_tensor(self, view: Image.Image) -> torch.Tensor:
        spec = self.job.spec
        normalised: torch.Tensor = F.normalize(F.to_tensor(view), spec.mean, spec.std)
        return normalised
