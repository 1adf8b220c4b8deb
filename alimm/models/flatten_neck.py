"""A neck that keeps the place: the whole last map, projected to one vector.

The output setting E of ArcFace (Deng et al., CVPR 2019) without its dropout: the map is flattened, then a linear layer
and a batch norm. Averaging over space, as `alimm.GlobalPoolNeck` does, forgets where a stroke lies, which is what tells
one Han character, or one aligned face, from another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule
from torch import nn

from alimm.registry import MODELS


@MODELS.register_module()
class FlattenNeck(BaseModule):
    """Flatten the last map, project it, apply a batch norm. The pictures must have one size.

    Args:
        in_channels: channels of the last map.
        map_size: its height and width; one number is a square.
        out_channels: D, length of the vector.
        init_cfg: initialisation, as in MMEngine.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        in_channels: int,
        map_size: int | Sequence[int],
        out_channels: int,
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        size = (map_size, map_size) if isinstance(map_size, int) else tuple(map_size)
        if len(size) != 2 or min(in_channels, *size, out_channels) < 1:
            raise ValueError(
                f"in_channels, map_size (one number or two) and out_channels must be at least 1, got {in_channels}, "
                f"{map_size} and {out_channels}"
            )
        self.map_shape = (in_channels, *size)
        self.project = nn.Linear(in_channels * size[0] * size[1], out_channels, bias=False)
        self.norm = nn.BatchNorm1d(out_channels)

    def forward(self, features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
        """A map (N, C, H, W), or a tuple of maps of which the last counts, to (N, D).

        Raises:
            ValueError: the map has another shape than the neck was made for.
        """
        last = features if isinstance(features, torch.Tensor) else features[-1]
        if tuple(last.shape[1:]) != self.map_shape:
            raise ValueError(
                f"FlattenNeck was made for maps {self.map_shape}, got {tuple(last.shape[1:])}: set in_channels and "
                f"map_size to these, or resize the pictures"
            )
        vectors: torch.Tensor = self.norm(self.project(last.flatten(1)))
        return vectors
