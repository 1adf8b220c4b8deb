"""Distributed training of a model that runs its own backward passes and steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from mmengine.dist import all_reduce, broadcast, get_world_size
from mmengine.model import revert_sync_batchnorm
from torch import Tensor, nn

from alimm.registry import MODEL_WRAPPERS

BUCKET_BYTES = 25 * 2**20


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of all ranks by their mean; nothing happens where there is one rank.

    Call it on every rank with the same parameters, after the backward passes and before the optimiser's step. A
    parameter that has a gradient on some ranks counts as zero on the others; one that has none anywhere keeps none.

    Args:
        parameters: those that the next step changes. Parameters that need no gradient are left out.
    """
    size = get_world_size()
    if size == 1:
        return
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    if not trained:
        return
    has_grad = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    all_reduce(has_grad, op="max")
    used = [parameter for parameter, flag in zip(trained, has_grad.tolist(), strict=True) if flag]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([parameter.grad for parameter in used if parameter.grad is not None]):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        all_reduce(flat, op="sum")
        flat /= size
        _spread(flat, bucket)


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type and device whose sizes sum up to about `BUCKET_BYTES`, in an order all ranks share."""
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in kinds.values():
        bucket: list[Tensor] = []
        held = 0
        for tensor in group:
            size = tensor.numel() * tensor.element_size()
            if bucket and held + size > BUCKET_BYTES:
                yield bucket
                bucket, held = [], 0
            bucket.append(tensor)
            held += size
        yield bucket


@MODEL_WRAPPERS.register_module()
class SteppedDataParallel(nn.Module):
    """The model wrapper for a model whose ``train_step`` does everything, averaging of gradients included.

    ``MMDistributedDataParallel`` runs the training step itself and averages gradients inside a single backward pass;
    alternating steps and several passes fit neither. Here the model calls `average_gradients` before every step of an
    optimiser, and the wrapper makes all ranks start from the weights of rank 0. Use it as
    ``model_wrapper_cfg = dict(type='alimm.SteppedDataParallel')``.

    Batch norm measures each rank's own pictures. After every training step all ranks take the statistics of rank 0, so
    that they teach, validate and save one model.

    Plain batch norm takes the place of SyncBN on the CPU, for which torch has none.

    Args:
        module: the model.
        broadcast_buffers: send the buffers of rank 0 to all ranks after every training step.
        device_ids: ignored; other wrappers have it.
    """

    def __init__(self, module: nn.Module, broadcast_buffers: bool = True, device_ids: Any = None) -> None:
        super().__init__()
        device = next((parameter.device.type for parameter in module.parameters()), "cpu")
        self.module: Any = revert_sync_batchnorm(module) if device == "cpu" else module
        self.broadcast_buffers = broadcast_buffers
        _send_from_first(self.module.parameters())
        _send_from_first(self.module.buffers())

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model."""
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> Any:
        """Let the model train on a batch; return what is logged."""
        logs = self.module.train_step(data, optim_wrapper)
        if self.broadcast_buffers:
            _send_from_first(self.module.buffers())
        return logs

    def val_step(self, data: Any) -> Any:
        """Predictions for a batch in validation."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> Any:
        """Predictions for a batch in a test."""
        return self.module.test_step(data)


@torch.no_grad()
def _send_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of rank 0, one message for each type and `BUCKET_BYTES`."""
    if get_world_size() > 1:
        for bucket in _buckets(list(tensors)):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            broadcast(flat)
            _spread(flat, bucket)


def _spread(flat: Tensor, tensors: Iterable[Tensor]) -> None:
    """Copy the values of a flat tensor into others, one after the other."""
    start = 0
    for tensor in tensors:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()
