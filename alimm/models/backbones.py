"""A small residual network for small pictures.

He et al., Deep Residual Learning for Image Recognition, CVPR 2016, basic blocks; the shortcut of a stage that halves
the map averages before its 1 x 1 convolution (He et al., Bag of Tricks, CVPR 2019, ResNet-D). Optional MixStyle (Zhou
et al., Domain Generalization with MixStyle, ICLR 2021) after the first two stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import nn

from alimm.registry import MODELS


def _conv_norm(in_channels: int, channels: int, kernel: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(channels)
    )


class _BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(in_channels, channels, 3, stride)
        self.conv2 = _conv_norm(channels, channels, 3)
        shortcut: list[nn.Module] = [nn.AvgPool2d(stride, ceil_mode=True)] if stride > 1 else []
        if stride > 1 or in_channels != channels:
            shortcut.append(_conv_norm(in_channels, channels, 1))
        self.shortcut = nn.Sequential(*shortcut)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class MixStyle(nn.Module):
    """Mix the channel statistics of a map with those of another picture of the batch, in training only.

    Args:
        prob: share of the pictures whose statistics are mixed.
        alpha: parameter of the Beta distribution of the mixing weight.
    """

    def __init__(self, prob: float = 0.5, alpha: float = 0.2) -> None:
        super().__init__()
        self.prob, self.alpha = prob, alpha

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """A map (N, C, H, W) to one of the same shape."""
        if not self.training or self.prob == 0:
            return x
        mean = x.mean((2, 3), keepdim=True).detach()
        std = (x.var((2, 3), correction=0, keepdim=True) + 1e-6).sqrt().detach()
        shape = (len(x), 1, 1, 1)
        weight = torch.distributions.Beta(self.alpha, self.alpha).sample(shape).to(x)
        weight = torch.where(torch.rand(shape, device=x.device) < self.prob, weight, 1.0)
        other = torch.randperm(len(x), device=x.device)
        mixed_mean = weight * mean + (1 - weight) * mean[other]
        mixed_std = weight * std + (1 - weight) * std[other]
        return (x - mean) / std * mixed_std + mixed_mean


@MODELS.register_module()
class ResNetTiny(BaseModule):
    """Residual network for pictures of 28 to 96 pixels.

    Args:
        width: channels of the first stage; each further stage doubles them.
        depths: blocks of each stage; every stage but the first halves the map.
        stem_stride: 1 for pictures up to 32 pixels, 2 above.
        mixstyle: probability of MixStyle after the first two stages; 0 leaves it out.
        init_cfg: initialisation, as in MMEngine.
    """

    def __init__(
        self,
        width: int = 32,
        depths: Sequence[int] = (1, 1, 1),
        stem_stride: int = 1,
        mixstyle: float = 0.0,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg or dict(type="Kaiming", layer="Conv2d", mode="fan_in"))
        if not depths or min(depths) < 1 or width < 1:
            raise ValueError(f"width and every depth must be at least 1, got {width} and {tuple(depths)}")
        self.stem = nn.Sequential(*_conv_norm(3, width, 3, stem_stride), nn.ReLU(inplace=True))
        self.stages = nn.ModuleList()
        self.mixstyle = MixStyle(mixstyle) if mixstyle else None
        channels = width
        for index, depth in enumerate(depths):
            out_channels = width * 2**index
            blocks = []
            for block in range(depth):
                blocks.append(_BasicBlock(channels, out_channels, 2 if block == 0 and index > 0 else 1))
                channels = out_channels
            self.stages.append(nn.Sequential(*blocks))
        self.out_channels = channels

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Pictures (N, 3, H, W) to the maps of all stages."""
        x = self.stem(x)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            maps.append(x)
            if self.mixstyle is not None and index < 2:
                x = self.mixstyle(x)
        return tuple(maps)
