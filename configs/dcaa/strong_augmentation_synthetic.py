"""Synthetic weather, no adaptation, but the source strongly augmented."""

from mmengine.config import read_base

with read_base():
    from .source_only_synthetic import *

from alimm.projects.dcaa.augment import StrongAugment

train_dataloader.source.dataset.pipeline.insert(1, dict(type=StrongAugment))
expected = {"mIoU/adverse": 67.6}
