"""A small residual network with the decoder of DCAA on half the resolution, for pictures of 64 x 128."""

from mmseg.models import SegDataPreProcessor
from mmseg.models.losses import CrossEntropyLoss

from alimm.models import ResNetTiny
from alimm.projects.dcaa.baselines import SourceSegmentor
from alimm.projects.dcaa.decoder import ConditionDecoder

decoder = dict(
    type=ConditionDecoder,
    in_channels=(16, 128),
    channels=16,
    low_channels=16,
    dilations=(1, 2, 3),
    dropouts=(0.0, 0.0, 0.0),
    num_classes=8,
    loss_decode=dict(type=CrossEntropyLoss, avg_non_ignore=True),
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
    backbone=dict(type=ResNetTiny, width=16, depths=(1, 1, 1, 1), stem_stride=2),
    decode_head=decoder,
    test_cfg=dict(mode="whole"),
)
