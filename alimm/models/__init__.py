"""The image classifier and what it is made of."""

from alimm.models.backbones import ResNetTiny
from alimm.models.batch_augments import BatchColorJitter, BatchCutout, BatchRandomAffine
from alimm.models.classifier import ImageClassifier
from alimm.models.necks import GlobalPoolNeck
from alimm.models.preprocessor import ClsDataPreprocessor

__all__ = [
    "BatchColorJitter",
    "BatchCutout",
    "BatchRandomAffine",
    "ClsDataPreprocessor",
    "GlobalPoolNeck",
    "ImageClassifier",
    "ResNetTiny",
]
