"""GTA5: the labelled source, translated into the styles of the target or not."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from alimm.projects.dcaa.conditions import Found, resolve_conditions
from alimm.projects.dcaa.datasets_base import CITYSCAPES, ConditionSegDataset
from alimm.registry import DATASETS

TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip
"""Label id of Cityscapes and GTA5 -> training id; every other id is ignored."""
LAST_LABEL_ID = 34
IGNORED = 255


@DATASETS.register_module()
class GTA5ConditionDataset(ConditionSegDataset):
    """GTA5, the labelled source, as it is or translated into the styles of the target's conditions.

    Args:
        styles: condition -> folder of the translated pictures, below ``data_root`` or with its full path. Each picture
            comes once for each style, with the same label. None takes the pictures of ``data_prefix['img_path']``.
        label_ids: what the label files hold, ``'gta'`` (label ids, as they are downloaded) or ``'train'``.
        **kwargs: of `ConditionSegDataset`.
    """

    METAINFO: ClassVar[dict[str, Any]] = CITYSCAPES

    def __init__(
        self,
        styles: Mapping[str, str] | None = None,
        label_ids: str = "gta",
        img_suffix: str = ".png",
        domain: str = "source",
        data_prefix: Mapping[str, str] | None = None,
        condition_rule: Mapping[str, Any] | None = None,
        conditions: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if label_ids not in ("gta", "train"):
            raise ValueError(f"label_ids must be 'gta' or 'train', got {label_ids!r}")
        if styles is not None and (not styles or len(set(styles.values())) < len(styles) or condition_rule is not None):
            raise ValueError(
                f"styles must name a folder of its own for each condition, and leave out condition_rule; got "
                f"{dict(styles)!r} and {condition_rule!r}"
            )
        self.styles, self.label_ids = dict(styles or {}), label_ids
        super().__init__(
            img_suffix=img_suffix,
            domain=domain,
            data_prefix=dict(data_prefix or {"img_path": "images", "seg_map_path": "labels"}),
            condition_rule=condition_rule or {"type": "constant", "condition": "source"},
            conditions=tuple(self.styles) if self.styles and conditions is None else conditions,
            **kwargs,
        )

    def _pictures(self) -> list[tuple[str, str]]:
        if not self.styles:
            return super()._pictures()
        roots = self._style_roots()
        return [pair for root in roots.values() for pair in (self._listed if self.ann_file else self._in_folder)(root)]

    def _style_roots(self) -> dict[str, str]:
        return {name: os.path.join(self.data_root or "", folder) for name, folder in self.styles.items()}

    def _resolve(self, paths: list[str]) -> tuple[Found, tuple[str, ...]]:
        if not self.styles:
            return super()._resolve(paths)
        roots = {Path(root): name for name, root in self._style_roots().items()}
        table = {path: next(roots[folder] for folder in Path(path).parents if folder in roots) for path in paths}
        return resolve_conditions(paths, {"type": "list", "mapping": table}, self.given_conditions)

    def _label_map(self) -> dict[int, int] | None:
        if self.label_ids == "train":
            return super()._label_map()
        chosen = self.label_map or {}
        train_ids = {number: TRAIN_IDS.get(number, IGNORED) for number in range(LAST_LABEL_ID + 1)}
        return {number: chosen.get(train_id, train_id) for number, train_id in train_ids.items()}
