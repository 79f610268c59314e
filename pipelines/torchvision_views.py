"""The reference backend: PIL and torchvision make the views, one operation after another.

The parameters are those of `draws`. This backend is slow, but easy to check. The tests compare all
others with it.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch.utils.data import DataLoader, Dataset

from rsa_fast.pipelines.draws import RAND_FILL, RandOp
from rsa_fast.pipelines.loading import Loader
from rsa_fast.pipelines.views import Batch, Interpolation, patch_px, view_name
from rsa_fast.pipelines.workers import FORKS, Parcel

# The rotations by one, two and three quarters, counter-clockwise.
TURNS = (Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
INTERPOLATIONS: dict[Interpolation, F.InterpolationMode] = {
    "bilinear": F.InterpolationMode.BILINEAR,
    "bicubic": F.InterpolationMode.BICUBIC,
}
# The jitter operations in the order of their numbers in `draws`.
JITTER = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


def weak_view(image: Image.Image, p: np.void, size_px: int) -> Image.Image:
    """The weak stage: the crop, flips and turn of `p`, a row of `draws.VIEW_PARAMS`."""
    window = (int(p[name]) for name in ("top", "left", "height", "width"))
    interpolation = INTERPOLATIONS["bicubic" if p["bicubic"] else "bilinear"]
    view: Image.Image = F.resized_crop(image, *window, [size_px, size_px], interpolation)
    if p["flip"]:
        view = F.hflip(view)
    if p["vertical_flip"]:
        view = F.vflip(view)
    if turns := int(p["quarter_turns"]):
        view = view.transpose(TURNS[turns - 1])
    return view


def aggressive_view(weak: Image.Image, p: np.void) -> Image.Image:
    """The aggressive stage of the 8-bit weak view: jitter and all operations after it."""
    if p["jitter"]:
        for operation in p["order"]:
            weak = JITTER[operation](weak, float(p["factor"][operation]))
    if p["grayscale"]:
        weak = F.rgb_to_grayscale(weak, num_output_channels=3)
    if p["blur_sigma_px"] > 0:
        weak = weak.filter(ImageFilter.GaussianBlur(float(p["blur_sigma_px"])))
    if p["solarize"]:
        weak = F.solarize(weak, 128)
    return rand_augment(weak, p)


def affine(view: Image.Image, how: Image.Resampling, *matrix: float) -> Image.Image:
    """Take each pixel from the place in `view` to which the matrix maps its own place."""
    return view.transform(view.size, Image.Transform.AFFINE, matrix, how, fillcolor=RAND_FILL)


# Each function takes a view, the operation's value and the interpolation, and returns a view.
RAND_AUGMENT: dict[RandOp, Callable[[Image.Image, float, Image.Resampling], Image.Image]] = {
    RandOp.AUTO_CONTRAST: lambda view, _, __: ImageOps.autocontrast(view),
    RandOp.EQUALIZE: lambda view, _, __: ImageOps.equalize(view),
    RandOp.INVERT: lambda view, _, __: ImageOps.invert(view),
    RandOp.POSTERIZE: lambda view, bits, _: ImageOps.posterize(view, int(bits)),
    RandOp.SOLARIZE: lambda view, threshold, _: ImageOps.solarize(view, int(threshold)),
    RandOp.SOLARIZE_ADD: lambda view, added, _: view.point(
        [min(level + int(added), 255) if level < 128 else level for level in range(256)] * 3
    ),
    RandOp.COLOR: lambda view, factor, _: ImageEnhance.Color(view).enhance(factor),
    RandOp.CONTRAST: lambda view, factor, _: ImageEnhance.Contrast(view).enhance(factor),
    RandOp.BRIGHTNESS: lambda view, factor, _: ImageEnhance.Brightness(view).enhance(factor),
    RandOp.SHARPNESS: lambda view, factor, _: ImageEnhance.Sharpness(view).enhance(factor),
    RandOp.ROTATE: lambda view, degrees, how: view.rotate(degrees, how, fillcolor=RAND_FILL),
    RandOp.SHEAR_X: lambda view, slope, how: affine(view, how, 1, slope, 0, 0, 1, 0),
    RandOp.SHEAR_Y: lambda view, slope, how: affine(view, how, 1, 0, 0, slope, 1, 0),
    RandOp.TRANSLATE_X: lambda view, by, how: affine(view, how, 1, 0, by * view.width, 0, 1, 0),
    RandOp.TRANSLATE_Y: lambda view, by, how: affine(view, how, 1, 0, 0, 0, 1, by * view.height),
}


def rand_augment(view: Image.Image, p: np.void) -> Image.Image:
    """The operations of RandAugment in `p`, a row of `draws.VIEW_PARAMS`."""
    for operation, value, bicubic in zip(
        p["rand_op"], p["rand_value"], p["rand_bicubic"], strict=True
    ):
        if operation:
            how = Image.Resampling.BICUBIC if bicubic else Image.Resampling.BILINEAR
            view = RAND_AUGMENT[RandOp(operation)](view, float(value), how)
    return view


def patches(weak: torch.Tensor, p: np.void) -> torch.Tensor:
    """The nine patches `(9, 3, P, P)` of a weak view `(3, S, S)`, one of each cell, row by row."""
    cell_px = weak.shape[1] // 3
    patch = []
    for cell, (y, x) in enumerate(p["patch_offset"]):
        top, left = cell // 3 * cell_px + int(y), cell % 3 * cell_px + int(x)
        patch.append(F.crop(weak, top, left, *2 * [patch_px(weak.shape[1])]))
    return torch.stack(patch)


def channels_last(views: torch.Tensor) -> torch.Tensor:
    """Views `(B, 3, S, S)` or patches `(B, 9, 3, P, P)` in channels_last memory format."""
    images = views.flatten(0, -4).contiguous(memory_format=torch.channels_last)
    return images.view_as(views)


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
            multiprocessing_context=FORKS,
        )
        batch: Batch | ValueError
        for batch, skipped in deliveries:
            for sample, fault in skipped.items():
                self.skip(sample, fault)
            if isinstance(batch, ValueError):
                raise batch
            device = self.job.device
            views = {name: view.to(device, non_blocking=True) for name, view in batch.views.items()}
            label, ids = batch.label.to(device, non_blocking=True), batch.ids
            yield Batch(label, views, None if ids is None else ids.to(device, non_blocking=True))

    def close(self) -> None:
        """Nothing to do: the worker processes end with their epoch's iterator."""

    def __getitem__(self, epoch_and_ids: tuple[int, np.ndarray]) -> Parcel:
        """What a worker returns for one batch: the batch or the error that occurred, and `skipped`.

        An error raised in a worker would get the worker's traceback added to its message.
        """
        try:
            batch = self.make(*epoch_and_ids)
            return Parcel((batch, dict(self.skipped)), batch.tensors)
        except ValueError as error:
            return Parcel((error, dict(self.skipped)), [])

    def make(self, epoch: int, ids: np.ndarray) -> Batch:
        """The batch of the samples `ids`, on the CPU."""
        job = self.job
        views: dict[str, list[torch.Tensor]] = {n: [] for n in job.spec.views if n in job.reads}
        samples, pixels = zip(*(self.readable(i, job.read) for i in ids.tolist()), strict=True)
        ids = np.array(samples)
        for image, params in zip(map(Image.fromarray, pixels), job.params(epoch, ids), strict=True):
            for crop in job.crops:
                p = params[crop]
                weak = weak_view(image, p, job.spec.crops[crop].size_px)
                if (name := view_name("weak", crop)) in views:
                    views[name].append(self.to_tensor(weak))
                if (name := view_name("aggressive", crop)) in views:
                    views[name].append(self.to_tensor(aggressive_view(weak, p)))
                if (name := view_name("patches", crop)) in views:
                    views[name].append(patches(self.to_tensor(weak), p))
        stacked = {
            name: channels_last(torch.stack(tensors).to(job.dtype))
            for name, tensors in views.items()
        }
        label = torch.from_numpy(job.source.manifest.labels[ids])
        return Batch(label, stacked, torch.from_numpy(ids))

    def to_tensor(self, view: Image.Image) -> torch.Tensor:
        spec = self.job.spec
        normalised: torch.Tensor = F.normalize(F.to_tensor(view), spec.mean, spec.std)
        return normalised
