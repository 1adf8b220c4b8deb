"""Composites: a moving teacher labels the target for a student that sees it strongly augmented."""

from mmengine.config import read_base

with read_base():
    from .source_only_composites import *

from alimm.projects.dcaa.mean_teacher import MeanTeacherSegmentor

model.update(type=MeanTeacherSegmentor)
train_dataloader.target = dict(batch_size=4, num_workers=0, sampler=sampler, dataset=target_dataset)
expected = {"mIoU/adverse": 0.0}
