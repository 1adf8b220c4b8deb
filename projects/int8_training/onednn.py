"""Integer products on the CPU: oneDNN's convolutions and matrix products of bytes, reached through torch.

Read from torch 2.13 and checked against int64 sums, bit for bit, in the tests:

- ``onednn.qconv2d_pointwise`` and ``qconv3d_pointwise`` take unsigned bytes with any zero point and signed weights, and
  give float32; groups, strides and dilations included.
- ``torch._int_mm`` multiplies unsigned or signed by signed bytes of any strides into int32. A matrix in the layout of a
  channels-last tensor serves as its own transpose, so the weight gradient needs no transposed copy.

Processors without VNNI add two products in a saturating int16: exact only while 2 x |a| x |b| <= 32,767, so for bytes
up to 127 with weights up to 127, or up to 255 with weights up to 63. `self_test` finds out what this processor does, on
the patterns that saturate first, instead of trusting a list of processors.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray

from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.products import exact_mm, scatter_phases
from alimm.projects.int8_training.quantized import Stored, rows
from alimm_ops.quantize import cpu_layout
from alimm_ops.quantize.cpu_layout import Triple

COLUMN_BYTES = 8 << 20
"""Size of the im2col buffer: larger ones leave the cache."""


class OneDnnProducts:
    """See the module.

    Args:
        wide: take the full range of a byte; None asks `self_test`.
    """

    name = "onednn"

    def __init__(self, wide: bool | None = None) -> None:
        self.wide = self_test() == "wide" if wide is None else wide
        self._columns = torch.empty(0, dtype=torch.uint8)

    def output(
        self,
        x: Stored,
        weight: torch.Tensor,
        step_O: NDArray[np.float32],
        bias: torch.Tensor | None,
        layer: Geometry,
    ) -> torch.Tensor:
        """See `Products`."""
        if layer.ndim == 0:
            sums = self._signed_mm(rows(x.bytes), x.zero_point, weight.t())
            y = sums * torch.from_numpy(step_O * np.float32(x.scale))
            return (y if bias is None else y.add_(bias)).view(*x.bytes.shape[:4], -1)
        kernel = (layer.kernel, layer.stride, layer.padding, layer.dilation)
        return self._conv(x, weight.reshape(*weight.shape[:2], *layer.kernel), step_O, bias, *kernel, layer.groups)

    def grad_input(
        self, gradient: Stored, weight: torch.Tensor, step_I: NDArray[np.float32], size: Triple, layer: Geometry
    ) -> torch.Tensor:
        """See `Products`."""
        if layer.ndim == 0:
            sums = self._signed_mm(rows(gradient.bytes), gradient.zero_point, weight[:, :, 0].t())
            return (sums * torch.from_numpy(step_I * np.float32(gradient.scale))).view(*gradient.bytes.shape[:4], -1)
        phases = layer.phases
        padding = tuple(
            max(0, -low, -(-n // s) + low + k - 1 - out)
            for low, n, s, k, out in zip(phases.low, size, layer.stride, phases.kernel, gradient.size, strict=True)
        )
        pad: Triple = (padding[0], padding[1], padding[2])
        group_I = layer.in_channels // layer.groups
        steps = np.repeat(step_I.reshape(layer.groups, 1, group_I), len(phases.offsets), axis=1).reshape(-1)
        one = (1, 1, 1)
        shaped = weight.view(*weight.shape[:2], *phases.kernel)
        y = self._conv(gradient, shaped, steps, None, phases.kernel, one, pad, one, layer.groups)
        start = tuple(p + low for p, low in zip(pad, phases.low, strict=True))
        if layer.stride == one and start == (0, 0, 0) and tuple(y.shape[1:4]) == size:
            return y
        return scatter_phases(y, size, (start[0], start[1], start[2]), layer)

    def grad_weight(
        self, x: Stored, gradient_RO: torch.Tensor, step_O: NDArray[np.float32], layer: Geometry
    ) -> torch.Tensor:
        """See `Products`."""
        kernel = (layer.kernel, layer.stride, layer.padding, layer.dilation)
        if layer.groups > 1:
            sums = cpu_layout.grouped_weight_gradient(
                x.bytes.numpy(), x.zero_point, gradient_RO.numpy(), *kernel, layer.groups
            )
            return torch.from_numpy(sums.astype(np.float32) * (step_O * np.float32(x.scale))[:, None, None])
        inputs = layer.in_channels
        if layer.pointwise:
            sums_LO = self._transposed_mm(rows(x.bytes), x.zero_point, gradient_RO)
        else:
            length = layer.volume * inputs
            many = max(1, min(len(gradient_RO), COLUMN_BYTES // length))
            if self._columns.numel() < many * length:
                self._columns = torch.empty(many * length, dtype=torch.uint8)
            parts = []
            for first in range(0, len(gradient_RO), many):
                part = gradient_RO[first : first + many]
                columns = self._columns[: len(part) * length].view(len(part), length)
                cpu_layout.im2col(x.bytes.numpy(), *kernel, x.zero_point, first, columns.numpy())
                parts.append(self._transposed_mm(columns, x.zero_point, part))
            sums_LO = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0, dtype=torch.int64)
        sums = sums_LO.view(layer.volume, inputs, layer.out_channels).numpy()
        return torch.from_numpy(cpu_layout.finish_weight_gradient(sums, step_O * np.float32(x.scale)))

    def _transposed_mm(self, bytes_RL: torch.Tensor, zero_point: int, gradient_RO: torch.Tensor) -> torch.Tensor:
        """Sum over rows of (bytes - zero point) x gradient, (L, O)."""
        return self._signed_mm(bytes_RL.t(), zero_point, gradient_RO)

    def _signed_mm(self, a_MK: torch.Tensor, zero_point: int, b_KN: torch.Tensor) -> torch.Tensor:
        if zero_point == 128 and not self.wide:
            return exact_mm(_above(a_MK), b_KN, False).long() - exact_mm(_below(a_MK), b_KN, False)
        sums = exact_mm(a_MK, b_KN, zero_point == 128)
        # In int64 where the sums are: 128 x 127 a term passes int32 as well.
        return sums if zero_point == 0 else sums - zero_point * b_KN.sum(0, dtype=sums.dtype)

    def _conv(
        self,
        x: Stored,
        weight: torch.Tensor,
        step_O: NDArray[np.float32],
        bias: torch.Tensor | None,
        kernel: Triple,
        stride: Triple,
        padding: Triple,
        dilation: Triple,
        groups: int,
    ) -> torch.Tensor:
        """A convolution of bytes (N, D, H, W, C) to float32 (N, Do, Ho, Wo, O)."""
        zero_point, data = x.zero_point, x.bytes
        # Bytes up to 255 with weights up to 63 are safe everywhere; the caller says so by the weights it gives.
        if zero_point == 128 and not self.wide and int(weight.abs().amax()) > 63:
            grouped = data.view(*data.shape[:4], groups, -1)
            data = torch.cat([_above(grouped), _below(grouped)], -1).flatten(4)
            weight, zero_point = torch.cat([weight, -weight], 1), 0
        flat = data.shape[1] == 1 and kernel[0] == 1 and padding[0] == 0
        first = 1 if flat else 0
        source = data.squeeze(1).permute(0, 3, 1, 2) if flat else data.permute(0, 4, 1, 2, 3)
        weight = weight.squeeze(2) if flat else weight
        conv = torch.ops.onednn.qconv2d_pointwise if flat else torch.ops.onednn.qconv3d_pointwise
        steps = torch.from_numpy(np.ascontiguousarray(step_O))
        triples: tuple[Triple, ...] = (stride, padding, dilation)
        shape = [list(values)[first:] for values in triples]
        # Packing depends on the zero point only; it reads the scales one by one, so it gets a single one.
        packed = torch.ops.onednn.qconv_prepack(
            weight.contiguous(), torch.ones(1), 1.0, zero_point, *shape, groups, list(source.shape)
        )
        zeros = torch.zeros(len(steps), dtype=torch.int64)
        y = conv(
            source,
            x.scale,
            zero_point,
            packed,
            steps,
            zeros,
            bias,
            *shape,
            groups,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        last = y.permute(0, 2, 3, 1).unsqueeze(1) if flat else y.permute(0, 2, 3, 4, 1)
        return last.contiguous()


def _above(stored: torch.Tensor) -> torch.Tensor:
    """The positive part of bytes with the zero point 128."""
    return stored.clamp(min=128) - 128


def _below(stored: torch.Tensor) -> torch.Tensor:
    """The negative part, as positive bytes."""
    return 128 - stored.clamp(max=128)


@cache
def self_test() -> str:
    """What this processor multiplies exactly, found by multiplying the patterns that saturate first.

    Returns:
        ``'wide'``: bytes up to 255 by 127; ``'narrow'``: up to 127 by 127, and up to 255 by 63; ``'none'``: the
        operators are missing or wrong.
    """
    try:
        if not (_exact(127, 0, 127) and _exact(255, 128, 63)):
            return "none"
        return "wide" if _exact(255, 128, 127) else "narrow"
    except (AttributeError, RuntimeError, NotImplementedError):
        return "none"


def _exact(top: int, zero_point: int, weight_top: int) -> bool:
    layer = Geometry(2, 32, 16, (1, 3, 3), (1, 1, 1), (0, 1, 1), (1, 1, 1), 1)
    products = OneDnnProducts(wide=True)
    generator = torch.Generator().manual_seed(0)
    low = 0 if zero_point == 0 else 1
    for share in (1.0, 0.7, 0.5):
        high = torch.rand(2, 1, 5, 5, 32, generator=generator) < share
        data = torch.where(high, top, low).to(torch.uint8)
        signs = torch.rand(16, 32, 3, 3, generator=generator) < share
        weight = torch.where(signs, weight_top, -weight_top).to(torch.int8)
        true = torch.nn.functional.conv2d(
            data.squeeze(1).permute(0, 3, 1, 2).double() - zero_point, weight.double(), padding=1
        )
        y = products.output(Stored(data, zero_point, 1.0), weight, np.ones(16, np.float32), None, layer)
        if not torch.equal(y.squeeze(1).permute(0, 3, 1, 2).double(), true):
            return False
        rows_RC, taps_CO = data.view(-1, 32), weight.view(16, -1)[:, :32].t()
        if not torch.equal(torch._int_mm(rows_RC, taps_CO).double(), rows_RC.double() @ taps_CO.double()):
            return False
        long_RO = weight.view(-1, 16)[: len(rows_RC)].contiguous()
        if not torch.equal(torch._int_mm(rows_RC.t(), long_RO).double(), rows_RC.t().double() @ long_RO.double()):
            return False
    return True
