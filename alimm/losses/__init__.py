"""Losses: logits (N, C) or features (N, D), and integer labels (N,), to one number."""

from alimm.losses.balanced_softmax import BalancedSoftmaxLoss
from alimm.losses.cross_entropy import CrossEntropyLoss
from alimm.losses.margins import AdaFaceMargin, ArcFaceMargin, CombinedMargin, CosFaceMargin, margin_logits
from alimm.losses.sharded_cross_entropy import SoftmaxOptions, sharded_cross_entropy
from alimm.losses.sup_con import SupConLoss

__all__ = [
    "AdaFaceMargin",
    "ArcFaceMargin",
    "BalancedSoftmaxLoss",
    "CombinedMargin",
    "CosFaceMargin",
    "CrossEntropyLoss",
    "SoftmaxOptions",
    "SupConLoss",
    "margin_logits",
    "sharded_cross_entropy",
]
