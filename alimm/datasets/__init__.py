"""Data sets, transforms and samplers. OpenCV and Pillow are imported when a picture is first touched."""

from alimm.datasets.emoji_products import EmojiProducts
from alimm.datasets.fashion_mnist import FashionMNIST
from alimm.datasets.geometry import CenterCrop, Pad, RandomAffine, RandomFlip, RandomResizedCrop, Resize
from alimm.datasets.han_glyphs import HanGlyphs
from alimm.datasets.hierarchy import HierarchyVectors
from alimm.datasets.image_list import ImageList
from alimm.datasets.loading import LoadImage
from alimm.datasets.packing import PackInputs
from alimm.datasets.photometry import ColorJitter, RandomErasing, RandomGrayscale
from alimm.datasets.samplers import ClassBalancedSampler, IdentityBatchSampler
from alimm.datasets.transforms import Transform

__all__ = [
    "CenterCrop",
    "ClassBalancedSampler",
    "ColorJitter",
    "EmojiProducts",
    "FashionMNIST",
    "HanGlyphs",
    "HierarchyVectors",
    "IdentityBatchSampler",
    "ImageList",
    "LoadImage",
    "PackInputs",
    "Pad",
    "RandomAffine",
    "RandomErasing",
    "RandomFlip",
    "RandomGrayscale",
    "RandomResizedCrop",
    "Resize",
    "Transform",
]
