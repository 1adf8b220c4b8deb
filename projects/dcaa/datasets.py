"""Data sets for segmentation whose pictures know the condition they were taken in.

    class                        pictures                                  condition
    ConditionSegDataset          any folder or list                        by a rule, see ``conditions``
    ACDCConditionDataset         rgb_anon/<condition>/<split>/...          the folder: fog, night, rain, snow
    CityscapesConditionDataset   leftImg8bit/<split>/...                   'clear'
    FoggyCityscapesDataset       leftImg8bit_foggy/<split>/..._beta_0.01   'fog'
    RainCityscapesDataset        leftImg8bit_rain/<split>/..._rain_...     'rain'
    BDD100KConditionDataset      images/10k/<split>/...                    weather, time of day, from the label file
    GTA5ConditionDataset         images, or one folder a style             'source', or the style

An item carries ``domain``, ``condition`` and ``cond_id`` beside what mmsegmentation's items carry. A set without labels
has no ``seg_map_path`` in its items, so that no transform can open one.
"""

from __future__ import annotations

from alimm.projects.dcaa.datasets_base import ConditionSegDataset
from alimm.projects.dcaa.datasets_bdd import BDD100KConditionDataset
from alimm.projects.dcaa.datasets_cityscapes import (
    ACDCConditionDataset,
    CityscapesConditionDataset,
    FoggyCityscapesDataset,
    RainCityscapesDataset,
)
from alimm.projects.dcaa.datasets_concat import ConcatConditionDataset
from alimm.projects.dcaa.datasets_gta import GTA5ConditionDataset

__all__ = [
    "ACDCConditionDataset",
    "BDD100KConditionDataset",
    "CityscapesConditionDataset",
    "ConcatConditionDataset",
    "ConditionSegDataset",
    "FoggyCityscapesDataset",
    "GTA5ConditionDataset",
    "RainCityscapesDataset",
]
