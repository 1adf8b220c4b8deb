"""Fashion-MNIST, 28 x 28; fetch it with tools/data/prepare_fashion_mnist.py."""

from mmengine.dataset import DefaultSampler

from alimm.datasets import FashionMNIST, PackInputs

train_dataloader = dict(
    batch_size=128,
    num_workers=0,  # the pictures are in memory and the augmentation runs on batches
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(type=FashionMNIST, split="train", pipeline=[dict(type=PackInputs)]),
)
test_dataloader = dict(
    batch_size=256,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(type=FashionMNIST, split="test", pipeline=[dict(type=PackInputs)]),
)
val_dataloader = test_dataloader
