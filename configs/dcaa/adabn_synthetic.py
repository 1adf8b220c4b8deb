"""Synthetic weather: the source-only model with batch norm statistics of the target (Li et al., 2016)."""

from mmengine.config import read_base

with read_base():
    from .source_only_synthetic import *

from alimm.projects.dcaa.adabn import AdaBNHook

custom_hooks.append(
    dict(
        type=AdaBNHook,
        dataloader=dict(batch_size=20, num_workers=0, sampler=dict(type=DefaultSampler), dataset=target_dataset),
        num_batches=30,
    )
)
expected = {"mIoU/adverse": 56.3}
