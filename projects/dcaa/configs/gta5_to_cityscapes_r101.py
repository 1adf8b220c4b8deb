"""GTA5 to clear, foggy and rainy Cityscapes with ResNet-101, by the hyper-parameters of the released code.

The data sets have to be fetched from their makers; this config was built and stepped on made pictures, and never
trained. Put them under ``data/gta5``, ``data/cityscapes``, ``data/foggy_cityscapes`` and ``data/rain_cityscapes``.
"""

from mmengine.config import read_base

with read_base():
    from ....configs._base_.default_runtime import *

from mmcv.transforms import LoadImageFromFile, RandomResize
from mmengine.dataset import DefaultSampler
from mmengine.optim import OptimWrapper, PolyLR
from mmengine.runner import TestLoop, ValLoop
from mmseg.datasets.transforms import LoadAnnotations, RandomCrop, RandomFlip
from mmseg.models import ResNetV1c, SegDataPreProcessor
from mmseg.models.losses import CrossEntropyLoss
from torch.optim import SGD, Adam

from alimm.hooks import EpochSeedHook
from alimm.projects.dcaa.datasets import (
    CityscapesConditionDataset,
    ConcatConditionDataset,
    FoggyCityscapesDataset,
    GTA5ConditionDataset,
    RainCityscapesDataset,
)
from alimm.projects.dcaa.decoder import ConditionDecoder
from alimm.projects.dcaa.loop import MultiLoaderTrainLoop
from alimm.projects.dcaa.metric import ConditionIoUMetric
from alimm.projects.dcaa.optim import AlternatingOptimWrapperConstructor
from alimm.projects.dcaa.packing import PackConditionInputs
from alimm.projects.dcaa.sampler import ConditionSampler
from alimm.projects.dcaa.segmentor import DCAASegmentor
from alimm.projects.dcaa.stage_hook import StageHook
from alimm.projects.dcaa.styles import StyledDataset, StyliseSource

conditions = ("clear", "fog", "rain")
align_iters, self_training_iters = 120000, 60000
max_iters = align_iters + self_training_iters
crop_size = (512, 1024)

model = dict(
    type=DCAASegmentor,
    conditions=conditions,
    freeze_bn=True,
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
        type=ResNetV1c,
        depth=101,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        norm_cfg=dict(type="BN"),
        init_cfg=dict(type="Pretrained", checkpoint="open-mmlab://resnet101_v1c"),
    ),
    decode_head=dict(
        type=ConditionDecoder,
        in_channels=(256, 2048),
        channels=256,
        num_classes=19,
        align_corners=True,
        loss_decode=dict(type=CrossEntropyLoss, avg_non_ignore=True),
    ),
    self_training=dict(threshold=0.6),
    test_cfg=dict(mode="whole"),
)

geometry = [
    dict(type=RandomResize, scale=(2200, 1237), ratio_range=(0.5, 1.5), keep_ratio=True),
    dict(type=RandomCrop, crop_size=crop_size, cat_max_ratio=0.75),
    dict(type=RandomFlip, prob=0.5),
]
target_geometry = [geometry[0], dict(type=RandomCrop, crop_size=crop_size), geometry[2]]
target_dataset = dict(
    type=ConcatConditionDataset,
    conditions=conditions,
    datasets=[
        dict(
            type=kind,
            data_root=root,
            split="train",
            with_labels=False,
            pipeline=[dict(type=LoadImageFromFile), *target_geometry, dict(type=PackConditionInputs)],
        )
        for kind, root in (
            (CityscapesConditionDataset, "data/cityscapes"),
            (FoggyCityscapesDataset, "data/foggy_cityscapes"),
            (RainCityscapesDataset, "data/rain_cityscapes"),
        )
    ],
)
# With folders of translated pictures, give GTA5ConditionDataset styles=dict(clear=..., fog=..., rain=...) instead.
source_dataset = dict(
    type=StyledDataset,
    dataset=dict(
        type=GTA5ConditionDataset,
        data_root="data/gta5",
        pipeline=[
            dict(type=LoadImageFromFile),
            dict(type=LoadAnnotations),
            dict(type=StyliseSource),
            *geometry,
            dict(type=PackConditionInputs),
        ],
    ),
    styles=target_dataset,
)
sampler = dict(type=ConditionSampler)
train_dataloader = dict(
    source=dict(batch_size=2, num_workers=4, persistent_workers=True, sampler=sampler, dataset=source_dataset),
    target=dict(batch_size=2, num_workers=4, persistent_workers=True, sampler=sampler, dataset=target_dataset),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=ConcatConditionDataset,
        conditions=conditions,
        datasets=[
            dict(
                type=part["type"],
                data_root=part["data_root"],
                split="val",
                pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackConditionInputs)],
            )
            for part in target_dataset["datasets"]
        ],
    ),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type=ConditionIoUMetric, conditions=conditions)

optim_wrapper = dict(
    type=OptimWrapper,
    constructor=AlternatingOptimWrapperConstructor,
    optimizer=dict(type=SGD, lr=1e-4, momentum=0.9, weight_decay=2e-4),
    discriminator=dict(type=Adam, lr=1e-4, betas=(0.9, 0.99)),
    paramwise_cfg=dict(custom_keys={"decode_head": dict(lr_mult=10.0)}),
)
poly = dict(type=PolyLR, power=0.9, eta_min=0.0, by_epoch=False)
schedule = [
    dict(**poly, begin=0, end=align_iters),
    dict(**poly, begin=align_iters, end=max_iters),
]
param_scheduler = dict(seg=schedule, disc=schedule)
train_cfg = dict(type=MultiLoaderTrainLoop, max_iters=max_iters, val_interval=5000)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
default_hooks.checkpoint.update(by_epoch=False, interval=5000, max_keep_ckpts=3)
custom_hooks = [
    dict(type=EpochSeedHook),
    dict(type=StageHook, stages=[dict(begin=0, stage="align"), dict(begin=align_iters, stage="self_train")]),
]
model_wrapper_cfg = dict(type="alimm.SteppedDataParallel")
