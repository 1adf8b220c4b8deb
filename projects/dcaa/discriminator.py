"""The discriminator: a small convolutional network that says for each patch of a map which domain it comes from.

Cai et al., Exploiting Diverse Characteristics and Adversarial Ambivalence for Domain Adaptive Segmentation, AAAI 2021
(arXiv:2012.05608). There is one for each condition and one for the fused output; each reads class probabilities.

    layout 'dcaa'         3x3 convolutions with padding 1 to 64, 128, 256, 512 channels, ReLU after the first three and
                          LeakyReLU(0.2) after the last; then 1x1 to one logit. Stride 2 each: 16 in all.
    layout 'adaptsegnet'  4x4 convolutions with padding 1 to 64, 128, 256, 512 channels, LeakyReLU(0.2) after each;
                          then another of them to one logit. Stride 2 each: 32 in all (Tsai et al., CVPR 2018).

Where we differ: ``channels`` and the number of strides can be chosen, so that small maps leave more than one patch.
The weights start as torch starts those of convolutions; give ``init_cfg`` for another start, for instance
``dict(type='Normal', layer='Conv2d', std=0.02)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import nn

from alimm.registry import MODELS

KERNELS = {"dcaa": 3, "adaptsegnet": 4}
"""Width of the convolutions of each layout."""

SLOPE = 0.2


@MODELS.register_module()
class PixelDiscriminator(BaseModule):
    """Maps (N, in_channels, H, W) to logits (N, 1, h, w), high where the map looks like source.

    Args:
        in_channels: channels of the map, the number of classes.
        channels: channels after each convolution but the classifier.
        layout: ``'dcaa'`` or ``'adaptsegnet'``, see the module.
        num_strides: how many of the convolutions, from the first on, have stride 2; the others have stride 1. All of
            them by default: 4 with ``'dcaa'`` and 5, the classifier included, with ``'adaptsegnet'``. A convolution of
            ``'adaptsegnet'`` with stride 1 makes the map one pixel smaller.
        init_cfg: how MMEngine initialises the weights.

    Raises:
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        in_channels: int,
        channels: Sequence[int] = (64, 128, 256, 512),
        layout: str = "dcaa",
        num_strides: int | None = None,
        init_cfg: Any = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if layout not in KERNELS:
            raise ValueError(f"PixelDiscriminator: layout must be one of {', '.join(KERNELS)}, got {layout!r}")
        if in_channels < 1 or not channels or min(channels) < 1:
            raise ValueError(
                "PixelDiscriminator: in_channels must be positive and channels a list of positive numbers, got "
                f"{in_channels} and {tuple(channels)}"
            )
        strided = len(channels) + (layout == "adaptsegnet")
        num_strides = strided if num_strides is None else num_strides
        if not 0 <= num_strides <= strided:
            raise ValueError(
                f"PixelDiscriminator: num_strides must be between 0 and {strided}, the number of convolutions that may "
                f"have stride 2 in layout {layout!r}, got {num_strides}"
            )
        self.in_channels, self.layout, self._num_strides = in_channels, layout, num_strides
        self._strides = [2 if i < num_strides else 1 for i in range(strided)]
        kernel = KERNELS[layout]
        layers: list[nn.Module] = []
        widths = [in_channels, *channels]
        for i, (before, after) in enumerate(pairwise(widths)):
            layers.append(nn.Conv2d(before, after, kernel, self._strides[i], padding=1))
            plain = layout == "dcaa" and i < len(channels) - 1
            # Not in place: gradients with respect to the probabilities are wanted in any order of calls.
            layers.append(nn.ReLU() if plain else nn.LeakyReLU(SLOPE))
        if layout == "dcaa":
            layers.append(nn.Conv2d(widths[-1], 1, 1))
        else:
            layers.append(nn.Conv2d(widths[-1], 1, kernel, self._strides[-1], padding=1))
        self.layers = nn.Sequential(*layers)

    @property
    def total_stride(self) -> int:
        """Pixels of the map between two patches."""
        return 2**self._num_strides

    @property
    def minimum_size(self) -> int:
        """Least height and width of a map: below it, a patch would be mostly padding or there would be none."""
        if self.layout == "dcaa":
            return self.total_stride
        size = 1
        for stride in reversed(self._strides):
            size = 2 * size if stride == 2 else size + 1
        return size

    def forward(self, maps_NCHW: torch.Tensor) -> torch.Tensor:
        """Logits (N, 1, h, w) of a map's patches.

        Args:
            maps_NCHW: class probabilities, or another map with ``in_channels`` channels.

        Raises:
            ValueError: the map has another number of channels, or is too small.
        """
        if maps_NCHW.ndim != 4 or maps_NCHW.shape[1] != self.in_channels:
            raise ValueError(
                f"PixelDiscriminator: expected a map (N, {self.in_channels}, H, W), got shape "
                f"{tuple(maps_NCHW.shape)}. in_channels must be the number of classes"
            )
        height, width = maps_NCHW.shape[2:]
        if min(height, width) < self.minimum_size:
            raise ValueError(
                f"PixelDiscriminator: maps must be at least {self.minimum_size} x {self.minimum_size} pixels with "
                f"{self._num_strides} strides, got {height} x {width}. Give larger crops, or a smaller num_strides"
            )
        logits: torch.Tensor = self.layers(maps_NCHW)
        return logits
