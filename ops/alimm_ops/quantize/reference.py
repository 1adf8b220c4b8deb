"""INT8 quantisation in NumPy: the oracle that the Numba kernels for the CPU and for CUDA equal bit for bit.

Symmetric, signed, free of a zero point. All arithmetic is float32, in this order and without fused multiply-add::

    inv = qmax / clip                            0 where the clip is 0
    v   = min(max(x * inv, -qmax), qmax)
    nearest:     q = rint(v)                     half to even
    stochastic:  q = floor(v + u)                u = (h >> 16) * 2**-16 in [0, 1), h = counter_hash(i, seed0, seed1)
    x'  = q * (clip / qmax)

The integers are -qmax..qmax; -128 never appears, so that the grid is symmetric and its rounding unbiased. ``qmax`` is
an integer and ``u < 1``, hence the stochastic ``q`` never exceeds ``qmax`` either. ``i`` is the element's flat index in
channels-last order, so the bits depend neither on the layout in memory nor on the number of threads.

The statistics find NaN and Inf; the quantiser itself never gets to see them.

Shapes: R rows (samples times positions), C channels, N samples, (D, H, W) positions of a volume. An image is a volume
with D = 1, a sequence one with D = H = 1.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = 0xFFFFFFFF


def counter_hash(index: npt.NDArray[np.uint32], seed0: int, seed1: int) -> npt.NDArray[np.uint32]:
    """Mix each counter with two seeds into 32 random bits; a pure function of its arguments.

    The multipliers and shifts are those of the hash ``lowbias32``. Two traps: another ``seed0`` alone gives a shifted
    copy of the same sequence, and a ``seed1`` that differs in one bit gives numbers that differ by about one constant.
    So both seeds must be words mixed before (``numpy.random.SeedSequence``), never a step or a layer's number as it is.

    Args:
        index: counters of any shape.
        seed0: the first seed, well mixed; its low 32 bits count.
        seed1: the second seed, well mixed; its low 32 bits count.

    Returns:
        The bits, in the shape of ``index``.
    """
    x = np.asarray(index, np.uint32) + np.uint32(seed0 & _MASK)
    x = x ^ (x >> np.uint32(16))
    x = x * np.uint32(0x7FEB352D)
    x = x ^ np.uint32(seed1 & _MASK)
    x = x ^ (x >> np.uint32(15))
    x = x * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))


def uniform16(bits: npt.NDArray[np.uint32]) -> npt.NDArray[np.float32]:
    """The upper half of each hash as a float in [0, 1).

    16 bits are few enough that ``v + u`` is exact for every integer ``|v| <= 127``: an integer is never moved.
    """
    return (bits >> np.uint32(16)).astype(np.float32) * np.float32(2.0**-16)


def inverse_scale(clip: npt.NDArray[np.float32], qmax: int = 127) -> npt.NDArray[np.float32]:
    """What a value is multiplied with before it is rounded: ``qmax / clip``.

    Args:
        clip: the largest magnitude to represent, at least 0, any shape.
        qmax: the largest integer.

    Returns:
        The factor, in the shape of ``clip``; 0 where the clip is 0, or so small (below 4e-37) that the quotient
        overflows.
    """
    clip = np.asarray(clip, np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.float32(qmax) / clip
    return np.where(np.isfinite(inverse), inverse, np.float32(0)).astype(np.float32)


def quantize_nearest(
    x_RC: npt.NDArray[np.float32], inv_C: npt.NDArray[np.float32], qmax: int = 127
) -> npt.NDArray[np.int8]:
    """Round to the nearest integer, half to even.

    Args:
        x_RC: finite values (R, C).
        inv_C: the factors of :func:`inverse_scale` (C,); one that repeats makes a quantiser of the whole tensor.
        qmax: the largest integer.

    Returns:
        The integers (R, C).
    """
    return np.rint(_scaled(x_RC, inv_C, qmax)).astype(np.int8)


def quantize_stochastic(
    x_RC: npt.NDArray[np.float32], inv_C: npt.NDArray[np.float32], qmax: int, seed0: int, seed1: int
) -> npt.NDArray[np.int8]:
    """Round up with the probability of the fraction: the expectation is the value, apart from the clip.

    Args:
        x_RC: finite values (R, C).
        inv_C: the factors of :func:`inverse_scale` (C,).
        qmax: the largest integer.
        seed0: the first seed of :func:`counter_hash`.
        seed1: the second seed.

    Returns:
        The integers (R, C).
    """
    v_RC = _scaled(x_RC, inv_C, qmax)
    # Counted in uint64 and cut to 32 bits: the counter wraps in tensors of more than 2**32 elements.
    index = np.arange(v_RC.size, dtype=np.uint64).astype(np.uint32).reshape(v_RC.shape)
    return np.floor(v_RC + uniform16(counter_hash(index, seed0, seed1))).astype(np.int8)


def dequantize(q_RC: npt.NDArray[np.int8], scale_C: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Integers times the width of a step, ``clip / qmax``.

    Args:
        q_RC: integers (R, C); int32 sums of products serve as well.
        scale_C: the width of a step (C,).
    """
    return np.asarray(q_RC).astype(np.float32) * np.asarray(scale_C, np.float32)


def tensor_range(x: npt.NDArray[np.float32]) -> tuple[np.float32, bool, bool]:
    """What decides how a whole tensor is stored.

    Args:
        x: float32, any shape; may be empty.

    Returns:
        The largest magnitude (0 of nothing; meaningless unless all is finite), whether a value is below 0 (-0.0 is
        not), and whether all values are finite.
    """
    x = np.asarray(x, np.float32)
    amax = np.float32(np.abs(x).max(initial=np.float32(0)))
    return amax, bool((x < 0).any()), bool(np.isfinite(x).all())


def channel_stats(
    x_RC: npt.NDArray[np.float32], threshold_C: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.int64], bool]:
    """What decides the clip of each channel, in one pass.

    Args:
        x_RC: values (R, C); R may be 0.
        threshold_C: the magnitude above which a value counts (C,), usually the standard deviation of the step before.

    Returns:
        The largest magnitude (C,), the sum (C,) and the sum of squares (C,) in float64, the number of values with
        ``|x| > threshold`` (C,), and whether all values are finite. Where they are not, the rest is meaningless. The
        sums are the only figures here whose last bits depend on the order of the additions.
    """
    x_RC = np.asarray(x_RC, np.float32)
    magnitude_RC = np.abs(x_RC)
    wide_RC = x_RC.astype(np.float64)
    return (
        magnitude_RC.max(axis=0, initial=np.float32(0)),
        wide_RC.sum(axis=0),
        np.square(wide_RC).sum(axis=0),
        np.count_nonzero(magnitude_RC > np.asarray(threshold_C, np.float32), axis=0).astype(np.int64),
        bool(np.isfinite(x_RC).all()),
    )


def im2col(
    q: npt.NDArray[np.uint8],
    kernel: tuple[int, int, int],
    stride: tuple[int, int, int],
    padding: tuple[int, int, int],
    dilation: tuple[int, int, int],
    fill: int,
) -> npt.NDArray[np.uint8]:
    """The patches under a sliding kernel, one a row: a convolution becomes a product of matrices.

    Args:
        q: the stored integers (N, D, H, W, C).
        kernel: (kd, kh, kw).
        stride: step of the kernel along (D, H, W).
        padding: positions added at both ends of (D, H, W).
        dilation: distance of the kernel's elements along (D, H, W).
        fill: what a padded position holds: the zero point.

    Returns:
        The matrix (N * Do * Ho * Wo, kd * kh * kw * C); its columns run through (kd, kh, kw, C).
    """
    samples, *size, channels = q.shape
    out = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]
    if min(out) < 1:
        raise ValueError(
            f"the kernel {kernel} with dilation {dilation} does not fit into {tuple(size)} padded by {padding}"
        )
    padded = np.pad(q, ((0, 0), *((p, p) for p in padding), (0, 0)), constant_values=fill)
    columns = np.empty((samples, *out, *kernel, channels), np.uint8)
    for offset in np.ndindex(*kernel):
        window = tuple(
            slice(o * d, o * d + (n - 1) * s + 1, s) for o, d, n, s in zip(offset, dilation, out, stride, strict=True)
        )
        columns[:, :, :, :, offset[0], offset[1], offset[2]] = padded[(slice(None), *window)]
    return columns.reshape(samples * int(np.prod(out)), int(np.prod(kernel)) * channels)


def _scaled(x_RC: npt.NDArray[np.float32], inv_C: npt.NDArray[np.float32], qmax: int) -> npt.NDArray[np.float32]:
    """``x * inv``, clipped to the range of the integers but not rounded."""
    v_RC = np.asarray(x_RC, np.float32) * np.asarray(inv_C, np.float32)
    limit = np.float32(qmax)
    return np.minimum(np.maximum(v_RC, -limit), limit)
