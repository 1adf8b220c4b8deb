"""EmojiProducts at 48 x 48, style split: train on noto and twemoji, test on fluent."""

from mmengine.dataset import DefaultSampler

from alimm.datasets import EmojiProducts, PackInputs, Resize

pipeline = [dict(type=Resize, size=48), dict(type=PackInputs)]
train_dataloader = dict(
    batch_size=128,
    num_workers=0,  # the pictures are in memory and the augmentation runs on batches
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=EmojiProducts, split="style", subset="train", pipeline=pipeline),
)
test_dataloader = dict(
    batch_size=256,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=EmojiProducts, split="style", subset="test", pipeline=pipeline),
)
val_dataloader = test_dataloader
