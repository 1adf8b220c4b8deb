"""ACDC, and Cityscapes with its foggy and rainy versions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar

from alimm.projects.dcaa.conditions import check_names, few
from alimm.projects.dcaa.datasets_base import SplitDataset, Splits
from alimm.registry import DATASETS

ACDC_CONDITIONS = ("fog", "night", "rain", "snow")


@DATASETS.register_module()
class ACDCConditionDataset(SplitDataset):
    """ACDC: fog, night, rain and snow, from the folders of the original download.

    The pictures of the same places in good weather (the folders ``*_ref``) are left out.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'`` (which has no labels), or several.
        conditions: which of the four, in the order of their ids.
        **kwargs: of `ConditionSegDataset`.

    Raises:
        ValueError: another condition is asked for, or the folder does not hold what it should.
    """

    def __init__(
        self,
        split: Splits = "train",
        conditions: Sequence[str] = ACDC_CONDITIONS,
        img_suffix: str = "_rgb_anon.png",
        seg_map_suffix: str = "_gt_labelTrainIds.png",
        data_prefix: Mapping[str, str] | None = None,
        condition_rule: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if foreign := sorted(set(check_names(conditions)) - set(ACDC_CONDITIONS)):
            raise ValueError(f"ACDC has the conditions {', '.join(ACDC_CONDITIONS)}, not {few(foreign)}")
        super().__init__(
            split=split,
            conditions=conditions,
            img_suffix=img_suffix,
            seg_map_suffix=seg_map_suffix,
            data_prefix=dict(data_prefix or {"img_path": "rgb_anon", "seg_map_path": "gt"}),
            condition_rule=condition_rule or {"type": "folder", "level": 0, "unknown": "skip"},
            **kwargs,
        )

    def _wanted(self, name: str) -> bool:
        parts = PurePosixPath(name).parts
        return len(parts) > 2 and parts[1] in self.splits

    def _wanted_names(self) -> str:
        return f"<condition>/{'|'.join(self.splits)}/.../*{self.img_suffix}"


@DATASETS.register_module()
class CityscapesConditionDataset(SplitDataset):
    """Cityscapes, all of the condition ``'clear'`` unless a rule says otherwise.

    Args:
        split: ``'train'``, ``'val'`` or ``'test'``, or several.
        **kwargs: of `ConditionSegDataset`.
    """

    CONDITION: ClassVar[str] = "clear"
    FOLDER: ClassVar[str] = "leftImg8bit"

    def __init__(
        self,
        split: Splits = "train",
        img_suffix: str = "_leftImg8bit.png",
        seg_map_suffix: str = "_gtFine_labelTrainIds.png",
        data_prefix: Mapping[str, str] | None = None,
        condition_rule: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            split=split,
            img_suffix=img_suffix,
            seg_map_suffix=seg_map_suffix,
            data_prefix=dict(data_prefix or {"img_path": self.FOLDER, "seg_map_path": "gtFine"}),
            condition_rule=condition_rule or {"type": "constant", "condition": self.CONDITION},
            **kwargs,
        )


class CityscapesVariants(CityscapesConditionDataset):
    """Pictures made from Cityscapes', with the numbers of the making in their names; labels are those of Cityscapes.

    Args:
        parameters: group of ``NAME`` -> its numbers that are taken, one or several; None takes all.
        **kwargs: of `CityscapesConditionDataset`.
    """

    NAME: ClassVar[re.Pattern[str]]

    def __init__(self, parameters: Mapping[str, float | Sequence[float] | None], **kwargs: Any) -> None:
        self.parameters = {key: _numbers(given) for key, given in parameters.items() if given is not None}
        super().__init__(**{"img_suffix": ".png", **kwargs})

    def _wanted(self, name: str) -> bool:
        match = self.NAME.fullmatch(name)
        if match is None or not super()._wanted(name):
            return False
        return all(float(match[key]) in values for key, values in self.parameters.items())

    def _wanted_names(self) -> str:
        chosen = [f"{key} in {sorted(values)}" for key, values in self.parameters.items()]
        return f"{super()._wanted_names()} named {self.NAME.pattern}" + (f" with {', '.join(chosen)}" if chosen else "")

    def _label_name(self, name: str) -> str:
        match = self.NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{type(self).__name__}: {name} is not named {self.NAME.pattern}: mend the list")
        return f"{match['stem']}{self.seg_map_suffix}"


@DATASETS.register_module()
class FoggyCityscapesDataset(CityscapesVariants):
    """Foggy Cityscapes, of the condition ``'fog'`` unless a rule says otherwise.

    Args:
        beta: density of the fog as the file names write it (0.005, 0.01 or 0.02), several, or None for all.
        **kwargs: of `CityscapesConditionDataset`. ``condition_rule=dict(type='regex',
            pattern='(?P<condition>beta_[0-9.]+)[.]png')`` makes each density a condition of its own.
    """

    CONDITION = "fog"
    FOLDER = "leftImg8bit_foggy"
    NAME = re.compile(r"(?P<stem>.+)_leftImg8bit_foggy_beta_(?P<beta>[0-9.]+)\.png")

    def __init__(self, beta: float | Sequence[float] | None = 0.01, **kwargs: Any) -> None:
        super().__init__({"beta": beta}, **kwargs)


@DATASETS.register_module()
class RainCityscapesDataset(CityscapesVariants):
    """Rain Cityscapes, of the condition ``'rain'`` unless a rule says otherwise: several pictures of one scene.

    Each argument chooses among the numbers in the file names; None takes all.

    Args:
        alpha: attenuation by rain.
        beta: attenuation by fog.
        dropsize: size of the drops.
        pattern: number of the rain's pattern.
        **kwargs: of `CityscapesConditionDataset`.
    """

    CONDITION = "rain"
    FOLDER = "leftImg8bit_rain"
    NAME = re.compile(
        r"(?P<stem>.+)_leftImg8bit_rain_alpha_(?P<alpha>[0-9.]+)_beta_(?P<beta>[0-9.]+)"
        r"_dropsize_(?P<dropsize>[0-9.]+)_pattern_(?P<pattern>[0-9]+)\.png"
    )

    def __init__(
        self,
        alpha: float | Sequence[float] | None = None,
        beta: float | Sequence[float] | None = None,
        dropsize: float | Sequence[float] | None = None,
        pattern: int | Sequence[int] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__({"alpha": alpha, "beta": beta, "dropsize": dropsize, "pattern": pattern}, **kwargs)


def _numbers(given: float | Sequence[float]) -> set[float]:
    return {float(value) for value in ([given] if isinstance(given, int | float) else given)}
