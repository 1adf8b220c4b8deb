"""Optimizer wrappers of MMEngine for models with sharded parameters.

What a wrapper decides must be the same on all ranks: by how much gradients are clipped, and whether a step is skipped
because a gradient is not finite. Either follows from all shards, of which each rank sees one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from mmengine.device import get_device
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor

from alimm.distributed.collectives import rank_and_size
from alimm.optim.bf16 import Bf16OptimWrapper
from alimm.optim.sharded_clip import clip_grad_norm, clip_grad_value
from alimm.registry import OPTIM_WRAPPERS


class _ShardedClip:
    """Takes the place of MMEngine's clipping; clips and logs as that does."""

    optimizer: torch.optim.Optimizer
    clip_grad_kwargs: dict[str, Any]
    grad_name: str
    message_hub: Any

    def _clip_grad(self) -> None:
        parameters = [
            parameter
            for group in self.optimizer.param_groups
            for parameter in group["params"]
            if parameter.requires_grad
        ]
        if self.grad_name == "grad_value":
            clip_grad_value(parameters, **self.clip_grad_kwargs)
        else:
            norm = clip_grad_norm(parameters, **self.clip_grad_kwargs)
            self.message_hub.update_scalar(f"train/{self.grad_name}", norm)


@OPTIM_WRAPPERS.register_module()
class ShardedOptimWrapper(_ShardedClip, OptimWrapper):
    """MMEngine's ``OptimWrapper`` with a ``clip_grad`` that sees all shards, and row-sparse gradients.

    Takes the arguments of ``OptimWrapper``. The norm that is logged is that of all gradients of all ranks.
    """


@OPTIM_WRAPPERS.register_module()
class ShardedBf16OptimWrapper(_ShardedClip, Bf16OptimWrapper):
    """`Bf16OptimWrapper` with a ``clip_grad`` that sees all shards, and row-sparse gradients."""


class ShardedGradScaler(torch.amp.GradScaler):
    """A ``torch.amp.GradScaler`` that skips a step on all ranks where a gradient of any rank is not finite.

    FSDP's scaler of the same name does this too but needs a process group; this one works without.

    Args:
        device: type of the device that the loss is on.
        process_group: the ranks that have to agree; all by default.
        **kwargs: of ``GradScaler``.
    """

    def __init__(self, device: str = "cuda", process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(device, **kwargs)
        self.process_group = process_group

    def _unscale_grads_(self, *args: Any, **kwargs: Any) -> dict[torch.device, Tensor]:
        # The one place that both ways of torch.amp lead through: unscaling, and the check for fused optimizers.
        found = super()._unscale_grads_(*args, **kwargs)
        assert self._scale is not None
        flag = torch.zeros((), device=self._scale.device)
        for value in found.values():
            flag = torch.maximum(flag, value.to(flag.device).reshape(()))
        if rank_and_size(self.process_group)[1] > 1:
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.process_group)
        for value in found.values():
            value.copy_(flag)
        return found or {flag.device: flag}


@OPTIM_WRAPPERS.register_module()
class ShardedAmpOptimWrapper(_ShardedClip, AmpOptimWrapper):
    """MMEngine's ``AmpOptimWrapper`` for sharded parameters: clips over all shards, and all ranks skip a step together.

    It works on the CPU as well, where MMEngine's autocast knows bfloat16 only.

    Args:
        loss_scale: ``'dynamic'``, a fixed scale, or arguments of ``torch.amp.GradScaler``.
        dtype: what autocast computes in, a name or a ``torch.dtype``; the device's default if None.
        **kwargs: of ``OptimWrapper``.

    Raises:
        ValueError: ``loss_scale`` or ``dtype`` is none of these.
    """

    def __init__(
        self,
        loss_scale: str | float | dict[str, Any] = "dynamic",
        dtype: str | torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        # Past AmpOptimWrapper's own, which refuses the CPU and makes a scaler for CUDA.
        OptimWrapper.__init__(self, **kwargs)
        self._scale_update_param: float | None = None
        arguments: dict[str, Any] = {}
        if isinstance(loss_scale, (int, float)):
            self._scale_update_param = float(loss_scale)
            arguments = dict(init_scale=float(loss_scale))
        elif isinstance(loss_scale, dict):
            arguments = dict(loss_scale)
        elif loss_scale != "dynamic":
            raise ValueError(f"loss_scale must be 'dynamic', a float or a dict for GradScaler, got {loss_scale!r}")
        arguments.setdefault("device", get_device().split(":")[0])
        self.loss_scaler = ShardedGradScaler(**arguments)
        if isinstance(dtype, str):
            if dtype not in self.valid_dtypes:
                raise ValueError(f"dtype must be one of {', '.join(self.valid_dtypes)}, got {dtype!r}")
            dtype = getattr(torch, dtype)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be a name, a torch.dtype or None, got {dtype!r}")
        self.cast_dtype = dtype
