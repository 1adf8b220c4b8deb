"""Synthetic weather: DCAA's first stage throughout, every condition aligned by its own discriminator and all by one."""

from mmengine.config import read_base

with read_base():
    from .source_only_synthetic import *

from torch.optim import Adam

from alimm.projects.dcaa.head import AttentiveFusionHead
from alimm.projects.dcaa.segmentor import DCAASegmentor
from alimm.projects.dcaa.stage_hook import StageHook

model.update(
    type=DCAASegmentor,
    discriminator=dict(channels=(16, 32, 64, 64), num_strides=2),
    adversarial_weight=0.03,
)
model.decode_head = dict(
    type=AttentiveFusionHead, num_conditions=len(conditions), branch=model.decode_head, dropouts=(0.0, 0.0, 0.0)
)
train_dataloader.source.dataset = styled_source_dataset
train_dataloader.target = dict(batch_size=5, num_workers=0, sampler=sampler, dataset=target_dataset)
optim_wrapper.discriminator = dict(type=Adam, lr=1e-3, betas=(0.9, 0.99))
param_scheduler.disc = [dict(type=PolyLR, power=0.9, eta_min=1e-6, begin=0, end=max_iters, by_epoch=False)]
custom_hooks.append(dict(type=StageHook, stages=[dict(begin=0, stage="align")]))
expected = {"mIoU/adverse": 76.3}
