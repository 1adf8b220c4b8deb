"""Faster R-CNN R-50 learns the 16 training pictures of EmojiCoco by heart, from scratch; its score is on these."""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.emoji_coco import *
    from .._base_.default_runtime import *

from mmdet.models import (
    FPN,
    CrossEntropyLoss,
    DetDataPreprocessor,
    FasterRCNN,
    L1Loss,
    ResNet,
    RPNHead,
    Shared2FCBBoxHead,
    SingleRoIExtractor,
    StandardRoIHead,
)
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, RandomSampler
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

default_scope = "mmdet"
epochs = 32

model = dict(
    type=FasterRCNN,
    data_preprocessor=dict(
        type=DetDataPreprocessor, mean=(127.5, 127.5, 127.5), std=(64, 64, 64), bgr_to_rgb=True, pad_size_divisor=32
    ),
    # Nothing is pretrained, so nothing is frozen and the statistics of the batches are learnt.
    backbone=dict(type=ResNet, depth=50, frozen_stages=-1, norm_eval=False, style="pytorch"),
    # Products are 32 to 80 pixels long: the levels with strides 8 to 32 suffice, and stride 4 would take the most time.
    neck=dict(type=FPN, in_channels=[256, 512, 1024, 2048], out_channels=128, start_level=1, num_outs=3),
    rpn_head=dict(
        type=RPNHead,
        in_channels=128,
        feat_channels=128,
        anchor_generator=dict(type=AnchorGenerator, scales=[4, 6], ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=CrossEntropyLoss, use_sigmoid=True, loss_weight=1.0),
        loss_bbox=dict(type=L1Loss, loss_weight=1.0),
    ),
    roi_head=dict(
        type=StandardRoIHead,
        bbox_roi_extractor=dict(
            type=SingleRoIExtractor,
            roi_layer=dict(type="RoIAlign", output_size=7, sampling_ratio=2),
            out_channels=128,
            featmap_strides=[8, 16, 32],
        ),
        bbox_head=dict(
            type=Shared2FCBBoxHead,
            in_channels=128,
            fc_out_channels=256,
            roi_feat_size=7,
            num_classes=6,
            bbox_coder=dict(type=DeltaXYWHBBoxCoder, target_stds=(0.1, 0.1, 0.2, 0.2)),
            loss_cls=dict(type=CrossEntropyLoss, use_sigmoid=False, loss_weight=1.0),
            loss_bbox=dict(type=L1Loss, loss_weight=1.0),
        ),
    ),
    train_cfg=dict(
        rpn=dict(
            assigner=dict(
                type=MaxIoUAssigner,
                pos_iou_thr=0.7,
                neg_iou_thr=0.3,
                min_pos_iou=0.3,
                match_low_quality=True,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type=RandomSampler, num=128, pos_fraction=0.5, neg_pos_ub=-1, add_gt_as_proposals=False),
            allowed_border=-1,
            pos_weight=-1,
            debug=False,
        ),
        rpn_proposal=dict(nms_pre=500, max_per_img=200, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(
            assigner=dict(
                type=MaxIoUAssigner,
                pos_iou_thr=0.5,
                neg_iou_thr=0.5,
                min_pos_iou=0.5,
                match_low_quality=False,
                ignore_iof_thr=-1,
            ),
            sampler=dict(type=RandomSampler, num=64, pos_fraction=0.25, neg_pos_ub=-1, add_gt_as_proposals=True),
            pos_weight=-1,
            debug=False,
        ),
    ),
    test_cfg=dict(
        rpn=dict(nms_pre=500, max_per_img=100, nms=dict(type="nms", iou_threshold=0.7), min_bbox_size=0),
        rcnn=dict(score_thr=0.05, nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
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
