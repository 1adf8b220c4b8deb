"""Losses: logits (N, C) or features (N, D), and integer labels (N,), to one number."""

from alimm.losses.balanced_softmax import BalancedSoftmaxLoss
from alimm.losses.cross_entropy import CrossEntropyLoss
from alimm.losses.sup_con import SupConLoss

__all__ = ["BalancedSoftmaxLoss", "CrossEntropyLoss", "SupConLoss"]
