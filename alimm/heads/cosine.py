"""The cosine head: logits = s cos(x, w_c).

Wang et al., NormFace, ACM MM 2017; Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, for the
tail: without norms, frequent classes cannot win by long weight vectors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from alimm.heads.base import ClsHead
from alimm.registry import MODELS


@MODELS.register_module()
class CosineHead(ClsHead):
    """Cosine similarity to one weight vector a class, times a scale.

    Args:
        num_classes: number of classes.
        in_channels: dimension of the features.
        scale: s in the formula.
        learn_scale: whether s is trained.
        **kwargs: see `ClsHead`.
    """

    def __init__(
        self, num_classes: int, in_channels: int, scale: float = 16.0, learn_scale: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_classes, in_channels, **kwargs)
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.weight = nn.Parameter(torch.randn(num_classes, in_channels) / in_channels**0.5)
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) to logits (N, C)."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))
