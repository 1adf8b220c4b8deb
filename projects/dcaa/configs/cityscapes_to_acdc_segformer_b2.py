"""Cityscapes to the fog, rain, night and snow of ACDC, on SegFormer-B2: a decoder of SegFormer for each condition.

The data sets have to be fetched from their makers, into ``data/cityscapes`` and ``data/acdc``; this config was built
and stepped on made pictures, and never trained. Optimiser and augmentation are those of DAFormer's kind, not the
paper's.
"""

from mmengine.config import read_base

with read_base():
    from ....configs._base_.default_runtime import *

from mmcv.transforms import LoadImageFromFile, RandomResize
from mmengine.dataset import DefaultSampler
from mmengine.optim import LinearLR, OptimWrapper, PolyLR
from mmengine.runner import TestLoop, ValLoop
from mmseg.datasets.transforms import LoadAnnotations, RandomCrop, RandomFlip
from mmseg.models import MixVisionTransformer, SegDataPreProcessor, SegformerHead
from mmseg.models.losses import CrossEntropyLoss
from torch.optim import Adam, AdamW

from alimm.hooks import EpochSeedHook
from alimm.projects.dcaa.datasets import ACDCConditionDataset, CityscapesConditionDataset
from alimm.projects.dcaa.loop import MultiLoaderTrainLoop
from alimm.projects.dcaa.metric import ConditionIoUMetric
from alimm.projects.dcaa.optim import AlternatingOptimWrapperConstructor
from alimm.projects.dcaa.packing import PackConditionInputs
from alimm.projects.dcaa.sampler import ConditionSampler
from alimm.projects.dcaa.segmentor import DCAASegmentor
from alimm.projects.dcaa.stage_hook import StageHook
from alimm.projects.dcaa.styles import StyledDataset, StyliseSource

conditions = ("fog", "rain", "night", "snow")
max_iters = 40000
crop_size = (512, 512)

model = dict(
    type=DCAASegmentor,
    conditions=conditions,
    data_preprocessor=dict(
        type=SegDataPreProcessor,
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
        bgr_to_rgb=True,
        size=crop_size,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type=MixVisionTransformer,
        embed_dims=64,
        num_layers=(3, 4, 6, 3),
        num_heads=(1, 2, 5, 8),
        patch_sizes=(7, 3, 3, 3),
        sr_ratios=(8, 4, 2, 1),
        mlp_ratio=4,
        drop_path_rate=0.1,
    ),
    decode_head=dict(
        type=SegformerHead,
        in_channels=[64, 128, 320, 512],
        in_index=[0, 1, 2, 3],
        channels=256,
        num_classes=19,
        norm_cfg=dict(type="BN"),
        align_corners=False,
        loss_decode=dict(type=CrossEntropyLoss, avg_non_ignore=True),
    ),
    self_training=dict(threshold=0.6, pseudo_on="all", student="strong", momentum=0.001),
    test_cfg=dict(mode="slide", crop_size=crop_size, stride=(384, 384)),
)

resize = dict(type=RandomResize, scale=(1024, 512), ratio_range=(1.0, 2.0), keep_ratio=True)
target_dataset = dict(
    type=ACDCConditionDataset,
    data_root="data/acdc",
    split="train",
    conditions=conditions,
    with_labels=False,
    pipeline=[
        dict(type=LoadImageFromFile),
        resize,
        dict(type=RandomCrop, crop_size=crop_size),
        dict(type=RandomFlip, prob=0.5),
        dict(type=PackConditionInputs),
    ],
)
source_dataset = dict(
    type=StyledDataset,
    dataset=dict(
        type=CityscapesConditionDataset,
        data_root="data/cityscapes",
        split="train",
        domain="source",
        pipeline=[
            dict(type=LoadImageFromFile),
            dict(type=LoadAnnotations),
            dict(type=StyliseSource),
            resize,
            dict(type=RandomCrop, crop_size=crop_size, cat_max_ratio=0.75),
            dict(type=RandomFlip, prob=0.5),
            dict(type=PackConditionInputs),
        ],
    ),
    styles=target_dataset,
)
sampler = dict(type=ConditionSampler)
train_dataloader = dict(
    source=dict(batch_size=4, num_workers=4, persistent_workers=True, sampler=sampler, dataset=source_dataset),
    target=dict(batch_size=4, num_workers=4, persistent_workers=True, sampler=sampler, dataset=target_dataset),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=ACDCConditionDataset,
        data_root="data/acdc",
        split="val",
        conditions=conditions,
        pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackConditionInputs)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type=ConditionIoUMetric, conditions=conditions)

optim_wrapper = dict(
    type=OptimWrapper,
    constructor=AlternatingOptimWrapperConstructor,
    optimizer=dict(type=AdamW, lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    discriminator=dict(type=Adam, lr=1e-4, betas=(0.9, 0.99)),
    paramwise_cfg=dict(
        custom_keys={
            "decode_head": dict(lr_mult=10.0),
            "pos_block": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    ),
)
param_scheduler = dict(
    seg=[
        dict(type=LinearLR, start_factor=1e-6, begin=0, end=1500, by_epoch=False),
        dict(type=PolyLR, power=1.0, eta_min=0.0, begin=1500, end=max_iters, by_epoch=False),
    ],
    disc=[dict(type=PolyLR, power=0.9, eta_min=0.0, begin=0, end=max_iters, by_epoch=False)],
)
train_cfg = dict(type=MultiLoaderTrainLoop, max_iters=max_iters, val_interval=4000)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
default_hooks.checkpoint.update(by_epoch=False, interval=4000, max_keep_ckpts=3)
custom_hooks = [
    dict(type=EpochSeedHook),
    dict(
        type=StageHook,
        stages=[
            dict(begin=0, stage="source"),
            dict(begin=4000, stage="align"),
            dict(begin=15000, stage="self_train"),
        ],
    ),
]
model_wrapper_cfg = dict(type="alimm.SteppedDataParallel")
