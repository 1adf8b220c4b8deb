"""Synthetic weather, no adaptation: the source's labels alone."""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.synthetic_weather import *
    from .._base_.default_runtime import *
    from .._base_.models.segmentor_tiny import *

from mmengine.optim import OptimWrapper, PolyLR
from mmengine.runner import TestLoop, ValLoop
from torch.optim import AdamW

from alimm.hooks import EpochSeedHook
from alimm.projects.dcaa.loop import MultiLoaderTrainLoop
from alimm.projects.dcaa.optim import AlternatingOptimWrapperConstructor
from alimm.projects.dcaa.wrapper import SteppedDataParallel

default_scope = "mmseg"
max_iters = 1000

model.update(conditions=conditions)
train_dataloader.pop("target")
train_dataloader.source.dataset = source_dataset
optim_wrapper = dict(
    type=OptimWrapper,
    constructor=AlternatingOptimWrapperConstructor,
    optimizer=dict(type=AdamW, lr=5e-3, weight_decay=1e-2),
)
param_scheduler = dict(
    seg=[dict(type=PolyLR, power=0.9, eta_min=1e-5, begin=0, end=max_iters, by_epoch=False)],
)
train_cfg = dict(type=MultiLoaderTrainLoop, max_iters=max_iters, val_interval=max_iters)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
default_hooks.logger.interval = 100
default_hooks.checkpoint.update(by_epoch=False, interval=max_iters)
log_processor.by_epoch = False
custom_hooks = [dict(type=EpochSeedHook)]
model_wrapper_cfg = dict(type=SteppedDataParallel)
expected = {"mIoU/adverse": 38.0}
