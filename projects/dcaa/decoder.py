"""The decoder of one condition: atrous spatial pyramid pooling and the decoder of DeepLabV3+, as DCAA uses it.

Paper: Cai et al., "Exploiting Diverse Characteristics and Adversarial Ambivalence for Domain Adaptive Segmentation",
AAAI 2021 (arXiv:2012.05608). One such decoder a condition k, over the shared features x_low (stride 4) and x_high:

    a   = drop(relu(bn(conv1x1([conv1x1(x_high), conv3x3_d(x_high) for each dilation d, pool(x_high)]))))
    f_k = drop(relu(bn(conv3x3(drop(relu(bn(conv3x3([conv1x1(x_low), up(a)]))))))))

It is an ordinary decode head of MMSegmentation, so it also serves alone, as the plain head of the baselines.
Differs from MMSegmentation's DepthwiseSeparableASPPHead: plain convolutions and three places of dropout, after the
released code of the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from torch import Tensor, nn
from torch.nn import functional

from alimm.registry import MODELS


def conv_block(
    in_channels: int,
    out_channels: int,
    kernel: int = 3,
    dilation: int = 1,
    dropout: float = 0.0,
    norm_cfg: dict[str, Any] | None = None,
) -> nn.Module:
    """Convolution without bias, norm (batch norm by default), ReLU and, where asked for, dropout; keeps the size."""
    _, norm = build_norm_layer(norm_cfg or dict(type="BN"), out_channels)
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, padding=dilation * (kernel // 2), dilation=dilation, bias=False),
        norm,
        nn.ReLU(inplace=True),
    ]
    if dropout:
        layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)


@MODELS.register_module()
class ConditionDecoder(BaseDecodeHead):
    """ASPP on the deepest features, joined with the shallow ones.

    Args:
        in_channels: of the shallow and the deep features.
        in_index: which of the backbone's outputs these are.
        channels: of every block, and of the features before the classifier.
        low_channels: what the shallow features are reduced to.
        dilations: of the 3 x 3 convolutions of the pyramid.
        dropouts: after the pyramid and after each of the two last blocks.
        **kwargs: of ``BaseDecodeHead``: ``num_classes``, ``align_corners``, ``loss_decode``, ...

    Raises:
        ValueError: not two kinds of features, or not three dropouts.
    """

    def __init__(
        self,
        in_channels: Sequence[int] = (256, 2048),
        in_index: Sequence[int] = (0, 3),
        channels: int = 256,
        low_channels: int = 48,
        dilations: Sequence[int] = (6, 12, 18),
        dropouts: Sequence[float] = (0.5, 0.5, 0.1),
        **kwargs: Any,
    ) -> None:
        if len(in_channels) != 2 or len(in_index) != 2:
            raise ValueError(
                "ConditionDecoder takes in_channels and in_index of two features, shallow then deep; got "
                f"{in_channels} and {in_index}"
            )
        if len(dropouts) != 3:
            raise ValueError(f"ConditionDecoder takes three dropouts, got {dropouts}")
        kwargs.setdefault("loss_decode", dict(type="mmseg.CrossEntropyLoss"))  # found from any scope
        super().__init__(
            in_channels=list(in_channels),
            channels=channels,
            in_index=list(in_index),
            input_transform="multiple_select",
            dropout_ratio=0.0,
            **kwargs,
        )
        low, high = in_channels
        block = partial(conv_block, norm_cfg=self.norm_cfg)
        self.pyramid = nn.ModuleList(
            [block(high, channels, 1), *(block(high, channels, 3, dilation) for dilation in dilations)]
        )
        # No batch norm behind the pool: a batch of one picture has one value a channel there.
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(high, channels, 1), nn.ReLU(inplace=True))
        self.reduce = block(channels * (len(self.pyramid) + 1), channels, 1, dropout=dropouts[0])
        self.shallow = block(low, low_channels, 1)
        self.refine = nn.Sequential(
            block(low_channels + channels, channels, dropout=dropouts[1]),
            block(channels, channels, dropout=dropouts[2]),
        )

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Logits (N, classes, h, w) on the grid of the shallow features."""
        low_Nchw, high_NCHW = self._transform_inputs(inputs)
        pooled = self.pool(high_NCHW).expand(-1, -1, *high_NCHW.shape[2:])
        deep = self.reduce(torch.cat([*(layer(high_NCHW) for layer in self.pyramid), pooled], dim=1))
        deep = functional.interpolate(deep, size=low_Nchw.shape[2:], mode="bilinear", align_corners=self.align_corners)
        return self.cls_seg(self.refine(torch.cat([self.shallow(low_Nchw), deep], dim=1)))
