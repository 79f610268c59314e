"""Draw the random parameters of every view with a counter-based hash.

    params = draw(seed=0, epoch=3, ids=np.arange(256), spec=spec, sizes=manifest.sizes[:256])
    params.shape  # (256, K), of VIEW_PARAMS: K crops of each image

Each random number depends only on (seed, epoch, sample id, crop, number of the draw). There is no
generator with a state. Therefore the views are the same for every batch split, number of ranks,
number of threads and backend, and a run can resume from any step. Nothing else in the project draws
an augmentation: the backends only apply the parameters drawn here.
"""

from __future__ import annotations

from enum import IntEnum
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from rsa_fast.pipelines.views import ViewSpec, patch_px

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
# (24, 4): every order of the four jitter operations.
ORDERS = np.array(list(permutations(range(4))), np.int8)
CROP_TRIES = 10  # as in torchvision's RandomResizedCrop.get_params


class RandOp(IntEnum):
    """RandAugment's operations by kind: six tables of levels, four blends and five affine maps."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4
    SOLARIZE = 5
    SOLARIZE_ADD = 6
    COLOR = 7
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    ROTATE = 11
    SHEAR_X = 12
    SHEAR_Y = 13
    TRANSLATE_X = 14
    TRANSLATE_Y = 15


# The value of each operation at the largest level, which is 10. 0.1 is added to a blend's value.
# The units are levels (and bits for posterize), factors, degrees, slopes, and parts of the side.
RAND_RANGE = np.array([0, 0, 0, 0, 4, 256, 110, 1.8, 1.8, 1.8, 1.8, 30, 0.3, 0.3, 0.45, 0.45])
RAND_FILL = (124, 116, 104)  # the levels of pixels that an affine map takes from outside the image
RAND_DRAWS = 12  # six for each of the two operations


VIEW_PARAMS = np.dtype(
    [
        ("top", "i4"),  # these four are the crop window, in pixels of the image
        ("left", "i4"),
        ("height", "i4"),
        ("width", "i4"),
        ("bicubic", "?"),  # whether the window is resized bicubically; otherwise bilinearly
        ("flip", "?"),
        ("jitter", "?"),
        ("order", "i1", 4),  # order[k] is the number of the k-th jitter operation
        ("factor", "f4", 4),  # factor[n] belongs to operation n; that of hue is in turns
        ("grayscale", "?"),
        ("blur_sigma_px", "f4"),  # 0 means no blur
        ("vertical_flip", "?"),  # after `flip`
        ("quarter_turns", "i1"),  # after both flips, counter-clockwise: 0, 1, 2 or 3
        ("solarize", "?"),
        # The two operations of RandAugment: their numbers, a value that each reads in its own unit,
        # and whether an affine map is bicubic (1) or bilinear (0). Numba reads no arrays of bool.
        ("rand_op", "i1", 2),
        ("rand_value", "f4", 2),
        ("rand_bicubic", "i1", 2),
        # The place of each patch of the jigsaw in its cell, (y, x) in pixels.
        ("patch_offset", "i2", (9, 2)),
    ]
)

# Each draw has a fixed number. The numbers of crop k start at k * DRAWS, which therefore stays 42:
# with any other number, the views of every run would change. New draws get a seed of their own,
# which is the run's seed with one of the salts below.
FLIP, JITTER, ORDER, GRAYSCALE, BLUR, SIGMA, TOP, LEFT = range(8)
FACTOR, AREA, ASPECT = 8, 16, 32  # the first of 4, CROP_TRIES and CROP_TRIES numbers
DRAWS = ASPECT + CROP_TRIES
TURNS_SALT, SOLARIZE_SALT, JIGSAW_SALT = 0x7475726E73, 0x736F6C6172, 0x6A6967736177
RAND_SALT = 0x72616E64


def mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of Splitmix64 (Steele et al. 2014) on uint64 of any shape.

    Every bit of the input changes half of the output bits on average.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = x ^ (x >> np.uint64(31))
    return x


def hash_keys(seed: int, *numbers: int | np.ndarray) -> NDArray[np.uint64]:
    """The hash keys `(n,)` uint64 of a seed and integers, the last of which is `(n,)`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = mix(np.asarray([seed], np.uint64) + golden)
        for number in numbers:
            key = mix(key + (np.asarray(number).astype(np.uint64) + np.uint64(1)) * golden)
        return key


def sample_keys(seed: int, epoch: int, ids: np.ndarray) -> NDArray[np.uint64]:
    """One hash key for each sample of an epoch, `(n,)` uint64."""
    return hash_keys(seed, epoch, ids)


def uniforms(seed: int, epoch: int, ids: np.ndarray, draws: int, crops: int = 2) -> np.ndarray:
    """Random numbers `(n, crops, draws)` float64 in [0, 1): `draws` of them per sample and crop.

    The numbers of a crop do not depend on how many crops there are.
    """
    streams = crops * draws
    counter = np.arange(1, streams + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = mix(sample_keys(seed, epoch, ids)[:, None] + counter)  # (n, crops * draws)
    numbers: np.ndarray = (hashes >> np.uint64(11)) * 2.0**-53
    return numbers.reshape(len(ids), crops, draws)


def draw(seed: int, epoch: int, ids: np.ndarray, spec: ViewSpec, sizes: np.ndarray) -> np.ndarray:
    """The parameters of all K crops of each sample: `(n, K)` of `VIEW_PARAMS`.

    `ids` `(n,)` are the sample ids in the dataset, and `sizes` `(n, 2)` are their heights and
    widths in pixels. The distributions are those of torchvision's RandomResizedCrop,
    RandomHorizontalFlip, ColorJitter and RandomGrayscale, and a blur of random sigma. The spec can
    add RandomVerticalFlip, quarter turns, RandomSolarize, RandAugment and jigsaw patches. All four
    quarter turns, and all positions of a patch in its cell, are equally likely.
    """
    crops, each = len(spec.crops), spec.by_crop
    u = uniforms(seed, epoch, ids, DRAWS, crops)  # (n, K, DRAWS)
    params = np.zeros((len(ids), crops), VIEW_PARAMS)
    windows = crop_windows(u, each["crop_area"], each["crop_aspect"], sizes)
    params["top"], params["left"], params["height"], params["width"] = windows
    params["bicubic"] = each["interpolation"] == "bicubic"
    params["flip"] = u[..., FLIP] < each["flip_p"]
    params["jitter"] = u[..., JITTER] < each["jitter_p"]
    params["order"] = ORDERS[(u[..., ORDER] * len(ORDERS)).astype(np.intp)]
    strength = np.stack([each[name] for name in ("brightness", "contrast", "saturation", "hue")], 1)
    centre = np.array([1, 1, 1, 0])
    params["factor"] = centre + strength * (2 * u[..., FACTOR : FACTOR + 4] - 1)
    params["grayscale"] = u[..., GRAYSCALE] < each["grayscale_p"]
    low, high = each["blur_sigma_px"]
    sigma_px = low + (high - low) * u[..., SIGMA]
    params["blur_sigma_px"] = np.where(u[..., BLUR] < each["blur_p"], sigma_px, 0)
    if each["vertical_flip_p"].any() or each["quarter_turns"].any():
        v = uniforms(seed ^ TURNS_SALT, epoch, ids, 2, crops)  # (n, K, 2)
        params["vertical_flip"] = v[..., 0] < each["vertical_flip_p"]
        params["quarter_turns"] = np.where(each["quarter_turns"], 4 * v[..., 1], 0)
    if each["solarize_p"].any():
        v = uniforms(seed ^ SOLARIZE_SALT, epoch, ids, 1, crops)  # (n, K, 1)
        params["solarize"] = v[..., 0] < each["solarize_p"]
    if each["rand_augment"].any():
        v = uniforms(seed ^ RAND_SALT, epoch, ids, RAND_DRAWS, crops)  # (n, K, RAND_DRAWS)
        operation, params["rand_value"], params["rand_bicubic"] = rand_augment(v)
        params["rand_op"] = np.where(each["rand_augment"][:, None], operation, RandOp.NONE)
    if each["jigsaw"].any():
        v = uniforms(seed ^ JIGSAW_SALT, epoch, ids, 18, crops).reshape(*params.shape, 9, 2)
        places = np.array([px // 3 - patch_px(px) + 1 for px in each["size_px"]])  # (K,)
        params["patch_offset"] = v * (places * each["jigsaw"])[:, None, None]
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
    """The seed of the generator of the user's own augmentation, for one batch of one rank."""
    return int(hash_keys(seed ^ 0x6578747261, epoch, step, rank)[0])


def crop_windows(
    u: np.ndarray, crop_area: np.ndarray, crop_aspect: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Top, left, height and width of the crop windows, each `(n, K)`.

    A window is the first of ten tries that fits into the image. If none fits, it is the largest
    central window of an allowed aspect. `u` `(n, K, DRAWS)` are the random numbers. `crop_area` and
    `crop_aspect` `(2, K)` are the ranges of the K crops.
    """
    image_h, image_w = np.asarray(sizes).astype(np.float64).T[..., None]  # (n, 1) each
    low, high = crop_area[..., None]  # (K, 1) each
    area = (image_h * image_w)[..., None] * (low + (high - low) * u[..., AREA : AREA + CROP_TRIES])
    log_low, log_high = np.log(crop_aspect)[..., None]  # (K, 1) each
    aspect = np.exp(log_low + (log_high - log_low) * u[..., ASPECT : ASPECT + CROP_TRIES])
    widths, heights = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits_across = (widths > 0) & (widths <= image_w[..., None])
    fits_down = (heights > 0) & (heights <= image_h[..., None])
    fits = fits_across & fits_down  # (n, K, CROP_TRIES), like the four arrays above
    first = fits.argmax(-1)[..., None]  # (n, K, 1)
    accepted = fits.any(-1)  # (n, K)
    # This is torchvision's fallback: the whole image, narrowed to the nearest allowed aspect.
    central_w = np.minimum(image_w, np.rint(image_h * crop_aspect[1]))
    central_h = np.minimum(image_h, np.rint(image_w / crop_aspect[0]))
    width = np.where(accepted, np.take_along_axis(widths, first, -1)[..., 0], central_w)
    height = np.where(accepted, np.take_along_axis(heights, first, -1)[..., 0], central_h)
    top = np.floor(np.where(accepted, u[..., TOP] * (image_h - height + 1), (image_h - height) / 2))
    left = np.floor(np.where(accepted, u[..., LEFT] * (image_w - width + 1), (image_w - width) / 2))
    return top, left, height, width


def rand_augment(u: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two operations of RandAugment per view: numbers, values and bicubic, each `(n, K, 2)`.

    This is InfoMin's rand-n2-m10-mstd0.5 (PyContrast's datasets/RandAugment.py). Each operation is
    one of 15 and is applied with probability 0.5. The same one may be drawn twice. Its level is
    normal with mean 10 and deviation 0.5, clipped to [0, 10], so it is 10 in half of the cases. The
    direction of an affine map is random, and it is bilinear or bicubic. Here these are the last
    operations of a view, whereas PyContrast applies grayscale after them. `u` `(n, K, RAND_DRAWS)`
    are the random numbers.
    """
    u = u.reshape(*u.shape[:2], 2, RAND_DRAWS // 2)
    which, applied, radius, angle, sign, bicubic = np.moveaxis(u, -1, 0)  # (n, K, 2) each
    operation = 1 + (which * 15).astype(np.intp)
    normal = np.sqrt(-2 * np.log1p(-radius)) * np.cos(2 * np.pi * angle)  # Box-Muller
    value = np.clip(10 + 0.5 * normal, 0, 10) / 10 * RAND_RANGE[operation]
    value = np.where(operation <= RandOp.SOLARIZE_ADD, np.floor(value), value)
    value = np.where(operation >= RandOp.ROTATE, np.where(sign < 0.5, -value, value), value)
    blend = (operation >= RandOp.COLOR) & (operation <= RandOp.SHARPNESS)
    return np.where(applied < 0.5, operation, RandOp.NONE), value + 0.1 * blend, bicubic < 0.5
