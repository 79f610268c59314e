"""Make the two stages of a view with batched tensor operations, mainly on a GPU.

The arithmetic is the same as in `host_ops`, on float32 tensors `(B, 3, S, S)` whose values are
whole 8-bit levels. The random parameters are known on the host. If an operation applies to some
samples only, the host therefore makes the list of their indices, and nothing waits for the device.
Resizing and blurring are small matrix products with one matrix per sample.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from rsa_fast.pipelines.draws import BRIGHTNESS, CONTRAST, HUE, RAND_FILL, RandOp, mirrors
from rsa_fast.pipelines.views import ViewSpec, patch_px

BLUR_PASSES = 3  # PIL's GaussianBlur


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on `device`, without waiting for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def weak_stage(images: Tensor, params: np.ndarray, size_px: int) -> Tensor:
    """Crop, resize, flip and turn `images` `(B, 3, H, W)` uint8 to levels `(B, 3, S, S)` float32.

    The resize is antialiased like PIL's. `params` `(B,)` are rows of `draws.VIEW_PARAMS`. The first
    of them decides for all images whether the resize is bilinear or bicubic.
    """
    window = [params[name] for name in ("top", "left", "height", "width")]
    fields = np.stack([*window, *mirrors(params)[:2]]).astype(np.float32)  # (6, B)
    top, left, height, width, flip_x, flip_y = send(fields, images.device)  # (B,) each
    image_h, image_w = images.shape[2:]
    # The weights across are (B, S, W), those down (B, S, H).
    bicubic = bool(params["bicubic"][0])
    across = filter_weights(
        start=left, length=width, size_in=image_w, size_out=size_px, flip=flip_x, bicubic=bicubic
    )
    down = filter_weights(
        start=top, length=height, size_in=image_h, size_out=size_px, flip=flip_y, bicubic=bicubic
    )
    rows = round_level(images.float().flatten(1, 2).bmm(across.mT))  # (B, 3 H, S)
    rows = (rows.clamp_(0, 255) if bicubic else rows).view(-1, 3, image_h, size_px)  # (B, 3, H, S)
    levels = round_level(down[:, None] @ rows)  # (B, 3, S, S)
    return transpose_(levels.clamp_(0, 255) if bicubic else levels, params)


def transpose_(levels: Tensor, params: np.ndarray) -> Tensor:
    """Swap the two axes of the images that are turned by one or three quarters, in place.

    The images are `levels` `(B, 3, S, S)`. `params` `(B,)` are rows of `draws.VIEW_PARAMS`.
    """
    turned_rows = np.flatnonzero(mirrors(params)[2])  # (n,)
    if len(turned_rows):
        index = send(turned_rows, levels.device)
        levels.index_copy_(0, index, levels.index_select(0, index).mT)
    return levels


def filter_weights(
    start: Tensor, length: Tensor, size_in: int, size_out: int, flip: Tensor, bicubic: bool
) -> Tensor:
    """The weights `(B, size_out, size_in)` that make each output pixel of one axis.

    The output covers the window `[start, start + length)`, in pixels of the input, and is mirrored
    where `flip` is 1. `start`, `length` and `flip` are `(B,)` float32.
    """
    out = torch.arange(size_out, device=start.device, dtype=torch.float32)
    out = torch.where(flip[:, None] > 0, size_out - 1 - out, out)  # (B, size_out)
    scale = (length / size_out)[:, None]  # (B, 1)
    centre = (start[:, None] + (out + 0.5) * scale)[..., None]  # (B, size_out, 1)
    pixel = torch.arange(size_in, device=start.device, dtype=torch.float32)  # (size_in,)
    distance = (pixel + 0.5 - centre).abs() / scale.clamp(min=1)[..., None]
    if bicubic:  # the cubic of Keys (1981) with a = -0.5; it can be negative
        near = (1.5 * distance - 2.5) * distance.square() + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    else:
        weight = (1 - distance).clamp(min=0)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])  # (B, size_in)
    weight = weight * inside[:, None]  # (B, size_out, size_in)
    return weight / weight.sum(-1, keepdim=True)


def aggressive_stage(levels: Tensor, params: np.ndarray) -> Tensor:
    """Jitter, grayscale, blur, solarize and RandAugment of `levels` `(B, 3, S, S)`, in a copy.

    The four jitter operations run in each sample's own order: step k applies the k-th operation of
    every sample. Brightness, contrast and saturation are one blend with different weights. Hue runs
    on the samples that have it as their k-th operation. `params` `(B,)` are rows of
    `draws.VIEW_PARAMS`.
    """
    device = levels.device
    steps = [blend_weights(params, k) for k in range(4)] + [grayscale_weights(params)]
    weights = send(np.stack(steps), device)[..., None, None, None]  # (5, 3, B, 1, 1, 1)
    # From here on the work is in place: on a CPU, new temporaries of 6 MB cost more than the
    # arithmetic.
    levels = levels.clone()
    for k in range(4):
        blend_(levels, *weights[k])
        hue_rows = np.flatnonzero(params["jitter"] & (params["order"][:, k] == HUE))  # (n,)
        if len(hue_rows):
            index, turns = send(hue_rows, device), params["factor"][hue_rows, HUE]
            shift = send(np.trunc(turns.astype(np.float64) * 255).astype(np.float32), device)
            shifted = shift_hue(levels.index_select(0, index), shift[:, None, None])
            levels.index_copy_(0, index, shifted)  # (n, 3, S, S)
    blend_(levels, *weights[4])
    blur_rows = np.flatnonzero(params["blur_sigma_px"] > 0)  # (n,)
    if len(blur_rows):
        index, sigma_px = send(blur_rows, device), params["blur_sigma_px"][blur_rows]
        levels.index_copy_(0, index, blur(levels.index_select(0, index), sigma_px))
    solarize_rows = np.flatnonzero(params["solarize"])  # (n,)
    if len(solarize_rows):
        index = send(solarize_rows, device)
        bright = levels.index_select(0, index)
        levels.index_copy_(0, index, torch.minimum(bright, 255 - bright))
    if params["rand_op"].any():
        rand_augment_(levels, params)
    return levels


def blend_weights(params: np.ndarray, k: int) -> np.ndarray:
    """The weights `(3, B)` float32 of the blend that is the k-th jitter operation of each sample.

    A blend moves each pixel towards a centre: black for brightness, the mean gray of the image for
    contrast, and the gray of the pixel for saturation. The first weight is the distance, which is 0
    for hue and for samples without jitter. The other two are the shares of the mean gray and of the
    pixel's gray in the centre.
    """
    operation = params["order"][:, k]
    factor = np.take_along_axis(params["factor"], operation[:, None].astype(np.intp), 1)[:, 0]
    towards = np.where(params["jitter"] & (operation != HUE), 1 - factor, 0)
    own_gray = (operation != BRIGHTNESS) & (operation != CONTRAST)
    return np.stack([towards, operation == CONTRAST, own_gray]).astype(np.float32)


def grayscale_weights(params: np.ndarray) -> np.ndarray:
    """The weights `(3, B)` of the fifth blend: samples with grayscale move to the pixel's gray."""
    zeros, ones = np.zeros(len(params)), np.ones(len(params))
    return np.stack([params["grayscale"], zeros, ones]).astype(np.float32)


def blend_(levels: Tensor, towards: Tensor, mean_share: Tensor, own_share: Tensor) -> None:
    """Move each pixel of `levels` towards its centre, in place, then clip and truncate as PIL does.

    The weights are `(B, 1, 1, 1)` each, as made by `blend_weights`.
    """
    gray = gray_level(levels)  # (B, 1, S, S)
    mean = (gray.mean((1, 2, 3), keepdim=True) + 0.5).floor_()  # (B, 1, 1, 1)
    levels.lerp_(gray.mul_(own_share).add_(mean_share * mean), towards).clamp_(0, 255).floor_()


def gray_level(levels: Tensor) -> Tensor:
    """The ITU-R 601 luma `(B, 1, S, S)` of levels `(B, 3, S, S)`, rounded.

    It is exact: the 24 bits of a float32 are enough for PIL's 16-bit fixed point.
    """
    r, g, b = levels[:, 0:1], levels[:, 1:2], levels[:, 2:3]
    luma = (r * (19595 / 65536)).add_(g, alpha=38470 / 65536).add_(b, alpha=7471 / 65536)
    return luma.add_(0.5).floor_()


def shift_hue(levels: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue of `levels` `(B, 3, S, S)` by `shift` `(B, 1, 1)`, in PIL's 8-bit HSV.

    A shift by 256 levels is a full turn.
    """
    r, g, b = levels.unbind(1)  # (B, S, S) each
    v = levels.amax(1)  # (B, S, S)
    spread = v - levels.amin(1)  # (B, S, S)
    # The levels are whole numbers, so these are 1 where red (or green) is the largest channel, and
    # 0 elsewhere. On a CPU, torch.where would be slower.
    is_red, is_green = (r - v).add_(1).clamp_(min=0), (g - v).add_(1).clamp_(min=0)
    rise = (r - g).lerp_(b - r, is_green).lerp_(g - b, is_red).div_(spread.clamp(min=1))
    # One turn (6) is added to the sextant, which makes it positive.
    sextant = rise.add_(is_green.mul_(-2).add_(10).lerp_(torch.full_like(v, 6), is_red))
    hue = sextant.mul_(1 / 6).frac_().mul_(255).floor_().add_(shift)
    hue -= (hue * (1 / 256)).floor_().mul_(256)
    chroma = (spread.mul_(255) / v.clamp(min=1)).floor_().mul_(v).mul_(1 / 255)
    # A channel is v - chroma * clamp(2 - d, 0, 1), where d is the distance of its sextant from 2 on
    # a circle of 6 sextants.
    offset = torch.arange(0, -6, -2, device=levels.device).view(3, 1, 1)
    distance = (hue.mul_(6 / 255)[:, None] + offset).abs_().sub_(3).abs_()  # (B, 3, S, S)
    return round_level(v[:, None] - chroma[:, None] * distance.neg_().add_(2).clamp_(0, 1))


def blur(levels: Tensor, sigma_px: np.ndarray) -> Tensor:
    """PIL's GaussianBlur of `levels` `(B, 3, S, S)` by `sigma_px` `(B,)`.

    PIL applies three box blurs along each axis, with repeated edges. Here they are one matrix per
    sample, which is applied along x and then along y.
    """
    box = send(box_matrices(sigma_px, levels.shape[-1]), levels.device)  # (B, S, S)
    matrix = torch.linalg.matrix_power(box, BLUR_PASSES)[:, None]  # (B, 1, S, S)
    return round_level(matrix @ round_level(levels @ matrix.mT))


def box_matrices(sigma_px: np.ndarray, size: int) -> np.ndarray:
    """The matrices `(B, size, size)` float32 of one box blur with repeated edges.

    Three passes of the box have the variance sigma squared. `sigma_px` is `(B,)`.
    """
    variance = sigma_px.astype(np.float64) ** 2 / BLUR_PASSES
    inner = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)  # the radius, rounded down
    fraction = (2 * inner + 1) * (inner * (inner + 1) - 3 * variance)
    radius = inner + fraction / (6 * (variance - (inner + 1) ** 2))
    reach = int(np.ceil(radius.max()))
    matrices = np.zeros((len(sigma_px), size, size), np.float32)
    pixel = np.arange(size)
    for offset in range(-reach, reach + 1):
        # The clipped number is 1 inside the box, and the remaining fraction of a pixel at its ends.
        tap = np.clip(radius + 1 - abs(offset), 0, 1) / (2 * radius + 1)  # (B,)
        matrices[:, pixel, np.clip(pixel + offset, 0, size - 1)] += tap[:, None]
    return matrices


def patches(weak: Tensor, offsets: np.ndarray) -> Tensor:
    """Cut the jigsaw's patches `(B, 9, 3, P, P)` out of weak views `(B, 3, S, S)`.

    A view has 3 x 3 cells, which are counted row by row. `offsets` `(B, 9, 2)` are the positions of
    the patches in their cells, (y, x) in pixels.
    """
    cell_px = weak.shape[-1] // 3
    cells = np.stack(np.divmod(np.arange(9), 3), 1) * cell_px  # (9, 2)
    pixel = np.arange(patch_px(weak.shape[-1]))  # (P,)
    places = send((cells + offsets)[..., None] + pixel, weak.device)  # (B, 9, 2, P)
    y, x = places[:, :, 0, :, None], places[:, :, 1, None, :]  # (B, 9, P, 1), (B, 9, 1, P)
    image = torch.arange(len(weak), device=weak.device)[:, None, None, None]  # (B, 1, 1, 1)
    return weak[image, :, y, x].permute(0, 1, 4, 2, 3)


def round_level(levels: Tensor) -> Tensor:
    """Round to whole levels, in place."""
    return levels.add_(0.5).floor_()


def affine(spec: ViewSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """Scale and bias, `(1, 3, 1, 1)` each, from a channel's 8-bit level to its normalised value."""
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (spec.mean, spec.std)
    )
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalise(levels: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Normalise levels `(B, 3, S, S)` to a channels_last view in `dtype`, in one pass over memory.

    `scale` and `bias` are those of `affine`.
    """
    out = torch.empty(
        levels.shape, dtype=dtype, device=levels.device, memory_format=torch.channels_last
    )
    return torch.addcmul(bias, levels, scale, out=out)


def rand_augment_(levels: Tensor, params: np.ndarray) -> None:
    """Apply the operations of RandAugment in `params` to `levels` `(B, 3, S, S)`, in place.

    Each of the two steps applies the tables, the blends and the affine maps to the samples that
    have such an operation. `params` `(B,)` are rows of `draws.VIEW_PARAMS`.
    """
    for k in range(2):
        operation = params["rand_op"][:, k]
        for first, last, apply in (
            (RandOp.AUTO_CONTRAST, RandOp.SOLARIZE_ADD, change_levels),
            (RandOp.COLOR, RandOp.SHARPNESS, enhance),
            (RandOp.ROTATE, RandOp.TRANSLATE_Y, transform),
        ):
            rows = np.flatnonzero((operation >= first) & (operation <= last))  # (n,)
            if len(rows):
                index = send(rows, levels.device)
                levels.index_copy_(0, index, apply(levels.index_select(0, index), params[rows], k))


def change_levels(levels: Tensor, params: np.ndarray, k: int) -> Tensor:
    """Apply ImageOps' tables to `levels` `(n, 3, S, S)`, all of which have one as operation k."""
    device, pixels = levels.device, levels[0, 0].numel()
    flat = levels.long().flatten(2)  # (n, 3, S * S)
    value = send(params["rand_value"][:, k].astype(np.int64), device)[:, None, None]  # (n, 1, 1)
    level = torch.arange(256, device=device)
    low, high = flat.amin(2, keepdim=True), flat.amax(2, keepdim=True)  # (n, 3, 1)
    # A number divided by a tensor would be rounded twice.
    scale = torch.full_like(low, 255, dtype=torch.float64) / (high - low).clamp(min=1)
    stretched = (level * scale - low * scale).long()  # (n, 3, 256), like all tables
    count = torch.zeros(*flat.shape[:2], 256, dtype=torch.int64, device=device)
    count.scatter_add_(2, flat, torch.ones_like(flat))
    step = (pixels - count.gather(2, high)) // 255  # (n, 3, 1)
    equalized = (step // 2 + count.cumsum(2) - count) // step.clamp(min=1)
    step_of_level = 2 ** (8 - value).clamp(0, 8)
    tables = (
        torch.where(high > low, stretched, level),
        torch.where(step > 0, equalized, level),
        255 - level,
        level // step_of_level * step_of_level,
        torch.where(level < value, level, 255 - level),
        torch.where(level < 128, level + value, level),
    )
    chosen = send(params["rand_op"][:, k] - RandOp.AUTO_CONTRAST, device)
    image = torch.arange(len(flat), device=device)
    stacked = torch.stack([table.expand_as(stretched) for table in tables])  # (6, n, 3, 256)
    table = stacked[chosen.long(), image].clamp(0, 255)
    return table.gather(2, flat).view_as(levels).to(levels.dtype)


def enhance(levels: Tensor, params: np.ndarray, k: int) -> Tensor:
    """Apply ImageEnhance's blends to `levels` `(n, 3, S, S)`, all of which have one as operation k.

    The centre of the blend is the pixel's gray, the mean gray, black or the smoothed image.
    """
    operation = params["rand_op"][:, k]
    blends = np.stack([operation == op for op in (RandOp.COLOR, RandOp.CONTRAST, RandOp.SHARPNESS)])
    weights = np.stack([*blends, params["rand_value"][:, k]]).astype(np.float32)  # (4, n)
    weight = send(weights, levels.device)[..., None, None, None]  # (4, n, 1, 1, 1)
    color, contrast, sharpness, factor = weight.unbind()
    gray = gray_level(levels)
    mean = (gray.mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    smooth = levels.clone()  # ImageFilter.SMOOTH keeps the border
    inner = levels[..., 1:-1, 1:-1]
    smooth[..., 1:-1, 1:-1] = round_level((F.avg_pool2d(levels, 3, 1) * 9 + inner * 4) / 13)
    centre = gray * color + mean * contrast + smooth * sharpness
    return (levels - centre).mul_(factor).add_(centre).clamp_(0, 255).floor_()


def transform(levels: Tensor, params: np.ndarray, k: int) -> Tensor:
    """Apply PIL's affine maps to `levels` `(n, 3, S, S)`, all of which have one as operation k.

    This computes in float64, as Geometry.c does. In float32, 1% of the levels of a sheared image
    would differ by one, and a few pixels at its border would be filled where PIL's are not, or the
    other way round.
    """
    device, size = levels.device, levels.shape[-1]
    matrices = affine_matrices(params["rand_op"][:, k], params["rand_value"][:, k], size)
    a, b, c, d, e, f = send(matrices, device)[..., None, None].unbind()  # (n, 1, 1) each
    x = torch.arange(size, device=device).double() + 0.5
    y = x[:, None]
    across, down = a * x + b * y + c, d * x + e * y + f  # (n, S, S) each, in pixels of the input
    inside = (across >= 0) & (across < size) & (down >= 0) & (down < size)
    left, top = (across - 0.5).floor(), (down - 0.5).floor()
    taps = torch.arange(-1, 3, device=device)[:, None, None, None]
    columns = (left.long() + taps).clamp(0, size - 1)  # (4, n, S, S)
    rows = (top.long() + taps).clamp(0, size - 1)
    bicubic = send(params["rand_bicubic"][:, k] > 0, device)[:, None, None, None]
    flat = levels.double().flatten(2)  # (n, 3, S * S)

    def pixels(row: Tensor, column: Tensor) -> Tensor:
        place = (row * size + column).flatten(1)[:, None].expand_as(flat)
        return flat.gather(2, place).view_as(levels)

    part_x, part_y = (across - 0.5 - left)[:, None], (down - 0.5 - top)[:, None]  # (n, 1, S, S)
    lines = [
        interpolate([pixels(row, column) for column in columns], part_x, bicubic) for row in rows
    ]
    result = interpolate(lines, part_y, bicubic).clamp_(0, 255).floor_().float()
    fill = send(np.array(RAND_FILL, np.float32), device)[:, None, None]
    return torch.where(inside[:, None], result, fill)


def affine_matrices(operation: np.ndarray, value: np.ndarray, size: int) -> np.ndarray:
    """The matrices `(6, n)` of Image.transform or rotate, from a place in the output to the input.

    `operation` and `value` are `(n,)`, and an image has `size` by `size` pixels.
    """
    value = value.astype(np.float64)
    turn = np.where(operation == RandOp.ROTATE, -(value % 360) * (np.pi / 180), 0)
    cos, sin = np.cos(turn).round(15), np.sin(turn).round(15)  # as PIL rounds them
    shear_x, shear_y, across, down = (
        value * (operation == op)
        for op in (RandOp.SHEAR_X, RandOp.SHEAR_Y, RandOp.TRANSLATE_X, RandOp.TRANSLATE_Y)
    )
    centre = size / 2
    c = cos * -centre + sin * -centre + centre + across * size
    f = -sin * -centre + cos * -centre + centre + down * size
    return np.stack([cos, sin + shear_x, c, -sin + shear_y, cos, f])


def interpolate(values: list[Tensor], part: Tensor, bicubic: Tensor) -> Tensor:
    """The value at `part` of the way from the second to the third of four equally spaced values."""
    before, low, high, after = values
    square = 2 * (before - low) + high - after
    cubic = low + part * (high - before + part * (square + part * (low - before - high + after)))
    return torch.where(bicubic, cubic, low + (high - low) * part)
