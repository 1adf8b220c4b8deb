"""Several data sets with conditions as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset, ConcatDataset
from numpy.typing import NDArray

from alimm.projects.dcaa.conditions import check_names, few
from alimm.projects.dcaa.datasets_base import condition_ids_of
from alimm.registry import DATASETS


@DATASETS.register_module()
class ConcatConditionDataset(ConcatDataset):
    """Several data sets with conditions as one, whose ids mean the same throughout.

    The sets that are given stay as they are; this one holds copies of their items with the joint ids.

    Args:
        datasets: data sets, or their configs. All need ``conditions`` and the same classes.
        conditions: the joint names in the order of their ids; None takes them in the order of the sets.
        lazy_init: look for pictures later.

    Raises:
        ValueError: classes differ, a set knows no conditions, or has one that is not among ``conditions``.
    """

    datasets: list[Any]

    def __init__(
        self, datasets: Sequence[Any], conditions: Sequence[str] | None = None, lazy_init: bool = False
    ) -> None:
        built = [DATASETS.build(dataset) if isinstance(dataset, dict) else dataset for dataset in datasets]
        built = [part for one in built for part in (one.datasets if isinstance(one, ConcatConditionDataset) else [one])]
        self.given_conditions = None if conditions is None else check_names(conditions)
        _check_alike(built)
        keys = sorted({key for dataset in built for key in dataset.metainfo})
        super().__init__(built, lazy_init=lazy_init, ignore_keys=keys)

    def full_init(self) -> None:
        """Load the sets and give their items the joint ids."""
        if self._fully_initialized:
            return
        for dataset in self.datasets:
            dataset.full_init()
        own = [tuple(dataset.conditions) for dataset in self.datasets]
        names = self.given_conditions or tuple(dict.fromkeys(name for some in own for name in some))
        if foreign := sorted({name for some in own for name in some} - set(names)):
            raise ValueError(
                f"ConcatConditionDataset: the sets have conditions that are not among {', '.join(names)}: "
                f"{few(foreign)}. Add them to conditions, or give them other names with rename={{...}} in the "
                f"set's condition rule"
            )
        self.datasets = [_with_conditions(dataset, names) for dataset in self.datasets]
        self._metainfo["conditions"] = names
        super().full_init()

    @property
    def conditions(self) -> tuple[str, ...]:
        """Joint names of the conditions, in the order of their ids."""
        self.full_init()
        return tuple(self._metainfo["conditions"])

    def condition_ids(self) -> NDArray[np.int64]:
        """The condition of each item, int64 (len,)."""
        return condition_ids_of(self)


def _check_alike(datasets: Sequence[Any]) -> None:
    if not datasets:
        raise ValueError("ConcatConditionDataset: datasets must hold at least one data set, got none")
    for number, dataset in enumerate(datasets):
        if not isinstance(dataset, BaseDataset) or "conditions" not in dir(dataset):
            raise ValueError(
                f"ConcatConditionDataset: data set {number}, a {type(dataset).__name__}, does not know conditions; use "
                f"ConditionSegDataset or one like it"
            )
        first, classes = (tuple(one.metainfo.get("classes", ())) for one in (datasets[0], dataset))
        if classes != first:
            differing = sorted(set(first) ^ set(classes)) or ["their order"]
            raise ValueError(
                f"ConcatConditionDataset: data set {number} ({type(dataset).__name__}) has other classes than the "
                f"first ({type(datasets[0]).__name__}): they differ in {few(differing)}. Give both the same metainfo"
            )


def _with_conditions(dataset: Any, names: tuple[str, ...]) -> Any:
    """A copy of the set in which ids count in ``names``."""
    items = [dataset.get_data_info(row) for row in range(len(dataset))]
    for item in items:
        item["cond_id"] = names.index(item["condition"])
        del item["sample_idx"]
    copied = dataset._copy_without_annotation({})
    copied._metainfo["conditions"] = names
    copied.data_list = items
    if copied.serialize_data:
        copied.data_bytes, copied.data_address = copied._serialize_data()
    return copied
