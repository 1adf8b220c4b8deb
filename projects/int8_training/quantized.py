"""Between torch tensors and the kernels: what a layer reads is seen channels-last and stored as bytes.

Two forms of storage. On the CPU a byte is unsigned, ``q + zero_point``, since the integer convolutions read nothing
else; on CUDA it is signed and the zero point is 0. `engine.storage` picks the zero point:

    data            zero point   largest integer
    no negatives    0            127       after a ReLU: what the paper's signed byte holds as well
    signed, wide    128          127       where the products take the full range of a byte
    signed, narrow  64           63        where they saturate beyond 127 (``signed='narrow'``)
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from alimm_ops.quantize import cpu
from alimm_ops.quantize.cpu_layout import Triple


@dataclass
class Stored:
    """A quantised tensor.

    Attributes:
        bytes: (N, D, H, W, C), contiguous; uint8 on the CPU, int8 on CUDA.
        zero_point: the byte that stands for zero.
        scale: value of one step.
    """

    bytes: torch.Tensor
    zero_point: int
    scale: float

    @property
    def size(self) -> Triple:
        """(D, H, W)."""
        return self.bytes.shape[1], self.bytes.shape[2], self.bytes.shape[3]

    def dequantize(self) -> torch.Tensor:
        """Float32, (N, D, H, W, C)."""
        return (self.bytes.float() - self.zero_point) * self.scale


def volume_last(x: torch.Tensor, ndim: int) -> torch.Tensor:
    """See (N, C, ...) of a convolution, or (..., C) of a linear layer (``ndim`` 0), as (N, D, H, W, C), contiguous."""
    if ndim == 0:
        return x.reshape(-1, 1, 1, 1, x.shape[-1]).contiguous()
    last = x.permute(0, *range(2, ndim + 2), 1)
    return last.reshape(x.shape[0], *(1,) * (3 - ndim), *last.shape[1:]).contiguous()


def from_volume_last(y: torch.Tensor, ndim: int, shape: torch.Size | tuple[int, ...]) -> torch.Tensor:
    """The reverse: (N, D, H, W, C) as a tensor of the layer's own ``shape``, without a copy.

    ``data`` hides that it is a view of ``y``: autograd refuses to change views in place that an operator returns, as a
    ReLU behind a convolution does. Nobody else holds ``y``.
    """
    if ndim == 0:
        return y.reshape(shape).data
    spatial = tuple(shape[2:])
    return y.reshape(shape[0], *spatial, shape[1]).permute(0, ndim + 1, *range(1, ndim + 1)).data


def channels_last(x: torch.Tensor, weight: torch.Tensor, ndim: int) -> bool:
    """Whether the stock layer would answer in channels-last layout: where its input or its weight has it.

    Operators that read raw memory, such as mmcv's RoIAlign on the CPU, take whatever comes for channels-first.
    """
    formats = {2: torch.channels_last, 3: torch.channels_last_3d}
    if ndim not in formats:
        return False
    return any(not t.is_contiguous() and t.is_contiguous(memory_format=formats[ndim]) for t in (x, weight))


def rows(volume: torch.Tensor) -> torch.Tensor:
    """(N, D, H, W, C) as (R, C)."""
    return volume.reshape(-1, volume.shape[-1])


def _cuda() -> ModuleType:
    from alimm.projects.int8_training import cuda_device

    return cuda_device


def tensor_range(volume: torch.Tensor) -> tuple[float, bool, bool]:
    """Largest magnitude, whether an element is negative, whether all are finite."""
    if volume.is_cuda:
        found: tuple[float, bool, bool] = _cuda().tensor_range(volume.detach())
        return found
    return cpu.tensor_range(volume.detach().numpy())


def channel_range(volume: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float64], bool]:
    """Largest magnitude and sum by channel, whether all are finite."""
    if volume.is_cuda:
        amax_C, sum_C, _, _, finite = channel_stats(volume, np.zeros(volume.shape[-1], np.float32))
        return amax_C, sum_C, finite
    return cpu.channel_range(rows(volume.detach()).numpy())


def channel_stats(
    volume: torch.Tensor, threshold_C: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float64], NDArray[np.int64], bool]:
    """Largest magnitude, sum, sum of squares, number above a threshold, by channel; whether all are finite."""
    x_RC = rows(volume.detach())
    if volume.is_cuda:
        found: Any = _cuda().channel_stats(x_RC, threshold_C)
        return found[0], found[1], found[2], found[3], found[4]
    return cpu.channel_stats(x_RC.numpy(), threshold_C)


def quantize_activation(volume: torch.Tensor, amax: float, zero_point: int, qmax: int) -> Stored:
    """With one scale, to nearest.

    Args:
        volume: finite, (N, D, H, W, C), contiguous.
        amax: largest magnitude in it.
        zero_point: of the storage; 0 on CUDA.
        qmax: largest integer.
    """
    inverse_C = cpu.inverse_scale(np.full(volume.shape[-1], amax, np.float32), qmax)
    stored = torch.empty(volume.shape, dtype=torch.int8 if volume.is_cuda else torch.uint8, device=volume.device)
    _fill(volume, inverse_C, qmax, stored, zero_point, None)
    return Stored(stored, zero_point, amax / qmax)


def quantize_gradient(
    volume: torch.Tensor, clip_C: NDArray[np.float32], qmax: int, seeds: tuple[int, int] | None, unsigned: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By channel.

    Args:
        volume: finite, (N, D, H, W, C), contiguous.
        clip_C: what each channel is clipped to.
        qmax: largest integer.
        seeds: of the stochastic rounding; to nearest if None.
        unsigned: also store bytes with the zero point 128, for the convolution that gives the input gradient.

    Returns:
        int8 (R, C), and the unsigned bytes (N, D, H, W, C) or None.
    """
    inverse_C = cpu.inverse_scale(clip_C, qmax)
    signed = torch.empty(volume.shape, dtype=torch.int8, device=volume.device)
    if volume.is_cuda:
        _fill(volume, inverse_C, qmax, signed, 0, seeds)
        return rows(signed), signed if unsigned else None
    shifted = torch.empty(volume.shape, dtype=torch.uint8) if unsigned else None
    cpu.quantize(
        rows(volume.detach()).numpy(),
        inverse_C,
        qmax,
        rows(signed).numpy(),
        None if shifted is None else rows(shifted).numpy(),
        128,
        seeds,
    )
    return rows(signed), shifted


def _fill(
    volume: torch.Tensor,
    inverse_C: NDArray[np.float32],
    qmax: int,
    stored: torch.Tensor,
    zero_point: int,
    seeds: tuple[int, int] | None,
) -> None:
    x, out = rows(volume.detach()), rows(stored)
    if volume.is_cuda:
        _cuda().quantize(x, inverse_C, qmax, out, seeds)
    elif stored.dtype == torch.uint8:
        cpu.quantize(x.numpy(), inverse_C, qmax, unsigned_RC=out.numpy(), zero_point=zero_point, seeds=seeds)
    else:
        cpu.quantize(x.numpy(), inverse_C, qmax, signed_RC=out.numpy(), seeds=seeds)
