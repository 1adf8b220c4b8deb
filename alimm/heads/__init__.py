"""Classification heads: features (N, D) to logits, loss and predictions."""

from alimm.heads.base import ClsHead
from alimm.heads.contrastive import ContrastiveHead
from alimm.heads.cosine import CosineHead
from alimm.heads.linear import LinearHead
from alimm.heads.multi import MultiHead
from alimm.heads.sharded import ShardedHead

__all__ = ["ClsHead", "ContrastiveHead", "CosineHead", "LinearHead", "MultiHead", "ShardedHead"]
