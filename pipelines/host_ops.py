"""The two stages of a view on the CPU, one image at a time: numba kernels that release the GIL.

Each kernel does the integer and float arithmetic of a PIL operation, in the same order. A view
therefore equals the one that torchvision makes from a PIL image with the same parameters. The
operations are crop and resize (Resample.c), the four jitter operations (Blend.c, Convert.c),
grayscale, and PIL's Gaussian blur, which is three box blurs along each axis (BoxBlur.c). Those of
RandAugment are ImageOps' tables, ImageEnhance's blends and affine maps (Geometry.c). Flips and
quarter turns only move pixels.

Images are `(H, W, 3)` uint8. Between the operations, a view is three planes `(3, S, S)` uint8, in a
layout that the compiler can vectorise.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from rsa_fast.pipelines.draws import BRIGHTNESS, CONTRAST, RAND_FILL, SATURATION, RandOp

log = logging.getLogger("rsa_fast")


def can_cache() -> bool:
    """Whether numba finds a folder in which to keep the machine code of this file's kernels."""
    try:
        njit(cache=True)(can_cache)  # this looks for the folder and compiles nothing
    except RuntimeError:
        log.warning(
            "no writable folder to keep compiled kernels in, so every start compiles them again: "
            "NUMBA_CACHE_DIR may name one"
        )
        return False
    return True


# All kernels must be in this file, because numba recognises an outdated cache by the file of the
# kernel, not by the files of the functions that it calls. `fastmath` is explicitly False: otherwise
# a kernel that is first compiled for a caller with fastmath, as FFCV's functions are, would inherit
# it and be cached with it. No kernel that another calls may take a writable 1-d uint8 array: FFCV
# marks numba's type of these as read-only, and numba then does not find what it has compiled.
CACHE = can_cache()
kernel = njit(nogil=True, cache=CACHE, error_model="numpy", fastmath=False)

# Numba's sum or product of two int32 is an int64, which AVX2 can neither multiply nor convert to a
# float. An expression of them is therefore wrapped in np.int32 as a whole: LLVM then computes it in
# 32 bits, and vectorises the loop.

# LLVM does not vectorise a look-up in a table. Where the CPU has AVX-512's VBMI and VNNI (Ice Lake,
# Zen 4 and later), some inner loops are therefore replaced by `look_up_64`, `normalise_64` and
# `resize_16` at the end of this file, which give the same bits. Numba leaves out the branches of a
# constant that is False, and keeps the machine code of each kind of CPU separately.
CPU_FEATURES = str(cpu_target.target_context.codegen().magic_tuple()[2]).split(",")
AVX512 = "+avx512vbmi" in CPU_FEATURES and "+avx512vnni" in CPU_FEATURES

RESIZE_BITS = 22  # Resample.c: PRECISION_BITS
HALF = np.int32(1 << (RESIZE_BITS - 1))
BLUR_PASSES = 3
BLOCK = 2048  # pixels per block, so that their sums stay in the first-level cache


@kernel
def sample_views(
    image: np.ndarray,
    params: np.ndarray,
    table: np.ndarray,
    weak: tuple[np.ndarray, ...],
    aggressive: tuple[np.ndarray, ...],
    b: int,
) -> None:
    """All views of one decoded image `(H, W, 3)` uint8, which is the image `b` of a batch.

    `params` are `(K,)` of `draws.VIEW_PARAMS`. `table` `(3, 256)` maps the 8-bit levels of each
    channel to normalised values. `weak` and `aggressive` are the outputs of the K crops: each is
    `(B, S, S, 3)` of the table's dtype, or `(B, 0, 0, 3)` when the view is not read. S may differ
    from crop to crop. Numba compiles this once for every K.
    """
    planes = np.empty((3, 0, 0), np.uint8)
    for crop in range(len(weak)):
        size = max(weak[crop].shape[1], aggressive[crop].shape[1])
        if size > 0:
            if size != planes.shape[1]:
                planes = np.empty((3, size, size), np.uint8)
            weak_stage(image, params[crop], planes)
            finish_crop(planes, params[crop], table, weak[crop][b], aggressive[crop][b])


@kernel
def finish_crop(
    planes: np.ndarray, p: np.void, table: np.ndarray, weak: np.ndarray, aggressive: np.ndarray
) -> None:
    """The views of a crop whose weak stage is done: `planes` `(3, S, S)` uint8, which is changed.

    The outputs are `(S, S, 3)`, or empty when the view is not read.
    """
    if weak.shape[0] > 0:
        normalise(planes, table, weak)
    if aggressive.shape[0] > 0:
        aggressive_stage(planes, p)
        normalise(planes, table, aggressive)


@kernel
def batch_views(
    pixels: np.ndarray,
    offsets: np.ndarray,
    sizes: np.ndarray,
    ids: np.ndarray,
    params: np.ndarray,
    table: np.ndarray,
    weak: tuple[np.ndarray, ...],
    aggressive: tuple[np.ndarray, ...],
) -> None:
    """`sample_views` for a batch of images of a dataset that is one flat array `pixels` uint8.

    Image `i` starts at `offsets[i]` and has height and width `sizes[i]`. `offsets` is `(N,)`,
    `sizes` `(N, 2)`, `ids` `(B,)` and `params` `(B, K)`.
    """
    for b in range(len(ids)):
        height, width = sizes[ids[b]]
        first = offsets[ids[b]]
        image = pixels[first : first + height * width * 3].reshape(height, width, 3)
        sample_views(image, params[b], table, weak, aggressive, b)


# This takes a microsecond, so that it keeps Python's lock: other threads would take it meanwhile.
@njit(cache=CACHE, error_model="numpy", fastmath=False)
def jpeg_header(data: np.ndarray) -> tuple[int, int, bool]:
    """Height and width, and whether the JPEG is usual, by the frame header in its bytes `(n,)`.

    It is usual if it has at most three components, unlike CMYK images, and the decoder enlarges
    each by 1x1, 2x1 (width times height) or 2x2. Both sides are 0 if there is no frame header
    where it should be.
    """
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        # These three markers are tables, not frame headers.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            # Each component has three bytes. The second one holds its two sampling factors.
            factors = data[at + 11 : at + 10 + 3 * data[at + 9] : 3]
            widest, tallest = 0, 0
            for both in factors:
                widest, tallest = max(widest, both >> 4), max(tallest, both & 15)
            usual = data[at + 9] <= 3
            for both in factors:
                across, down = both >> 4, both & 15
                usual &= widest == across or widest == 2 * across
                usual &= tallest == down or (tallest == 2 * down and widest == 2 * across)
            height = data[at + 5] * 256 + data[at + 6]
            return height, data[at + 7] * 256 + data[at + 8], usual
        # Skip a fill byte, or a whole segment.
        at += 1 if marker == 0xFF else 2 + data[at + 2] * 256 + data[at + 3]
    return 0, 0, False


@kernel
def aggressive_stage(planes: np.ndarray, p: np.void) -> None:
    """Jitter, grayscale, blur, solarize and RandAugment of `planes` `(3, S, S)` uint8, in place.

    `p` is one row of `draws.VIEW_PARAMS`.
    """
    if p["jitter"]:
        for k in range(4):
            operation = p["order"][k]
            if operation == BRIGHTNESS:
                blend_constant(planes, 0, p["factor"][BRIGHTNESS])
            elif operation == CONTRAST:
                blend_constant(planes, mean_gray(planes), p["factor"][CONTRAST])
            elif operation == SATURATION:
                blend_gray(planes, p["factor"][SATURATION])
            else:
                shift_hue(planes, p["factor"][3])
    if p["grayscale"]:
        blend_gray(planes, np.float32(0))
    if p["blur_sigma_px"] > 0:
        blur(planes, p["blur_sigma_px"])
    if p["solarize"]:
        flat = planes.reshape(-1)
        for i in range(flat.size):
            flat[i] = min(flat[i], 255 - flat[i])
    rand_augment(planes, p)


@kernel
def normalise(planes: np.ndarray, table: np.ndarray, out: np.ndarray) -> None:
    """Write `planes` `(3, S, S)` uint8 to `out` `(S, S, 3)` through `table` `(3, 256)`."""
    channels, pixels = planes.reshape(3, -1), out.reshape(-1, 3)
    count, done = len(pixels), 0
    if AVX512:
        done = count // 64 * 64
        separate = bytes_of(table)
        for i in range(0, done, 64):
            normalise_64(planes, count, separate, pixels, i)
    for i in range(done, count):
        for c in range(3):
            pixels[i, c] = table[c, channels[c, i]]


@kernel
def bytes_of(table: np.ndarray) -> np.ndarray:
    """The first bytes of all values of `table` `(3, 256)`, the second ones, and so on.

    Returns `(3, itemsize, 256)` uint8.
    """
    separate = np.empty((3, table.itemsize, 256), np.uint8)
    for c in range(3):
        values = table[c].view(np.uint8)
        for k in range(table.itemsize):
            separate[c, k] = values[k :: table.itemsize]
    return separate


@kernel
def look_up(levels: np.ndarray, table: np.ndarray) -> None:
    """Replace `levels` `(S, S)` uint8 by their entries in `table` `(1, 256)` uint8, in place."""
    flat = levels.reshape(-1)
    done = 0
    if AVX512:
        done = flat.size // 64 * 64
        for i in range(0, done, 64):
            look_up_64(levels, table, i)
    for i in range(done, flat.size):
        flat[i] = table[0, flat[i]]


@kernel
def filter_taps(size_in: int, size_out: int, bicubic: bool) -> tuple[np.ndarray, np.ndarray]:
    """PIL's antialiased bilinear or bicubic filter in fixed point.

    Returns each output's first tap `(size_out,)` and the weights `(taps, size_out)`. Every output
    has the same number of taps, some of them with weight 0, so a loop over the outputs needs no
    branch.
    """
    scale = size_in / size_out
    stretch = max(scale, 1.0)  # the filter is wider when the image is made smaller
    support = 2 * stretch if bicubic else stretch
    taps = min(math.ceil(2 * support), size_in)
    first = np.empty(size_out, np.int64)
    fixed = np.zeros((taps, size_out), np.int32)
    weights = np.empty(taps, np.float64)
    for out in range(size_out):
        centre = (out + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), size_in, low + taps)
        first[out] = min(low, size_in - taps)
        total = 0.0
        for i in range(low, high):
            distance = abs((i - centre + 0.5) * (1 / stretch))
            if not bicubic:
                weights[i - low] = max(1.0 - distance, 0.0)
            elif distance < 1:  # the cubic of Keys (1981) with a = -0.5
                weights[i - low] = (1.5 * distance - 2.5) * distance * distance + 1
            else:
                weights[i - low] = (
                    (((distance - 5) * distance + 8) * distance - 4) * -0.5 if distance < 2 else 0.0
                )
            total += weights[i - low]
        for i in range(low, high):
            share = weights[i - low] * (1 / total) * (1 << RESIZE_BITS)
            fixed[i - first[out], out] = np.int32(share + (0.5 if share >= 0 else -0.5))
    return first, fixed


@kernel
def weak_stage(image: np.ndarray, p: np.void, planes: np.ndarray) -> None:
    """Crop, resize, flip and turn `image` `(H, W, 3)` to `planes` `(3, S, S)` uint8.

    `p` is one row of `draws.VIEW_PARAMS`. A turn is two flips and a transposition (see
    `draws.mirrors`), and the flips cost nothing.
    """
    top, left, height, width = p["top"], p["left"], p["height"], p["width"]
    turns, bicubic = p["quarter_turns"], p["bicubic"]
    flip_x = p["flip"] != (turns == 1 or turns == 2)
    flip_y = p["vertical_flip"] != (turns >= 2)
    size = planes.shape[1]
    pixels = image.reshape(image.shape[0], image.shape[1] * 3)
    if height > size and 2 * width < height + size:
        # Pillow 13 resizes such a window along y first. Older versions never do.
        pixels = resize_down(pixels, top, 3 * left, height, 3 * width, size, bicubic)
        top, left, height = 0, 0, size
    rows = resize_across(pixels, top, left, height, width, flip_x, size, bicubic)
    resized = resize_down(rows, 0, 0, height, 3 * size, size, bicubic)
    for c in range(3):
        for y in range(size):
            row, out = resized[size - 1 - y if flip_y else y][c * size :][:size], planes[c, y]
            if turns % 2 == 1:
                for x in range(size):
                    planes[c, x, y] = row[x]
            else:
                for x in range(size):
                    out[x] = row[x]


@kernel
def resize_across(
    pixels: np.ndarray,
    top: int,
    left: int,
    height: int,
    width: int,
    flip: bool,
    size: int,
    bicubic: bool,
) -> np.ndarray:
    """Resize a window of interleaved rows `(H, 3 * W)` uint8 along x, mirrored if `flip`.

    Returns `(height, 3 * size)` uint8. Each row contains first all red, then all green, then all
    blue levels.
    """
    first, weights = filter_taps(width, size, bicubic)
    # The place of each output's first tap. Numba does not check whether an unsigned index is
    # negative.
    place = np.empty(size, np.uint32)
    weight = np.empty(weights.shape, np.int32)
    for x in range(size):
        out = size - 1 - x if flip else x
        place[out] = first[x]
        for t in range(len(weights)):
            weight[t, out] = weights[t, x]
    rows = np.empty((height, 3 * size), np.uint8)
    if AVX512 and resize_rows_16(pixels, top, left, place, weight, rows):
        return rows
    # Each integer of these two contains red, green and blue.
    line, tap = np.empty(width, np.int32), np.empty(size, np.int32)
    total = np.empty(3 * size, np.int32)
    red, green, blue = total[:size], total[size:][:size], total[2 * size :][:size]
    for y in range(height):
        pixel = pixels[top + y][3 * left :]
        for x in range(width):
            line[x] = (
                np.int32(pixel[3 * x])
                | np.int32(pixel[3 * x + 1]) << 8
                | np.int32(pixel[3 * x + 2]) << 16
            )
        total[:] = HALF
        for t in range(len(weights)):
            weight_t, from_t = weight[t], line[t:]
            # One look-up serves three channels. It has a loop of its own, so that the compiler can
            # vectorise the other one.
            for x in range(size):
                tap[x] = from_t[place[x]]
            for x in range(size):
                rgb, w = tap[x], weight_t[x]
                red[x] += w * (rgb & 255)
                green[x] += w * ((rgb >> 8) & 255)
                blue[x] += w * (rgb >> 16)
        if bicubic:
            clip(total)
        row = rows[y]
        for i in range(3 * size):
            row[i] = total[i] >> RESIZE_BITS
    return rows


@kernel
def resize_rows_16(
    pixels: np.ndarray,
    top: int,
    left: int,
    place: np.ndarray,
    weight: np.ndarray,
    rows: np.ndarray,
) -> bool:
    """The loop over the rows of `resize_across`, 16 outputs at once by `resize_16`.

    Returns False and does nothing if 16 neighbouring outputs depend on more than 128 bytes of a row
    or on more than 8 taps each. This happens when an image is made smaller by more than a factor of
    about 2.3. It also returns False for rows below 128 bytes and for fewer than 16 outputs.

    `place` `(size,)` and `weight` `(taps, size)` are those of `resize_across`.
    """
    taps, size = weight.shape
    row_bytes = pixels.shape[1] - 3 * left
    if taps > 8 or size < 16 or pixels.shape[1] < 128:
        return False
    blocks, groups = (size + 15) // 16, (taps + 3) // 4
    begin, first_byte = np.empty(blocks, np.int64), np.empty(blocks, np.int64)
    # For each block, `index` contains the place of every tap in the 128 bytes, and `digits` its
    # weight. The taps of an output are in groups of four.
    index = np.zeros((blocks, groups, 16, 4), np.uint8)
    digits = np.zeros((blocks, 3, groups, 16, 4), np.int8)
    for b in range(blocks):
        begin[b] = min(16 * b, size - 16)  # the last block may overlap the one before
        low, high = np.int64(place[begin[b]]), np.int64(place[begin[b]])
        for x in range(begin[b], begin[b] + 16):
            low, high = min(low, np.int64(place[x])), max(high, np.int64(place[x]))
        # The 128 bytes never extend beyond the row, and so not beyond the image.
        first_byte[b] = min(3 * low, row_bytes - 128)
        if 3 * (high + taps) - first_byte[b] > 128:
            return False
        for i in range(16):
            x = begin[b] + i
            for t in range(taps):
                index[b, t // 4, i, t % 4] = 3 * (np.int64(place[x]) + t) - first_byte[b]
                # The weight is d2 * 256**2 + d1 * 256 + d0 with signed bytes, as VNNI multiplies.
                rest = weight[t, x]
                for digit in range(3):
                    low_digit = ((rest & 255) ^ 128) - 128
                    digits[b, digit, t // 4, i, t % 4] = low_digit
                    rest = (rest - low_digit) >> 8
    for y in range(len(rows)):
        line = (top + y) * pixels.strides[0] + 3 * left
        for b in range(blocks):
            source, out = line + first_byte[b], 3 * size * y + begin[b]
            if groups == 1:
                resize_16(pixels, source, index, digits, b, rows, out, size, 1)
            else:
                resize_16(pixels, source, index, digits, b, rows, out, size, 2)
    return True


@kernel
def clip(total: np.ndarray) -> None:
    """Clip levels in fixed point to 0..255, in place.

    Bicubic weights can be negative. Bilinear ones are not, so that their results need no clipping.
    """
    for i in range(total.size):
        total[i] = min(max(total[i], np.int32(0)), np.int32((256 << RESIZE_BITS) - 1))


@kernel
def resize_down(
    pixels: np.ndarray, top: int, left: int, height: int, width: int, size: int, bicubic: bool
) -> np.ndarray:
    """Resize a window of `pixels` `(H, W)` uint8 along y. Returns `(size, width)` uint8."""
    first, weights = filter_taps(height, size, bicubic)
    out = np.empty((size, width), np.uint8)
    total = np.empty(width, np.int32)
    for y in range(size):
        total[:] = HALF
        for t in range(len(weights)):
            weight, row = weights[t, y], pixels[top + first[y] + t][left:][:width]
            for x in range(width):
                total[x] += weight * np.int32(row[x])
        if bicubic:
            clip(total)
        line = out[y]
        for x in range(width):
            line[x] = total[x] >> RESIZE_BITS
    return out


@kernel
def gray_level(r: np.uint8, g: np.uint8, b: np.uint8) -> np.int32:
    """The ITU-R 601 luma of one pixel, in Convert.c's 16-bit fixed point."""
    scaled = np.int32(np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000)
    gray: np.int32 = np.int32(scaled >> 16)
    return gray


@kernel
def mean_gray(planes: np.ndarray) -> int:
    """The mean luma of `planes` `(3, S, S)`, rounded: torchvision's centre of a contrast change."""
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    total = np.int64(0)
    for i in range(r.size):
        total += gray_level(r[i], g[i], b[i])
    return int(total / r.size + 0.5)


@kernel
def blend_level(level: np.uint8, centre: int | np.int32, factor: np.float32) -> np.uint8:
    """Blend.c: `centre + factor * (level - centre)` in float32, clipped and truncated."""
    value = np.float32(centre) + factor * (np.float32(level) - np.float32(centre))
    blended: np.uint8 = np.uint8(min(max(value, np.float32(0)), np.float32(255)))
    return blended


@kernel
def blend_constant(planes: np.ndarray, centre: int, factor: np.float32) -> None:
    """Brightness (with centre 0) or contrast (with centre mean gray) of `(3, S, S)`, in place."""
    if AVX512:
        table = np.empty((1, 256), np.uint8)
        for level in range(256):
            table[0, level] = blend_level(np.uint8(level), centre, factor)
        look_up(planes, table)
    else:
        flat = planes.reshape(-1)
        for i in range(flat.size):
            flat[i] = blend_level(flat[i], centre, factor)


@kernel
def blend_gray(planes: np.ndarray, factor: np.float32) -> None:
    """Saturation of `planes` `(3, S, S)` uint8, in place. A factor of 0 is grayscale."""
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(r.size):
        gray = gray_level(r[i], g[i], b[i])
        r[i] = blend_level(r[i], gray, factor)
        g[i] = blend_level(g[i], gray, factor)
        b[i] = blend_level(b[i], gray, factor)


@kernel
def shift_hue(planes: np.ndarray, turns: np.float32) -> None:
    """torchvision's adjust_hue of `planes` `(3, S, S)` uint8, in place.

    Converts to 8-bit HSV, adds to H modulo 256, and converts back. The result equals Convert.c's
    for every colour and shift.
    """
    shift = np.int32(np.float64(turns) * 255)  # toward zero
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    hue, saturation = np.empty(BLOCK, np.uint8), np.empty(BLOCK, np.uint8)
    value = np.empty(BLOCK, np.uint8)
    for start in range(0, r.size, BLOCK):
        count = min(BLOCK, r.size - start)
        red, green, blue = r[start:][:count], g[start:][:count], b[start:][:count]
        for i in range(count):
            hue[i], saturation[i], value[i] = hsv(
                np.int32(red[i]), np.int32(green[i]), np.int32(blue[i])
            )
        # The way back has a loop of its own. One loop for both directions would have too many live
        # values to be vectorised well.
        for i in range(count):
            red[i], green[i], blue[i] = rgb(
                np.int32((np.int32(hue[i]) + shift) & 255),
                np.float32(saturation[i]),
                np.float32(value[i]),
            )


@kernel
def hsv(red: np.int32, green: np.int32, blue: np.int32) -> tuple[np.int32, np.int32, np.int32]:
    """Convert.c's rgb2hsv of one pixel: hue, saturation and value as levels in 0..255."""
    value, low = max(red, max(green, blue)), min(red, min(green, blue))
    spread = np.int32(value - low)
    # Convert.c divides the distances of the three channels from the value by the spread. Two of the
    # quotients are 0 and 1. This is the third one.
    distance = np.int32(2 * value + low - red - green - blue)
    part = np.float32(distance) / np.float32(max(spread, np.int32(1)))
    if red == value:
        sextant = np.float32(1) - part if blue == low else part - np.float32(1)
    elif green == value:
        sextant = np.float32(3) - part if red == low else np.float32(1) + part
    else:
        sextant = np.float32(5) - part if green == low else np.float32(3) + part
    turn = np.float64(sextant if spread > 0 else np.float32(0)) * (1.0 / 6.0) + 1.0
    turn = turn - 1.0 if turn >= 1.0 else turn
    hue = np.int32(np.float32(turn) * np.float32(255))
    chroma = np.float32(np.int32(spread * 255))
    return hue, np.int32(chroma / np.float32(max(value, np.int32(1)))), value


@kernel
def rgb(
    hue: np.int32, saturation: np.float32, value: np.float32
) -> tuple[np.uint8, np.uint8, np.uint8]:
    """Convert.c's hsv2rgb of one pixel, from an integer hue and float32 levels."""
    sector = np.int32(np.int32(hue * 6 * 257 + 257) >> 16)  # equals hue * 6 // 255
    fraction = np.float32(np.int32(hue * 6 - sector * 255))  # 255 means one sector
    chroma = value * saturation
    p = np.uint8(value - chroma * np.float32(1 / 255) + np.float32(0.5))
    q = np.uint8(value - chroma * fraction * np.float32(1 / 255**2) + np.float32(0.5))
    t = np.uint8(
        value - chroma * (np.float32(255) - fraction) * np.float32(1 / 255**2) + np.float32(0.5)
    )
    v = np.uint8(value)
    sector = np.int32(0) if sector == 6 else sector
    red = v if sector == 0 or sector == 5 else (q if sector == 1 else (t if sector == 4 else p))
    green = t if sector == 0 else (v if sector <= 2 else (q if sector == 3 else p))
    blue = p if sector <= 1 else (t if sector == 2 else (v if sector <= 4 else q))
    return red, green, blue


@kernel
def box_radius(sigma_px: np.float32) -> np.float32:
    """Radius in pixels of the box whose three passes have the variance sigma squared.

    The sources are BoxBlur.c and Gwosdek et al. 2011.
    """
    # Like PIL, this computes in float32 throughout.
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)
    variance = sigma_px * sigma_px / np.float32(BLUR_PASSES)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    inner = np.float32(math.floor((length - 1.0) / 2.0))  # the radius, rounded down
    part = (two * inner + one) * (inner * (inner + one) - three * variance)
    radius: np.float32 = inner + part / (six * (variance - (inner + one) * (inner + one)))
    return radius


@kernel
def blur(planes: np.ndarray, sigma_px: np.float32) -> None:
    """PIL's GaussianBlur of `planes` `(3, S, S)` uint8, in place.

    Three box passes run along x, then three along y. The plane has a frame of `edge` pixels in
    which the pixels of its border are repeated.
    """
    size = planes.shape[1]
    radius = box_radius(sigma_px)
    inner_radius = int(radius)
    # Also this is in float32. An integer of numba's would make the sum a float64.
    weight = np.uint32(np.float32(1 << 24) / (radius * np.float32(2) + np.float32(1)))
    far_weight = np.uint32(((1 << 24) - (inner_radius * 2 + 1) * np.int64(weight)) // 2)
    edge = inner_radius + 1
    side = size + 2 * edge
    framed, other = np.empty((side, 3, side), np.uint8), np.empty((side, 3, side), np.uint8)
    for y in range(size):
        for c in range(3):
            row, inner = planes[c, y], framed[edge + y, c][edge:][:size]
            for x in range(size):
                inner[x] = row[x]
    for _ in range(BLUR_PASSES):
        for y in range(edge, edge + size):
            for c in range(3):
                for e in range(edge):
                    framed[y, c, e] = framed[y, c, edge]
                    framed[y, c, edge + size + e] = framed[y, c, edge + size - 1]
        box_pass(framed, other, 1, inner_radius, weight, far_weight)
        framed, other = other, framed
    for _ in range(BLUR_PASSES):
        for e in range(edge):
            for c in range(3):
                for x in range(side):
                    framed[e, c, x] = framed[edge, c, x]
                    framed[edge + size + e, c, x] = framed[edge + size - 1, c, x]
        box_pass(framed, other, 3 * side, inner_radius, weight, far_weight)
        framed, other = other, framed
    for y in range(size):
        for c in range(3):
            row, inner = planes[c, y], framed[edge + y, c][edge:][:size]
            for x in range(size):
                row[x] = inner[x]


@kernel
def box_pass(
    source: np.ndarray,
    out: np.ndarray,
    step: int,
    inner_radius: int,
    weight: np.uint32,
    far_weight: np.uint32,
) -> None:
    """One box blur from `source` to `out`, `(side, 3, side)` uint8, over pixels `step` apart.

    The box has `2 * inner_radius + 1` full taps and a fractional one at each end. The loops run
    along the memory of the whole array, including the frame: they are long, and the compiler
    vectorises them.
    """
    source, out = source.reshape(-1), out.reshape(-1)
    reach = (inner_radius + 1) * step
    total = np.empty(BLOCK, np.uint32)
    for start in range(reach, source.size - reach, BLOCK):
        count = min(BLOCK, source.size - reach - start)
        low, high = source[start - reach :][:count], source[start + reach :][:count]
        for i in range(count):
            total[i] = far_weight * (np.uint32(low[i]) + np.uint32(high[i])) + np.uint32(1 << 23)
        for t in range(-inner_radius, inner_radius + 1):
            tap = source[start + t * step :][:count]
            for i in range(count):
                total[i] += weight * np.uint32(tap[i])
        line = out[start:][:count]
        for i in range(count):
            line[i] = total[i] >> np.uint32(24)


@kernel
def finish_views(
    crops: tuple[np.ndarray, ...],
    params: np.ndarray,
    table: np.ndarray,
    weak: tuple[np.ndarray, ...],
    aggressive: tuple[np.ndarray, ...],
) -> None:
    """All views of a batch whose weak crops are made, except that they are not transposed yet.

    `crops` are `(B, S, S, 3)` uint8 each, or `(B, 0, 0, 3)` when not read. `params` are `(B, K)`,
    `table` `(3, 256)`, and the outputs as in `sample_views`.
    """
    for b in range(len(params)):
        for crop in range(len(crops)):
            levels = crops[crop]
            size = levels.shape[1]
            if size == 0:
                continue
            planes = np.empty((3, size, size), np.uint8)
            transpose = params[b, crop]["quarter_turns"] % 2 == 1
            for c in range(3):
                for y in range(size):
                    row, out = levels[b, y], planes[c, y]
                    if transpose:
                        for x in range(size):
                            planes[c, x, y] = row[x, c]
                    else:
                        for x in range(size):
                            out[x] = row[x, c]
            finish_crop(planes, params[b, crop], table, weak[crop][b], aggressive[crop][b])


@kernel
def rand_augment(planes: np.ndarray, p: np.void) -> None:
    """The operations of RandAugment in `p` on `planes` `(3, S, S)` uint8, in place.

    `p` is one row of `draws.VIEW_PARAMS`.
    """
    for k in range(2):
        operation, value = p["rand_op"][k], p["rand_value"][k]
        if operation == RandOp.NONE:
            continue
        if operation <= RandOp.SOLARIZE_ADD:
            for c in range(3):
                change_levels(planes[c], operation, value)
        elif operation == RandOp.COLOR:
            blend_gray(planes, value)
        elif operation == RandOp.CONTRAST:
            blend_constant(planes, mean_gray(planes), value)
        elif operation == RandOp.BRIGHTNESS:
            blend_constant(planes, 0, value)
        elif operation == RandOp.SHARPNESS:
            blend_smooth(planes, value)
        else:
            matrix = affine_matrix(operation, value, planes.shape[1])
            transform(planes, matrix, p["rand_bicubic"][k])


@kernel
def change_levels(plane: np.ndarray, operation: int, value: np.float32) -> None:
    """Map the levels of one channel `(S, S)` uint8 by a table, in place, as ImageOps does."""
    count = np.zeros(256, np.int64)
    for row in plane:
        for level in row:
            count[level] += 1
    low, high = 0, 255
    while count[low] == 0:
        low += 1
    while count[high] == 0:
        high -= 1
    scale = 255.0 / max(high - low, 1)
    step = (plane.size - count[high]) // 255
    darker = step // 2  # the number of darker pixels, rounded to steps
    whole = int(value)
    table = np.empty((1, 256), np.uint8)
    for level in range(256):
        new = level
        if operation == RandOp.AUTO_CONTRAST and high > low:
            new = int(level * scale + -low * scale)
        elif operation == RandOp.EQUALIZE and step > 0:
            new = darker // step
        elif operation == RandOp.INVERT or (operation == RandOp.SOLARIZE and level >= whole):
            new = 255 - level
        elif operation == RandOp.POSTERIZE:
            new = level >> (8 - whole) << (8 - whole)
        elif operation == RandOp.SOLARIZE_ADD and level < 128:
            new = level + whole
        darker += count[level]
        table[0, level] = min(max(new, 0), 255)
    look_up(plane, table)


@kernel
def blend_smooth(planes: np.ndarray, factor: np.float32) -> None:
    """Sharpness of `planes` `(3, S, S)` uint8, in place: a blend with ImageFilter.SMOOTH.

    The pixels of the border keep their level.
    """
    source, last = planes.astype(np.int32), planes.shape[1] - 1
    for c in range(3):
        for y in range(1, last):
            above, row, below = source[c, y - 1], source[c, y], source[c, y + 1]
            for x in range(1, last):
                total = 4 * row[x]
                for t in range(x - 1, x + 2):
                    total += above[t] + row[t] + below[t]
                smooth = np.int32((2 * total + 13) // 26)  # total / 13, rounded
                planes[c, y, x] = blend_level(planes[c, y, x], smooth, factor)


@kernel
def affine_matrix(
    operation: int, value: np.float32, size: int
) -> tuple[float, float, float, float, float, float]:
    """The matrix of Image.transform or rotate, from a place in the output to one in the input."""
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if operation == RandOp.ROTATE:
        turn = -(np.float64(value) % 360.0) * (math.pi / 180.0)
        a = e = np.rint(math.cos(turn) * 1e15) / 1e15  # PIL rounds them to 15 digits
        b = np.rint(math.sin(turn) * 1e15) / 1e15
        d = -b
        centre = size / 2
        c, f = a * -centre + b * -centre + centre, d * -centre + e * -centre + centre
    elif operation == RandOp.SHEAR_X:
        b = np.float64(value)
    elif operation == RandOp.SHEAR_Y:
        d = np.float64(value)
    elif operation == RandOp.TRANSLATE_X:
        c = np.float64(value) * size
    else:
        f = np.float64(value) * size
    return a, b, c, d, e, f


@kernel
def transform(
    planes: np.ndarray, matrix: tuple[float, float, float, float, float, float], bicubic: int
) -> None:
    """PIL's affine map of `planes` `(3, S, S)` uint8, in place (Geometry.c, in float64)."""
    a, b, c, d, e, f = matrix
    size = planes.shape[1]
    source = planes.copy()
    column, line = np.empty(4, np.int64), np.empty(4, np.float64)
    for y in range(size):
        for x in range(size):
            across = a * (x + 0.5) + b * (y + 0.5) + c
            down = d * (x + 0.5) + e * (y + 0.5) + f
            if across < 0 or across >= size or down < 0 or down >= size:
                for channel in range(3):
                    planes[channel, y, x] = RAND_FILL[channel]
                continue
            left, top = math.floor(across - 0.5), math.floor(down - 0.5)
            part_x, part_y = across - 0.5 - left, down - 0.5 - top
            for t in range(4):
                column[t] = min(max(left - 1 + t, 0), size - 1)
            for channel in range(3):
                for t in range(4):
                    row = source[channel, min(max(top - 1 + t, 0), size - 1)]
                    line[t] = interpolate(
                        float(row[column[0]]),
                        float(row[column[1]]),
                        float(row[column[2]]),
                        float(row[column[3]]),
                        part_x,
                        bicubic,
                    )
                level = interpolate(line[0], line[1], line[2], line[3], part_y, bicubic)
                planes[channel, y, x] = np.uint8(min(max(level, 0.0), 255.0))


@kernel
def interpolate(
    before: float, low: float, high: float, after: float, part: float, bicubic: int
) -> float:
    """The value at `part` of the way from `low` to `high`, four equally spaced values in a row."""
    if not bicubic:
        return low + (high - low) * part
    square = 2 * (before - low) + high - after
    return low + part * (high - before + part * (square + part * (low - before - high + after)))


# Inner loops in AVX-512, written in LLVM's intermediate representation. Numba has no type for a
# vector. Each loop therefore reads its vectors from arrays and writes the result to an array. All
# offsets are in bytes.

inner_loop: Any = intrinsic(prefer_literal=True)  # mypy counts numba's argument `typing`, too
BYTE, ADDRESS = ir.IntType(8), ir.IntType(64)
BYTES, INTEGERS = ir.VectorType(BYTE, 64), ir.VectorType(ir.IntType(32), 16)


def addresses(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> list[Any]:
    """The arguments of an inner loop, with the address of the data in place of each array."""
    return [
        builder.ptrtoint(context.make_array(type_)(context, builder, value).data, ADDRESS)
        if isinstance(type_, types.Array)
        else value
        for type_, value in zip(signature.args, arguments, strict=True)
    ]


def pointer(builder: ir.IRBuilder, address: ir.Value, offset: int, type_: ir.Type) -> ir.Value:
    """A pointer to a `type_` at `offset` after `address`."""
    return builder.inttoptr(builder.add(address, ADDRESS(offset)), type_.as_pointer())


def load(builder: ir.IRBuilder, address: ir.Value, offset: int) -> ir.Value:
    """The 64 bytes at `offset` after `address`."""
    return builder.load(pointer(builder, address, offset, BYTES), align=1)


def store(builder: ir.IRBuilder, value: ir.Value, address: ir.Value) -> None:
    builder.store(value, pointer(builder, address, 0, value.type), align=1)


def call(builder: ir.IRBuilder, name: str, *vectors: ir.Value) -> ir.Value:
    """One of LLVM's functions for AVX-512. Its result has the type of the first argument."""
    name = f"llvm.x86.avx512.{name}.512"
    function = builder.module.globals.get(name) or ir.Function(
        builder.module, ir.FunctionType(vectors[0].type, [v.type for v in vectors]), name
    )
    return builder.call(function, vectors)


def permute(builder: ir.IRBuilder, low: ir.Value, index: ir.Value, high: ir.Value) -> ir.Value:
    """For each byte of `index`, modulo 128, the byte at that place in the 128 of `low`, `high`."""
    return call(builder, "vpermi2var.qi", low, index, high)


def entries(builder: ir.IRBuilder, levels: ir.Value, table: ir.Value, offset: int) -> ir.Value:
    """The entries of 64 `levels` in the 256 bytes at `offset` after the address `table`."""
    part = [load(builder, table, offset + 64 * k) for k in range(4)]
    return builder.select(
        builder.icmp_signed("<", levels, BYTES([0] * 64)),  # whether the level is above 127
        permute(builder, part[2], levels, part[3]),
        permute(builder, part[0], levels, part[1]),
    )


def shuffle(builder: ir.IRBuilder, low: ir.Value, high: ir.Value, order: list[int]) -> ir.Value:
    """The elements of `low` and then of `high`, in this order."""
    return builder.shuffle_vector(low, high, ir.VectorType(ir.IntType(32), len(order))(order))


@inner_loop
def look_up_64(typing, levels, table, i):  # type: ignore[no-untyped-def]
    """Replace 64 of `levels`, from the `i`-th on, by their entries in `table` `(1, 256)` uint8."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        levels, table, i = addresses(context, builder, signature, arguments)
        at = builder.add(levels, i)
        store(builder, entries(builder, load(builder, at, 0), table, 0), at)
        return context.get_dummy_value()

    return types.void(levels, table, types.intp), codegen


@inner_loop
def normalise_64(typing, planes, count, separate, pixels, i):  # type: ignore[no-untyped-def]
    """Write 64 of the `count` pixels of `planes`, from the `i`-th on, to `pixels` `(count, 3)`.

    `separate` is the result of `bytes_of`.
    """
    itemsize = pixels.dtype.bitwidth // 8

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        planes, count, separate, pixels, i = addresses(context, builder, signature, arguments)
        channels = []
        for c in range(3):
            at = builder.add(planes, builder.add(i, builder.mul(count, ADDRESS(c))))
            levels = load(builder, at, 0)
            first = 256 * itemsize * c
            parts = [entries(builder, levels, separate, first + 256 * k) for k in range(itemsize)]
            bits = 8
            while len(parts) > 1:  # bytes to 16-bit integers, and these to 32-bit ones
                bits *= 2
                type_ = ir.VectorType(ir.IntType(bits), 64)
                order = [64 * (k % 2) + k // 2 for k in range(128)]
                parts = [
                    builder.bitcast(shuffle(builder, low, high, order), type_)
                    for low, high in zip(parts[::2], parts[1::2], strict=True)
                ]
            channels += parts
        red_green = shuffle(builder, channels[0], channels[1], list(range(128)))
        twice_blue = shuffle(builder, channels[2], channels[2], list(range(128)))
        order = [64 * (k % 3) + k // 3 for k in range(192)]
        rgb = shuffle(builder, red_green, twice_blue, order)
        store(builder, rgb, builder.add(pixels, builder.mul(i, ADDRESS(3 * itemsize))))
        return context.get_dummy_value()

    return types.void(planes, types.intp, separate, pixels, types.intp), codegen


@inner_loop
def resize_16(  # type: ignore[no-untyped-def]
    typing, pixels, source, index, digits, block, rows, out, size, groups
):
    """Make 16 outputs of a resized row from the 128 bytes at the offset `source` in `pixels`.

    Three times 16 bytes are written to the offset `out` in `rows`, `size` bytes apart. `index` and
    `digits` are the tables of `resize_rows_16`, and `groups` is their number of groups.
    """
    number = groups.literal_value

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pixels, source, index, digits, block, rows, out, size, _ = addresses(
            context, builder, signature, arguments
        )
        line, out = builder.add(pixels, source), builder.add(rows, out)
        index = builder.add(index, builder.mul(block, ADDRESS(64 * number)))
        digits = builder.add(digits, builder.mul(block, ADDRESS(3 * 64 * number)))
        low, high = load(builder, line, 0), load(builder, line, 64)
        places = [load(builder, index, 64 * g) for g in range(number)]
        for _ in range(3):  # channels
            taps = [
                builder.bitcast(permute(builder, low, place, high), INTEGERS) for place in places
            ]
            # Horner's scheme: the largest of the three digits first.
            total = INTEGERS([int(HALF) >> 16] * 16)
            for digit in (2, 1, 0):
                if digit < 2:
                    total = builder.shl(total, INTEGERS([8] * 16))
                for g, tap in enumerate(taps):
                    weights = load(builder, digits, 64 * (digit * number + g))
                    weights = builder.bitcast(weights, INTEGERS)
                    total = call(builder, "vpdpbusd", total, tap, weights)
            levels = builder.ashr(total, INTEGERS([RESIZE_BITS] * 16))
            for limit, outside in ((0, "<"), (255, ">")):  # only bicubic results can be outside
                bound = INTEGERS([limit] * 16)
                levels = builder.select(builder.icmp_signed(outside, levels, bound), bound, levels)
            store(builder, builder.trunc(levels, ir.VectorType(BYTE, 16)), out)
            places = [builder.add(place, BYTES([1] * 64)) for place in places]
            out = builder.add(out, size)
        return context.get_dummy_value()

    intp = types.intp
    return types.void(pixels, intp, index, digits, intp, rows, intp, intp, groups), codegen
