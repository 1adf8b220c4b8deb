"""Composites: a moving teacher labels the target for a student that sees it strongly augmented."""

from mmengine.config import read_base

with read_base():
    from .source_only_composites import *

from alimm.projects.dcaa.mean_teacher import MeanTeacherSegmentor
from alimm.projects.dcaa.stage_hook import StageHook

model.update(type=MeanTeacherSegmentor, momentum=0.02, class_mix=True, threshold=0.6, weighting="pixel")
train_dataloader.target = dict(batch_size=4, num_workers=0, sampler=sampler, dataset=target_dataset)
custom_hooks.append(
    dict(
        type=StageHook,
        stages=[dict(begin=0, stage="source"), dict(begin=max_iters // 3, stage="self_train")],
    )
)
expected = {"mIoU/adverse": 17.4}
