"""A ResNet-18 of a quarter of the width with the decoder of DCAA, for pictures of 64 x 128."""

from mmseg.models import ResNetV1c, SegDataPreProcessor
from mmseg.models.losses import CrossEntropyLoss

from alimm.projects.dcaa.baselines import SourceSegmentor
from alimm.projects.dcaa.decoder import ConditionDecoder

decoder = dict(
    type=ConditionDecoder,
    in_channels=(16, 128),
    channels=32,
    low_channels=16,
    dilations=(1, 2, 3),
    dropouts=(0.1, 0.1, 0.1),
    num_classes=8,
    loss_decode=dict(type=CrossEntropyLoss),
)
model = dict(
    type=SourceSegmentor,
    data_preprocessor=dict(
        type=SegDataPreProcessor,
        mean=(127.5,) * 3,
        std=(63.75,) * 3,
        bgr_to_rgb=True,
        size=(64, 128),
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type=ResNetV1c,
        depth=18,
        base_channels=16,
        stem_channels=16,
        strides=(1, 2, 2, 1),
        dilations=(1, 1, 1, 2),
        norm_cfg=dict(type="BN"),
    ),
    decode_head=decoder,
    test_cfg=dict(mode="whole"),
)
