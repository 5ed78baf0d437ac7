"""Products of packed signs on the CPU: an exclusive or and a count of bits do 64 multiplications at once.

With bits for +1 and signs ``a``, ``b`` of ``n`` entries, ``sum a b = n - 2 popcount(bits_a xor bits_b)``. Entries of 0
and 1 (steps) use the same count: ``sum b w = (sum (2 b - 1) w + sum w) / 2``. Everything is a sum of integers, so the
result is exact; one multiplication by the scale and one addition of the bias follow.

Both kernels keep one dimension in the lanes of vector registers: output features of a linear layer, pixels of a
convolution. Where few channels meet (depthwise convolutions), most of 64 places would stay empty: there pixels are
added and subtracted as small integers, sixteen or more at a time. Compiled by numba when first called, and kept on
disk.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["conv_direct", "conv_product", "linear_product", "pack_planes", "pack_rows", "unfold"]

WORD = 64
"""Signs in one packed number."""

_BLOCK = 3072
"""Packed numbers that are read again and again at a time: 24 KiB, which the first cache holds."""


def _count_ones(typing_context: Any, value: Any) -> Any:
    """Count the ones of a uint64 (what numba makes of it)."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> Any:
        return builder.ctpop(args[0])

    return types.uint64(types.uint64), generate


_popcount: Any = intrinsic(_count_ones)


@njit(cache=True, nogil=True)
def pack_planes(x, threshold, reaches, group_channels, words, planes):  # type: ignore[no-untyped-def]
    """Pack one image ``x [C, P]`` to ``planes [groups * words, P]``; the last bits of each group are 0."""
    channels, pixels = x.shape
    planes[:] = np.uint64(0)
    for channel in range(channels):
        group, place = channel // group_channels, channel % group_channels
        plane = planes[group * words + place // WORD]
        shift = np.uint64(place % WORD)
        source, limit = x[channel], threshold[channel]
        if reaches:
            for p in range(pixels):
                plane[p] |= np.uint64(source[p] >= limit) << shift
        else:
            for p in range(pixels):
                plane[p] |= np.uint64(source[p] > limit) << shift


@njit(cache=True, nogil=True)
def pack_rows(x, threshold, reaches, rows):  # type: ignore[no-untyped-def]
    """Pack ``x [M, features]`` to ``rows [M, words]``."""
    samples, features = x.shape
    for m in range(samples):
        source = x[m]
        for word in range(rows.shape[1]):
            begin = word * WORD
            bits = np.uint64(0)
            for place in range(min(WORD, features - begin)):
                value, limit = source[begin + place], threshold[begin + place]
                high = value >= limit if reaches else value > limit
                bits |= np.uint64(high) << np.uint64(place)
            rows[m, word] = bits


@njit(cache=True, nogil=True)
def unfold(planes, row_map, column_map, lanes):  # type: ignore[no-untyped-def]
    """Gather what each output pixel sees: ``planes [words, H, W]`` to ``lanes [kh * kw * words, oh * ow]``.

    ``row_map [kh, oh]`` and ``column_map [kw, ow]`` hold source positions, -1 where there is padding (bits 0).
    """
    words = planes.shape[0]
    tall, wide = row_map.shape[1], column_map.shape[1]
    k = 0
    for i in range(row_map.shape[0]):
        for j in range(column_map.shape[0]):
            columns = column_map[j]
            for word in range(words):
                for oy in range(tall):
                    target = lanes[k, oy * wide : (oy + 1) * wide]
                    if row_map[i, oy] < 0:
                        target[:] = np.uint64(0)
                        continue
                    source = planes[word, row_map[i, oy]]
                    for ox in range(wide):
                        target[ox] = source[columns[ox]] if columns[ox] >= 0 else np.uint64(0)
                k += 1


@njit(cache=True, nogil=True)
def _add(a, b, c):  # type: ignore[no-untyped-def]
    """Add three bits in each place: the sum's bit and the carry."""
    half = a ^ b
    return half ^ c, (a & b) | (half & c)


@njit(cache=True, nogil=True)
def _count(row, lanes, begin, end, counts):  # type: ignore[no-untyped-def]
    """Count differing bits of one row ``[K]`` and the lanes ``[K, begin:end]``.

    Seven words are added to three first (ones, twos, fours), which halves the counting.
    """
    width = end - begin
    for lane in range(width):
        counts[lane] = 0
    k = 0
    while k + 7 <= len(row):
        r0, r1, r2, r3, r4, r5, r6 = (
            row[k],
            row[k + 1],
            row[k + 2],
            row[k + 3],
            row[k + 4],
            row[k + 5],
            row[k + 6],
        )
        b0, b1, b2, b3 = (
            lanes[k, begin:end],
            lanes[k + 1, begin:end],
            lanes[k + 2, begin:end],
            lanes[k + 3, begin:end],
        )
        b4, b5, b6 = lanes[k + 4, begin:end], lanes[k + 5, begin:end], lanes[k + 6, begin:end]
        for lane in range(width):
            s0, c0 = _add(r0 ^ b0[lane], r1 ^ b1[lane], r2 ^ b2[lane])
            s1, c1 = _add(r3 ^ b3[lane], r4 ^ b4[lane], r5 ^ b5[lane])
            ones, c2 = _add(s0, s1, r6 ^ b6[lane])
            twos, fours = _add(c0, c1, c2)
            counts[lane] += (
                _popcount(ones) + (_popcount(twos) << np.uint64(1)) + (_popcount(fours) << np.uint64(2))
            )
        k += 7
    while k < len(row):
        bits, lane_bits = row[k], lanes[k, begin:end]
        for lane in range(width):
            counts[lane] += _popcount(bits ^ lane_bits[lane])
        k += 1


@njit(cache=True, nogil=True)
def conv_product(rows, lanes, offset, scale, bias, edges, edge_kinds, edge_sums, out):  # type: ignore[no-untyped-def]
    """Output channels times pixels: ``out[r, p] = (offset[r] - 2 count) scale[r] + bias[r]``.

    At the pixels ``edges`` (ascending), whose windows hold padding, ``edge_sums[r, kind]`` is added to the integer.

    Shapes: rows ``[R, K]``, lanes ``[K, P]``, offset, scale and bias ``[R]``, edges and edge_kinds ``[E]``, edge_sums
    ``[R, kinds]``, out ``[R, P]``.
    """
    pixels = lanes.shape[1]
    block = max(WORD, _BLOCK // max(lanes.shape[0], 1))
    counts = np.empty(min(block, pixels), np.uint64)
    sums = np.empty(min(block, pixels), np.int32)
    for begin in range(0, pixels, block):
        end = min(begin + block, pixels)
        first, last = np.searchsorted(edges, begin), np.searchsorted(edges, end)
        for r in range(rows.shape[0]):
            _count(rows[r], lanes, begin, end, counts)
            start = np.int32(offset[r])
            for lane in range(end - begin):
                sums[lane] = start - np.int32(2) * np.int32(counts[lane])
            for e in range(first, last):
                sums[edges[e] - begin] += edge_sums[r, edge_kinds[e]]
            target, factor, shift = out[r, begin:end], scale[r], bias[r]
            for lane in range(end - begin):
                target[lane] = sums[lane]  # to the number type of the output first: no detour over float64
                target[lane] = target[lane] * factor + shift


@njit(cache=True, nogil=True)
def linear_product(rows, lanes, offset, scale, bias, out):  # type: ignore[no-untyped-def]
    """Samples times output features: ``out[m, o] = (offset[o] - 2 count) scale[o] + bias[o]``.

    Shapes: rows ``[M, K]``, lanes ``[K, O]``, offset, scale and bias ``[O]``, out ``[M, O]``.
    """
    features = lanes.shape[1]
    block = max(WORD, _BLOCK // max(lanes.shape[0], 1))
    counts = np.empty(min(block, features), np.uint64)
    for begin in range(0, features, block):
        end = min(begin + block, features)
        for m in range(rows.shape[0]):
            _count(rows[m], lanes, begin, end, counts)
            target = out[m, begin:end]
            for lane in range(end - begin):
                target[lane] = offset[begin + lane] - np.int32(2) * np.int32(counts[lane])
                target[lane] = target[lane] * scale[begin + lane] + bias[begin + lane]


@njit(cache=True, nogil=True)
def _spread(x, limit, reaches, low, high, row_map, column_map, left, plane):  # type: ignore[no-untyped-def]
    """Make one channel ``x [H, W]`` two-valued, inside of a padded ``plane`` int16 ``[PH * PW]`` whose rest is zero.

    ``row_map [PH]`` and ``column_map [PW]`` hold source positions, -1 where the plane stays as it is.
    """
    width, wide = x.shape[1], len(column_map)
    for row in range(len(row_map)):
        source, begin = row_map[row], row * wide + left
        if source < 0:
            continue
        line, target = x[source], plane[begin : begin + width]  # slices: their indices need no check
        if reaches:
            for p in range(width):
                target[p] = high if line[p] >= limit else low
        else:
            for p in range(width):
                target[p] = high if line[p] > limit else low
        for p in range(left):
            if column_map[p] >= 0:
                plane[begin - left + p] = target[column_map[p]]
        for p in range(left + width, wide):
            if column_map[p] >= 0:
                plane[begin - left + p] = target[column_map[p]]


@njit(cache=True, nogil=True)
def _add_or_subtract(sums, source, adds):  # type: ignore[no-untyped-def]
    """Add one tap's pixels to the sums, or take them away."""
    if adds:
        for p in range(len(sums)):
            sums[p] += source[p]
    else:
        for p in range(len(sums)):
            sums[p] -= source[p]


@njit(cache=True, nogil=True)
def conv_direct(  # type: ignore[no-untyped-def]
    x, limits, reaches, low, high, maps, left, bits, shifts, steps, group_outputs, scale, bias, out
):
    """Few channels at each output: ``out[r, p] = sum(+-high or low) * scale[r] + bias[r]``.

    Shapes: x ``[C, H, W]``, limits ``[C]``, maps: the source of each row and column of the padded image (-1 is a zero),
    ``left`` columns are padding in front, bits ``[R, words]`` (taps before channels), shifts ``[taps]`` (where in the
    padded image each tap reads, from the pixel on), steps (from one output to the next, down and across), scale and
    bias ``[R]``, out ``[R, OH, OW]``. The channels are those of whole groups, with ``group_outputs`` outputs each.
    """
    row_map, column_map = maps
    outputs, tall, wide = out.shape
    each = x.shape[0] * group_outputs // max(outputs, 1)
    down, across = steps[0] * len(column_map), steps[1]
    length = (tall - 1) * down + (wide - 1) * across + 1
    planes = np.zeros((each, len(row_map) * len(column_map)), np.int16)
    sums = np.empty(length, np.int16)
    for r in range(outputs):
        base = r // group_outputs * each
        if r % group_outputs == 0:
            for i in range(each):
                c = base + i
                _spread(x[c], limits[c], reaches, low, high, row_map, column_map, left, planes[i])
        sums[:] = np.int16(0)
        k = 0
        for tap in range(len(shifts)):
            for i in range(each):
                high_bit = (bits[r, k // WORD] >> np.uint64(k % WORD)) & np.uint64(1)
                _add_or_subtract(
                    sums, planes[i, shifts[tap] : shifts[tap] + length], high_bit == np.uint64(1)
                )
                k += 1
        factor, shift = scale[r], bias[r]
        for oy in range(tall):
            target, line = out[r, oy], sums[oy * down :]
            if across == 1:
                for ox in range(wide):
                    target[ox] = line[ox]
                    target[ox] = target[ox] * factor + shift
            else:
                for ox in range(wide):
                    target[ox] = line[ox * across]
                    target[ox] = target[ox] * factor + shift
