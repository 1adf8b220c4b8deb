"""Fake quantisation: the integers are turned back into float32 and multiplied there. To compare with, by name only."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.grad import conv3d_weight

from alimm.projects.int8_training.geometry import Geometry
from alimm.projects.int8_training.products import scatter_phases
from alimm.projects.int8_training.quantized import Stored
from alimm_ops.quantize.cpu_layout import Triple


class FakeProducts:
    """The same integers as the other products, multiplied in float32."""

    name = "fake"
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
        steps = torch.from_numpy(step_O).to(weight.device)
        w = weight.reshape(*weight.shape[:2], *layer.kernel) * steps.view(-1, 1, 1, 1, 1)
        source = x.dequantize().permute(0, 4, 1, 2, 3)
        y = torch.conv3d(source, w, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
        return y.permute(0, 2, 3, 4, 1).contiguous()

    def grad_input(
        self, gradient: Stored, weight: torch.Tensor, step_I: NDArray[np.float32], size: Triple, layer: Geometry
    ) -> torch.Tensor:
        """See `Products`."""
        phases = layer.phases
        group_I = layer.in_channels // layer.groups
        steps = np.repeat(step_I.reshape(layer.groups, 1, group_I), len(phases.offsets), axis=1).reshape(-1)
        w = weight.view(*weight.shape[:2], *phases.kernel) * torch.from_numpy(steps).to(weight.device).view(
            -1, 1, 1, 1, 1
        )
        pads: list[int] = []
        for low, n, s, k, out in zip(phases.low, size, layer.stride, phases.kernel, gradient.size, strict=True):
            pads = [-low, max(0, -(-n // s) + low + k - 1 - out), *pads]
        source = torch.nn.functional.pad(gradient.dequantize().permute(0, 4, 1, 2, 3), pads)
        y = torch.conv3d(source, w, groups=layer.groups).permute(0, 2, 3, 4, 1).contiguous()
        return scatter_phases(y, size, (0, 0, 0), layer)

    def grad_weight(
        self, x: Stored, gradient_RO: torch.Tensor, step_O: NDArray[np.float32], layer: Geometry
    ) -> torch.Tensor:
        """See `Products`."""
        out = layer.output_size(x.size)
        g = (gradient_RO * torch.from_numpy(step_O).to(gradient_RO.device)).view(-1, *out, layer.out_channels)
        source = x.dequantize().permute(0, 4, 1, 2, 3)
        shape = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel)
        dw: torch.Tensor = conv3d_weight(
            source, shape, g.permute(0, 4, 1, 2, 3), layer.stride, layer.padding, layer.dilation, layer.groups
        )
        return dw.flatten(2)
