"""Statistics, quantisation and layout on an NVIDIA GPU, in Numba CUDA: the bits of ``reference.py``.

Every function here launches kernels of ``cuda_kernels.py`` and waits for nothing. It takes contiguous arrays of the
device (anything with ``__cuda_array_interface__``, so detached torch tensors too; NumPy arrays in Numba's simulator)
and writes into arrays that the caller made. ``stream`` is the address of a CUDA stream, for torch
``torch.cuda.current_stream().cuda_stream``; by default it is the legacy one. An activation or a gradient comes in one
of two layouts, and integers always leave in the first::

    rows    (R, C)      channels-last: R = samples x positions
    planes  (N, C, S)   channels-first: N samples, S positions; row n * S + s of the result is position s of sample n

The sums of :func:`channel_stats` are the same on every device, but their last bits are not NumPy's. They are made in
float64: on cards where that is slow, arithmetic and not memory bounds this pass.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    # The simulator replaces the global name "cuda" while a kernel runs: it is imported at the top of a module.
    from numba import cuda
except (ImportError, RuntimeError) as error:  # numba-cuda without a CUDA runtime to load is a RuntimeError
    raise ImportError(
        "alimm_ops.quantize.cuda needs numba_cuda and the CUDA libraries it loads, which are not installed. "
        "Install it with: pip install 'alimm[cuda]'",
        name="numba_cuda",
    ) from error

from alimm_ops.quantize import cuda_kernels as kernels

INFINITE = 0x7F800000
SIGN = 0x80000000

CHUNK = 1024
MAX_CHUNKS = 512
"""A partial sum covers at least 1024 rows; there are at most 512, whatever the device: the sums do not depend on it."""

MAX_BLOCKS = 65535
"""The limit of a grid along y and z."""


def tensor_range(x: Any, out_2: Any, stream: int | None = None) -> None:
    """Find the largest magnitude, negative values, and NaN or Inf in one pass; :func:`decode_range` reads the result.

    Args:
        x: float32, any shape.
        out_2: two words of 32 bits that hold 0. Several calls into the same words give the range of all tensors.
        stream: address of the CUDA stream.
    """
    if math.prod(x.shape):
        bits = _words(_array(x).ravel())
        blocks = min(-(-bits.size // (4 * kernels.THREADS)), 1024)
        kernels.range_kernel[blocks, kernels.THREADS, _stream(stream)](bits, _words(_array(out_2)))


def decode_range(out_2: NDArray[Any]) -> tuple[np.float32, bool, bool]:
    """Largest magnitude, whether a value is below zero, and whether all are finite, of :func:`tensor_range`'s words.

    Args:
        out_2: the words, on the host.
    """
    absolute, highest = out_2.view(np.uint32)
    return absolute.view(np.float32), bool(highest > SIGN), bool(absolute < INFINITE)


def stats_chunks(rows: int) -> tuple[int, int]:
    """How :func:`channel_stats` cuts its rows.

    Args:
        rows: R, or N * S of planes.

    Returns:
        The number of chunks, and the rows of each.
    """
    length = max(CHUNK, -(-rows // MAX_CHUNKS))
    return -(-rows // length), length


def channel_stats(
    x: Any,
    threshold_C: Any,
    work: Any,
    amax_C: Any,
    sum_C: Any,
    squares_C: Any,
    count_C: Any,
    stream: int | None = None,
) -> None:
    """Find what the clipping rules need of each channel in one pass. Where ``amax_C`` is not finite, the rest is void.

    Args:
        x: float32, rows (R, C) or planes (N, C, S).
        threshold_C: float32; values above it in magnitude are counted.
        work: float64 (4, K, C) with K, at least 1, from :func:`stats_chunks`: scratch memory.
        amax_C: float32, written.
        sum_C: float64, written.
        squares_C: float64, written.
        count_C: int64, written.
        stream: address of the CUDA stream.
    """
    planes = x.ndim == 3
    rows, channels = (x.shape[0] * x.shape[2] if planes else x.shape[0]), x.shape[1]
    chunks, length = stats_chunks(rows)
    if tuple(work.shape) != (4, max(chunks, 1), channels):
        raise ValueError(
            f"work must be of shape {(4, max(chunks, 1), channels)} for {rows} rows, got {tuple(work.shape)}"
        )
    if not channels:
        return
    on, work = _stream(stream), _array(work)
    columns = -(-channels // kernels.TILE)
    if chunks:
        x, threshold_C = _array(x), _array(threshold_C)
        if planes:
            kernel = kernels.stats_planes_kernel[(channels, chunks), kernels.THREADS, on]
        else:
            kernel = kernels.stats_rows_kernel[(columns, chunks), (kernels.TILE, kernels.LANES), on]
        kernel(x, _words(x), threshold_C, work, length)
    kernels.stats_finish_kernel[columns, (kernels.TILE, kernels.LANES), on](
        work, chunks, _words(_array(amax_C)), _array(sum_C), _array(squares_C), _array(count_C)
    )


def quantize(
    x: Any,
    inverse_C: Any,
    qmax: int,
    signed_RC: Any = None,
    unsigned_RC: Any = None,
    zero_point: int = 0,
    seeds: tuple[int, int] | None = None,
    stream: int | None = None,
) -> None:
    """Quantise by channel into ``signed_RC``, into ``unsigned_RC`` (shifted by the zero point), or both, in one pass.

    Args:
        x: finite float32, rows (R, C) or planes (N, C, S); R = N * S.
        inverse_C: ``qmax / clip`` of each channel (``reference.inverse_scale``), float32.
        qmax: largest integer, at most 127.
        signed_RC: int8, written if given.
        unsigned_RC: uint8, written if given.
        zero_point: what ``unsigned_RC`` holds for a zero.
        seeds: of the stochastic rounding; rounds to nearest if None.
        stream: address of the CUDA stream.
    """
    if not math.prod(x.shape) or (signed_RC is None and unsigned_RC is None):
        return
    signed = _unused(unsigned_RC, np.int8) if signed_RC is None else _array(signed_RC)
    unsigned = _unused(signed_RC, np.uint8) if unsigned_RC is None else _array(unsigned_RC)
    low, high = seeds or (0, 0)
    columns = -(-x.shape[1] // kernels.TILE)
    if x.ndim == 3:
        grid = (-(-x.shape[2] // kernels.TILE), columns, min(x.shape[0], MAX_BLOCKS))
        kernel = kernels.quantize_planes_kernel
    else:
        grid = (columns, min(-(-x.shape[0] // kernels.LANES), MAX_BLOCKS), 1)
        kernel = kernels.quantize_rows_kernel
    kernel[grid, (kernels.TILE, kernels.LANES), _stream(stream)](
        _array(x),
        _array(inverse_C),
        np.float32(qmax),
        signed,
        unsigned,
        signed_RC is not None,
        unsigned_RC is not None,
        np.int32(zero_point),
        seeds is not None,
        np.uint32(low & 0xFFFFFFFF),
        np.uint32(high & 0xFFFFFFFF),
    )


def dequantize(q_RC: Any, scale_R: Any, scale_C: Any, out_RC: Any, stream: int | None = None) -> None:
    """Write ``float32(q) * scale_R * scale_C``, from left to right, into ``out_RC``.

    Args:
        q_RC: int32 sums of products (R, C).
        scale_R: float32 (R,), or one for all rows.
        scale_C: float32 (C,), or one for all columns.
        out_RC: float32, written.
        stream: address of the CUDA stream.
    """
    if math.prod(q_RC.shape):
        grid = (-(-q_RC.shape[1] // kernels.TILE), min(-(-q_RC.shape[0] // kernels.LANES), MAX_BLOCKS))
        arrays = _array(scale_R), _array(scale_C), _array(out_RC)
        kernels.dequantize_kernel[grid, (kernels.TILE, kernels.LANES), _stream(stream)](_array(q_RC), *arrays)


def im2col(
    q: Any,
    columns: Any,
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    fill: int,
    cuda_stream: int | None = None,
) -> None:
    """Write the patches under a sliding kernel, one a row, as ``reference.im2col`` does.

    Args:
        q: uint8 (N, D, H, W, C).
        columns: uint8 (N * Do * Ho * Wo, kd * kh * kw * C), written.
        kernel: (kd, kh, kw).
        stride: step of the kernel along (D, H, W).
        padding: positions added at both ends of (D, H, W).
        dilation: distance of the kernel's elements along (D, H, W).
        fill: what a padded position holds: the zero point.
        cuda_stream: address of the CUDA stream.
    """
    out = tuple(
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(q.shape[1:4], kernel, stride, padding, dilation, strict=True)
    )
    shape = (q.shape[0] * math.prod(out), math.prod(kernel) * q.shape[4])
    if min(out) < 1 or tuple(columns.shape) != shape:
        raise ValueError(f"columns must be of shape {shape} for an output of {out}, got {tuple(columns.shape)}")
    if math.prod(shape):
        blocks = min(-(-shape[0] // kernels.LANES), 1 << 20)
        kernels.im2col_kernel[blocks, (kernels.TILE, kernels.LANES), _stream(cuda_stream)](
            _array(q),
            _array(columns),
            out,
            tuple(kernel),
            tuple(stride),
            tuple(padding),
            tuple(dilation),
            np.int32(fill),
        )


def _array(x: Any) -> Any:
    """The array as Numba sees it, without waiting for its stream: which stream is in order, the caller knows."""
    return cuda.as_cuda_array(x, sync=False) if hasattr(x, "__cuda_array_interface__") else x


def _unused(other: Any, kind: type[np.generic]) -> Any:
    """Stands for an output that is not wanted: on the device the memory of the other, which the kernel leaves alone.

    The simulator copies its arguments back after a launch, so there it must not be the same memory.
    """
    return np.empty((0, 0), kind) if isinstance(other, np.ndarray) else _array(other).view(kind)


def _words(x: Any) -> Any:
    return x.view(np.uint32)


def _stream(address: int | None) -> Any:
    return cuda.external_stream(address) if address else 0
