"""A classification head whose features are nearly binary, so that thresholding them gives codes for the index.

    h = tanh(W x + b),   logits = V h + c
    loss = classification(logits) + wq mean_nb (|h_nb| - 1)^2 + wb mean_b (mean_n h_nb)^2

The first term pulls the codes of a class together, the second keeps the threshold from losing much, the third keeps
each bit in use. The combination is ours; terms of this kind are common in learned hashing, for the second e.g. Liu et
al., Deep supervised hashing for fast image retrieval, CVPR 2016. Bit b of the code is 1 where h_b > 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from alimm.heads.base import ClsHead, collect_labels
from alimm.projects.binary_graph.packing import pack_bits, words_of
from alimm.registry import MODELS
from alimm.structures import ClsDataSample


def quantisation_loss(relaxed: torch.Tensor) -> torch.Tensor:
    """How far relaxed codes (N, B) are from -1 and 1: the mean squared distance."""
    return (relaxed.abs() - 1).square().mean()


def balance_loss(relaxed: torch.Tensor) -> torch.Tensor:
    """How far the bits of a batch are from one half each: the mean over the bits of the squared batch mean."""
    return relaxed.mean(dim=0).square().mean()


@MODELS.register_module()
class HashHead(ClsHead):
    """A linear layer to bits, relaxed by tanh, and a linear classifier on them.

    With several workers the balance is that of each worker's batch.

    Args:
        num_classes: number of classes.
        in_channels: dimension of the features.
        bits: length of the codes, a multiple of 64 from 64 to 1024.
        quantisation_weight: wq in the formula.
        balance_weight: wb in the formula. In batches of few classes it works against the classification.
        **kwargs: see `ClsHead`.
    """

    def __init__(
        self,
        num_classes: int,
        in_channels: int,
        bits: int = 256,
        quantisation_weight: float = 0.1,
        balance_weight: float = 0.1,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("init_cfg", dict(type="Xavier", layer="Linear"))
        super().__init__(num_classes, in_channels, **kwargs)
        words_of(bits)
        if quantisation_weight < 0 or balance_weight < 0:
            raise ValueError(f"weights must be at least 0, got {quantisation_weight} and {balance_weight}")
        self.bits, self.quantisation_weight, self.balance_weight = bits, quantisation_weight, balance_weight
        self.hash = nn.Linear(in_channels, bits)
        self.fc = nn.Linear(bits, num_classes)

    def relaxed(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) to relaxed codes (N, bits) between -1 and 1."""
        return torch.tanh(self.hash(features))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Features (N, D) to logits (N, C)."""
        logits: torch.Tensor = self.fc(self.relaxed(features))
        return logits

    def loss(self, features: torch.Tensor, data_samples: Sequence[ClsDataSample]) -> dict[str, torch.Tensor]:
        """The three terms, weighted (and accuracies, if asked for), of a batch."""
        relaxed = self.relaxed(features)
        logits, labels = self.fc(relaxed), collect_labels(data_samples, self.target, features.device)
        wide = relaxed.float()
        return dict(
            loss=self.loss_module(logits, labels),
            loss_quantisation=self.quantisation_weight * quantisation_loss(wide),
            loss_balance=self.balance_weight * balance_loss(wide),
        ) | self.accuracies(logits, labels)

    @torch.no_grad()
    def encode(self, features: torch.Tensor) -> NDArray[np.uint64]:
        """Codes of features: (N, D) to uint64 (N, bits / 64), for `BinaryGraph`.

        Raises:
            ValueError: a row that gives NaN.
        """
        values = self.hash(features)
        bad = torch.nonzero(values.isnan().any(dim=1))
        if len(bad):
            raise ValueError(
                f"features row {int(bad[0])} gives NaN: it or the weights of the head hold NaN or infinity"
            )
        return pack_bits((values > 0).cpu().numpy())
