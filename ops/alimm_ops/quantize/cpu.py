# mypy: allow-untyped-defs
"""Statistics, quantisation and layout on the CPU, in Numba: one or two passes over memory each.

Tensors are seen as (R, C): R = pictures x positions, C channels, channels last, contiguous. The integers are those of
``reference.py``, bit for bit, whatever the number of threads; sums run over blocks of fixed size for the same reason.

How it is fast: every inner loop runs over contiguous channels and is free of branches, so that LLVM turns it into
vector instructions. That needs 32-bit integers throughout (Numba widens mixed ones to 64 bit) and maxima taken of the
bit patterns of floats, since float reductions may not be reordered. A bit pattern at or above ``INFINITE`` is Inf or
NaN, which finds both without a pass of its own.
"""

from __future__ import annotations

import numpy as np
from numba import float32, int32, njit, prange, uint32
from numpy.typing import NDArray

from alimm_ops.quantize.reference import inverse_scale

SIGN = 0x80000000
ABSOLUTE = 0x7FFFFFFF
INFINITE = 0x7F800000
BLOCK = 1 << 16
"""Elements a block: 256 KiB of float32, inside a core's own cache."""

_options = dict(nogil=True, cache=True, error_model="numpy")


def tensor_range(x: NDArray[np.float32]) -> tuple[float, bool, bool]:
    """Largest magnitude, whether an element is below zero, whether all are finite, in one pass.

    Args:
        x: contiguous, any shape.
    """
    flat = x.reshape(-1)
    if not flat.size:
        return 0.0, False, True
    absolute, highest = _bit_range(flat.view(np.uint32), (flat.size + BLOCK - 1) // BLOCK)
    amax = np.uint32(absolute).view(np.float32)
    return float(amax), bool(highest > SIGN), bool(absolute < INFINITE)


@njit(parallel=True, **_options)
def _bit_range(bits, blocks):
    absolute = np.zeros(blocks, np.uint32)
    highest = np.zeros(blocks, np.uint32)
    for block in prange(blocks):
        part = bits[block * BLOCK : min((block + 1) * BLOCK, bits.size)]
        largest = uint32(0)
        top = uint32(0)
        for index in range(part.size):
            largest = max(largest, uint32(part[index] & uint32(ABSOLUTE)))
            top = max(top, part[index])
        absolute[block] = largest
        highest[block] = top
    return absolute.max(), highest.max()


def channel_range(x_RC: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float64], bool]:
    """Largest magnitude and sum of each channel, and whether all elements are finite, in one pass.

    Args:
        x_RC: contiguous, (R, C).

    Returns:
        amax_C, sum_C, finite.
    """
    rows = _block_rows(x_RC)
    bits_C, sum_C = _channel_range(x_RC, x_RC.view(np.uint32), rows, -(-len(x_RC) // rows))
    return bits_C.view(np.float32), sum_C, bool((bits_C < INFINITE).all())


def channel_stats(
    x_RC: NDArray[np.float32], threshold_C: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], bool]:
    """What the clipping rules need of each channel, in one pass.

    Args:
        x_RC: contiguous, (R, C).
        threshold_C: elements above it in magnitude are counted.

    Returns:
        amax_C, sum_C, sum of squares_C, count_C, finite.
    """
    rows = _block_rows(x_RC)
    blocks = -(-len(x_RC) // rows)
    bits_C, sum_C, square_C, count_C = _channel_stats(x_RC, x_RC.view(np.uint32), threshold_C, rows, blocks)
    return bits_C.view(np.float32), sum_C, square_C, count_C, bool((bits_C < INFINITE).all())


def _block_rows(x_RC: NDArray[np.float32]) -> int:
    return max(1, BLOCK // max(1, x_RC.shape[1]))


@njit(parallel=True, **_options)
def _channel_range(x, bits, rows, blocks):
    channels = x.shape[1]
    largest = np.zeros((blocks, channels), np.uint32)
    total = np.zeros((blocks, channels), np.float32)
    for block in prange(blocks):
        for row in range(block * rows, min((block + 1) * rows, x.shape[0])):
            for channel in range(channels):
                largest[block, channel] = max(largest[block, channel], uint32(bits[row, channel] & uint32(ABSOLUTE)))
                total[block, channel] += x[row, channel]
    amax = np.zeros(channels, np.uint32)
    summed = np.zeros(channels, np.float64)
    for block in range(blocks):
        for channel in range(channels):
            amax[channel] = max(amax[channel], largest[block, channel])
            summed[channel] += total[block, channel]
    return amax, summed


@njit(parallel=True, **_options)
def _channel_stats(x, bits, threshold, rows, blocks):
    channels = x.shape[1]
    largest = np.zeros((blocks, channels), np.uint32)
    total = np.zeros((blocks, channels), np.float32)
    square = np.zeros((blocks, channels), np.float32)
    above = np.zeros((blocks, channels), np.int32)
    for block in prange(blocks):
        for row in range(block * rows, min((block + 1) * rows, x.shape[0])):
            for channel in range(channels):
                value = x[row, channel]
                largest[block, channel] = max(largest[block, channel], uint32(bits[row, channel] & uint32(ABSOLUTE)))
                total[block, channel] += value
                square[block, channel] += value * value
                above[block, channel] = int32(above[block, channel] + int32(abs(value) > threshold[channel]))
    amax = np.zeros(channels, np.uint32)
    summed = np.zeros(channels, np.float64)
    squared = np.zeros(channels, np.float64)
    count = np.zeros(channels, np.int64)
    for block in range(blocks):
        for channel in range(channels):
            amax[channel] = max(amax[channel], largest[block, channel])
            summed[channel] += total[block, channel]
            squared[channel] += square[block, channel]
            count[channel] += above[block, channel]
    return amax, summed, squared, count


def quantize(
    x_RC: NDArray[np.float32],
    inverse_C: NDArray[np.float32],
    qmax: int,
    signed_RC: NDArray[np.int8] | None = None,
    unsigned_RC: NDArray[np.uint8] | None = None,
    zero_point: int = 0,
    seeds: tuple[int, int] | None = None,
) -> None:
    """Quantise by channel into ``signed_RC``, into ``unsigned_RC`` (shifted by the zero point), or both, in one pass.

    Args:
        x_RC: finite, contiguous, (R, C).
        inverse_C: ``qmax / clip`` of each channel (``reference.inverse_scale``).
        qmax: largest integer, at most 127.
        signed_RC: written if given.
        unsigned_RC: written if given.
        zero_point: what ``unsigned_RC`` holds for a zero.
        seeds: of the stochastic rounding; rounds to nearest if None.
    """
    kernel = _round_nearest if seeds is None else _round_stochastic
    low, high = (np.uint32(0), np.uint32(0)) if seeds is None else (np.uint32(seeds[0]), np.uint32(seeds[1]))
    nothing_s, nothing_u = np.empty((0, 0), np.int8), np.empty((0, 0), np.uint8)
    kernel(
        x_RC,
        inverse_C,
        np.float32(qmax),
        nothing_s if signed_RC is None else signed_RC,
        nothing_u if unsigned_RC is None else unsigned_RC,
        np.int32(zero_point),
        low,
        high,
        _block_rows(x_RC),
    )


@njit(inline="always")
def _hash(index, seed0, seed1):
    x = uint32(index + seed0)
    x = uint32(x ^ (x >> uint32(16)))
    x = uint32(x * uint32(0x7FEB352D))
    x = uint32(x ^ seed1)
    x = uint32(x ^ (x >> uint32(15)))
    x = uint32(x * uint32(0x846CA68B))
    return uint32(x ^ (x >> uint32(16)))


@njit(parallel=True, **_options)
def _round_nearest(x, inverse, qmax, signed, unsigned, zero, seed0, seed1, rows):
    channels = x.shape[1]
    for block in prange((x.shape[0] + rows - 1) // rows):
        for row in range(block * rows, min((block + 1) * rows, x.shape[0])):
            if signed.size:
                for channel in range(channels):
                    value = min(max(x[row, channel] * inverse[channel], -qmax), qmax)
                    signed[row, channel] = np.int8(int32(np.rint(value)))
            if unsigned.size:
                for channel in range(channels):
                    value = min(max(x[row, channel] * inverse[channel], -qmax), qmax)
                    unsigned[row, channel] = np.uint8(int32(np.rint(value)) + zero)


@njit(parallel=True, **_options)
def _round_stochastic(x, inverse, qmax, signed, unsigned, zero, seed0, seed1, rows):
    channels = x.shape[1]
    both = signed.size > 0 and unsigned.size > 0
    for block in prange((x.shape[0] + rows - 1) // rows):
        for row in range(block * rows, min((block + 1) * rows, x.shape[0])):
            start = uint32(uint32(row) * uint32(channels))
            if both:
                for channel in range(channels):
                    noise = float32(_hash(uint32(start + uint32(channel)), seed0, seed1) >> uint32(16))
                    value = min(max(x[row, channel] * inverse[channel], -qmax), qmax)
                    integer = int32(np.floor(value + noise * float32(1 / 65536)))
                    signed[row, channel] = np.int8(integer)
                    unsigned[row, channel] = np.uint8(integer + zero)
            elif signed.size:
                for channel in range(channels):
                    noise = float32(_hash(uint32(start + uint32(channel)), seed0, seed1) >> uint32(16))
                    value = min(max(x[row, channel] * inverse[channel], -qmax), qmax)
                    signed[row, channel] = np.int8(int32(np.floor(value + noise * float32(1 / 65536))))
            elif unsigned.size:
                for channel in range(channels):
                    noise = float32(_hash(uint32(start + uint32(channel)), seed0, seed1) >> uint32(16))
                    value = min(max(x[row, channel] * inverse[channel], -qmax), qmax)
                    integer = int32(np.floor(value + noise * float32(1 / 65536)))
                    unsigned[row, channel] = np.uint8(integer + zero)


__all__ = ["channel_range", "channel_stats", "inverse_scale", "quantize", "tensor_range"]
