"""The 1,914 products of EmojiProducts as classes, two pictures each, tested on the vendor that training never saw.

Too few classes for KNN softmax to save time; a run of minutes on pictures that the package brings
along, to see it work.
"""

from mmengine.config import read_base

with read_base():
    from ..emoji_products.resnet_tiny_style import *

from alimm.evaluation import TopKAccuracy
from alimm.hooks import ShardedCheckpointHook
from alimm.optim import RowSparseAdamW, ShardedOptimWrapper
from alimm.projects.knn_softmax import KNNGraphHook, KNNSoftmaxHead

model.head = dict(
    type=KNNSoftmaxHead,
    method="knn",
    num_classes=1_914,
    in_channels=256,
    active=0.25,
    neighbours=16,
    scale=16.0,
    target="gt_identity",
    topk=5,
)
optim_wrapper = dict(
    type=ShardedOptimWrapper,
    optimizer=dict(type=RowSparseAdamW, lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05, rows="frozen"),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
)
val_evaluator = [dict(type=TopKAccuracy, topk=(1, 5), target="gt_identity")]
test_evaluator = val_evaluator
default_hooks.checkpoint.type = ShardedCheckpointHook
custom_hooks = [dict(type=KNNGraphHook, start=100, check_interval=50, recall_min=0.7)]
# Built and started, never run to its end: no accuracy is promised yet.
expected = {"accuracy/top1": 0.0}
