"""Optimizers, optimizer wrappers and parameter schedulers."""

from alimm.optim.bf16 import Bf16OptimWrapper
from alimm.optim.row_sparse_adamw import RowSparseAdamW
from alimm.optim.row_sparse_lars import RowSparseLARS
from alimm.optim.row_sparse_sgd import RowSparseSGD
from alimm.optim.sharded_wrapper import (
    ShardedAmpOptimWrapper,
    ShardedBf16OptimWrapper,
    ShardedGradScaler,
    ShardedOptimWrapper,
)

__all__ = [
    "Bf16OptimWrapper",
    "RowSparseAdamW",
    "RowSparseLARS",
    "RowSparseSGD",
    "ShardedAmpOptimWrapper",
    "ShardedBf16OptimWrapper",
    "ShardedGradScaler",
    "ShardedOptimWrapper",
]
