"""Composites, trained on the labels of the target: what adaptation cannot be expected to surpass."""

from mmengine.config import read_base

with read_base():
    from .source_only_composites import *

train_dataloader.source = dict(
    batch_size=4,
    num_workers=0,
    sampler=sampler,
    dataset={**target_dataset, "with_labels": True, "pipeline": source_dataset["pipeline"]},
)
expected = {"mIoU/adverse": 27.3}
