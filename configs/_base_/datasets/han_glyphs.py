"""HanGlyphs at 32 x 32; render it with tools/data/prepare_han_glyphs.py. Train on five families, test on wqy-zenhei.

A config chooses the classes: ``classes`` holds arguments of the data set that both sides get alike.
"""

from mmengine.dataset import DefaultSampler

from alimm.datasets import HanGlyphs, PackInputs

pipeline = [dict(type=PackInputs)]
train_dataloader = dict(
    batch_size=256,
    num_workers=0,  # the pictures are in memory and the augmentation runs on batches
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=HanGlyphs, subset="train", test_family="wqy-zenhei", pipeline=pipeline),
)
test_dataloader = dict(
    batch_size=500,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=HanGlyphs, subset="test", test_family="wqy-zenhei", pipeline=pipeline),
)
val_dataloader = test_dataloader
