"""A classifier of the interface that the inferencers use, small enough to compute by hand."""

from typing import ClassVar

import numpy as np
import torch
from mmengine.model import BaseModel
from PIL import Image

from alimm.registry import DATASETS, MODELS, TRANSFORMS
from alimm.structures import ClsDataSample


@MODELS.register_module(force=True)
class ToyClassifier(BaseModel):
    """The feature is the mean colour, the score of class c the softmax of channel c."""

    def __init__(self, scale=0.1):
        super().__init__(data_preprocessor={"type": "alimm.ToyPreprocessor"})
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.head = torch.nn.Conv2d(3, 3, 1, bias=False)
        torch.nn.init.dirac_(self.head.weight)
        self.batch_sizes = []

    def embed(self, inputs):
        self.batch_sizes.append(len(inputs))
        return self.head(inputs.float()).mean(dim=(2, 3)) * self.scale

    def forward(self, inputs, data_samples=None, mode="tensor"):
        if mode == "tensor":
            return self.head(inputs.float())
        features = self.embed(inputs)
        return [
            sample.set_pred_score(row.softmax(0)).set_feature(row)
            for sample, row in zip(data_samples, features, strict=True)
        ]


@MODELS.register_module(force=True)
class ToyPreprocessor(torch.nn.Module):
    def forward(self, data, training=False):
        return {"inputs": torch.stack(list(data["inputs"])), "data_samples": data["data_samples"]}


@DATASETS.register_module(force=True)
class Toy(torch.utils.data.Dataset):
    METAINFO: ClassVar = {"classes": ["r", "g", "b"]}


@TRANSFORMS.register_module(force=True)
class LoadImageToy:
    def __call__(self, results):
        with Image.open(results["img_path"]) as image:
            results["img"] = np.asarray(image.convert("RGB"))
        return results


@TRANSFORMS.register_module(force=True)
class LoadImageBGRToy(LoadImageToy):
    def __call__(self, results):
        results = super().__call__(results)
        results["img"] = results["img"][..., ::-1]
        return results


@TRANSFORMS.register_module(force=True)
class PackToy:
    def __call__(self, results):
        inputs = torch.from_numpy(results["img"][:4, :4].transpose(2, 0, 1).copy())
        return {"inputs": inputs, "data_samples": ClsDataSample()}


CONFIG = """
default_scope = 'alimm'
model = dict(type='ToyClassifier', scale=0.1)
pipeline = [dict(type='LoadImageToy'), dict(type='PackToy')]
test_dataloader = dict(dataset=dict(
    type='Toy', metainfo=dict(classes=['red', 'green', 'blue']), pipeline=pipeline))
"""
