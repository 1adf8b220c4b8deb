"""One million classes in a hierarchy of 10,000 x 100, made on the fly: what a step costs, and that it learns.

A class is seen four times in all. One in a hundred classes is active in a step; the test takes 20,000 samples, since a
prediction looks at every class.
"""

from mmengine.config import read_base
from mmengine.dataset import DefaultSampler
from mmengine.optim import CosineAnnealingLR, LinearLR
from mmengine.runner import EpochBasedTrainLoop, TestLoop, ValLoop

with read_base():
    from .._base_.default_runtime import *

from alimm.datasets import HierarchyVectors
from alimm.evaluation import TopKAccuracy
from alimm.hooks import ShardedCheckpointHook
from alimm.models import ImageClassifier, VectorBackbone, VectorPreprocessor
from alimm.optim import RowSparseSGD, ShardedOptimWrapper
from alimm.projects.knn_softmax import KNNGraphHook, KNNSoftmaxHead

epochs, warmup = 2, 0.1
hierarchy = dict(type=HierarchyVectors, coarse=10_000, fine=100, dim=128, spread=0.5, noise=1.0)

model = dict(
    type=ImageClassifier,
    data_preprocessor=dict(type=VectorPreprocessor),
    backbone=dict(type=VectorBackbone, in_channels=128, out_channels=128),
    head=dict(
        type=KNNSoftmaxHead,
        method="knn",
        num_classes=1_000_000,
        in_channels=128,
        active=0.01,
        neighbours=32,
        scale=16.0,
        init_std=0.01,  # a class is seen four times: its row has to turn at the first
        topk=5,
    ),
)
train_dataloader = dict(
    batch_size=256,
    num_workers=0,  # a batch is made at once, faster than it can be handed over
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(subset="train", samples_per_class=2, **hierarchy),
)
test_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(subset="test", num_samples=20_000, **hierarchy),
)
val_dataloader = test_dataloader
optim_wrapper = dict(
    type=ShardedOptimWrapper,
    optimizer=dict(type=RowSparseSGD, lr=0.1, momentum=0.9, weight_decay=0.0, rows="lazy_exact"),
    paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0.1))),
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
# An exact graph of a million rows is 2.6e14 FLOP, hours on a few cores; an inverted file finds most of it in minutes.
custom_hooks = [
    dict(type=KNNGraphHook, start=1_000, check_interval=2_000, recall_min=0.5, sample=64, backend="faiss_ivf")
]
# Built and started, never run to its end: no accuracy is promised yet.
expected = {"accuracy/top1": 0.0}
