# mypy: allow-untyped-defs
"""Layout kernels on the CPU, in Numba: im2col of bytes, weights of the input gradient, gradients of grouped layers.

Volumes are (N, D, H, W, C), channels last; a picture has D = 1, a sequence D = H = 1.
"""

from __future__ import annotations

import numpy as np
from numba import int32, njit, prange
from numpy.typing import NDArray

_options = dict(nogil=True, cache=True, error_model="numpy")

Triple = tuple[int, int, int]


def output_size(size: Triple, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple) -> Triple:
    """(D, H, W) of a convolution's output."""
    depth, height, width = (
        (size[d] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(3)
    )
    return depth, height, width


def im2col(
    q: NDArray[np.uint8],
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    fill: int,
    first: int,
    columns: NDArray[np.uint8],
) -> None:
    """Copy the patches of some output positions into rows; the padding reads as ``fill``.

    Args:
        q: (N, D, H, W, C), contiguous.
        kernel: of the convolution, by dimension; likewise ``stride``, ``padding`` (both sides) and ``dilation``.
        stride: see ``kernel``.
        padding: see ``kernel``.
        dilation: see ``kernel``.
        fill: stored value of a zero.
        first: number of the first output position, counted over (N, Do, Ho, Wo).
        columns: (positions, kernel volume x C), written; as many positions as it has rows.
    """
    out = output_size(q.shape[1:4], kernel, stride, padding, dilation)
    # Whole words where the channels allow it: a copy of bytes is eight times slower.
    word = np.uint64 if q.shape[4] % 8 == 0 else np.uint8
    padded = np.uint64(fill * 0x0101010101010101) if word is np.uint64 else np.uint8(fill)
    channels = q.shape[4] // np.dtype(word).itemsize
    source, target = q.reshape(-1).view(word), columns.reshape(-1).view(word)
    _im2col(source, q.shape[1:4], channels, kernel, stride, padding, dilation, out, padded, first, target, len(columns))


@njit(parallel=True, **_options)
def _im2col(source, size, channels, kernel, stride, padding, dilation, out, fill, first, target, rows):
    length = channels * kernel[0] * kernel[1] * kernel[2]
    for row in prange(rows):
        rest = first + row
        x = rest % out[2] * stride[2] - padding[2]
        rest //= out[2]
        y = rest % out[1] * stride[1] - padding[1]
        rest //= out[1]
        z = rest % out[0] * stride[0] - padding[0]
        picture = rest // out[0] * size[0]
        to = row * length
        for dz in range(kernel[0]):
            a = z + dz * dilation[0]
            for dy in range(kernel[1]):
                b = y + dy * dilation[1]
                inside = 0 <= a < size[0] and 0 <= b < size[1]
                line = ((picture + a) * size[1] + b) * size[2]
                for dx in range(kernel[2]):
                    c = x + dx * dilation[2]
                    if inside and 0 <= c < size[2]:
                        copied = target[to : to + channels]
                        taken = source[(line + c) * channels : (line + c + 1) * channels]
                        for channel in range(channels):
                            copied[channel] = taken[channel]
                    else:
                        for channel in range(to, to + channels):
                            target[channel] = fill
                    to += channels


def weight_range(weight_OIK: NDArray[np.float32], fold_O: NDArray[np.float32], groups: int) -> NDArray[np.float32]:
    """Largest magnitude of the folded weights of each input channel, (groups x I,).

    Args:
        weight_OIK: (O, I, kernel volume), contiguous; I input channels a group.
        fold_O: what each output channel's weights are multiplied with.
        groups: of the layer.
    """
    amax = np.zeros(groups * weight_OIK.shape[1], np.float32)
    _weight_range(weight_OIK, fold_O, groups, amax)
    return amax


@njit(parallel=True, **_options)
def _weight_range(weight, fold, groups, amax):
    inputs = weight.shape[1]
    outputs = weight.shape[0] // groups
    block = 16
    blocks = (inputs + block - 1) // block
    for task in prange(groups * blocks):
        group = task // blocks
        begin = task % blocks * block
        for output in range(group * outputs, (group + 1) * outputs):
            for channel in range(begin, min(begin + block, inputs)):
                largest = amax[group * inputs + channel]
                for tap in range(weight.shape[2]):
                    largest = max(largest, abs(weight[output, channel, tap] * fold[output]))
                amax[group * inputs + channel] = largest


def transpose_weight(
    weight_OIK: NDArray[np.float32],
    fold_O: NDArray[np.float32],
    inverse_I: NDArray[np.float32],
    qmax: int,
    taps_PJ: NDArray[np.int64],
    groups: int,
) -> NDArray[np.int8]:
    """Fold, quantise to nearest, and lay out the weights for the convolution that computes the input gradient.

    Args:
        weight_OIK: (O, I, kernel volume), contiguous; I input channels a group.
        fold_O: what each output channel's weights are multiplied with before they are quantised.
        inverse_I: ``qmax / clip`` of each input channel, (groups x I,).
        qmax: largest integer.
        taps_PJ: which tap of the kernel stands at place J for phase P of the stride; -1: none.
        groups: of the layer.

    Returns:
        (groups x P x I, O / groups, J).
    """
    phases, places = taps_PJ.shape
    outputs, inputs = weight_OIK.shape[:2]
    out = np.empty((groups * phases * inputs, outputs // groups, places), np.int8)
    _transpose_weight(weight_OIK, fold_O, inverse_I, np.float32(qmax), taps_PJ, groups, out)
    return out


@njit(parallel=True, **_options)
def _transpose_weight(weight, fold, inverse, qmax, taps, groups, out):
    inputs = weight.shape[1]
    outputs = weight.shape[0] // groups
    phases, places = taps.shape
    block = 16
    blocks = (inputs + block - 1) // block
    for task in prange(groups * blocks):
        group = task // blocks
        begin = task % blocks * block
        for output in range(outputs):
            factor = fold[group * outputs + output]
            for channel in range(begin, min(begin + block, inputs)):
                scale = inverse[group * inputs + channel]
                for phase in range(phases):
                    row = (group * phases + phase) * inputs + channel
                    for place in range(places):
                        tap = taps[phase, place]
                        value = np.float32(0)
                        if tap >= 0:
                            value = weight[group * outputs + output, channel, tap] * factor * scale
                        out[row, output, place] = np.int8(int32(np.rint(min(max(value, -qmax), qmax))))


def quantize_rows(x_RL: NDArray[np.float32], inverse_R: NDArray[np.float32], qmax: int) -> NDArray[np.int8]:
    """Quantise each row with its own scale, to nearest; (R, L), contiguous."""
    out = np.empty(x_RL.shape, np.int8)
    _quantize_rows(x_RL, inverse_R, np.float32(qmax), out)
    return out


@njit(parallel=True, **_options)
def _quantize_rows(x, inverse, qmax, out):
    for row in prange(x.shape[0]):
        for column in range(x.shape[1]):
            value = min(max(x[row, column] * inverse[row], -qmax), qmax)
            out[row, column] = np.int8(int32(np.rint(value)))


def grouped_weight_gradient(
    q: NDArray[np.uint8],
    zero_point: int,
    gradient_RO: NDArray[np.int8],
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
) -> NDArray[np.int64]:
    """Weight gradient of a grouped or depthwise convolution, in integers: int32 within 4,096 positions, int64 over all.

    Args:
        q: stored activations, (N, D, H, W, C), contiguous.
        zero_point: what ``q`` holds for a zero.
        gradient_RO: (N x Do x Ho x Wo, O), contiguous.
        kernel: of the convolution, by dimension; likewise ``stride``, ``padding`` and ``dilation``.
        stride: see ``kernel``.
        padding: see ``kernel``.
        dilation: see ``kernel``.
        groups: of the layer.

    Returns:
        (O, C / groups, kernel volume).
    """
    out = output_size(q.shape[1:4], kernel, stride, padding, dilation)
    rows = gradient_RO.shape[0]
    chunks = max(1, min(32, rows // 2048))
    shape = (chunks, kernel[0] * kernel[1] * kernel[2], gradient_RO.shape[1], q.shape[4] // groups)
    partial = np.zeros(shape, np.int64)
    _grouped_weight_gradient(q, int32(zero_point), gradient_RO, kernel, stride, padding, dilation, groups, out, partial)
    return np.ascontiguousarray(partial.sum(axis=0).transpose(1, 2, 0))


@njit(parallel=True, **_options)
def _grouped_weight_gradient(q, zero, gradient, kernel, stride, padding, dilation, groups, out, partial):
    chunks, volume, outputs, inputs = partial.shape
    per_group = outputs // groups
    rows = gradient.shape[0]
    for chunk in prange(chunks):
        begin = rows * chunk // chunks
        end = rows * (chunk + 1) // chunks
        sums = np.zeros((volume, outputs, inputs), np.int32)
        held = 0
        for row in range(begin, end):
            rest = row
            x = rest % out[2] * stride[2] - padding[2]
            rest //= out[2]
            y = rest % out[1] * stride[1] - padding[1]
            rest //= out[1]
            z = rest % out[0] * stride[0] - padding[0]
            picture = rest // out[0]
            for tap in range(volume):
                c = x + tap % kernel[2] * dilation[2]
                b = y + tap // kernel[2] % kernel[1] * dilation[1]
                a = z + tap // (kernel[2] * kernel[1]) * dilation[0]
                if 0 <= a < q.shape[1] and 0 <= b < q.shape[2] and 0 <= c < q.shape[3]:
                    if inputs == 1 and per_group == 1:
                        for channel in range(outputs):
                            value = int32(int32(q[picture, a, b, c, channel]) - zero)
                            sums[tap, channel, 0] = int32(
                                sums[tap, channel, 0] + int32(value * int32(gradient[row, channel]))
                            )
                    else:
                        for output in range(outputs):
                            first = output // per_group * inputs
                            factor = int32(gradient[row, output])
                            for channel in range(inputs):
                                value = int32(int32(q[picture, a, b, c, first + channel]) - zero)
                                sums[tap, output, channel] = int32(sums[tap, output, channel] + int32(value * factor))
            held += 1
            # 4,096 x 255 x 127 stays far below 2^31.
            if held == 4096 or row == end - 1:
                for tap in range(volume):
                    for output in range(outputs):
                        for channel in range(inputs):
                            partial[chunk, tap, output, channel] += sums[tap, output, channel]
                sums[:] = 0
                held = 0


def finish_weight_gradient(sums_LO: NDArray[np.int32 | np.int64], scale_O: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scale and transpose the integer sums of a weight gradient.

    Args:
        sums_LO: (kernel volume, I, O), contiguous.
        scale_O: value of one step of each output channel.

    Returns:
        (O, I, kernel volume).
    """
    volume, inputs, outputs = sums_LO.shape
    out = np.empty((outputs, inputs, volume), np.float32)
    _finish_weight_gradient(sums_LO, scale_O, out)
    return out


@njit(parallel=True, **_options)
def _finish_weight_gradient(sums, scale, out):
    outputs, inputs, volume = out.shape
    # Tiles of 16 x 64, so that both sides touch whole cache lines.
    tiles_i = (inputs + 15) // 16
    tiles_o = (outputs + 63) // 64
    for tile in prange(tiles_i * tiles_o):
        begin_i = tile // tiles_o * 16
        begin_o = tile % tiles_o * 64
        for channel in range(begin_i, min(begin_i + 16, inputs)):
            for tap in range(volume):
                for output in range(begin_o, min(begin_o + 64, outputs)):
                    out[output, channel, tap] = np.float32(sums[tap, channel, output]) * scale[output]
