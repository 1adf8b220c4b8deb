"""ResNetTiny with four stages and a linear head; a config sets the number of classes."""

from alimm.heads import LinearHead
from alimm.models import ClsDataPreprocessor, GlobalPoolNeck, ImageClassifier, ResNetTiny

model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(
        type=ClsDataPreprocessor, mean=(127.5, 127.5, 127.5), std=(127.5, 127.5, 127.5), channels_last=True
    ),
    backbone=dict(type=ResNetTiny, width=32, depths=(1, 1, 1, 1), stem_stride=2),
    neck=dict(type=GlobalPoolNeck, in_channels=256, norm=True),
    head=dict(type=LinearHead, num_classes=10, in_channels=256),
)
