"""Distribution Adaptive INT8 training: a hook that turns a model's convolutions and linear layers into INT8 ones."""

from alimm.projects.int8_training.conversion import Report, convert, layers_of, revert
from alimm.projects.int8_training.hook import Int8TrainingHook
from alimm.projects.int8_training.options import Int8Options

__all__ = ["Int8Options", "Int8TrainingHook", "Report", "convert", "layers_of", "revert"]
