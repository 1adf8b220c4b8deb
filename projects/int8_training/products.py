"""The three products of a layer in integers, whatever multiplies them.

K is the length of a sum: I x taps for the output, O x taps for the input gradient, positions for the weight gradient,
where it easily passes what an int32 accumulator holds:

    bytes              worst term     K that always fits
    0..127 x 127       16,129         133,144
    0..255 x 127       32,385          66,311

`exact_mm` cuts longer sums and adds the parts in int64. A convolution cannot be cut, so `fits` says beforehand whether
a product may run as one.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.quantized import Stored
from alimm_ops.quantize.cpu_layout import Triple

INT32_MAX = 2**31 - 1


class Products(Protocol):
    """What multiplies. ``wide``: the products are exact for bytes up to 255, else up to 127 only."""

    name: str
    wide: bool

    def output(
        self,
        x: Stored,
        weight: torch.Tensor,
        step_O: NDArray[np.float32],
        bias: torch.Tensor | None,
        layer: Geometry,
    ) -> torch.Tensor:
        """The layer's output, float32 (N, Do, Ho, Wo, O).

        Args:
            x: the input, (N, D, H, W, C).
            weight: int8 (O, I / groups, ...).
            step_O: value of one step of each output channel's weights.
            bias: float32 (O,) or None.
            layer: of the layer.
        """

    def grad_input(
        self, gradient: Stored, weight: torch.Tensor, step_I: NDArray[np.float32], size: Triple, layer: Geometry
    ) -> torch.Tensor:
        """The gradient of the input, float32 (N, D, H, W, C).

        Args:
            gradient: of the output, (N, Do, Ho, Wo, O).
            weight: int8 as `weights.transposed_weight` gives them.
            step_I: value of one step of each input channel's weights.
            size: (D, H, W) of the input.
            layer: of the layer.
        """

    def grad_weight(
        self, x: Stored, gradient_RO: torch.Tensor, step_O: NDArray[np.float32], layer: Geometry
    ) -> torch.Tensor:
        """The gradient of the weight, float32 (O, I / groups, kernel volume).

        Args:
            x: the input, (N, D, H, W, C).
            gradient_RO: int8, (N x Do x Ho x Wo, O).
            step_O: value of one step of each output channel's gradient.
            layer: of the layer.
        """


def longest_sum(wide: bool) -> int:
    """The longest sum of byte products that no int32 accumulator can overflow."""
    return INT32_MAX // ((255 if wide else 127) * 127)


def fits(layer: Geometry, product: str, wide: bool) -> bool:
    """Whether the sums of the output or the input gradient stay within int32. The weight gradient is always cut."""
    if product == "grad_weight" or layer.ndim == 0:
        return True
    channels = layer.in_channels if product == "output" else layer.out_channels
    return channels // layer.groups * layer.volume <= longest_sum(wide)


def exact_mm(a_MK: torch.Tensor, b_KN: torch.Tensor, wide: bool) -> torch.Tensor:
    """Integer product that cannot overflow: int32, or int64 where the sum had to be cut.

    Args:
        a_MK: uint8 or int8, any strides.
        b_KN: int8, any strides.
        wide: whether ``a_MK`` may hold bytes above 127.
    """
    limit = longest_sum(wide)
    length = a_MK.shape[1]
    # torch 2.13 reads a row or column of one element with the wrong stride and returns what lay in memory.
    if 1 in a_MK.shape or 1 in b_KN.shape:
        a_MK = a_MK.clone(memory_format=torch.contiguous_format)
        b_KN = b_KN.clone(memory_format=torch.contiguous_format)
    if length <= limit:
        return torch._int_mm(a_MK, b_KN)
    total = torch.zeros(a_MK.shape[0], b_KN.shape[1], dtype=torch.int64, device=a_MK.device)
    for start in range(0, length, limit):
        total += torch._int_mm(a_MK[:, start : start + limit], b_KN[start : start + limit])
    return total


def scatter_phases(y: torch.Tensor, size: Triple, start: Triple, layer: Geometry) -> torch.Tensor:
    """Put the phases of an input gradient into their places.

    Args:
        y: float32 (N, d, h, w, groups x P x I / groups).
        size: (D, H, W) of the input.
        start: (d, h, w) where the first input position lies in ``y``.
        layer: of the layer.
    """
    offsets = layer.phases.offsets
    if layer.stride == (1, 1, 1):
        d, h, w = (slice(a, a + n) for a, n in zip(start, size, strict=True))
        return y[:, d, h, w].contiguous()
    out = y.new_zeros(len(y), *size, layer.in_channels)
    split = y.view(*y.shape[:4], layer.groups, len(offsets), layer.in_channels // layer.groups)
    for index, offset in enumerate(offsets):
        counts = [max(0, -(-(n - r) // s)) for n, r, s in zip(size, offset, layer.stride, strict=True)]
        d, h, w = (slice(a, a + n) for a, n in zip(start, counts, strict=True))
        sd, sh, sw = (slice(r, None, s) for r, s in zip(offset, layer.stride, strict=True))
        out[:, sd, sh, sw] = split[:, d, h, w, :, index].reshape(len(y), *counts, layer.in_channels)
    return out
