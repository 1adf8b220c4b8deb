"""TSN R-50 learns by heart which product moves in the 24 training clips of EmojiClips; its score is on these clips.

TSN scores single frames and averages over them, so it cannot see which way a product moves: it learns the products.
"""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.emoji_clips import *
    from .._base_.default_runtime import *

from mmaction.datasets.transforms import FormatShape, PackActionInputs, RawFrameDecode, SampleFrames
from mmaction.models import ActionDataPreprocessor, Recognizer2D, ResNet, TSNHead
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

default_scope = "mmaction"
epochs = 20

model = dict(
    type=Recognizer2D,
    data_preprocessor=dict(
        type=ActionDataPreprocessor, mean=(127.5, 127.5, 127.5), std=(64, 64, 64), format_shape="NCHW"
    ),
    backbone=dict(type=ResNet, pretrained=None, depth=50, norm_eval=False),
    cls_head=dict(
        type=TSNHead,
        num_classes=6,
        in_channels=2048,
        spatial_type="avg",
        # By name: the head compares it, and the dump of a class reads otherwise.
        consensus=dict(type="AvgConsensus", dim=1),
        dropout_ratio=0.0,
        average_clips="prob",
    ),
)
train_dataloader.dataset.update(
    ann_file=f"{folder}/train_product.txt",
    pipeline=[
        dict(type=SampleFrames, clip_len=1, frame_interval=1, num_clips=3),
        dict(type=RawFrameDecode),
        dict(type=FormatShape, input_format="NCHW"),
        dict(type=PackActionInputs),
    ],
)
val_dataloader.dataset.update(
    ann_file=f"{folder}/train_product.txt",
    pipeline=[
        dict(type=SampleFrames, clip_len=1, frame_interval=1, num_clips=3, test_mode=True),
        dict(type=RawFrameDecode),
        dict(type=FormatShape, input_format="NCHW"),
        dict(type=PackActionInputs),
    ],
)
test_dataloader = val_dataloader
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=1e-3, weight_decay=1e-4),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, begin=0, end=6, by_epoch=False),
    dict(type=CosineAnnealingLR, T_max=epochs, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=epochs, val_interval=epochs // 2)
default_hooks.checkpoint.interval = epochs // 2
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
expected = {"acc/top1": 1.0}
