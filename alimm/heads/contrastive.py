"""A head without classes: it trains the features themselves, by comparing the samples of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule

from alimm.heads.base import collect_labels
from alimm.registry import MODELS
from alimm.structures import ClsDataSample


@MODELS.register_module()
class ContrastiveHead(BaseModule):
    """Hand the features and the labels of a batch to a loss. Use it in `MultiHead`, beside a head that predicts.

    Batches must hold several samples of a label: take `alimm.IdentityBatchSampler`.

    Args:
        loss: config of a loss of features and labels; `alimm.SupConLoss` if not given.
        target: field of the data samples that holds the label.
        init_cfg: initialisation, as in MMEngine.
    """

    def __init__(
        self,
        loss: dict[str, Any] | None = None,
        target: str = "gt_identity",
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        self.loss_module = MODELS.build(loss or dict(type="alimm.SupConLoss"))
        self.target = target

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """The features as they are, (N, D)."""
        return features

    def loss(self, features: torch.Tensor, data_samples: Sequence[ClsDataSample]) -> dict[str, torch.Tensor]:
        """The loss of a batch."""
        return dict(loss=self.loss_module(features, collect_labels(data_samples, self.target, features.device)))

    def predict(
        self, features: torch.Tensor, data_samples: Sequence[ClsDataSample] | None = None
    ) -> list[ClsDataSample]:
        """Write ``feature`` into the samples (new ones if none are given)."""
        samples = [ClsDataSample() for _ in features] if data_samples is None else list(data_samples)
        return [sample.set_feature(feature) for sample, feature in zip(samples, features, strict=True)]
