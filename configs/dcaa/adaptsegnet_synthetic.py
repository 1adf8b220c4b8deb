"""Synthetic weather: one discriminator on the output (Tsai et al., CVPR 2018)."""

from mmengine.config import read_base

with read_base():
    from .source_only_synthetic import *

from torch.optim import Adam

from alimm.projects.dcaa.baselines import AdversarialSegmentor

model.update(
    type=AdversarialSegmentor,
    adversarial_weight=0.01,
    discriminator=dict(layout="adaptsegnet", channels=(16, 32, 64, 64)),
)
train_dataloader.target = dict(batch_size=5, num_workers=0, sampler=sampler, dataset=target_dataset)
optim_wrapper.discriminator = dict(type=Adam, lr=1e-3, betas=(0.9, 0.99))
param_scheduler.disc = [dict(type=PolyLR, power=0.9, eta_min=1e-6, begin=0, end=max_iters, by_epoch=False)]
expected = {"mIoU/adverse": 59.5}
