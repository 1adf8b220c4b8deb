"""The image classifier and what it is made of."""

from alimm.models.backbones import ResNetTiny
from alimm.models.batch_augments import BatchColorJitter, BatchCutout, BatchRandomAffine
from alimm.models.classifier import ImageClassifier
from alimm.models.flatten_neck import FlattenNeck
from alimm.models.necks import GlobalPoolNeck
from alimm.models.preprocessor import ClsDataPreprocessor
from alimm.models.vector_backbone import VectorBackbone, VectorPreprocessor

__all__ = [
    "BatchColorJitter",
    "BatchCutout",
    "BatchRandomAffine",
    "ClsDataPreprocessor",
    "FlattenNeck",
    "GlobalPoolNeck",
    "ImageClassifier",
    "ResNetTiny",
    "VectorBackbone",
    "VectorPreprocessor",
]
