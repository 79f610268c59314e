"""The two stages of a view as batched tensor operations on the device: what runs on a GPU.

The same arithmetic as `host_ops`, on float32 tensors that hold whole 8-bit levels, `(B, 3, S, S)`. The dice are known on
the host, so which samples an operation concerns is an index list made there: no operation waits for the device.
Resizing and blurring are small matrix products, one matrix per sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pipelines.draws import BRIGHTNESS, CONTRAST, HUE
from pipelines.views import ViewSpec

BLUR_PASSES = 3  # PIL's GaussianBlur


def send(array: np.ndarray, device: torch.device) -> Tensor:
    """A host array on `device`, without waiting for the copy."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return (
        tensor.pin_memory().to(device, non_blocking=True)
        if device.type == "cuda"
        else tensor.to(device)
    )


def weak_stage(images: Tensor, params: np.ndarray, size_px: int) -> Tensor:
    """Crop, resize and flip `(B, 3, H, W)` uint8 to levels `(B, 3, S, S)`, antialiased as PIL's bilinear resize."""
    fields = np.stack([params[name] for name in ("top", "left", "height", "width", "flip")]).astype(
        np.float32
    )
    top, left, height, width, flip = send(fields, images.device)
    across = triangle_weights(left, width, images.shape[3], size_px, flip)
    down = triangle_weights(top, height, images.shape[2], size_px, torch.zeros_like(flip))
    rows = round_level(images.float().flatten(1, 2).bmm(across.mT))  # (B, 3 H, S)
    return round_level(down[:, None] @ rows.view(-1, *images.shape[1:3], size_px))


def triangle_weights(
    start: Tensor, length: Tensor, size_in: int, size_out: int, flip: Tensor
) -> Tensor:
    """`(B, size_out, size_in)`: each output pixel's weights over the window `[start, start + length)`, mirrored if `flip`."""
    out = torch.arange(size_out, device=start.device, dtype=torch.float32)
    out = torch.where(flip[:, None] > 0, size_out - 1 - out, out)  # (B, size_out)
    scale = (length / size_out)[:, None]
    centre = (start[:, None] + (out + 0.5) * scale)[..., None]
    pixel = torch.arange(size_in, device=start.device, dtype=torch.float32)
    weight = (1 - (pixel + 0.5 - centre).abs() / scale.clamp(min=1)[..., None]).clamp(min=0)
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weight = weight * inside[:, None]
    return weight / weight.sum(-1, keepdim=True)


def aggressive_stage(levels: Tensor, params: np.ndarray) -> Tensor:
    """Jitter in each sample's own order, grayscale and blur of `(B, 3, S, S)` levels; the input is left as it is."""
    steps = [blend_weights(params, slot) for slot in range(4)] + [grayscale_weights(params)]
    weights = send(np.stack(steps), levels.device)[..., None, None, None]  # (5, 3, B, 1, 1, 1)
    levels = (
        levels.clone()
    )  # from here in place: fresh 6 MB temporaries cost more than the arithmetic on a CPU
    for slot in range(5):
        blend_(levels, *weights[slot])
        if slot < 4 and len(
            chosen := np.flatnonzero(params["jitter"] & (params["order"][:, slot] == HUE))
        ):
            index, turns = send(chosen, levels.device), params["factor"][chosen, HUE]
            shift = send(np.trunc(turns.astype(np.float64) * 255).astype(np.float32), levels.device)
            levels.index_copy_(
                0, index, shift_hue(levels.index_select(0, index), shift[:, None, None])
            )
    if len(chosen := np.flatnonzero(params["blur_sigma_px"] > 0)):
        index, sigma = send(chosen, levels.device), params["blur_sigma_px"][chosen]
        levels.index_copy_(0, index, blur(levels.index_select(0, index), sigma))
    return levels


def blend_weights(params: np.ndarray, slot: int) -> np.ndarray:
    """`(3, B)` float32: how far a slot's blend moves towards its centre, and the centre's shares of mean and own gray.

    Brightness, contrast and saturation move away from black, the mean gray and the pixel's gray; 0 moves nothing.
    """
    operation = params["order"][:, slot]
    factor = np.take_along_axis(params["factor"], operation[:, None].astype(np.intp), 1)[:, 0]
    towards = np.where(params["jitter"] & (operation != HUE), 1 - factor, 0)
    own_gray = (operation != BRIGHTNESS) & (operation != CONTRAST)
    return np.stack([towards, operation == CONTRAST, own_gray]).astype(np.float32)


def grayscale_weights(params: np.ndarray) -> np.ndarray:
    """The fifth blend: all the way to the pixel's gray, where grayscale is on."""
    return np.stack([params["grayscale"], np.zeros(len(params)), np.ones(len(params))]).astype(
        np.float32
    )


def blend_(levels: Tensor, towards: Tensor, mean_share: Tensor, own_share: Tensor) -> None:
    """Move each pixel towards its centre, clip and truncate as PIL does, in place."""
    gray = gray_level(levels)
    mean = (gray.mean((1, 2, 3), keepdim=True) + 0.5).floor_()
    levels.lerp_(gray.mul_(own_share).add_(mean_share * mean), towards).clamp_(0, 255).floor_()


def gray_level(levels: Tensor) -> Tensor:
    """ITU-R 601 luma `(B, 1, S, S)`, rounded; exact in float32, whose 24 bits hold PIL's 16-bit fixed point."""
    r, g, b = levels[:, 0:1], levels[:, 1:2], levels[:, 2:3]
    return (
        (r * (19595 / 65536))
        .add_(g, alpha=38470 / 65536)
        .add_(b, alpha=7471 / 65536)
        .add_(0.5)
        .floor_()
    )


def shift_hue(levels: Tensor, shift: Tensor) -> Tensor:
    """Rotate the hue by `shift` of 256 levels, through PIL's 8-bit HSV."""
    r, g, b = levels.unbind(1)
    v = levels.amax(1)
    spread = v - levels.amin(1)
    # Levels are whole, so these are 1 where red (green) is the largest and 0 elsewhere; torch.where is slower on a CPU
    is_red, is_green = (r - v).add_(1).clamp_(min=0), (g - v).add_(1).clamp_(min=0)
    rise = (r - g).lerp_(b - r, is_green).lerp_(g - b, is_red).div_(spread.clamp(min=1))
    sextant = rise.add_(
        is_green.mul_(-2).add_(10).lerp_(torch.full_like(v, 6), is_red)
    )  # one turn up: positive
    hue = sextant.mul_(1 / 6).frac_().mul_(255).floor_().add_(shift)
    hue -= (hue * (1 / 256)).floor_().mul_(256)
    chroma = (spread.mul_(255) / v.clamp(min=1)).floor_().mul_(v).mul_(1 / 255)
    # A channel is v - chroma * clamp(2 - d, 0, 1), d the distance of its sextant from 2 on a circle of 6
    offset = torch.arange(0, -6, -2, device=levels.device).view(3, 1, 1)
    distance = (hue.mul_(6 / 255)[:, None] + offset).abs_().sub_(3).abs_()
    return round_level(v[:, None] - chroma[:, None] * distance.neg_().add_(2).clamp_(0, 1))


def blur(levels: Tensor, sigma_px: np.ndarray) -> Tensor:
    """PIL's GaussianBlur, three box blurs per axis with repeated edges, as one matrix per sample and axis."""
    box = send(box_matrices(sigma_px, levels.shape[-1]), levels.device)
    matrix = torch.linalg.matrix_power(box, BLUR_PASSES)[:, None]
    return round_level(matrix @ round_level(levels @ matrix.mT))


def box_matrices(sigma_px: np.ndarray, size: int) -> np.ndarray:
    """`(B, size, size)` float32: one box blur whose three passes have variance sigma squared, edges repeated."""
    variance = sigma_px.astype(np.float64) ** 2 / BLUR_PASSES
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    radius = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (
        6 * (variance - (whole + 1) ** 2)
    )
    reach = int(np.ceil(radius.max()))
    matrices = np.zeros((len(sigma_px), size, size), np.float32)
    pixel = np.arange(size)
    for offset in range(-reach, reach + 1):
        tap = np.clip(radius + 1 - abs(offset), 0, 1) / (
            2 * radius + 1
        )  # 1 inside the box, its fraction at the ends
        matrices[:, pixel, np.clip(pixel + offset, 0, size - 1)] += tap[:, None]
    return matrices


def round_level(levels: Tensor) -> Tensor:
    return levels.add_(0.5).floor_()


def affine(spec: ViewSpec, device: torch.device) -> tuple[Tensor, Tensor]:
    """`(1, 3, 1, 1)` scale and bias that take a channel's 8-bit level to its normalised value."""
    mean, std = (
        torch.tensor(x, dtype=torch.float64).view(1, 3, 1, 1) for x in (spec.mean, spec.std)
    )
    return (1 / (255 * std)).float().to(device), (-mean / std).float().to(device)


def normalise(levels: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Levels `(B, 3, S, S)` to the normalised, channels_last view in the compute dtype, in one pass over memory."""
    out = torch.empty(
        levels.shape, dtype=dtype, device=levels.device, memory_format=torch.channels_last
    )
    return torch.addcmul(bias, levels, scale, out=out)
