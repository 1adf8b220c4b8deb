"""DCAA: semantic segmentation adapted to mixed weather without labels, in MMSegmentation (AAAI 2021).

Importing this is cheap: it names the parts to the registries. MMSegmentation is imported with the first part that a
config asks for, and where it is not installed that part says which extra brings it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from alimm import compat
from alimm.registry import (
    DATA_SAMPLERS,
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODEL_WRAPPERS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    TRANSFORMS,
    Registry,
)

_PARTS: dict[str, tuple[Registry, str]] = {
    "ACDCConditionDataset": (DATASETS, "datasets"),
    "AdaBNHook": (HOOKS, "adabn"),
    "AdversarialSegmentor": (MODELS, "baselines"),
    "AlternatingOptimWrapperConstructor": (OPTIM_WRAPPER_CONSTRUCTORS, "optim"),
    "AttentiveFusionHead": (MODELS, "head"),
    "BDD100KConditionDataset": (DATASETS, "datasets"),
    "CityscapesConditionDataset": (DATASETS, "datasets"),
    "ConcatConditionDataset": (DATASETS, "datasets"),
    "ConditionDecoder": (MODELS, "decoder"),
    "ConditionIoUMetric": (METRICS, "metric"),
    "ConditionSampler": (DATA_SAMPLERS, "sampler"),
    "ConditionSegDataset": (DATASETS, "datasets"),
    "DCAASegmentor": (MODELS, "segmentor"),
    "DCAAVisualizationHook": (HOOKS, "inference"),
    "FoggyCityscapesDataset": (DATASETS, "datasets"),
    "GTA5ConditionDataset": (DATASETS, "datasets"),
    "MeanTeacherSegmentor": (MODELS, "mean_teacher"),
    "MultiLoaderTrainLoop": (LOOPS, "loop"),
    "PackConditionInputs": (TRANSFORMS, "packing"),
    "PixelDiscriminator": (MODELS, "discriminator"),
    "RainCityscapesDataset": (DATASETS, "datasets"),
    "SourceSegmentor": (MODELS, "baselines"),
    "StageHook": (HOOKS, "stage_hook"),
    "SteppedDataParallel": (MODEL_WRAPPERS, "wrapper"),
    "StrongAugment": (TRANSFORMS, "augment"),
    "StyledDataset": (DATASETS, "styles"),
    "StyliseSource": (TRANSFORMS, "styles"),
    "SyntheticWeatherDataset": (DATASETS, "synthetic.dataset"),
}

__all__ = list(_PARTS)

compat.apply_to_imports()
for _name, (_registry, _module) in _PARTS.items():
    _registry.register_lazy(_name, f"alimm.projects.dcaa.{_module}", needs="mmseg")


def __getattr__(name: str) -> Any:
    if name not in _PARTS:
        raise AttributeError(f"module 'alimm.projects.dcaa' has no attribute {name!r}")
    return getattr(import_module(f"alimm.projects.dcaa.{_PARTS[name][1]}"), name)
