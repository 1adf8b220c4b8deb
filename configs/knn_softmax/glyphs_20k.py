"""20,000 Han characters as classes, KNN softmax on 12 % of them, tested on a font that training never sees.

``model.head.method`` is the one word that changes the method: ``knn``, ``random``, ``full`` or ``fused``; the others do
without the graph. About 89,000 pictures of 32 x 32 in four epochs: a small network whose head takes as long as itself.
"""

from mmengine.config import read_base

with read_base():
    from .._base_.datasets.han_glyphs import *
    from .._base_.default_runtime import *

from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop

from alimm.evaluation import TopKAccuracy
from alimm.hooks import ShardedCheckpointHook
from alimm.models import BatchRandomAffine, ClsDataPreprocessor, FlattenNeck, ImageClassifier, ResNetTiny
from alimm.optim import RowSparseSGD, ShardedOptimWrapper
from alimm.projects.knn_softmax import KNNGraphHook, KNNSoftmaxHead

epochs, warmup = 4, 0.4  # the first in whole epochs, the second in parts of one

classes = dict(min_fonts=3, num_classes=20_000)
train_dataloader.batch_size = 128  # smaller batches leave each label more neighbours
train_dataloader.dataset.update(classes)
val_dataloader.dataset.update(classes)
test_dataloader.dataset.update(classes)
model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(
        type=ClsDataPreprocessor,
        mean=(127.5, 127.5, 127.5),
        std=(127.5, 127.5, 127.5),
        channels_last=True,
        batch_augments=[
            dict(type=BatchRandomAffine, degrees=4, scale=0.1, aspect=0.08, shear=0.06, shift=0.06, flip_prob=0)
        ],
    ),
    backbone=dict(type=ResNetTiny, width=16, depths=(1, 1, 1), stem_stride=2),
    neck=dict(type=FlattenNeck, in_channels=64, map_size=4, out_channels=128),
    head=dict(
        type=KNNSoftmaxHead,
        method="knn",
        num_classes=20_000,
        in_channels=128,
        active=0.12,
        neighbours=32,
        random_share=0.25,
        logq=True,
        scale=24.0,
        init_std=0.01,  # short rows turn fast at first; with rows of length one the backbone outruns them
        topk=5,
    ),
)
optim_wrapper = dict(
    type=ShardedOptimWrapper,
    optimizer=dict(type=RowSparseSGD, lr=0.12, momentum=0.9, weight_decay=1e-4, rows="lazy_exact"),
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
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=epochs, val_interval=1)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
val_evaluator = [dict(type=TopKAccuracy, topk=(1, 5))]
test_evaluator = val_evaluator
default_hooks.checkpoint.type = ShardedCheckpointHook
custom_hooks = [dict(type=KNNGraphHook, start=100, check_interval=50, recall_min=0.9)]
# The least of three seeds was 93.9; one seed of the full softmax had 92.9.
expected = {"accuracy/top1": 92.5}
