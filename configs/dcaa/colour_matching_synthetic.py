"""Synthetic weather: the source in the colours of the target's conditions (Reinhard et al., 2001), nothing else."""

from mmengine.config import read_base

with read_base():
    from .source_only_synthetic import *

train_dataloader.source.dataset = styled_source_dataset
expected = {"mIoU/adverse": 73.5}
