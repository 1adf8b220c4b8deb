"""Synthetic weather: the source with the low frequencies of target pictures (Yang and Soatto, CVPR 2020)."""

from mmengine.config import read_base

with read_base():
    from .source_only_synthetic import *

train_dataloader.source.dataset = styled_source_dataset
train_dataloader.source.dataset.dataset.pipeline[1].update(method="fda")
expected = {"mIoU/adverse": 54.0}
