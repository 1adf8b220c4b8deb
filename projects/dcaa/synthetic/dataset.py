"""Streets in five kinds of weather, rendered when they are asked for: a domain gap that needs no download."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from mmengine.dataset import BaseDataset
from numpy.typing import NDArray
from PIL import Image

from alimm.projects.dcaa.synthetic.paint import DOMAINS, paint
from alimm.projects.dcaa.synthetic.scene import CLASSES, PALETTE, draw_scene
from alimm.projects.dcaa.synthetic.weather import CONDITIONS, apply_weather
from alimm.registry import DATASETS
from alimm.seeding import numpy_stream, stream_seed

Picture = NDArray[np.uint8]


@DATASETS.register_module()
class SyntheticWeatherDataset(BaseDataset):
    """Labelled source streets in clear weather, or target streets in several conditions.

    An item before the transforms: ``img`` (uint8 (H, W, 3), BGR as mmseg's own loading leaves it), ``img_shape``,
    ``ori_shape``, ``img_path`` (a name, there is no file), ``number``, ``domain``, ``condition``, ``cond_id`` (place of
    the condition in ``conditions``), ``reduce_zero_label``, ``seg_fields``, and with labels ``gt_seg_map`` (uint8
    (H, W)). The pipeline needs no loading transform.

    The same seed, domain, split, condition and number give the same bytes, whatever other conditions are asked for.
    They hold for the streams of NumPy's ``default_rng``; all arithmetic is in float64 and rounded at the end, so that
    the last bits in which platforms differ do not show.

    Args:
        domain: ``'source'``, of one condition named ``source``, or ``'target'``.
        num: pictures of the source, or of each condition of the target.
        split: ``'train'`` or ``'val'``, which have no street in common.
        conditions: of the target, in the order of their ids; without effect on the source.
        size: rows and columns.
        alpha: how far the target's colours are from the source's, 0 to 1.
        severity: how strong the weather is, 0 to 1.
        seed: of everything.
        with_labels: items carry labels. Give False for the target's training side: its items then hold none, and no
            transform can make one.
        paired: all conditions show the same streets in the same colours, for pictures that compare them.
        cache: keep rendered pictures in memory (32 KiB for one of 64 x 128).
        metainfo: more meta information.
        **kwargs: of MMEngine's BaseDataset, ``pipeline`` above all.

    Raises:
        ValueError: an argument is wrong.
    """

    METAINFO: ClassVar[dict[str, Any]] = {
        "classes": CLASSES,
        "palette": [list(colour) for colour in PALETTE],
        "conditions": CONDITIONS,
    }

    def __init__(
        self,
        domain: str = "source",
        num: int = 100,
        split: str = "train",
        conditions: Sequence[str] = CONDITIONS,
        size: Sequence[int] = (64, 128),
        alpha: float = 0.5,
        severity: float = 0.8,
        seed: int = 0,
        with_labels: bool = True,
        paired: bool = False,
        cache: bool = True,
        metainfo: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        choices: tuple[tuple[str, str, tuple[str, ...]], ...] = (
            ("domain", domain, DOMAINS),
            ("split", split, ("train", "val")),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"SyntheticWeatherDataset: {name} must be {' or '.join(allowed)}, got {value!r}")
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise ValueError(f"SyntheticWeatherDataset: num must be a whole number of at least 1, got {num!r}")
        for name, share in (("alpha", alpha), ("severity", severity)):
            if not 0 <= share <= 1:
                raise ValueError(f"SyntheticWeatherDataset: {name} must be in [0, 1], got {share!r}")
        if len(size) != 2 or min(size) < 16:
            raise ValueError(f"SyntheticWeatherDataset: size must be (rows, columns) of at least 16, got {size!r}")
        unknown = [name for name in conditions if name not in CONDITIONS]
        if isinstance(conditions, str) or unknown or not conditions or len(set(conditions)) != len(conditions):
            raise ValueError(
                f"SyntheticWeatherDataset: conditions must be a list of different names of {', '.join(CONDITIONS)}; "
                f"got {conditions!r}"
            )
        self.domain, self.num, self.split, self.seed = domain, num, split, seed
        self.conditions: tuple[str, ...] = tuple(conditions) if domain == "target" else ("source",)
        self.size, self.alpha, self.severity = (int(size[0]), int(size[1])), float(alpha), float(severity)
        self.with_labels, self.paired = with_labels, paired
        self._cache: dict[tuple[str, int], tuple[Picture, Picture | None]] | None = {} if cache else None
        super().__init__(metainfo={"conditions": self.conditions, **(metainfo or {})}, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict a picture, condition after condition."""
        return [
            dict(
                img_path=f"synthetic/{self.domain}/{self.split}/{condition}/{number:05d}.png",
                number=number,
                domain=self.domain,
                condition=condition,
                cond_id=cond_id,
                reduce_zero_label=False,
                seg_fields=[],
            )
            for cond_id, condition in enumerate(self.conditions)
            for number in range(self.num)
        ]

    def condition_ids(self) -> NDArray[np.int64]:
        """The id of each item's condition, int64 (len(self),)."""
        return np.array([self.get_data_info(index)["cond_id"] for index in range(len(self))], np.int64)

    def raw_item(self, idx: int) -> dict[str, Any]:
        """The item ``idx`` as the pipeline receives it."""
        item: dict[str, Any] = self.get_data_info(idx)
        picture, label = self._pictures(item["condition"], item["number"])
        item["img"] = np.ascontiguousarray(picture[..., ::-1])
        item["img_shape"] = item["ori_shape"] = picture.shape[:2]
        if label is not None:
            item["gt_seg_map"] = label.copy()
            item["seg_fields"].append("gt_seg_map")
        return item

    def prepare_data(self, idx: int) -> Any:
        """The item ``idx`` after the pipeline."""
        return self.pipeline(self.raw_item(idx))

    def _pictures(self, condition: str, number: int) -> tuple[Picture, Picture | None]:
        """The picture (RGB) and, where this side has labels, the label map."""
        if self._cache is not None and (condition, number) in self._cache:
            return self._cache[condition, number]
        streets = "paired" if self.paired else condition
        seed = stream_seed(self.seed, f"dcaa/streets/{self.domain}/{self.split}/{streets}")
        scene = draw_scene(seed, number, self.size)
        clear = paint(scene, self.domain, self.alpha, numpy_stream(seed, "dcaa/paint", number))
        weather = "clear" if self.domain == "source" else condition
        picture = apply_weather(
            clear, scene.depth, scene.label, weather, self.severity, numpy_stream(seed, f"dcaa/{weather}", number)
        )
        found = picture, scene.label if self.with_labels else None
        if self._cache is not None:
            self._cache[condition, number] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        """Copies and data workers render anew instead of carrying the pictures."""
        state = self.__dict__.copy()
        state["_cache"] = None if self._cache is None else {}
        return state


def export_dataset(dataset: SyntheticWeatherDataset, folder: str | os.PathLike[str]) -> int:
    """Write the pictures as ``img/<condition>/<number>.png``, and the labels, if any, under ``labels`` likewise.

    Args:
        dataset: what to write.
        folder: is made where it is missing; files of the same names are replaced.

    Returns:
        The number of pictures.
    """
    for index in range(len(dataset)):
        item = dataset.raw_item(index)
        name = f"{item['condition']}/{item['number']:05d}.png"
        pictures = {"img": np.ascontiguousarray(item["img"][..., ::-1])}
        if "gt_seg_map" in item:
            pictures["labels"] = item["gt_seg_map"]
        for kind, picture in pictures.items():
            path = Path(folder) / kind / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
    return len(dataset)
