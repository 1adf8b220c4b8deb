"""Mixed precision in bfloat16, on the CPU as well as on CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner.amp import autocast
from torch import nn

from alimm.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class Bf16OptimWrapper(OptimWrapper):
    """Runs the forward pass in bfloat16 and keeps weights, gradients and updates in float32.

    bfloat16 has the exponent range of float32, so the loss needs no scaling; MMEngine's ``AmpOptimWrapper`` scales it
    and therefore refuses to work without CUDA.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Enable autocast, and what the parent does for gradient accumulation."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
