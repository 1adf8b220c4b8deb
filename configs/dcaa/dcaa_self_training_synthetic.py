"""Synthetic weather: both stages of DCAA, self-training in the last third.

Self-training is not quite the paper's here: all pixels stay aligned, the teacher moves, and its loss weighs a tenth,
since at full weight it taught itself mistakes.
"""

from mmengine.config import read_base

with read_base():
    from .dcaa_synthetic import *

model.self_training = dict(threshold=0.8, weight=0.1, hard_only=False, pseudo_on="all", momentum=0.02)
custom_hooks[-1].stages.append(dict(begin=2 * max_iters // 3, stage="self_train"))
expected = {"mIoU/adverse": 75.3}
