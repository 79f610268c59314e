"""The dice: every random choice about a view, drawn once, by a counter-based hash.

    draw(seed=0, epoch=3, ids=np.arange(256), spec=spec, sizes=manifest.sizes[:256])  ->  (256, 2) array of VIEW_PARAMS

The choice depends on (seed, epoch, sample id, crop, draw) and on nothing else: no generator state exists, so the same
views come out whatever the batch split, the number of ranks, threads or the backend, and a run resumes from its step.
Nothing else in the project draws an augmentation; backends only apply what stands here.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from pipelines.views import ViewSpec

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
ORDERS = np.array(
    list(permutations(range(4))), np.int8
)  # (24, 4): the orders of the four jitter operations
CROP_TRIES = 10  # torchvision's RandomResizedCrop.get_params

VIEW_PARAMS = np.dtype(
    [
        ("top", "i4"),  # crop window in source pixels
        ("left", "i4"),
        ("height", "i4"),
        ("width", "i4"),
        ("flip", "?"),
        ("jitter", "?"),
        ("order", "i1", 4),  # order[k] is the operation applied k-th
        ("factor", "f4", 4),  # by operation; hue in turns
        ("grayscale", "?"),
        ("blur_sigma_px", "f4"),  # 0: no blur
    ]
)

# One fixed counter per choice: adding a choice at the end moves no other.
FLIP, JITTER, ORDER, GRAYSCALE, BLUR, SIGMA, TOP, LEFT = range(8)
FACTOR, AREA, ASPECT = 8, 16, 32  # ranges of 4, CROP_TRIES, CROP_TRIES counters
DRAWS = ASPECT + CROP_TRIES


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Splitmix64's finaliser (Steele et al. 2014) on uint64 of any shape: every input bit flips half the output bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x


def keys(seed: int, epoch: int, ids: np.ndarray) -> NDArray[np.uint64]:
    """`(n,)` uint64, one well-mixed key per sample of an epoch."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.asarray([seed], np.uint64) + golden)
        key = mix(key + (np.uint64(epoch) + np.uint64(1)) * golden)
        return mix(key + (np.asarray(ids).astype(np.uint64) + np.uint64(1)) * golden)


def uniforms(seed: int, epoch: int, ids: np.ndarray, draws: int) -> np.ndarray:
    """`(n, 2, draws)` float64 in [0, 1): for each sample and crop, one number per draw."""
    streams = 2 * draws
    counter = np.arange(1, streams + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    bits = mix(keys(seed, epoch, ids)[:, None] + counter)
    numbers: np.ndarray = (bits >> np.uint64(11)) * 2.0**-53
    return numbers.reshape(len(ids), 2, draws)


def draw(seed: int, epoch: int, ids: np.ndarray, spec: ViewSpec, sizes: np.ndarray) -> np.ndarray:
    """The parameters of both crops of each sample: `(n, 2)` of `VIEW_PARAMS`.

    `ids` `(n,)` are sample ids of the dataset, `sizes` `(n, 2)` their height and width in pixels. Distributions are
    torchvision's RandomResizedCrop, RandomHorizontalFlip, ColorJitter, RandomGrayscale and a blur of random sigma.
    """
    u = uniforms(seed, epoch, ids, DRAWS)
    params = np.zeros((len(ids), 2), VIEW_PARAMS)
    params["top"], params["left"], params["height"], params["width"] = crop_windows(u, spec, sizes)
    params["flip"] = u[..., FLIP] < spec.flip_p
    params["jitter"] = u[..., JITTER] < spec.jitter_p
    params["order"] = ORDERS[(u[..., ORDER] * len(ORDERS)).astype(np.intp)]
    strength = np.array([spec.brightness, spec.contrast, spec.saturation, spec.hue])
    centre = np.array([1, 1, 1, 0])
    params["factor"] = centre + strength * (2 * u[..., FACTOR : FACTOR + 4] - 1)
    params["grayscale"] = u[..., GRAYSCALE] < spec.grayscale_p
    low, high = spec.blur_sigma_px
    params["blur_sigma_px"] = np.where(
        u[..., BLUR] < spec.blur_p, low + (high - low) * u[..., SIGMA], 0
    )
    return params


def crop_windows(u: np.ndarray, spec: ViewSpec, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Top, left, height, width, each `(n, 2)`: the first of ten tries that fits, else the largest central window."""
    image_h, image_w = (
        np.asarray(sizes)[:, None, axis].astype(np.float64) for axis in (0, 1)
    )  # (n, 1)
    low, high = spec.crop_area
    area = (image_h * image_w)[..., None] * (low + (high - low) * u[..., AREA : AREA + CROP_TRIES])
    log_low, log_high = np.log(spec.crop_aspect)
    aspect = np.exp(log_low + (log_high - log_low) * u[..., ASPECT : ASPECT + CROP_TRIES])
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (
        (widths > 0)
        & (widths <= image_w[..., None])
        & (heights > 0)
        & (heights <= image_h[..., None])
    )
    first = fits.argmax(-1)[..., None]
    accepted = fits.any(-1)
    # torchvision's fallback: the whole image, narrowed to the nearest allowed aspect
    central_w = np.minimum(image_w, np.rint(image_h * spec.crop_aspect[1]))
    central_h = np.minimum(image_h, np.rint(image_w / spec.crop_aspect[0]))
    width = np.where(accepted, np.take_along_axis(widths, first, -1)[..., 0], central_w)
    height = np.where(accepted, np.take_along_axis(heights, first, -1)[..., 0], central_h)
    top = np.floor(np.where(accepted, u[..., TOP] * (image_h - height + 1), (image_h - height) / 2))
    left = np.floor(np.where(accepted, u[..., LEFT] * (image_w - width + 1), (image_w - width) / 2))
    return top, left, height, width
