"""BDD100K, whose label files tell weather and time of day."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from alimm.projects.dcaa.conditions import Found
from alimm.projects.dcaa.datasets_base import SplitDataset, Splits
from alimm.registry import DATASETS


@DATASETS.register_module()
class BDD100KConditionDataset(SplitDataset):
    """BDD100K, with the condition from the attributes in its label file.

    Args:
        attributes_file: JSON, a list of ``{'name': ..., 'attributes': {'weather': ..., 'timeofday': ...}}``; one for
            each split where there are several. Relative to ``data_root``.
        scheme: ``'weather'``, ``'timeofday'``, or ``'both'``: night where it is night, else the weather.
        unknown: what to do with pictures that the file lacks or calls undefined, ``'error'`` or ``'skip'``.
        rename: other names, such as ``{'rainy': 'rain', 'snowy': 'snow', 'foggy': 'fog'}``.
        split: ``'train'`` or ``'val'``, or several.
        **kwargs: of `ConditionSegDataset`.
    """

    SCHEMES: ClassVar[tuple[str, ...]] = ("weather", "timeofday", "both")

    def __init__(
        self,
        attributes_file: str | Sequence[str],
        scheme: str = "both",
        unknown: str = "error",
        rename: Mapping[str, str] | None = None,
        split: Splits = "train",
        data_prefix: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        if scheme not in self.SCHEMES:
            raise ValueError(f"scheme must be one of {', '.join(self.SCHEMES)}, got {scheme!r}")
        self.scheme = scheme
        self.attributes_files = (attributes_file,) if isinstance(attributes_file, str) else tuple(attributes_file)
        super().__init__(
            split=split,
            data_prefix=dict(data_prefix or {"img_path": "images/10k", "seg_map_path": "labels/sem_seg/masks"}),
            condition_rule={"type": "list", "mapping": {}, "unknown": unknown, "rename": dict(rename or {})},
            **kwargs,
        )

    def _resolve(self, paths: list[str]) -> tuple[Found, tuple[str, ...]]:
        mapping: dict[str, str] = {}
        for file in self.attributes_files:
            mapping |= _attributes(Path(self.data_root or "", file), self.scheme)
        self.condition_rule["mapping"] = mapping
        return super()._resolve(paths)


def _attributes(path: Path, scheme: str) -> dict[str, str]:
    """Stem of each picture -> condition."""
    if not path.is_file():
        raise ValueError(f"BDD100KConditionDataset: there is no label file {path}: mend attributes_file")
    entries = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(entries, list) or not all("name" in entry and "attributes" in entry for entry in entries):
        raise ValueError(
            f"{path} must hold a list of objects with 'name' and 'attributes', as BDD100K's label files do"
        )
    found = {}
    for entry in entries:
        weather, time = (str(entry["attributes"].get(key, "")) for key in ("weather", "timeofday"))
        at_night = scheme == "timeofday" or (scheme == "both" and time == "night")
        found[PurePosixPath(entry["name"]).stem] = time if at_night else weather
    return found
