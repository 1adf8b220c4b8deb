"""R(2+1)D-34 learns by heart how the product moves in the 24 training clips of EmojiClips; its score is on these clips.

Left and right, up and down, grow and shrink are told apart by the order of the frames alone.
"""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.emoji_clips import *
    from .._base_.default_runtime import *

from mmaction.datasets.transforms import FormatShape, PackActionInputs, RawFrameDecode, Resize, SampleFrames
from mmaction.models import ActionDataPreprocessor, I3DHead, Recognizer3D, ResNet2Plus1d
from mmengine.optim import CosineAnnealingLR, LinearLR, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop
from torch.optim import AdamW

default_scope = "mmaction"
epochs = 24

model = dict(
    type=Recognizer3D,
    data_preprocessor=dict(
        type=ActionDataPreprocessor, mean=(127.5, 127.5, 127.5), std=(64, 64, 64), format_shape="NCTHW"
    ),
    backbone=dict(
        type=ResNet2Plus1d,
        depth=34,
        pretrained=None,
        pretrained2d=False,
        norm_eval=False,
        # By name: the backbone compares it, and the dump of a class reads otherwise.
        conv_cfg=dict(type="Conv2plus1d"),
        norm_cfg=dict(type="BN3d", requires_grad=True, eps=1e-3),
        conv1_kernel=(3, 7, 7),
        conv1_stride_t=1,
        pool1_stride_t=1,
        inflate=(1, 1, 1, 1),
        spatial_strides=(1, 2, 2, 2),
        temporal_strides=(1, 2, 2, 2),
        zero_init_residual=False,
    ),
    cls_head=dict(
        type=I3DHead,
        num_classes=6,
        in_channels=512,
        spatial_type="avg",
        dropout_ratio=0.0,
        average_clips="prob",
    ),
)
train_dataloader.batch_size = 4
train_dataloader.dataset.update(
    ann_file=f"{folder}/train_motion.txt",
    pipeline=[
        dict(type=SampleFrames, clip_len=8, frame_interval=1, num_clips=1),
        dict(type=RawFrameDecode),
        dict(type=Resize, scale=(48, 48), keep_ratio=False),
        dict(type=FormatShape, input_format="NCTHW"),
        dict(type=PackActionInputs),
    ],
)
val_dataloader.dataset.update(
    ann_file=f"{folder}/train_motion.txt",
    pipeline=[
        dict(type=SampleFrames, clip_len=8, frame_interval=1, num_clips=1, test_mode=True),
        dict(type=RawFrameDecode),
        dict(type=Resize, scale=(48, 48), keep_ratio=False),
        dict(type=FormatShape, input_format="NCTHW"),
        dict(type=PackActionInputs),
    ],
)
test_dataloader = val_dataloader
optim_wrapper = dict(
    type=OptimWrapper,
    optimizer=dict(type=AdamW, lr=5e-4, weight_decay=1e-4),
    clip_grad=dict(max_norm=10.0),
)
param_scheduler = [
    dict(type=LinearLR, start_factor=0.1, begin=0, end=12, by_epoch=False),
    dict(type=CosineAnnealingLR, T_max=epochs, by_epoch=True, convert_to_iter_based=True),
]
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=epochs, val_interval=epochs // 2)
default_hooks.checkpoint.interval = epochs // 2
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
expected = {"acc/top1": 1.0}
