"""The recogniser of emoji_products/resnet_tiny_style.py, trained in INT8: the same recipe and one hook more."""

from mmengine.config import read_base

with read_base():
    from ..emoji_products.resnet_tiny_style import *

from alimm.projects.int8_training import Int8TrainingHook

custom_hooks.append(dict(type=Int8TrainingHook))
