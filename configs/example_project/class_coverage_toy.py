"""A tiny network on coloured squares, with the class coverage in the log: seconds on one core."""

from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.optim import CosineAnnealingLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import SGD

from alimm.datasets import PackInputs
from alimm.evaluation import Accuracy
from alimm.heads import LinearHead
from alimm.models import ClsDataPreprocessor, GlobalPoolNeck, ImageClassifier, ResNetTiny
from alimm.projects.example_project import ClassCoverageHook, ColouredSquares

with read_base():
    from .._base_.default_runtime import *

model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(type=ClsDataPreprocessor),
    backbone=dict(type=ResNetTiny, width=8, depths=(1, 1)),
    neck=dict(type=GlobalPoolNeck),
    head=dict(type=LinearHead, num_classes=4, in_channels=16),
)

train_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=ColouredSquares, head_count=64, seed=0, pipeline=[dict(type=PackInputs)]),
)
val_dataloader = dict(
    batch_size=30,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=ColouredSquares, seed=1, pipeline=[dict(type=PackInputs)]),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=Accuracy, topk=(1,))
test_evaluator = val_evaluator

train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=12)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.05, momentum=0.9))
param_scheduler = dict(type=CosineAnnealingLR, T_max=12, by_epoch=True)

custom_hooks = [dict(type=ClassCoverageHook, num_classes=4)]

# What training must reach; the test of this config checks it.
expected = {"accuracy/top1": 95.0}
