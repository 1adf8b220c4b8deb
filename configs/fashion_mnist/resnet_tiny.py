"""ResNetTiny of width 16 on Fashion-MNIST: 91.2 % top-1 (seed 0) after six minutes on two cores."""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.fashion_mnist import *
    from .._base_.default_runtime import *
    from .._base_.models.resnet_tiny import *

from mmengine.optim import OneCycleLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

from alimm.evaluation import Accuracy
from alimm.models import BatchRandomAffine

epochs = 4

model.data_preprocessor.batch_augments = [
    dict(type=BatchRandomAffine, degrees=0, scale=0.1, aspect=0.05, shear=0, shift=0.1, fill=0)
]
model.backbone.update(width=16, depths=(1, 1, 1), stem_stride=1)
model.neck.in_channels = model.head.in_channels = 64
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=4e-3, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [dict(type=OneCycleLR, eta_max=4e-3, total_steps=epochs, by_epoch=True, convert_to_iter_based=True)]
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=epochs, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
val_evaluator = [dict(type=Accuracy, topk=(1,))]
test_evaluator = val_evaluator
expected = {"accuracy/top1": 90.5}
