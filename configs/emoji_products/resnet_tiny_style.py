"""Recogniser on EmojiProducts, style split: 98 sub-groups, and features that find the same product in another style.

The linear head learns the sub-group; the contrastive head pulls the two vendors' pictures of one product together.
Pictures are not mirrored: which way an arrow, a hand or a clock points tells products apart.
"""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.emoji_products_style import *
    from .._base_.default_runtime import *
    from .._base_.models.resnet_tiny import *

from mmengine.hooks import EMAHook
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

from alimm.datasets import IdentityBatchSampler
from alimm.evaluation import Accuracy, PerClassAccuracy, ShotAccuracy
from alimm.heads import ContrastiveHead, LinearHead, MultiHead
from alimm.losses import SupConLoss
from alimm.models import BatchColorJitter, BatchCutout, BatchRandomAffine

epochs, warmup = 36, 5

model.data_preprocessor.batch_augments = [
    dict(type=BatchRandomAffine, degrees=12, scale=0.18, aspect=0.09, shear=0.12, shift=0.09, flip_prob=0),
    dict(
        type=BatchColorJitter,
        saturation=0.4,
        hue=0.06,
        hue_prob=0.05,
        contrast=0.2,
        gain=0.125,
        offset=0.075,
        gray_prob=0,
    ),
    dict(type=BatchCutout, size=0.25, prob=0.5),
]
model.head = dict(
    type=MultiHead,
    main="subgroup",
    heads=dict(
        subgroup=dict(type=LinearHead, num_classes=98, in_channels=256),
        identity=dict(type=ContrastiveHead, loss=dict(type=SupConLoss, temperature=0.1, loss_weight=2.0)),
    ),
)
train_dataloader.batch_sampler = dict(type=IdentityBatchSampler, images=2)
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.01, begin=0, end=warmup, by_epoch=True, convert_to_iter_based=True),
    dict(
        type=CosineAnnealingLR,
        T_max=epochs - warmup,
        begin=warmup,
        end=epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    ),
]
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=epochs, val_interval=5)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
val_evaluator = [dict(type=Accuracy, topk=(1, 5))]
test_evaluator = [
    dict(type=Accuracy, topk=(1, 5)),
    dict(type=PerClassAccuracy, table_rows=0),
    dict(type=ShotAccuracy),
]
custom_hooks = [dict(type=EMAHook, momentum=0.01, update_buffers=True)]
expected = {"accuracy/top1": 62.0}
