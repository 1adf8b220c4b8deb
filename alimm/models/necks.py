"""Necks: feature maps to one vector a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import nn

from alimm.registry import MODELS


@MODELS.register_module()
class GlobalPoolNeck(BaseModule):
    """Average over space, then optionally a batch norm of the vector (Luo et al., BNNeck, CVPRW 2019).

    Args:
        in_channels: number of channels, needed for the batch norm.
        norm: whether to apply the batch norm; it makes cosine search on the features work better.
        init_cfg: initialisation, as in MMEngine.
    """

    def __init__(
        self, in_channels: int | None = None, norm: bool = False, init_cfg: dict[str, Any] | None = None
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if norm and in_channels is None:
            raise ValueError("GlobalPoolNeck(norm=True) needs in_channels, the number of channels of the last stage")
        self.norm: nn.Module = nn.BatchNorm1d(in_channels) if norm and in_channels is not None else nn.Identity()

    def forward(self, features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """A map (N, D, H, W), or a tuple of maps of which the last counts, to (N, D)."""
        last = features if isinstance(features, torch.Tensor) else features[-1]
        pooled: torch.Tensor = self.norm(last.mean((2, 3)))
        return pooled
