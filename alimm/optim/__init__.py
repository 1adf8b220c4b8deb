"""Optimizers, optimizer wrappers and parameter schedulers."""

from alimm.optim.bf16 import Bf16OptimWrapper

__all__ = ["Bf16OptimWrapper"]
