"""The random parameters of every view, drawn once by a counter-based hash.

    params = draw(seed=0, epoch=3, ids=np.arange(256), spec=spec, sizes=manifest.sizes[:256])
    params.shape  # (256, 2), of VIEW_PARAMS

Each random number depends only on (seed, epoch, sample id, crop, number of the draw). There is no
generator with a state. Therefore the views are the same for every batch split, number of ranks,
number of threads and backend, and a run can resume from any step. Nothing else in the project draws
an augmentation: the backends only apply the parameters drawn here.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from pipelines.views import ViewSpec

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# (24, 4): every order of the four jitter operations.
ORDERS = np.array(list(permutations(range(4))), np.int8)
CROP_TRIES = 10  # as in torchvision's RandomResizedCrop.get_params

VIEW_PARAMS = np.dtype(
    [
        ("top", "i4"),  # these four are the crop window, in pixels of the image
        ("left", "i4"),
        ("height", "i4"),
        ("width", "i4"),
        ("flip", "?"),
        ("jitter", "?"),
        ("order", "i1", 4),  # order[k] is the number of the k-th jitter operation
        ("factor", "f4", 4),  # factor[n] belongs to operation n; the one of hue is in turns
        ("grayscale", "?"),
        ("blur_sigma_px", "f4"),  # 0 means no blur
        ("vertical_flip", "?"),  # after `flip`
        ("quarter_turns", "i1"),  # after both flips, counter-clockwise: 0, 1, 2 or 3
    ]
)

# Each draw has a fixed number. The second crop's numbers start at DRAWS, which therefore stays 42:
# with any other number, the views of every run would change. New draws get a seed of their own.
FLIP, JITTER, ORDER, GRAYSCALE, BLUR, SIGMA, TOP, LEFT = range(8)
FACTOR, AREA, ASPECT = 8, 16, 32  # the first of 4, CROP_TRIES and CROP_TRIES numbers
DRAWS = ASPECT + CROP_TRIES


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of Splitmix64 (Steele et al. 2014) on uint64 of any shape.

    Every bit of the input changes half of the output bits on average.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x


def hash_keys(seed: int, *numbers: int | np.ndarray) -> NDArray[np.uint64]:
    """The hash key of a seed and whole numbers: `(n,)` uint64, where the last of them is `(n,)`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.asarray([seed], np.uint64) + golden)
        for number in numbers:
            key = mix(key + (np.asarray(number).astype(np.uint64) + np.uint64(1)) * golden)
        return key


def sample_keys(seed: int, epoch: int, ids: np.ndarray) -> NDArray[np.uint64]:
    """One hash key for each sample of an epoch, `(n,)` uint64."""
    return hash_keys(seed, epoch, ids)


def uniforms(seed: int, epoch: int, ids: np.ndarray, draws: int) -> np.ndarray:
    """Random numbers `(n, 2, draws)` float64 in [0, 1): `draws` of them per sample and crop."""
    streams = 2 * draws
    counter = np.arange(1, streams + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = mix(sample_keys(seed, epoch, ids)[:, None] + counter)  # (n, 2 * draws)
    numbers: np.ndarray = (hashes >> np.uint64(11)) * 2.0**-53
    return numbers.reshape(len(ids), 2, draws)


def draw(seed: int, epoch: int, ids: np.ndarray, spec: ViewSpec, sizes: np.ndarray) -> np.ndarray:
    """The parameters of both crops of each sample: `(n, 2)` of `VIEW_PARAMS`.

    `ids` `(n,)` are the sample ids in the dataset, and `sizes` `(n, 2)` are their heights and
    widths in pixels. The distributions are those of torchvision's RandomResizedCrop,
    RandomHorizontalFlip, ColorJitter and RandomGrayscale, a blur of random sigma, and, where the
    spec has them, RandomVerticalFlip and a quarter turn of equal chances.
    """
    u = uniforms(seed, epoch, ids, DRAWS)  # (n, 2, DRAWS)
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
    sigma_px = low + (high - low) * u[..., SIGMA]
    params["blur_sigma_px"] = np.where(u[..., BLUR] < spec.blur_p, sigma_px, 0)
    if spec.vertical_flip_p > 0 or spec.quarter_turns:
        v = uniforms(seed ^ 0x7475726E73, epoch, ids, 2)  # (n, 2, 2)
        params["vertical_flip"] = v[..., 0] < spec.vertical_flip_p
        params["quarter_turns"] = 4 * v[..., 1] if spec.quarter_turns else 0
    return params


def mirrors(params: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The flips and turns as three choices: mirrored along x, along y, and then transposed.

    A turn of 90 degrees is a flip along x and a transposition, one of 180 degrees both flips, and
    one of 270 degrees a flip along y and a transposition. `params` are of `VIEW_PARAMS`, and the
    three bool arrays have their shape.
    """
    turns = params["quarter_turns"]
    along_x = params["flip"] ^ ((turns == 1) | (turns == 2))
    along_y = params["vertical_flip"] ^ (turns >= 2)
    return along_x, along_y, turns % 2 == 1


def batch_seed(seed: int, epoch: int, step: int, rank: int) -> int:
    """The seed of the generator that a function of the user's gets for one batch of one rank."""
    return int(hash_keys(seed ^ 0x6578747261, epoch, step, rank)[0])


def crop_windows(u: np.ndarray, spec: ViewSpec, sizes: np.ndarray) -> tuple[np.ndarray, ...]:
    """Top, left, height and width of the crop windows, each `(n, 2)`.

    A window is the first of ten tries that fits into the image. If none fits, it is the largest
    central window of an allowed aspect. `u` `(n, 2, DRAWS)` are the random numbers.
    """
    image_h, image_w = np.asarray(sizes).astype(np.float64).T[..., None]  # (n, 1) each
    low, high = spec.crop_area
    area = (image_h * image_w)[..., None] * (low + (high - low) * u[..., AREA : AREA + CROP_TRIES])
    log_low, log_high = np.log(spec.crop_aspect)
    aspect = np.exp(log_low + (log_high - log_low) * u[..., ASPECT : ASPECT + CROP_TRIES])
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits_across = (widths > 0) & (widths <= image_w[..., None])
    fits_down = (heights > 0) & (heights <= image_h[..., None])
    fits = fits_across & fits_down  # (n, 2, CROP_TRIES), as the four arrays before
    first = fits.argmax(-1)[..., None]  # (n, 2, 1)
    accepted = fits.any(-1)  # (n, 2)
    # This is torchvision's fallback: the whole image, narrowed to the nearest allowed aspect.
    central_w = np.minimum(image_w, np.rint(image_h * spec.crop_aspect[1]))
    central_h = np.minimum(image_h, np.rint(image_w / spec.crop_aspect[0]))
    width = np.where(accepted, np.take_along_axis(widths, first, -1)[..., 0], central_w)
    height = np.where(accepted, np.take_along_axis(heights, first, -1)[..., 0], central_h)
    top = np.floor(np.where(accepted, u[..., TOP] * (image_h - height + 1), (image_h - height) / 2))
    left = np.floor(np.where(accepted, u[..., LEFT] * (image_w - width + 1), (image_w - width) / 2))
    return top, left, height, width
