"""Integer products by ``torch._int_mm`` alone: what CUDA has, and the portable form on any CPU.

A convolution becomes im2col and a matrix product of signed bytes; the input gradient is a convolution too (`Phases`).
cuBLAS wants at least 17 rows and the other two sizes in multiples of 8: `padded_mm` adds zeros. On the CPU bytes are
stored unsigned, so the zero point is taken off first.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.products import exact_mm, scatter_phases
from alimm.projects.int8_training.quantized import Stored, rows
from alimm_ops.quantize.cpu_layout import Triple


class IntMmProducts:
    """See the module."""

    name = "int_mm"
    wide = True

    def output(
        self,
        x: Stored,
        weight: torch.Tensor,
        step_O: NDArray[np.float32],
        bias: torch.Tensor | None,
        layer: Geometry,
    ) -> torch.Tensor:
        """See `Products`."""
        kernel = (layer.kernel, layer.stride, layer.padding, layer.dilation)
        shaped = weight.reshape(*weight.shape[:2], *layer.kernel)
        sums = _conv(_signed(x), shaped, *kernel, layer.groups)
        y = sums * _like(step_O * np.float32(x.scale), sums)
        return y if bias is None else y + bias

    def grad_input(
        self, gradient: Stored, weight: torch.Tensor, step_I: NDArray[np.float32], size: Triple, layer: Geometry
    ) -> torch.Tensor:
        """See `Products`."""
        g = _signed(gradient)
        phases = layer.phases
        one = (1, 1, 1)
        pads: list[int] = []
        for low, n, s, k, out in zip(phases.low, size, layer.stride, phases.kernel, gradient.size, strict=True):
            pads = [-low, max(0, -(-n // s) + low + k - 1 - out), *pads]
        g = F.pad(g, [0, 0, *pads])
        y = _conv(g, weight.view(*weight.shape[:2], *phases.kernel), phases.kernel, one, (0, 0, 0), one, layer.groups)
        placed = scatter_phases(y, size, (0, 0, 0), layer)
        return placed * _like(step_I * np.float32(gradient.scale), y)

    def grad_weight(
        self, x: Stored, gradient_RO: torch.Tensor, step_O: NDArray[np.float32], layer: Geometry
    ) -> torch.Tensor:
        """See `Products`."""
        cols = _columns(_signed(x), layer.kernel, layer.stride, layer.padding, layer.dilation, layer.groups)
        outputs = layer.out_channels // layer.groups
        parts = []
        for group in range(layer.groups):
            g = gradient_RO[:, group * outputs : (group + 1) * outputs]
            parts.append(padded_mm(cols[group].t(), g).t())
        sums = torch.cat(parts).view(layer.out_channels, layer.volume, -1)
        return (sums * _like(step_O * np.float32(x.scale), sums)[:, None, None]).transpose(1, 2).contiguous()


def _like(values: NDArray[np.float32], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device)


def _signed(x: Stored) -> torch.Tensor:
    if x.bytes.dtype == torch.int8:
        return x.bytes
    return (x.bytes.to(torch.int16) - x.zero_point).to(torch.int8)


def padded_mm(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    """`exact_mm` for any sizes, empty ones included, on CUDA and CPU."""
    (m, k), n = a_MK.shape, b_KN.shape[1]
    if not (m and n and k):
        return torch.zeros(m, n, dtype=torch.int32, device=a_MK.device)
    if a_MK.is_cuda:
        more_m, more_k, more_n = max(0, 17 - m), -k % 8, -n % 8
        a_MK = F.pad(a_MK, [0, more_k, 0, more_m]) if more_m or more_k else a_MK
        b_KN = F.pad(b_KN, [0, more_n, 0, more_k]) if more_n or more_k else b_KN
        return exact_mm(a_MK.contiguous(), b_KN, False)[:m, :n]
    # Signed by signed bytes saturate on processors without VNNI; each half of the signs is exact everywhere.
    above, below = (part.clamp_(min=0).to(torch.uint8) for part in (a_MK.clone(), -a_MK))
    return exact_mm(above, b_KN, False).long() - exact_mm(below, b_KN, False)


def _columns(
    x: torch.Tensor, kernel: Triple, stride: Triple, padding: Triple, dilation: Triple, groups: int
) -> list[torch.Tensor]:
    """im2col of (N, D, H, W, C): for each group (N x Do x Ho x Wo, kernel volume x C / groups)."""
    if kernel == (1, 1, 1) and stride == (1, 1, 1) and padding == (0, 0, 0) and groups == 1:
        return [rows(x)]
    x = F.pad(x, [0, 0, padding[2], padding[2], padding[1], padding[1], padding[0], padding[0]])
    out = [(x.shape[d + 1] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(3)]
    n, d, h, w, c = x.stride()
    view = x.as_strided(
        (x.shape[0], *out, *kernel, x.shape[4]),
        (n, d * stride[0], h * stride[1], w * stride[2], d * dilation[0], h * dilation[1], w * dilation[2], c),
    )
    split = view.unflatten(7, (groups, -1))
    count = x.shape[0] * out[0] * out[1] * out[2]
    # A reshape may be a view whose rows overlap, which a matrix product does not read.
    return [split[..., group, :].reshape(count, -1).contiguous() for group in range(groups)]


def _conv(
    x: torch.Tensor,
    weight: torch.Tensor,
    kernel: Triple,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
) -> torch.Tensor:
    """Integer convolution, (N, D, H, W, C) int8 to (N, Do, Ho, Wo, O) int32."""
    columns = _columns(x, kernel, stride, padding, dilation, groups)
    outputs = len(weight) // groups
    last = weight.flatten(2).transpose(1, 2).reshape(len(weight), -1)
    parts = [padded_mm(columns[g], last[g * outputs : (g + 1) * outputs].t()) for g in range(groups)]
    size = [(x.shape[d + 1] + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1 for d in range(3)]
    return torch.cat(parts, 1).view(x.shape[0], *size, len(weight))
