"""fashion_mnist/resnet_tiny.py trained in INT8: the same recipe and one hook."""

from mmengine.config import read_base

with read_base():
    from ..fashion_mnist.resnet_tiny import *

from alimm.projects.int8_training import Int8TrainingHook

custom_hooks = [dict(type=Int8TrainingHook)]
