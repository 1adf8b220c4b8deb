"""The linear head: logits = x W^T + b."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from alimm.heads.base import ClsHead
from alimm.registry import MODELS


@MODELS.register_module()
class LinearHead(ClsHead):
    """One linear layer.

    Args:
        num_classes: number of classes.
        in_channels: dimension of the features.
        bias: whether the layer has a bias.
        dropout: probability of dropping a feature in training.
        **kwargs: see `ClsHead`.
    """

    def __init__(
        self, num_classes: int, in_channels: int, bias: bool = True, dropout: float = 0.0, **kwargs: Any
    ) -> None:
        kwargs.setdefault("init_cfg", dict(type="Normal", layer="Linear", std=0.01))
        super().__init__(num_classes, in_channels, **kwargs)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(in_channels, num_classes, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) to logits (N, C)."""
        logits: torch.Tensor = self.fc(self.dropout(features))
        return logits
