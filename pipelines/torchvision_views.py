"""The reference: views by PIL and torchvision, one operation after another.

The parameters are those of `draws`. This backend is slow and obvious. The tests compare all others
with it.
"""

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
from pipelines.workers import Parcel

# The rotations by one, two and three quarters, counter-clockwise.
TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
# The jitter operations in the order of their numbers in `draws`.
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def weak_view(image: Image.Image, p: np.void, size_px: int) -> Image.Image:
    """The weak stage: the crop, flips and turn of `p`, a row of `draws.VIEW_PARAMS`."""
    window = (int(p[name]) for name in ("top", "left", "height", "width"))
    view: Image.Image = F.resized_crop(image, *window, [size_px, size_px])
    if p["flip"]:
        view = F.hflip(view)
    if p["vertical_flip"]:
        view = F.vflip(view)
    if turns := int(p["quarter_turns"]):
        view = view.transpose(TURNS[turns - 1])
    return view


def aggressive_view(weak: Image.Image, p: np.void) -> Image.Image:
    """The aggressive stage: jitter, grayscale and blur of the 8-bit weak view."""
    if p["jitter"]:
        for operation in p["order"]:
            weak = JITTER[operation](weak, float(p["factor"][operation]))
    if p["grayscale"]:
        weak = F.rgb_to_grayscale(weak, num_output_channels=3)
    if p["blur_sigma_px"] > 0:
        weak = weak.filter(ImageFilter.GaussianBlur(float(p["blur_sigma_px"])))
    return weak


def ignore_signals(worker: int) -> None:
    """Ignore signals that were sent to all processes of a job.

    Only the training process handles them, and it needs this worker to finish its step.
    """
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class TorchvisionViews(Loader, Dataset[Parcel]):
    """Loader with worker processes, each of which makes whole batches.

    The workers belong to the iterator of one epoch and end with it.
    """

    def load_batches(self, epoch: int, step: int) -> Generator[Batch]:
        epochs_and_ids = [(epoch, self.job.order.ids(epoch, s)) for s in range(step, len(self))]
        deliveries = DataLoader(
            self,
            sampler=epochs_and_ids,
            batch_size=None,
            num_workers=self.job.loading.threads,
            worker_init_fn=ignore_signals,
        )
        batch: Batch | ValueError
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

    def __getitem__(self, epoch_and_ids: tuple[int, np.ndarray]) -> Parcel:
        """What a worker returns for one batch: the batch or the error that occurred, and `skipped`.

        An error raised in a worker would get the worker's traceback added to its message.
        """
        try:
            batch = self.make(*epoch_and_ids)
            return Parcel((batch, dict(self.skipped)), [batch.label, *batch.views.values()])
        except ValueError as error:
            return Parcel((error, dict(self.skipped)), [])

    def make(self, epoch: int, ids: np.ndarray) -> Batch:
        """The batch of the samples `ids`, on the CPU."""
        job = self.job
        views: dict[str, list[torch.Tensor]] = {name: [] for name in VIEWS if name in job.reads}
        samples, pixels = zip(*(self.readable(i, job.read) for i in ids.tolist()), strict=True)
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
