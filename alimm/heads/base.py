"""What every classification head shares: labels from the data samples, the loss, predictions into the data samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseModule

from alimm.registry import MODELS
from alimm.structures import ClsDataSample


def collect_labels(data_samples: Sequence[ClsDataSample], target: str, device: torch.device) -> torch.Tensor:
    """The field ``target`` of every sample of a batch, int64 (N,).

    Raises:
        ValueError: a sample has no such label.
    """
    for number, sample in enumerate(data_samples):
        if target not in sample:
            name = sample.get("sample_id", f"number {number} of the batch")
            raise ValueError(f"sample {name} has no {target}: the data set must give it for training")
    return torch.cat([sample.get(target) for sample in data_samples]).to(device)


class ClsHead(BaseModule):
    """Base of the heads; a subclass gives ``forward``, features (N, D) to logits (N, C).

    Args:
        num_classes: C.
        in_channels: D.
        loss: config of the loss, called with logits and labels.
        target: field of the data samples that holds the label, ``'gt_label'`` or ``'gt_identity'``.
        topk: accuracies of the training batch to log, e.g. ``(1, 5)``; none by default, since they cost a sort.
        init_cfg: initialisation, as in MMEngine.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        loss: dict[str, Any] | None = None,
        target: str = "gt_label",
        topk: Sequence[int] = (),
        init_cfg: dict[str, Any] | list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"num_classes and in_channels must be at least 1, got {num_classes} and {in_channels}")
        self.num_classes, self.in_channels, self.target, self.topk = num_classes, in_channels, target, tuple(topk)
        self.loss_module = MODELS.build(loss or dict(type="alimm.CrossEntropyLoss"))

    def loss(self, features: torch.Tensor, data_samples: Sequence[ClsDataSample]) -> dict[str, torch.Tensor]:
        """Loss (and accuracies, if asked for) of a batch."""
        logits, labels = self(features), collect_labels(data_samples, self.target, features.device)
        return dict(loss=self.loss_module(logits, labels)) | self.accuracies(logits, labels)

    def accuracies(self, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """The accuracies of a training batch that ``topk`` asks for, in percent."""
        if not self.topk:
            return {}
        best = logits.detach().topk(min(max(self.topk), self.num_classes), dim=1).indices
        return {f"accuracy_top{k}": 100 * (best[:, :k] == labels[:, None]).any(1).float().mean() for k in self.topk}

    def predict(
        self, features: torch.Tensor, data_samples: Sequence[ClsDataSample] | None = None
    ) -> list[ClsDataSample]:
        """Write ``pred_score``, ``pred_label`` and ``feature`` into the samples (new ones if none are given)."""
        scores = self(features).float().softmax(1)
        samples = [ClsDataSample() for _ in features] if data_samples is None else list(data_samples)
        for sample, score, feature in zip(samples, scores, features, strict=True):
            sample.set_pred_score(score).set_feature(feature)
        return samples
