"""The shape of a layer, as a three-dimensional convolution: a picture has one plane, a vector one position.

The input gradient of a convolution is a convolution as well. Along one dimension, with stride s, padding p, dilation d,

    dX[i] = sum over o, k with o s - p + k d = i of  G[o] W[k]

Write i = s m + r: for a phase r only the taps with (r + p - k d) divisible by s take part, and tap k reads G[m + j],
j = (r + p - k d) / s. So each phase is a convolution of stride 1 over G; all phases that have taps are computed at once
as output channels of one convolution, whose kernel spans every j that occurs. Taps that a phase lacks are zero.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from alimm_ops.quantize.cpu_layout import Triple, output_size


def _triple(values: Any, ndim: int, fill: int) -> Triple:
    values = tuple(int(value) for value in values)
    padded = (fill,) * (3 - ndim) + values
    return padded[0], padded[1], padded[2]


@dataclass(frozen=True)
class Geometry:
    """A convolution of 1 to 3 dimensions, or a linear layer (``ndim`` 0), with padding by zeros on both sides alike."""

    ndim: int
    in_channels: int
    out_channels: int
    kernel: Triple
    stride: Triple
    padding: Triple
    dilation: Triple
    groups: int

    @classmethod
    def of(cls, module: nn.Module) -> Geometry:
        """Of a convolution or a linear layer. A padding that is not symmetric or not of zeros counts as none."""
        if isinstance(module, nn.Linear):
            one, none = (1, 1, 1), (0, 0, 0)
            return cls(0, module.in_features, module.out_features, one, one, none, one, 1)
        assert isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        ndim = len(module.kernel_size)
        padding = (0,) * ndim if pads_outside(module) else module.padding
        return cls(
            ndim,
            module.in_channels,
            module.out_channels,
            _triple(module.kernel_size, ndim, 1),
            _triple(module.stride, ndim, 1),
            _triple(padding, ndim, 0),
            _triple(module.dilation, ndim, 1),
            module.groups,
        )

    @property
    def volume(self) -> int:
        """Taps of the kernel."""
        return self.kernel[0] * self.kernel[1] * self.kernel[2]

    @property
    def pointwise(self) -> bool:
        """Whether every output position reads one input position, the same one."""
        return self.volume == 1 and self.stride == (1, 1, 1) and self.padding == (0, 0, 0)

    def output_size(self, size: Triple) -> Triple:
        """(D, H, W) of the output for that of the input."""
        return output_size(size, self.kernel, self.stride, self.padding, self.dilation)

    def spatial(self, values: Triple) -> list[int]:
        """The last ``ndim`` of three values; two at least, since 1-d convolutions run as 2-d ones."""
        return list(values[-max(2, self.ndim) :])

    @cached_property
    def phases(self) -> Phases:
        """How the input gradient is computed as one convolution."""
        return Phases.of(self)

    def __str__(self) -> str:
        if self.ndim == 0:
            return f"{self.in_channels} -> {self.out_channels}"
        parts = [f"{self.in_channels} -> {self.out_channels}", "x".join(map(str, self.kernel[-self.ndim :]))]
        for name, values, usual in (("s", self.stride, 1), ("d", self.dilation, 1)):
            if any(value != usual for value in values):
                parts.append(name + "x".join(map(str, values[-self.ndim :])))
        if self.groups > 1:
            parts.append(f"g{self.groups}")
        return " ".join(parts)


@dataclass(frozen=True, eq=False)
class Phases:
    """The convolution over the output's gradient that yields the input's, see the module.

    Attributes:
        offsets: (D, H, W) start of each phase in the input; phases without taps are left out.
        taps_PJ: the tap that stands at place J for phase P, or -1.
        kernel: places by dimension.
        low: how far the first place lies before the position itself, by dimension; never positive.
    """

    offsets: list[Triple]
    taps_PJ: NDArray[np.int64]
    kernel: Triple
    low: Triple

    @classmethod
    def of(cls, layer: Geometry) -> Phases:
        """Of a layer."""
        reach: list[list[list[tuple[int, int]]]] = []
        for k, s, p, d in zip(layer.kernel, layer.stride, layer.padding, layer.dilation, strict=True):
            reach.append([[((r + p - t * d) // s, t) for t in range(k) if (r + p - t * d) % s == 0] for r in range(s)])
        low = [min(0, *(j for phase in one for j, _ in phase)) for one in reach]
        high = [max(0, *(j for phase in one for j, _ in phase)) for one in reach]
        kernel = [b - a + 1 for a, b in zip(low, high, strict=True)]
        offsets, rows = [], []
        for phase in itertools.product(*(range(s) for s in layer.stride)):
            if not all(reach[dim][phase[dim]] for dim in range(3)):
                continue
            row = np.full(kernel, -1, np.int64)
            for (jd, td), (jh, th), (jw, tw) in itertools.product(*(reach[dim][phase[dim]] for dim in range(3))):
                tap = (td * layer.kernel[1] + th) * layer.kernel[2] + tw
                row[jd - low[0], jh - low[1], jw - low[2]] = tap
            offsets.append((phase[0], phase[1], phase[2]))
            rows.append(row.reshape(-1))
        return cls(offsets, np.stack(rows), (kernel[0], kernel[1], kernel[2]), (low[0], low[1], low[2]))


def pads_outside(module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> bool:
    """Whether the padding has to be put around the input before the convolution.

    So it is for ``padding_mode`` other than zeros, and for ``padding='same'`` where the sides differ.
    """
    if module.padding_mode != "zeros":
        return any(module._reversed_padding_repeated_twice)
    return isinstance(module.padding, str)
