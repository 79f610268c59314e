"""RandAugment's draws, and each of its operations against PIL and timm on the same levels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from scipy.stats import ks_2samp
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from rsa_fast.pipelines import device_ops, host_ops
from rsa_fast.pipelines.draws import (
    ORDERS,
    RAND_DRAWS,
    RAND_FILL,
    RAND_RANGE,
    VIEW_PARAMS,
    RandOp,
    draw,
    rand_augment,
    uniforms,
)
from rsa_fast.pipelines.torchvision_views import aggressive_view
from rsa_fast.pipelines.torchvision_views import rand_augment as pil_rand_augment
from rsa_fast.pipelines.views import CropGroup, ViewSpec
from tests.helpers import natural_image

TABLES = [op for op in RandOp if RandOp.AUTO_CONTRAST <= op <= RandOp.SOLARIZE_ADD]
BLENDS = [op for op in RandOp if RandOp.COLOR <= op <= RandOp.SHARPNESS]
AFFINE = [op for op in RandOp if op >= RandOp.ROTATE]
SPEC = ViewSpec(32, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
RAND = replace(SPEC, rand_augment=True)
FIELDS = ("rand_op", "rand_value", "rand_bicubic")


def images(size: int) -> np.ndarray:
    """Return `(12, S, S, 3)` uint8: natural ones, noise, and ones of one and of three levels."""
    rng = np.random.default_rng(size)
    shape = (size, size, 3)
    noise = rng.integers(0, 256, shape), rng.integers(100, 103, shape), np.full(shape, 77)
    return np.stack([*(natural_image(i, size, size) for i in range(9)), *noise]).astype(np.uint8)


def value(op: RandOp, level: float, sign: int) -> float:
    """What an operation reads at a level in [0, 10], by the formulas of PyContrast."""
    largest = float(RAND_RANGE[op]) * level / 10
    if op in TABLES:
        return int(largest)
    return largest + 0.1 if op in BLENDS else sign * largest


def host(views: np.ndarray, params: np.ndarray) -> np.ndarray:
    planes = np.ascontiguousarray(views.transpose(0, 3, 1, 2))
    for plane, p in zip(planes, params, strict=True):
        host_ops.rand_augment(plane, p)
    return planes.transpose(0, 2, 3, 1)


def device(views: np.ndarray, params: np.ndarray) -> np.ndarray:
    levels = torch.from_numpy(views).permute(0, 3, 1, 2).float()
    device_ops.rand_augment_(levels, params)
    assert levels.dtype == torch.float32
    return levels.permute(0, 2, 3, 1).numpy()


def pil(views: np.ndarray, params: np.ndarray) -> np.ndarray:
    augmented = [
        pil_rand_augment(Image.fromarray(view), p) for view, p in zip(views, params, strict=True)
    ]
    return np.stack([np.asarray(view) for view in augmented])


@pytest.mark.parametrize("size", [32, 57])
@pytest.mark.parametrize("op", list(RandOp)[1:], ids=lambda op: op.name.lower())
@pytest.mark.parametrize("stage", [host, device])
def test_operation_equals_pil(stage, op, size):
    views = images(size)
    params = np.zeros(len(views), VIEW_PARAMS)
    params["rand_op"][:, 1] = op
    for bicubic in (0, 1):
        for sign, level in ((1, 10), (-1, 10), (-1, 9.43), (1, 7.81), (1, 2.5)):
            params["rand_value"], params["rand_bicubic"] = value(op, level, sign), bicubic
            ours, theirs = stage(views, params), pil(views, params)
            assert (ours == theirs).all(), (level, np.abs(ours.astype(int) - theirs).max())
    assert not (theirs == views).all()  # The operation changed something.


@pytest.mark.parametrize("stage", [host, device, pil])
def test_operations_do_what_their_names_say(stage):
    views = images(8)

    def made(op: RandOp, number: float) -> np.ndarray:
        params = np.zeros(len(views), VIEW_PARAMS)
        params["rand_op"][:, 0], params["rand_value"][:, 0] = op, number
        return stage(views, params)

    assert (made(RandOp.INVERT, 0) == 255 - views).all()
    assert (made(RandOp.POSTERIZE, 4) == views // 16 * 16).all()
    assert (made(RandOp.SOLARIZE, 256) == views).all()
    assert (made(RandOp.SOLARIZE, 128) == np.minimum(views, 255 - views)).all()
    assert (made(RandOp.SOLARIZE_ADD, 110) == views + 110 * (views < 128)).all()
    # Positive values show what lies to the right or below, and turn counter-clockwise.
    assert (made(RandOp.TRANSLATE_X, 0.25)[:, :, :6] == views[:, :, 2:]).all()
    assert (made(RandOp.TRANSLATE_X, 0.25)[:, :, 6:] == RAND_FILL).all()
    assert (made(RandOp.TRANSLATE_Y, -0.25)[:, 2:] == views[:, :6]).all()
    assert (made(RandOp.ROTATE, 90) == np.rot90(views, axes=(1, 2))).all()
    for op in AFFINE:
        assert (made(op, 0) == views).all()


@pytest.mark.parametrize("stage", [host, device])
def test_a_batch_of_random_operations_equals_pil(stage):
    """Views that have two operations, one and none stand beside each other in a batch."""
    views = np.tile(images(32), (10, 1, 1, 1))
    params = draw(3, 1, np.arange(len(views)), RAND, np.full((len(views), 2), 32))[:, 1]
    assert set(np.count_nonzero(params["rand_op"], 1)) == {0, 1, 2}
    assert (stage(views, params) == pil(views, params)).all()


@pytest.mark.parametrize("stage", [host, device, pil])
def test_the_two_operations_run_in_their_order(stage):
    views = images(16)
    params = np.zeros(len(views), VIEW_PARAMS)
    params["rand_op"], params["rand_value"] = (RandOp.SOLARIZE_ADD, RandOp.POSTERIZE), (99, 3)
    params["rand_op"][6:] = params["rand_op"][6:, ::-1]
    params["rand_value"][6:] = params["rand_value"][6:, ::-1]
    added = views[:6].astype(int) + 99 * (views[:6] < 128)
    coarse = views[6:].astype(int) // 32 * 32
    wanted = np.concatenate([added // 32 * 32, coarse + 99 * (coarse < 128)])
    assert (stage(views, params) == wanted).all()


def test_rand_augment_is_the_end_of_the_aggressive_stage():
    """It follows jitter, grayscale, blur and solarize, in every implementation."""
    views = images(32)
    params = np.zeros(len(views), VIEW_PARAMS)
    params["order"], params["factor"] = ORDERS[5], (1.2, 0.8, 1.3, 0.05)
    params["jitter"][::2] = params["grayscale"][::3] = params["solarize"][::4] = True
    params["blur_sigma_px"] = 1.3
    plain = [
        np.asarray(aggressive_view(Image.fromarray(view), p))
        for view, p in zip(views, params, strict=True)
    ]
    params["rand_op"] = RandOp.EQUALIZE, RandOp.ROTATE
    params["rand_value"][:, 1] = 20
    wanted = [
        ImageOps.equalize(Image.fromarray(view)).rotate(
            20, Image.Resampling.BILINEAR, fillcolor=RAND_FILL
        )
        for view in plain
    ]
    planes = np.ascontiguousarray(views.transpose(0, 3, 1, 2))
    levels = torch.from_numpy(planes.copy()).float()
    for plane, p, view, expected in zip(planes, params, views, wanted, strict=True):
        assert aggressive_view(Image.fromarray(view), p) == expected
        host_ops.aggressive_stage(plane, p)
        assert Image.fromarray(plane.transpose(1, 2, 0).copy()) == expected
    # The device's jitter and blur may be one level off, which equalize makes larger.
    params["rand_op"][:, 0], plain_params = RandOp.INVERT, params.copy()
    plain_params["rand_op"] = 0
    before = device_ops.aggressive_stage(levels, plain_params)
    device_ops.rand_augment_(before, params)
    assert torch.equal(device_ops.aggressive_stage(levels, params), before)


def test_nothing_waits_for_the_device():
    """With fake tensors, whatever depends on a value on the device raises an error."""
    params = np.zeros(15, VIEW_PARAMS)
    params["rand_op"][:, 0], params["rand_op"][:, 1] = list(RandOp)[1:], list(RandOp)[:0:-1]
    with FakeTensorMode():
        levels = torch.zeros(15, 3, 32, 32)
        device_ops.rand_augment_(levels, params)
        with pytest.raises(DataDependentOutputException):
            levels.max().item()


def test_operations_and_levels_come_as_often_as_stated():
    op, values, bicubic = rand_augment(uniforms(0, 0, np.arange(30_000), RAND_DRAWS, 2))
    assert op.shape == values.shape == bicubic.shape == (30_000, 2, 2)
    # Four standard errors of 120,000 numbers are at most .006.
    assert abs((op == RandOp.NONE).mean() - 0.5) < 0.006 and abs(bicubic.mean() - 0.5) < 0.006
    for each in list(RandOp)[1:]:
        assert abs((op == each).mean() - 1 / 30) < 0.0021
    both = (op[..., 0] > 0) & (op[..., 1] > 0)
    assert abs(both.mean() - 0.25) < 0.0071
    assert abs((op[..., 0] == op[..., 1])[both].mean() - 1 / 15) < 0.0082
    for affine in AFFINE:
        size = np.abs(values[op == affine]) / RAND_RANGE[affine]
        assert abs((size == 1).mean() - 0.5) < 0.032, "the level is 10 in half of the draws"
        assert abs((values[op == affine] > 0).mean() - 0.5) < 0.032
        below = np.abs(np.random.default_rng(0).normal(0, 0.05, 20_000))  # of a level over 10
        assert ks_2samp(1 - size[size < 1], below).pvalue > 0.001
    for blend in BLENDS:
        factor = values[op == blend]
        assert abs(np.isclose(factor, 1.9, atol=1e-6).mean() - 0.5) < 0.032
        assert 1 < factor.min() < factor.max() < 1.900001
    for table, most in ((RandOp.POSTERIZE, 4), (RandOp.SOLARIZE, 256), (RandOp.SOLARIZE_ADD, 110)):
        whole = values[op == table]
        assert (whole == np.floor(whole)).all() and whole.max() == most
        assert abs((whole == most).mean() - 0.5) < 0.032
    assert set(values[op == RandOp.POSTERIZE]) == {3, 4}


def test_rand_augment_leaves_every_other_draw_as_it_is():
    sizes = np.full((300, 2), 32)
    plain, rand = (draw(0, 0, np.arange(300), spec, sizes) for spec in (SPEC, RAND))
    for name in VIEW_PARAMS.names:
        assert (plain[name] == rand[name]).all() == (name not in FIELDS), name
    assert not any(plain[name].any() for name in FIELDS)
    groups = (CropGroup("plain", 2), CropGroup("rand", 3, rand_augment=True))
    mixed = draw(0, 0, np.arange(300), replace(SPEC, groups=groups), sizes)
    assert not mixed["rand_op"][:, :2].any()
    assert (mixed["rand_op"][:, 2:] > 0).any(0).all()
    whole = draw(0, 0, np.arange(300), replace(RAND, groups=(CropGroup("rand", 5),)), sizes)
    assert (mixed[:, 2:] == whole[:, 2:]).all()


def test_the_dice_never_change():
    """A resumed run must see the same views: a change here would break resuming older runs."""
    row = draw(7, 3, np.arange(4), RAND, np.full((4, 2), 32))
    assert row["rand_op"].ravel().tolist() == [7, 14, 0, 5, 2, 7, 11, 0, 0, 0, 7, 0, 0, 0, 12, 3]
    assert row["rand_value"].ravel() == pytest.approx(
        [
            1.79648,
            0.45,
            1.83041,
            246.0,
            0.0,
            1.8732,
            -30.0,
            0.0,
            248.0,
            0.0,
            1.9,
            0.45,
            0.0,
            0.0,
            -0.2942,
            0.0,
        ],
        abs=1e-4,
    )
    assert row["rand_bicubic"].ravel().tolist() == [1, 0, 0, 0, 1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0]


def test_operations_and_levels_equal_timm_s():
    """A second opinion: timm's file has the same author as PyContrast's."""
    timm = pytest.importorskip("timm.data.auto_augment")
    view = images(32)[:1]
    for op in list(RandOp)[1:]:
        name = op.name.title().replace("_", "") + "Rel" * (op >= RandOp.TRANSLATE_X)
        for level in (10, 9.3, 6.2):
            numbers = timm.LEVEL_TO_ARG[name](level, {}) if timm.LEVEL_TO_ARG[name] else ()
            params = np.zeros(1, VIEW_PARAMS)
            params["rand_op"][:, 0] = op
            if numbers:  # The sign of these is random.
                assert abs(numbers[0]) == pytest.approx(value(op, level, 1)), name
                params["rand_value"][:, 0] = numbers[0]
                numbers = (type(numbers[0])(params["rand_value"][0, 0]),)  # as float32
            how = {"resample": Image.Resampling.BILINEAR, "fillcolor": RAND_FILL}
            theirs = timm.NAME_TO_OP[name](Image.fromarray(view[0]), *numbers, **how)
            assert (pil(view, params)[0] == np.asarray(theirs)).all(), name
