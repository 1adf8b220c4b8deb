"""Drawn streets: a labelled source in clear weather; an unlabelled target in clear weather, fog, rain, night, snow."""

from mmengine.dataset import DefaultSampler
from mmseg.datasets.transforms import RandomFlip

from alimm.projects.dcaa.metric import ConditionIoUMetric
from alimm.projects.dcaa.packing import PackConditionInputs
from alimm.projects.dcaa.sampler import ConditionSampler
from alimm.projects.dcaa.styles import StyledDataset, StyliseSource
from alimm.projects.dcaa.synthetic.dataset import SyntheticWeatherDataset

conditions = ("clear", "fog", "rain", "night", "snow")
# How far the target's colours are from the source's, and how strong its weather is.
gap = dict(alpha=0.5, severity=0.8)

source_dataset = dict(
    type=SyntheticWeatherDataset,
    **gap,
    domain="source",
    num=400,
    with_labels=True,
    pipeline=[dict(type=RandomFlip, prob=0.5), dict(type=PackConditionInputs)],
)
# The same pictures, each in the colours of any condition of the target.
styled_source_dataset = dict(
    type=StyledDataset,
    dataset={
        **source_dataset,
        "pipeline": [dict(type=RandomFlip, prob=0.5), dict(type=StyliseSource), dict(type=PackConditionInputs)],
    },
    styles=dict(
        type=SyntheticWeatherDataset,
        **gap,
        domain="target",
        num=120,
        conditions=conditions,
        with_labels=False,
        pipeline=[],
    ),
)
target_dataset = dict(
    type=SyntheticWeatherDataset,
    **gap,
    domain="target",
    num=120,
    conditions=conditions,
    with_labels=False,
    pipeline=[dict(type=RandomFlip, prob=0.5), dict(type=PackConditionInputs)],
)
sampler = dict(type=ConditionSampler)
train_dataloader = dict(
    source=dict(batch_size=5, num_workers=0, sampler=sampler, dataset=styled_source_dataset),
    target=dict(batch_size=5, num_workers=0, sampler=sampler, dataset=target_dataset),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=SyntheticWeatherDataset,
        **gap,
        domain="target",
        split="val",
        seed=2,
        num=40,
        conditions=conditions,
        with_labels=True,
        pipeline=[dict(type=PackConditionInputs)],
    ),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type=ConditionIoUMetric, conditions=conditions)
