"""The model wrapper of distributed runs on the CPU."""

from __future__ import annotations

from typing import Any

from mmengine.model import MMDistributedDataParallel, revert_sync_batchnorm
from torch import nn

from alimm.distributed.shards import exclude_from_ddp
from alimm.registry import MODEL_WRAPPERS


@MODEL_WRAPPERS.register_module()
class CpuDistributedDataParallel(MMDistributedDataParallel):
    """MMEngine's wrapper without device numbers, and with plain batch norm for SyncBN, which torch has on GPUs only.

    Shards of a classifier are left alone.

    Args:
        module: the model.
        device_ids: what MMEngine passes; ignored.
        broadcast_buffers: send the buffers of rank 0 to all ranks before every forward pass.
        **kwargs: passed on to ``MMDistributedDataParallel``.
    """

    def __init__(self, module: nn.Module, device_ids: Any = None, broadcast_buffers: bool = False, **kwargs: Any):
        exclude_from_ddp(module)
        super().__init__(revert_sync_batchnorm(module), device_ids=None, broadcast_buffers=broadcast_buffers, **kwargs)
