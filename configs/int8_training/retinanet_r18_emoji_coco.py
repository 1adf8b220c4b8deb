"""RetinaNet R-18 learns the 16 training pictures of EmojiCoco by heart, from scratch; its score is on these."""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.emoji_coco import *
    from .._base_.default_runtime import *

from mmdet.models import FPN, DetDataPreprocessor, FocalLoss, L1Loss, ResNet, RetinaHead, RetinaNet
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

default_scope = "mmdet"
epochs = 48

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(
        type=DetDataPreprocessor, mean=(127.5, 127.5, 127.5), std=(64, 64, 64), bgr_to_rgb=True, pad_size_divisor=32
    ),
    # Nothing is pretrained, so nothing is frozen and the statistics of the batches are learnt.
    backbone=dict(type=ResNet, depth=18, frozen_stages=-1, norm_eval=False, style="pytorch"),
    neck=dict(
        type=FPN,
        in_channels=[64, 128, 256, 512],
        out_channels=128,
        start_level=1,
        num_outs=3,
    ),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=6,
        in_channels=128,
        feat_channels=128,
        stacked_convs=2,
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32]
        ),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=1.0),
        loss_bbox=dict(type=L1Loss, loss_weight=1.0),
    ),
    train_cfg=dict(
        assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4, min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type=PseudoSampler),
        allowed_border=-1,
        pos_weight=-1,
        debug=False,
    ),
    test_cfg=dict(
        nms_pre=1000, min_bbox_size=0, score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100
    ),
)
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=1e-4),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, begin=0, end=20, by_epoch=False),
    dict(type=CosineAnnealingLR, T_max=epochs, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=epochs, val_interval=epochs // 2)
default_hooks.checkpoint.interval = epochs // 2
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
expected = {"coco/bbox_mAP_50": 0.9}
