"""Every operation of the host and device stages is compared with PIL for the same parameters.

Differences are in 8-bit levels.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numba import njit
from numba.core.caching import CacheImpl
from PIL import Image

from rsa_fast.pipelines import device_ops, host_ops
from rsa_fast.pipelines.draws import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    ORDERS,
    SATURATION,
    VIEW_PARAMS,
    draw,
)
from rsa_fast.pipelines.host_ops import sample_views, shift_hue
from rsa_fast.pipelines.layouts import open_source
from rsa_fast.pipelines.torchvision_views import aggressive_view, weak_view
from rsa_fast.pipelines.views import ViewSpec
from tests.helpers import natural_image

LEVELS = np.tile(np.arange(256, dtype=np.uint8), (3, 1))  # This table does not normalise.


def host(images: list[np.ndarray], params: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weak and aggressive views `(N, S, S, 3)` for `params` `(N,)`."""
    weak, aggressive = (np.empty((len(images), size, size, 3), np.uint8) for _ in range(2))
    for i, image in enumerate(images):
        sample_views(image, params[[i]], LEVELS, (weak,), (aggressive,), i)
    return weak, aggressive


def device(
    images: list[np.ndarray], params: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    weak, aggressive = [], []
    for i, image in enumerate(images):  # Real images differ in size.
        levels = device_ops.weak_stage(
            torch.from_numpy(image).permute(2, 0, 1)[None], params[[i]], size
        )
        weak.append(levels)
        aggressive.append(device_ops.aggressive_stage(levels, params[[i]]))
    return tuple(torch.cat(views).permute(0, 2, 3, 1).numpy() for views in (weak, aggressive))


def pil(images: list[np.ndarray], params: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    weak = [
        weak_view(Image.fromarray(image), p, size) for image, p in zip(images, params, strict=True)
    ]
    aggressive = [aggressive_view(view, p) for view, p in zip(weak, params, strict=True)]
    return np.stack([np.asarray(v) for v in weak]), np.stack([np.asarray(v) for v in aggressive])


def whole_window(count: int, size: int) -> np.ndarray:
    params = np.zeros(count, VIEW_PARAMS)
    params["height"] = params["width"] = size
    params["order"], params["factor"] = ORDERS[0], (1, 1, 1, 0)
    return params


def difference(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Return the mean and the largest absolute difference in levels."""
    gap = np.abs(ours.astype(np.float64) - theirs)
    return gap.mean(), gap.max()


IMAGES_32 = [natural_image(i, 32, 32) for i in range(60)]
OPERATIONS = {
    "brightness": (BRIGHTNESS, np.linspace(0.6, 1.4, 60)),
    "contrast": (CONTRAST, np.linspace(0.6, 1.4, 60)),
    "saturation": (SATURATION, np.linspace(0.6, 1.4, 60)),
    "hue": (HUE, np.linspace(-0.1, 0.1, 60)),
    "hue_half_turn": (HUE, np.linspace(-0.5, 0.5, 60)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize(("stage", "mean_levels"), [(host, 0), (device, 0.1)])
def test_jitter_operation_against_pil(stage, mean_levels, name):
    operation, factors = OPERATIONS[name]
    params = whole_window(60, 32)
    params["jitter"] = True
    params["factor"][:, operation] = factors
    ours, theirs = stage(IMAGES_32, params, 32)[1], pil(IMAGES_32, params, 32)[1]
    mean, largest = difference(ours, theirs)
    assert mean <= mean_levels and largest <= (6 if mean_levels else 0), (mean, largest)
    assert difference(ours, np.stack(IMAGES_32))[0] > 1  # The operation changed something.


@pytest.mark.parametrize("shift", [-128, -26, 1, 25])
def test_hue_of_every_colour_against_pil(shift):
    """No level of any of the 2^24 colours differs from PIL's.

    The host kernels compute in float32, PIL partly in float64.
    """
    every = np.indices((256, 256, 256), np.uint8).reshape(3, 4096, 4096)
    ours = every.copy()
    shift_hue(ours, np.float32((shift + 0.5) / 255 if shift > 0 else (shift - 0.5) / 255))
    h, s, v = Image.fromarray(np.moveaxis(every, 0, -1)).convert("HSV").split()
    shifted = h.point(lambda level: (level + shift) % 256)
    theirs = np.asarray(Image.merge("HSV", (shifted, s, v)).convert("RGB"))
    assert (ours == np.moveaxis(theirs, -1, 0)).all()


@pytest.mark.parametrize(("stage", "mean_levels"), [(host, 0), (device, 0)])
def test_grayscale_against_pil(stage, mean_levels):
    params = whole_window(60, 32)
    params["grayscale"] = True
    ours = stage(IMAGES_32, params, 32)[1]
    assert difference(ours, pil(IMAGES_32, params, 32)[1])[0] <= mean_levels
    assert (ours[..., 0] == ours[..., 1]).all() and (ours[..., 0] == ours[..., 2]).all()


# Beyond the paper's range the box has more taps.
@pytest.mark.parametrize("largest_sigma_px", [2.0, 9.0])
@pytest.mark.parametrize(("stage", "mean_levels"), [(host, 0), (device, 0.5)])
def test_blur_against_pil(stage, mean_levels, largest_sigma_px):
    params = whole_window(60, 32)
    params["blur_sigma_px"] = np.linspace(0.1, largest_sigma_px, 60)
    ours, theirs = stage(IMAGES_32, params, 32)[1], pil(IMAGES_32, params, 32)[1]
    assert difference(ours, theirs)[0] <= mean_levels


@pytest.mark.parametrize(("stage", "most_levels"), [(host, 0), (device, 2)])
def test_blur_of_2000_random_sigmas_against_pil(stage, most_levels):
    """The box's weight has to be rounded as PIL does: in float32, and at every sigma."""
    images = [np.random.default_rng(i).integers(0, 256, (24, 24, 3), np.uint8) for i in range(20)]
    for i, image in enumerate(images):
        params = whole_window(100, 24)
        params["blur_sigma_px"] = np.random.default_rng(100 + i).uniform(0.1, 2, 100)
        ours, theirs = stage(100 * [image], params, 24)[1], pil(100 * [image], params, 24)[1]
        assert difference(ours, theirs)[1] <= most_levels


@pytest.mark.parametrize("stage", [host, device])
def test_an_impulse_spreads_alike_along_both_axes(stage):
    impulse = np.zeros((33, 33, 3), np.uint8)
    impulse[16, 16] = 255
    params = whole_window(1, 33)
    params["blur_sigma_px"] = 1.5
    blurred = stage([impulse], params, 33)[1][0, ..., 0]
    assert blurred[16, 13] > 0 and blurred[13, 16] > 0
    assert np.abs(blurred.astype(int) - blurred.T.astype(int)).max() <= 1


@pytest.mark.parametrize("size", [(32, 32), (50, 40), (90, 33), (31, 100), (200, 180)])
@pytest.mark.parametrize("stage", [host, device])
def test_crop_resize_and_flip_against_pil(stage, size):
    images = [natural_image(i, *size) for i in range(40)]
    params = draw(0, 0, np.arange(40), ViewSpec(32, (0, 0, 0), (1, 1, 1)), np.tile(size, (40, 1)))[
        :, 0
    ]
    mean, largest = difference(stage(images, params, 32)[0], pil(images, params, 32)[0])
    # The device always resizes across first. PIL resizes a tall window down first, which changes
    # some pixels by one level.
    assert mean <= (0 if stage is host else 0.1) and largest <= 1, (mean, largest)


@pytest.mark.parametrize("stage", [host, device])
def test_every_flip_and_turn_against_pil_and_numpy(stage):
    images = [natural_image(i, 40, 56) for i in range(16)]
    spec = ViewSpec(16, (0, 0, 0), (1, 1, 1), blur_p=1)
    params = draw(0, 0, np.arange(16), spec, np.tile((40, 56), (16, 1)))[:, 0]
    plain = stage(images, params, 16)[0]
    choices = np.array([(x, y, turns) for x in (0, 1) for y in (0, 1) for turns in range(4)])
    flip = params["flip"].copy()
    params["flip"], params["vertical_flip"], params["quarter_turns"] = choices.T
    ours, theirs = stage(images, params, 16), pil(images, params, 16)
    for view, base, was, (x, y, turns) in zip(ours[0], plain, flip, choices, strict=True):
        upright = base[:: -1 if y else 1, :: -1 if x != was else 1]
        assert difference(view, np.rot90(upright, turns))[1] <= (0 if stage is host else 1)
    assert difference(ours[0], theirs[0])[0] <= (0 if stage is host else 0.1)
    assert difference(ours[1], theirs[1])[0] <= (0 if stage is host else 0.4)


@pytest.mark.parametrize("turned", [{}, {"vertical_flip_p": 0.5, "quarter_turns": True}])
@pytest.mark.parametrize("stage", [host, device])
def test_aggressive_equals_weak_when_colour_grey_and_blur_are_off(stage, turned):
    spec = ViewSpec(32, (0, 0, 0), (1, 1, 1), jitter_p=0, grayscale_p=0, blur_p=0, **turned)
    params = draw(0, 0, np.arange(60), spec, np.full((60, 2), 32))[:, 0]
    weak, aggressive = stage(IMAGES_32, params, 32)
    assert (weak == aggressive).all()
    assert len({image.tobytes() for image in weak}) == 60


@pytest.mark.parametrize("stage", [host, device])
@pytest.mark.parametrize(("data", "size"), [("cifar", 32), ("imagenet", 224)])
def test_views_of_real_images_against_pil(stage, data, size, request):
    """The host's whole views equal PIL's, and the device's are close."""
    source = open_source(request.getfixturevalue(data), "train")
    ids = np.arange(0, len(source.manifest), len(source.manifest) // 40)[:40]
    images = [source.read(i) for i in ids]
    params = draw(0, 0, ids, ViewSpec(size, (0, 0, 0), (1, 1, 1)), source.manifest.sizes[ids])[:, 0]
    (weak, aggressive), (weak_pil, aggressive_pil) = (
        stage(images, params, size),
        pil(images, params, size),
    )
    assert difference(weak, weak_pil)[0] <= (0 if stage is host else 0.1)
    assert difference(aggressive, aggressive_pil)[0] <= (0 if stage is host else 0.4)


def test_images_on_the_device_are_left_as_they_are():
    levels = torch.from_numpy(np.stack(IMAGES_32)).permute(0, 3, 1, 2).float()
    before = levels.clone()
    params = draw(0, 0, np.arange(60), ViewSpec(32, (0, 0, 0), (1, 1, 1)), np.full((60, 2), 32))[
        :, 0
    ]
    assert not torch.equal(device_ops.aggressive_stage(levels, params), before)
    assert torch.equal(levels, before)


def test_kernels_are_compiled_without_a_folder_to_keep_them_in(monkeypatch, caplog):
    assert host_ops.can_cache()
    monkeypatch.setattr(CacheImpl, "_locator_classes", [])
    assert not host_ops.can_cache() and "NUMBA_CACHE_DIR" in caplog.text


def plain(kernel, monkeypatch):
    """The kernel, compiled without the inner loops in AVX-512."""
    if not host_ops.AVX512:
        pytest.skip("this CPU has no AVX-512 VBMI and VNNI, so that all kernels are plain")
    compiled = njit(error_model="numpy")(kernel.py_func)

    def call(*arguments):
        # Numba compiles at the first call. Only this kernel may see the change: the others are
        # kept in numba's cache.
        with monkeypatch.context() as patch:
            patch.setattr(host_ops, "AVX512", False)
            return compiled(*arguments)

    return call


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_normalise_in_avx512_equals_the_plain_loop(monkeypatch, dtype):
    rng = np.random.default_rng(0)
    plain_normalise = plain(host_ops.normalise, monkeypatch)
    for size in (1, 7, 8, 18, 96, 224):
        planes = rng.integers(0, 256, (3, size, size), dtype=np.uint8)
        table = rng.integers(0, 256, (3, 256 * dtype().itemsize), dtype=np.uint8).view(dtype)
        out, expected = np.empty((2, size, size, 3), dtype)
        host_ops.normalise(planes, table, out)
        plain_normalise(planes, table, expected)
        assert out.tobytes() == expected.tobytes()


def test_brightness_and_contrast_in_avx512_equal_the_plain_loop(monkeypatch):
    planes = np.random.default_rng(0).integers(0, 256, (3, 33, 33), dtype=np.uint8)
    plain_blend = plain(host_ops.blend_constant, monkeypatch)
    for centre in (0, 113, 255):
        for factor in np.linspace(0, 2, 41, dtype=np.float32):
            out, expected = planes.copy(), planes.copy()
            host_ops.blend_constant(out, centre, factor)
            plain_blend(expected, centre, factor)
            assert np.array_equal(out, expected)


@pytest.mark.parametrize("bicubic", [False, True])
def test_resize_in_avx512_equals_the_plain_loop(monkeypatch, bicubic):
    rng = np.random.default_rng(0)
    plain_resize = plain(host_ops.resize_across, monkeypatch)
    vectorised = 0
    for _ in range(300):
        size = int(rng.integers(1, 130))
        width = int(rng.integers(1, min(int(3 * size) + 2, 300)))
        left, right = rng.integers(0, 3, 2) * rng.integers(0, 100, 2)  # often at a border
        # Black and white pixels: bicubic results exceed both ends of the levels.
        pixels = rng.choice(np.array([0, 255], np.uint8), (4, 3 * (left + width + right)))
        place = (1, left, 2, width, bool(rng.integers(2)), size, bicubic)
        assert np.array_equal(host_ops.resize_across(pixels, *place), plain_resize(pixels, *place))
        vectorised += size >= 16 and width < 2 * size and left + width + right >= 43
    assert vectorised > 100
