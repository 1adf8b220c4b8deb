"""Pictures for segmentation that know the condition they were taken in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar

import numpy as np
from mmengine import fileio
from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset, CityscapesDataset
from numpy.typing import NDArray

from alimm.projects.dcaa.conditions import Found, check_names, few, resolve_conditions
from alimm.registry import DATASETS

Item = dict[str, Any]
Splits = str | Sequence[str]

CITYSCAPES: dict[str, Any] = dict(CityscapesDataset.METAINFO)


@DATASETS.register_module()
class ConditionSegDataset(BaseSegDataset):
    """Pictures of a folder or a list, each with its condition.

    Args:
        condition_rule: how the condition of a picture is found, see ``conditions``. A relative ``file`` in it is taken
            from ``data_root``.
        conditions: their names in the order of their ids; None takes those found, sorted. Give the training set's names
            to the other sets, so that an id means the same everywhere.
        domain: ``'source'`` or ``'target'``.
        with_labels: False leaves labels out of the items: the target's while training. They need not exist then.
        **kwargs: of mmsegmentation's BaseSegDataset. ``metainfo`` should name the classes.

    Raises:
        ValueError: there are no pictures, labels are missing, or conditions cannot be told.
    """

    def __init__(
        self,
        condition_rule: Mapping[str, Any] | None = None,
        conditions: Sequence[str] | None = None,
        domain: str = "target",
        with_labels: bool = True,
        **kwargs: Any,
    ) -> None:
        if domain not in ("source", "target"):
            raise ValueError(f"domain must be 'source' or 'target', got {domain!r}")
        self.condition_rule = dict(condition_rule or {"type": "folder", "level": -2})
        self.given_conditions = None if conditions is None else check_names(conditions)
        self.domain, self.with_labels = domain, with_labels
        super().__init__(**kwargs)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions, in the order of their ids."""
        self.full_init()
        return tuple(self._metainfo["conditions"])

    def condition_ids(self) -> NDArray[np.int64]:
        """The condition of each item, int64 (len,)."""
        return condition_ids_of(self)

    def load_data_list(self) -> list[Item]:
        """Find pictures, labels and conditions."""
        found = self._pictures()
        names, conditions = self._resolve([image for image, _ in found])
        self._metainfo["conditions"] = conditions
        kept = [(pair, name) for pair, name in zip(found, names, strict=True) if name is not None]
        if len(kept) < len(found):
            print_log(
                f"{type(self).__name__}: {len(found) - len(kept)} of {len(found)} pictures are left out: they have "
                f"none of the conditions {', '.join(conditions)}",
                logger="current",
            )
        if not kept:
            raise ValueError(
                f"{type(self).__name__}: none of the {len(found)} pictures, such as {found[0][0]}, has one of the "
                f"conditions {', '.join(conditions)}: mend condition_rule or conditions"
            )
        if self.with_labels:
            self._check_labels([label for (_, label), _ in kept])
        return [self._item(image, label, name, conditions) for (image, label), name in kept]

    def prepare_data(self, idx: int) -> Any:
        """Put one item through the pipeline.

        Raises:
            ValueError: a transform asks for the label of a set that has none.
        """
        try:
            return super().prepare_data(idx)
        except KeyError as error:
            if self.with_labels or error.args != ("seg_map_path",):
                raise
            raise ValueError(
                f"{type(self).__name__} has with_labels=False: training on the target reads no labels. Remove "
                f"LoadAnnotations from this pipeline, or set with_labels=True for a set that is evaluated or a source"
            ) from error

    def _item(self, image: str, label: str, condition: str, conditions: tuple[str, ...]) -> Item:
        item: Item = {
            "img_path": image,
            "label_map": self._label_map(),
            "reduce_zero_label": self.reduce_zero_label,
            "seg_fields": [],
            "domain": self.domain,
            "condition": condition,
            "cond_id": conditions.index(condition),
        }
        return item | {"seg_map_path": label} if self.with_labels else item

    def _label_map(self) -> dict[int, int] | None:
        """Id in the label file -> id of the class, where they differ."""
        return self.label_map

    def _pictures(self) -> list[tuple[str, str]]:
        """Path of each picture and of its label, sorted by picture, or in the order of the list."""
        root = self._image_root()
        if self.ann_file:
            return self._listed(root)
        return self._in_folder(root)

    def _in_folder(self, root: str) -> list[tuple[str, str]]:
        if not fileio.isdir(root, backend_args=self.backend_args):
            raise ValueError(f"{type(self).__name__}: there is no folder {root}: mend data_root or data_prefix")
        listing = sorted(fileio.list_dir_or_file(root, list_dir=False, recursive=True, backend_args=self.backend_args))
        listing = [name.replace(os.sep, "/") for name in listing]
        names = [name for name in listing if name.endswith(self.img_suffix) and self._wanted(name)]
        if not names:
            seen = f"it holds {len(listing)} files, such as {few(listing)}" if listing else "it holds no file"
            raise ValueError(
                f"{type(self).__name__}: no picture {self._wanted_names()} below {root}; {seen}. Mend data_root, "
                f"data_prefix or img_suffix"
            )
        return [(fileio.join_path(root, name), self._label_path(name)) for name in names]

    def _listed(self, root: str) -> list[tuple[str, str]]:
        if not fileio.isfile(self.ann_file, backend_args=self.backend_args):
            raise ValueError(f"{type(self).__name__}: there is no list {self.ann_file}: mend ann_file")
        lines = fileio.get_text(self.ann_file, backend_args=self.backend_args).splitlines()
        names = [line.strip() + self.img_suffix for line in lines if line.strip()]
        if not names:
            raise ValueError(f"{self.ann_file} lists no picture: give each a line, its name without {self.img_suffix}")
        return [(fileio.join_path(root, name), self._label_path(name)) for name in names]

    def _image_root(self) -> str:
        return str(self.data_prefix.get("img_path") or self.data_root or "")

    def _wanted(self, name: str) -> bool:
        """Whether a picture, by its path below the root, belongs to the set."""
        return True

    def _wanted_names(self) -> str:
        return f"*{self.img_suffix}"

    def _label_path(self, name: str) -> str:
        """The label of a picture, by the picture's path below the root."""
        if not self.with_labels:
            return ""
        root = self.data_prefix.get("seg_map_path") or self.data_root or ""
        return str(fileio.join_path(root, self._label_name(name)))

    def _label_name(self, name: str) -> str:
        return name[: -len(self.img_suffix)] + str(self.seg_map_suffix)

    def _check_labels(self, labels: Sequence[str]) -> None:
        missing = [label for label in dict.fromkeys(labels) if not fileio.exists(label, backend_args=self.backend_args)]
        if missing:
            raise ValueError(
                f"{type(self).__name__}: {len(missing)} of {len(labels)} labels are missing: {few(missing)}. Mend "
                f"data_prefix['seg_map_path'] or seg_map_suffix, or set with_labels=False where none are needed"
            )

    def _resolve(self, paths: list[str]) -> tuple[Found, tuple[str, ...]]:
        rule = dict(self.condition_rule)
        if rule.get("file") and self.data_root:
            rule["file"] = os.path.join(self.data_root, rule["file"])
        return resolve_conditions(paths, rule, self.given_conditions, self._image_root())


class SplitDataset(ConditionSegDataset):
    """Pictures with Cityscapes' classes in one folder a split.

    Args:
        split: name of the folder, or several.
        **kwargs: of `ConditionSegDataset`.
    """

    METAINFO: ClassVar[dict[str, Any]] = CITYSCAPES

    def __init__(self, split: Splits, **kwargs: Any) -> None:
        self.splits = (split,) if isinstance(split, str) else tuple(split)
        super().__init__(**kwargs)

    def _wanted(self, name: str) -> bool:
        return PurePosixPath(name).parts[0] in self.splits

    def _wanted_names(self) -> str:
        return f"{'|'.join(self.splits)}/.../*{self.img_suffix}"


def condition_ids_of(dataset: Any) -> NDArray[np.int64]:
    """The condition of each item of a data set, int64 (len,)."""
    return np.array([dataset.get_data_info(row)["cond_id"] for row in range(len(dataset))], np.int64)
