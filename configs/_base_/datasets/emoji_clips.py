"""EmojiClips, 24 clips of 8 frames of 64 x 64; make them with tools/data/prepare_emoji_clips.py.

A config says which labels it learns (``*_motion.txt`` or ``*_product.txt``) and sets the pipelines. Validation and test
read the training clips, on purpose: the configs on this set ask whether a recogniser can learn them by heart, which
compares two ways to train within minutes. The lists of val name clips that were never trained on.
"""

from mmaction.datasets import RawframeDataset
from mmaction.evaluation import AccMetric
from mmengine.dataset import DefaultSampler

# MMEngine makes every import of a config lazy, and a lazy function cannot be called.
folder = str(__import__("alimm.paths", fromlist=["data_root"]).data_root() / "emoji_clips")

dataset = dict(type=RawframeDataset, data_prefix=dict(img=folder))
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(**dataset),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(test_mode=True, **dataset),
)
val_evaluator = dict(type=AccMetric)
test_evaluator = val_evaluator
