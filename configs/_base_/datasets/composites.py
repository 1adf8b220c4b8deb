"""Cut-outs on grounds: a source of drawings, and a target of photographs, plain, dark, in haze and in rain.

Made by ``python tools/data/prepare_composites.py`` in alimm's data folder: ``$ALIMM_DATA``, or ``data`` in the cache.
"""

from mmcv.transforms import LoadImageFromFile
from mmengine.dataset import DefaultSampler
from mmseg.datasets.transforms import LoadAnnotations, RandomFlip

from alimm.projects.dcaa.composites import METAINFO
from alimm.projects.dcaa.datasets import ConditionSegDataset
from alimm.projects.dcaa.metric import ConditionIoUMetric
from alimm.projects.dcaa.packing import PackConditionInputs
from alimm.projects.dcaa.sampler import ConditionSampler
from alimm.projects.dcaa.styles import StyledDataset, StyliseSource

# MMEngine makes every import of a config lazy, and a lazy function cannot be called.
folder = str(__import__("alimm.paths", fromlist=["data_root"]).data_root() / "dcaa_composites")
conditions = ("plain", "dark", "haze", "rain")
num_classes = 5
files = dict(
    metainfo=METAINFO,
    img_suffix=".png",
    seg_map_suffix=".png",
    reduce_zero_label=False,
    data_prefix=dict(img_path="img", seg_map_path="labels"),
)
by_folder = dict(condition_rule=dict(type="folder", level=-2), conditions=conditions)

source_dataset = dict(
    type=ConditionSegDataset,
    data_root=f"{folder}/source/train",
    domain="source",
    condition_rule=dict(type="constant", condition="source"),
    pipeline=[
        dict(type=LoadImageFromFile),
        dict(type=LoadAnnotations),
        dict(type=RandomFlip, prob=0.5),
        dict(type=PackConditionInputs),
    ],
    **files,
)
target_dataset = dict(
    type=ConditionSegDataset,
    data_root=f"{folder}/target/train",
    domain="target",
    with_labels=False,
    pipeline=[dict(type=LoadImageFromFile), dict(type=RandomFlip, prob=0.5), dict(type=PackConditionInputs)],
    **by_folder,
    **files,
)
# The same pictures, each in the colours of any condition of the target.
styled_source_dataset = dict(
    type=StyledDataset,
    dataset={
        **source_dataset,
        "pipeline": [
            dict(type=LoadImageFromFile),
            dict(type=LoadAnnotations),
            dict(type=RandomFlip, prob=0.5),
            dict(type=StyliseSource),
            dict(type=PackConditionInputs),
        ],
    },
    styles={**target_dataset, "pipeline": []},
)
sampler = dict(type=ConditionSampler)
train_dataloader = dict(
    source=dict(batch_size=4, num_workers=0, sampler=sampler, dataset=styled_source_dataset),
    target=dict(batch_size=4, num_workers=0, sampler=sampler, dataset=target_dataset),
)
val_dataloader = dict(
    batch_size=20,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=ConditionSegDataset,
        data_root=f"{folder}/target/val",
        domain="target",
        pipeline=[dict(type=LoadImageFromFile), dict(type=LoadAnnotations), dict(type=PackConditionInputs)],
        **by_folder,
        **files,
    ),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type=ConditionIoUMetric, conditions=conditions, clear_names=("plain",))
