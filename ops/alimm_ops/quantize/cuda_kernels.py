# mypy: allow-untyped-defs
"""The Numba CUDA kernels behind ``cuda.py``; what they compute is said there and in ``reference.py``.

Shared memory, barriers and atomics only: Numba's simulator runs them all. Device functions are inlined as Numba IR,
since numba-cuda compiles a called one for the device at hand, and there may be none.

Why the bits equal those of NumPy although a compiler may contract ``a * b + c`` into one fused multiply-add: numba-cuda
0.30.4 cannot turn that off. ``cuda.jit`` and ``cuda.compile`` hand NVVM the options ``opt`` and ``fastmath`` and no
others; without ``fastmath``, NVVM's ``-fma=1`` and ptxas's ``-fmad=true`` stand as their defaults. So no float here is
multiplied and then added, with two exceptions where the product is exact and the fused operation rounds to the same
bits: ``v + n * 2**-16``, and the squares of float32 in float64. The clip keeps ``x * inv`` apart from the addition
after it. ``fastmath`` must stay off: it would also flush subnormals to 0.
"""

from __future__ import annotations

import math

from numba import cuda, float32, float64, int32, int64, uint32

ABSOLUTE = 0x7FFFFFFF
"""The bits of a float32 without its sign; as integers they are in the order of the magnitudes."""

TO_INTEGER = 1.5 * 2**23
"""Added to a small float32 and taken off again it leaves the nearest integer, half to even; ``round`` uses float64."""

THREADS = 256
LANES = 8
TILE = 32
PITCH = TILE + 1
"""A block has 256 threads: in a line, or 8 lanes of 32 columns. 32 by 32 elements are turned at once; their rows lie 33
apart, so that the elements of a column fall into different banks."""


@cuda.jit
def range_kernel(bits, out):
    """The largest pattern without its sign, and the largest with it."""
    absolute = cuda.shared.array(THREADS, uint32)
    highest = cuda.shared.array(THREADS, uint32)
    lane = cuda.threadIdx.x
    largest = uint32(0)
    top = uint32(0)
    for index in range(cuda.grid(1), bits.size, cuda.gridsize(1)):
        word = bits[index]
        largest = max(largest, uint32(word & uint32(ABSOLUTE)))
        top = max(top, word)
    absolute[lane] = largest
    highest[lane] = top
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if lane < step:
            absolute[lane] = max(absolute[lane], absolute[lane + step])
            highest[lane] = max(highest[lane], highest[lane + step])
        cuda.syncthreads()
        step //= 2
    if lane == 0:
        cuda.atomic.max(out, 0, absolute[0])
        cuda.atomic.max(out, 1, highest[0])


@cuda.jit
def stats_rows_kernel(x, bits, threshold, work, rows):
    """One chunk of rows for 32 channels: bits of the amax, sum, sum of squares and count, each as float64."""
    shared = cuda.shared.array((4, LANES, TILE), float64)
    column = cuda.threadIdx.x
    lane = cuda.threadIdx.y
    channel = cuda.blockIdx.x * TILE + column
    chunk = cuda.blockIdx.y
    largest = uint32(0)
    total = float64(0)
    squares = float64(0)
    count = 0
    if channel < x.shape[1]:
        limit = threshold[channel]
        for row in range(chunk * rows + lane, min((chunk + 1) * rows, x.shape[0]), LANES):
            value = x[row, channel]
            wide = float64(value)
            largest = max(largest, uint32(bits[row, channel] & uint32(ABSOLUTE)))
            total += wide
            squares += wide * wide
            count += 1 if abs(value) > limit else 0
    shared[0, lane, column] = float64(largest)
    shared[1, lane, column] = total
    shared[2, lane, column] = squares
    shared[3, lane, column] = float64(count)
    cuda.syncthreads()
    if lane == 0 and channel < x.shape[1]:
        for other in range(1, LANES):
            shared[0, 0, column] = max(shared[0, 0, column], shared[0, other, column])
            for figure in range(1, 4):
                shared[figure, 0, column] += shared[figure, other, column]
        for figure in range(4):
            work[figure, chunk, channel] = shared[figure, 0, column]


@cuda.jit
def stats_planes_kernel(x, bits, threshold, work, rows):
    """The same of planes: one chunk of one channel a block."""
    shared = cuda.shared.array((4, THREADS), float64)
    lane = cuda.threadIdx.x
    channel = cuda.blockIdx.x
    chunk = cuda.blockIdx.y
    positions = x.shape[2]
    largest = uint32(0)
    total = float64(0)
    squares = float64(0)
    count = 0
    limit = threshold[channel]
    for row in range(chunk * rows + lane, min((chunk + 1) * rows, x.shape[0] * positions), THREADS):
        sample = _quotient(row, positions)
        position = row - sample * positions
        value = x[sample, channel, position]
        wide = float64(value)
        largest = max(largest, uint32(bits[sample, channel, position] & uint32(ABSOLUTE)))
        total += wide
        squares += wide * wide
        count += 1 if abs(value) > limit else 0
    shared[0, lane] = float64(largest)
    shared[1, lane] = total
    shared[2, lane] = squares
    shared[3, lane] = float64(count)
    cuda.syncthreads()
    step = THREADS // 2
    while step > 0:
        if lane < step:
            shared[0, lane] = max(shared[0, lane], shared[0, lane + step])
            for figure in range(1, 4):
                shared[figure, lane] += shared[figure, lane + step]
        cuda.syncthreads()
        step //= 2
    if lane == 0:
        for figure in range(4):
            work[figure, chunk, channel] = shared[figure, 0]


@cuda.jit
def stats_finish_kernel(work, chunks, amax_bits, total, squares, count):
    """Sums the chunks of each channel in one fixed order."""
    shared = cuda.shared.array((4, LANES, TILE), float64)
    column = cuda.threadIdx.x
    lane = cuda.threadIdx.y
    channel = cuda.blockIdx.x * TILE + column
    for figure in range(4):
        shared[figure, lane, column] = 0.0
    if channel < total.size:
        for chunk in range(lane, chunks, LANES):
            shared[0, lane, column] = max(shared[0, lane, column], work[0, chunk, channel])
            for figure in range(1, 4):
                shared[figure, lane, column] += work[figure, chunk, channel]
    cuda.syncthreads()
    if lane == 0 and channel < total.size:
        for other in range(1, LANES):
            shared[0, 0, column] = max(shared[0, 0, column], shared[0, other, column])
            for figure in range(1, 4):
                shared[figure, 0, column] += shared[figure, other, column]
        amax_bits[channel] = uint32(shared[0, 0, column])
        total[channel] = shared[1, 0, column]
        squares[channel] = shared[2, 0, column]
        count[channel] = int64(shared[3, 0, column])


@cuda.jit(device=True, inline="always")
def _quotient(dividend, divisor):
    """``dividend // divisor`` of 32-bit numbers: the GPU divides 64-bit ones several times slower."""
    return int64(uint32(dividend) // uint32(divisor))


@cuda.jit(device=True, inline="always")
def _hash(index, seed0, seed1):
    x = uint32(index + seed0)
    x = uint32(x ^ (x >> uint32(16)))
    x = uint32(x * uint32(0x7FEB352D))
    x = uint32(x ^ seed1)
    x = uint32(x ^ (x >> uint32(15)))
    x = uint32(x * uint32(0x846CA68B))
    return uint32(x ^ (x >> uint32(16)))


@cuda.jit(device=True, inline="always")
def _integer(value, inverse, qmax, stochastic, index, seed0, seed1):
    v = min(max(value * inverse, -qmax), qmax)
    if stochastic:
        u = float32(uint32(_hash(index, seed0, seed1) >> uint32(16))) * float32(1 / 65536)
        return int32(math.floor(v + u))
    return int32((v + float32(TO_INTEGER)) - float32(TO_INTEGER))


@cuda.jit
def quantize_rows_kernel(x, inverse, qmax, signed, unsigned, to_signed, to_unsigned, zero, stochastic, seed0, seed1):
    """Round to nearest or stochastically; write int8, uint8 shifted by the zero point, or both."""
    channel = cuda.blockIdx.x * TILE + cuda.threadIdx.x
    channels = x.shape[1]
    if channel < channels:
        factor = inverse[channel]
        first = cuda.blockIdx.y * LANES + cuda.threadIdx.y
        for row in range(first, x.shape[0], cuda.gridDim.y * LANES):
            index = uint32(row * channels + channel)
            q = _integer(x[row, channel], factor, qmax, stochastic, index, seed0, seed1)
            if to_signed:
                signed[row, channel] = q
            if to_unsigned:
                unsigned[row, channel] = q + zero


@cuda.jit
def quantize_planes_kernel(x, inverse, qmax, signed, unsigned, to_signed, to_unsigned, zero, stochastic, seed0, seed1):
    """The same of planes. Tiles of integers turn in shared memory, so that both sides touch memory in its order."""
    tile = cuda.shared.array((TILE, PITCH), int32)
    column = cuda.threadIdx.x
    lane = cuda.threadIdx.y
    channels = x.shape[1]
    positions = x.shape[2]
    position0 = cuda.blockIdx.x * TILE
    channel0 = cuda.blockIdx.y * TILE
    for sample in range(cuda.blockIdx.z, x.shape[0], cuda.gridDim.z):
        for offset in range(lane, TILE, LANES):
            channel = channel0 + offset
            position = position0 + column
            if channel < channels and position < positions:
                index = uint32((sample * positions + position) * channels + channel)
                value = x[sample, channel, position]
                tile[offset, column] = _integer(value, inverse[channel], qmax, stochastic, index, seed0, seed1)
        cuda.syncthreads()
        for offset in range(lane, TILE, LANES):
            channel = channel0 + column
            position = position0 + offset
            if channel < channels and position < positions:
                row = sample * positions + position
                if to_signed:
                    signed[row, channel] = tile[column, offset]
                if to_unsigned:
                    unsigned[row, channel] = tile[column, offset] + zero
        cuda.syncthreads()


@cuda.jit
def dequantize_kernel(q, scale_rows, scale_columns, out):
    """``(q * row) * column``; a scale of one element serves all."""
    column = cuda.blockIdx.x * TILE + cuda.threadIdx.x
    if column < q.shape[1]:
        right = scale_columns[column if scale_columns.size > 1 else 0]
        first = cuda.blockIdx.y * LANES + cuda.threadIdx.y
        for row in range(first, q.shape[0], cuda.gridDim.y * LANES):
            left = scale_rows[row if scale_rows.size > 1 else 0]
            out[row, column] = float32(q[row, column]) * left * right


@cuda.jit
def im2col_kernel(q, columns, out, kernel, stride, padding, dilation, fill):
    """Threads run along a row of the result, whose address is worked out once."""
    channels = q.shape[4]
    first = cuda.blockIdx.x * LANES + cuda.threadIdx.y
    for row in range(first, columns.shape[0], cuda.gridDim.x * LANES):
        above = _quotient(row, out[2])
        plane = _quotient(above, out[1])
        sample = _quotient(plane, out[0])
        left = (row - above * out[2]) * stride[2] - padding[2]
        top = (above - plane * out[1]) * stride[1] - padding[1]
        front = (plane - sample * out[0]) * stride[0] - padding[0]
        for column in range(cuda.threadIdx.x, columns.shape[1], TILE):
            tap = _quotient(column, channels)
            line = _quotient(tap, kernel[2])
            slab = _quotient(line, kernel[1])
            d = front + slab * dilation[0]
            h = top + (line - slab * kernel[1]) * dilation[1]
            w = left + (tap - line * kernel[2]) * dilation[2]
            if 0 <= d < q.shape[1] and 0 <= h < q.shape[2] and 0 <= w < q.shape[3]:
                columns[row, column] = q[sample, d, h, w, column - tap * channels]
            else:
                columns[row, column] = fill
