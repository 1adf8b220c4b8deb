"""Several heads on the same features, for instance category and identity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from mmengine.model import BaseModule
from torch import nn

from alimm.heads.base import ClsHead
from alimm.registry import MODELS
from alimm.structures import ClsDataSample


@MODELS.register_module()
class MultiHead(BaseModule):
    """A dict of heads; their losses are added, the predictions are those of ``main``.

    Args:
        heads: name -> config of a head. Names become part of the names of the losses.
        main: the head that predicts.
        init_cfg: initialisation, as in MMEngine.
    """

    def __init__(self, heads: dict[str, dict[str, Any]], main: str, init_cfg: dict[str, Any] | None = None) -> None:
        super().__init__(init_cfg=init_cfg)
        if main not in heads:
            raise ValueError(f"main must be one of the heads {sorted(heads)}, got {main!r}")
        self.main = main
        self.heads = nn.ModuleDict({name: MODELS.build(head) for name, head in heads.items()})

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) to the logits of the main head."""
        return cast(torch.Tensor, self.heads[self.main](features))

    def prefetch(self, data_samples: Sequence[ClsDataSample]) -> None:
        """Let the heads that can begin with the labels alone do so."""
        for head in self.heads.values():
            if hasattr(head, "prefetch"):
                cast(Any, head).prefetch(data_samples)

    def loss(self, features: torch.Tensor, data_samples: Sequence[ClsDataSample]) -> dict[str, torch.Tensor]:
        """The losses of all heads, each under its own name."""
        losses = {}
        for name, head in self.heads.items():
            for key, value in cast(ClsHead, head).loss(features, data_samples).items():
                losses[f"{name}.{key}"] = value
        return losses

    def predict(
        self, features: torch.Tensor, data_samples: Sequence[ClsDataSample] | None = None
    ) -> list[ClsDataSample]:
        """The predictions of the main head."""
        return cast(ClsHead, self.heads[self.main]).predict(features, data_samples)
