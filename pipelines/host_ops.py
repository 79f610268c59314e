"""The two stages of a view on the CPU, one image at a time: numba kernels on uint8 that release the GIL.

Each kernel does the integer and float arithmetic of the PIL operation it stands for, in the same order, so that a view
equals the one torchvision makes from PIL images with the same parameters: crop and resize (Resample.c), the four jitter
operations (Blend.c, Convert.c), grayscale, and PIL's Gaussian blur, which is three box blurs per axis (BoxBlur.c).

Images are `(H, W, 3)` uint8; views in the making are planes `(3, S, S)` uint8, which the compiler vectorises.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pipelines.draws import BRIGHTNESS, CONTRAST, SATURATION

# All kernels stand in this file: numba notices a stale compiled cache by the file a kernel is in, not by what it calls.
kernel = njit(nogil=True, cache=True, error_model="numpy")

RESIZE_BITS = 22  # Resample.c: PRECISION_BITS
BLUR_PASSES = 3


@kernel
def sample_views(image, params, table, weak_1, weak_2, aggressive_1, aggressive_2):
    """All views of one image, from one decode.

    `params` `(2,)` of `draws.VIEW_PARAMS`; `table` `(3, 256)` maps a channel's 8-bit level to the normalised value; each
    output is `(S, S, 3)` of the table's dtype, or empty when it is not read.
    """
    size = max(max(weak_1.shape[0], weak_2.shape[0]), max(aggressive_1.shape[0], aggressive_2.shape[0]))
    planes = np.empty((3, size, size), np.uint8)
    for crop in range(2):
        weak, aggressive = (weak_1, aggressive_1) if crop == 0 else (weak_2, aggressive_2)
        if weak.shape[0] == 0 and aggressive.shape[0] == 0:
            continue
        p = params[crop]
        crop_resize_flip(image, p.top, p.left, p.height, p.width, p.flip, planes)
        if weak.shape[0] > 0:
            normalise(planes, table, weak)
        if aggressive.shape[0] > 0:
            aggressive_stage(planes, p)
            normalise(planes, table, aggressive)


@kernel
def batch_views(pixels, offsets, sizes, ids, params, table, weak_1, weak_2, aggressive_1, aggressive_2):
    """`sample_views` of images that lie one after another in `pixels`: image `i` of `sizes[i]` begins at `offsets[i]`."""
    for b in range(len(ids)):
        height, width = sizes[ids[b]]
        first = offsets[ids[b]]
        image = pixels[first : first + height * width * 3].reshape(height, width, 3)
        sample_views(image, params[b], table, weak_1[b], weak_2[b], aggressive_1[b], aggressive_2[b])


@kernel
def aggressive_stage(planes, p):
    """Jitter, grayscale and blur of `(3, S, S)` uint8, in place."""
    if p.jitter:
        for k in range(4):
            operation = p.order[k]
            if operation == BRIGHTNESS:
                blend_constant(planes, 0, p.factor[BRIGHTNESS])
            elif operation == CONTRAST:
                blend_constant(planes, mean_gray(planes), p.factor[CONTRAST])
            elif operation == SATURATION:
                blend_gray(planes, p.factor[SATURATION])
            else:
                shift_hue(planes, p.factor[3])
    if p.grayscale:
        blend_gray(planes, np.float32(0))
    if p.blur_sigma_px > 0:
        blur(planes, p.blur_sigma_px)


@kernel
def normalise(planes, table, out):
    """Write `(3, S, S)` uint8 to `(S, S, 3)` through the table."""
    size = planes.shape[1]
    for y in range(size):
        for x in range(size):
            for c in range(3):
                out[y, x, c] = table[c, planes[c, y, x]]


@kernel
def bilinear_taps(size_in, size_out):
    """PIL's antialiased bilinear filter: first tap `(size_out,)` and fixed-point weights `(size_out, taps)`."""
    scale = size_in / size_out
    support = max(scale, 1.0)  # the triangle widens when it shrinks the image
    taps = math.ceil(support) * 2 + 1
    first = np.zeros(size_out, np.int64)
    count = np.zeros(size_out, np.int64)
    fixed = np.zeros((size_out, taps), np.int32)
    weights = np.zeros(taps, np.float64)
    for out in range(size_out):
        centre = (out + 0.5) * scale
        low = max(int(centre - support + 0.5), 0)
        high = min(int(centre + support + 0.5), size_in)
        total = 0.0
        for t in range(high - low):
            weights[t] = max(1.0 - abs((t + low - centre + 0.5) / support), 0.0)
            total += weights[t]
        for t in range(high - low):
            fixed[out, t] = np.int32(0.5 + weights[t] / total * (1 << RESIZE_BITS))
        first[out], count[out] = low, high - low
    return first, count, fixed


@kernel
def crop_resize_flip(image, top, left, height, width, flip, planes):
    """The window of `image` `(H, W, 3)` resized to `planes` `(3, S, S)`, then mirrored if `flip`."""
    size = planes.shape[1]
    half = np.int32(1 << (RESIZE_BITS - 1))
    window = image[top : top + height, left : left + width]
    if height > size and 2 * width < height + size:  # Pillow 13 resizes such a window down first, older ones never do
        window = shrink_down(window, size)[:, :]
    first, count, weight = bilinear_taps(width, size)
    rows = np.empty((3, len(window), size), np.uint8)
    for y in range(len(window)):
        line = window[y]
        for x in range(size):
            r = g = b = half
            for t in range(count[x]):
                w = weight[x, t]
                r += w * np.int32(line[first[x] + t, 0])
                g += w * np.int32(line[first[x] + t, 1])
                b += w * np.int32(line[first[x] + t, 2])
            to = size - 1 - x if flip else x
            rows[0, y, to] = r >> RESIZE_BITS  # weights are positive and sum to one: 0..255 without a clip
            rows[1, y, to] = g >> RESIZE_BITS
            rows[2, y, to] = b >> RESIZE_BITS
    first, count, weight = bilinear_taps(len(window), size)
    total = np.empty(size, np.int32)
    for c in range(3):
        for y in range(size):
            total[:] = half
            for t in range(count[y]):
                w = weight[y, t]
                row = rows[c, first[y] + t]
                for x in range(size):
                    total[x] += w * np.int32(row[x])
            out = planes[c, y]
            for x in range(size):
                out[x] = total[x] >> RESIZE_BITS


@kernel
def shrink_down(window, size):
    """`(H, W, 3)` to `(size, W, 3)`."""
    height, width, _ = window.shape
    first, count, weight = bilinear_taps(height, size)
    out = np.empty((size, width, 3), np.uint8)
    total = np.empty(3 * width, np.int32)
    for y in range(size):
        total[:] = np.int32(1 << (RESIZE_BITS - 1))
        for t in range(count[y]):
            w = weight[y, t]
            row = window[first[y] + t]
            for x in range(width):
                for c in range(3):
                    total[3 * x + c] += w * np.int32(row[x, c])
        line = out[y].reshape(3 * width)
        for i in range(3 * width):
            line[i] = total[i] >> RESIZE_BITS
    return out


@kernel
def gray_level(r, g, b):
    """ITU-R 601 luma in Convert.c's 16-bit fixed point."""
    return (np.int32(r) * 19595 + np.int32(g) * 38470 + np.int32(b) * 7471 + 0x8000) >> 16


@kernel
def mean_gray(planes):
    """torchvision's contrast centre: the mean luma of the image, rounded to a level."""
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    total = np.int64(0)
    for i in range(r.size):
        total += gray_level(r[i], g[i], b[i])
    return int(total / r.size + 0.5)


@kernel
def blend_level(level, centre, factor):
    """Blend.c: `centre + factor * (level - centre)` in float32, clipped and truncated."""
    value = np.float32(centre) + factor * np.float32(np.int32(level) - np.int32(centre))
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@kernel
def blend_constant(planes, centre, factor):
    """Brightness (centre 0) and contrast (centre mean gray)."""
    flat = planes.reshape(-1)
    for i in range(flat.size):
        flat[i] = blend_level(flat[i], centre, factor)


@kernel
def blend_gray(planes, factor):
    """Saturation; factor 0 is grayscale."""
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(r.size):
        gray = gray_level(r[i], g[i], b[i])
        r[i] = blend_level(r[i], gray, factor)
        g[i] = blend_level(g[i], gray, factor)
        b[i] = blend_level(b[i], gray, factor)


@kernel
def shift_hue(planes, turns):
    """torchvision's adjust_hue: to 8-bit HSV, add to H modulo 256, back (Convert.c's rgb2hsv and hsv2rgb)."""
    shift = int(np.float64(turns) * 255)  # toward zero
    r, g, b = planes[0].reshape(-1), planes[1].reshape(-1), planes[2].reshape(-1)
    for i in range(r.size):
        red, green, blue = np.float32(r[i]), np.float32(g[i]), np.float32(b[i])
        v = max(red, max(green, blue))
        spread = v - min(red, min(green, blue))
        over = max(spread, np.float32(1))  # a gray pixel gets hue 0 and saturation 0, as in Convert.c
        rc, gc, bc = (v - red) / over, (v - green) / over, (v - blue) / over
        sextant = bc - gc
        if red != v:
            sextant = np.float32(2.0 + np.float64(rc) - np.float64(bc))
            if green != v:
                sextant = np.float32(4.0 + np.float64(gc) - np.float64(rc))
        turn = np.float64(sextant) * (1.0 / 6.0) + 1.0
        turn = np.float64(np.float32(turn - 1.0 if turn >= 1.0 else turn))
        hue = (np.int32(turn * 255.0) + shift) & 255
        saturation = np.int32(np.float64(spread / max(v, np.float32(1))) * 255.0)
        sector = (hue * 6 * 257 + 257) >> 16  # hue * 6 // 255
        f = np.float32(hue * 6 - sector * 255) / np.float32(255)
        fs = np.float32(saturation) / np.float32(255)
        p = np.uint8(v * (np.float32(1) - fs) + np.float32(0.5))
        q = np.uint8(np.float64(v) * (1.0 - np.float64(fs * f)) + 0.5)
        t = np.uint8(np.float64(v) * (1.0 - np.float64(fs) * (1.0 - np.float64(f))) + 0.5)
        level = np.uint8(v)
        sector = sector % 6
        r[i] = level if sector == 0 or sector == 5 else (q if sector == 1 else (t if sector == 4 else p))
        g[i] = t if sector == 0 else (level if sector <= 2 else (q if sector == 3 else p))
        b[i] = p if sector <= 1 else (t if sector == 2 else (level if sector <= 4 else q))


@kernel
def box_radius(sigma_px):
    """Radius of the box whose three passes have variance sigma squared (BoxBlur.c, Gwosdek et al. 2011)."""
    one, two, three, six = np.float32(1), np.float32(2), np.float32(3), np.float32(6)  # float32 throughout, as PIL
    variance = sigma_px * sigma_px / np.float32(BLUR_PASSES)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = np.float32(math.floor((length - 1.0) / 2.0))
    part = (two * whole + one) * (whole * (whole + one) - three * variance)
    return whole + part / (six * (variance - (whole + one) * (whole + one)))


@kernel
def blur(planes, sigma_px):
    """PIL's GaussianBlur of `(3, S, S)` uint8 in place: three box passes along x, then three along y, edges repeated."""
    size = planes.shape[1]
    radius = box_radius(sigma_px)
    whole = int(radius)
    weight = np.uint32(np.float32(1 << 24) / (radius * 2 + 1))
    far_weight = np.uint32(((1 << 24) - (whole * 2 + 1) * np.int64(weight)) // 2)
    a, b = np.empty((size, 3, size), np.uint8), np.empty((size, 3, size), np.uint8)  # the blurred axis comes first
    for x in range(size):
        for c in range(3):
            for y in range(size):
                a[x, c, y] = planes[c, y, x]
    three_boxes(a, b, whole, weight, far_weight)
    for y in range(size):
        for c in range(3):
            for x in range(size):
                a[y, c, x] = b[x, c, y]
    three_boxes(a, b, whole, weight, far_weight)
    for y in range(size):
        for c in range(3):
            planes[c, y] = b[y, c]


@kernel
def three_boxes(a, b, whole, weight, far_weight):
    """Three box passes along the first axis of `a`, into `b`; `a` is scratch afterwards."""
    box_pass(a, b, whole, weight, far_weight)
    box_pass(b, a, whole, weight, far_weight)
    box_pass(a, b, whole, weight, far_weight)


@kernel
def box_pass(source, out, whole, weight, far_weight):
    """One box along the first axis of `(S, 3, S)`: `2 * whole + 1` full taps and a fractional one at each end."""
    size = source.shape[0]
    source, out = source.reshape(size, 3 * size), out.reshape(size, 3 * size)
    total = np.empty(3 * size, np.uint32)
    for y in range(size):
        far_low, far_high = source[max(y - whole - 1, 0)], source[min(y + whole + 1, size - 1)]
        for i in range(3 * size):
            total[i] = far_weight * (np.uint32(far_low[i]) + np.uint32(far_high[i])) + np.uint32(1 << 23)
        for near in range(y - whole, y + whole + 1):
            tap = source[min(max(near, 0), size - 1)]
            for i in range(3 * size):
                total[i] += weight * np.uint32(tap[i])
        line = out[y]
        for i in range(3 * size):
            line[i] = total[i] >> np.uint32(24)
