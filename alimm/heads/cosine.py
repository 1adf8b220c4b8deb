"""The cosine head: logits = s cos(x, w_c), in training with a margin for the sample's own class if asked for.

Wang et al., NormFace, ACM MM 2017; Liu et al., Large-Scale Long-Tailed Recognition in an Open World, CVPR 2019, for the
tail: without norms, frequent classes cannot win by long weight vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from alimm.distributed.collectives import all_gather_uneven
from alimm.heads.base import ClsHead, collect_labels
from alimm.losses.margins import Margin, margin_logits
from alimm.registry import MODELS
from alimm.structures import ClsDataSample


@MODELS.register_module()
class CosineHead(ClsHead):
    """Cosine similarity to one weight vector a class, times a scale.

    Args:
        num_classes: number of classes.
        in_channels: dimension of the features.
        scale: s in the formula.
        learn_scale: whether s is trained.
        margin: config of a margin, as ``dict(type='alimm.ArcFaceMargin')``. It acts on the loss alone: predictions and
            logged accuracies are those of the plain cosine.
        **kwargs: see `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        scale: float = 16.0,
        learn_scale: bool = False,
        margin: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_classes, in_channels, **kwargs)
        if scale <= 0:
            raise ValueError(f"scale must be above 0, got {scale}")
        self.weight = nn.Parameter(torch.randn(num_classes, in_channels) / in_channels**0.5)
        self.scale = nn.Parameter(torch.tensor(float(scale)), requires_grad=learn_scale)
        self.margin: Margin | None = None if margin is None else MODELS.build(margin)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) to logits (N, C)."""
        return self.scale * F.linear(F.normalize(features), F.normalize(self.weight))

    def loss(self, features: torch.Tensor, data_samples: Sequence[ClsDataSample]) -> dict[str, torch.Tensor]:
        """Loss (and accuracies, if asked for) of a batch."""
        if self.margin is None:
            return super().loss(features, data_samples)
        labels = collect_labels(data_samples, self.target, features.device)
        cosine = F.linear(F.normalize(features), F.normalize(self.weight))
        norms = features.detach().float().norm(dim=1)
        if self.training and self.margin.needs_norms:
            # The averages of the margin have to be those of the global batch, or replicas would drift apart.
            self.margin.update(torch.cat(all_gather_uneven(norms)))
        logits = margin_logits(cosine, labels, self.margin, self.scale, norms)
        return dict(loss=self.loss_module(logits, labels)) | self.accuracies(cosine, labels)
