"""Synthetic weather: one discriminator on the entropy of the output (Vu et al., CVPR 2019)."""

from mmengine.config import read_base

with read_base():
    from .adaptsegnet_synthetic import *

model.update(input="entropy")
expected = {"mIoU/adverse": 54.2}
