"""EmojiCoco, 16 pictures of 160 x 160; make it with tools/data/prepare_emoji_coco.py.

Validation and test read the training pictures, on purpose: the configs on this set ask whether a detector can learn
them by heart, which compares two ways to train within minutes. val.json holds pictures that were never trained on.
"""

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations, PackDetInputs, Resize
from mmdet.evaluation import CocoMetric
from mmengine.dataset import DefaultSampler

# MMEngine makes every import of a config lazy, and a lazy function cannot be called.
folder = str(__import__("alimm.paths", fromlist=["data_root"]).data_root() / "emoji_coco")
classes = ("animal-mammal", "clothing", "food-fruit", "musical-instrument", "plant-flower", "transport-ground")

pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=(160, 160), keep_ratio=True),
    dict(type=PackDetInputs, meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
dataset = dict(
    type=CocoDataset,
    data_root=folder,
    ann_file="train.json",
    data_prefix=dict(img="train/"),
    metainfo=dict(classes=classes),
    pipeline=pipeline,
)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dataset,
)
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(test_mode=True, **dataset),
)
test_dataloader = val_dataloader
val_evaluator = dict(type=CocoMetric, ann_file=f"{folder}/train.json", metric="bbox")
test_evaluator = val_evaluator
