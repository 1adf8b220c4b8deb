"""EmojiProducts: a real product catalogue that travels inside the package.

The same 1,914 products (emoji) drawn by three vendors (noto, twemoji, fluent), 5,160 pictures of 64 x 64 with
transparency, 98 sub-groups with their natural long tail in 9 groups, names and keywords in twelve languages. What the
vendors differ in is style, so training on two and testing on the third is the gap between a shop's picture and a
user's. ``assets/emoji_products.md`` is the data card; ``tools/data/build_emoji_products.py`` builds the file.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset

from alimm.datasets.loading import composite
from alimm.registry import DATASETS
from alimm.seeding import numpy_stream

ASSET = Path(__file__).parent / "assets" / "emoji_products.npz"
VENDORS = ("noto", "twemoji", "fluent")
SPLITS = ("style", "concept", "all")
TARGETS = ("subgroup", "group", "identity")


class EmojiCatalogue:
    """The file, opened: pictures and texts, before any split.

    Attributes:
        pixels: uint8, (5160, 64, 64, 4), RGBA.
        vendor: int, (5160,), index into ``VENDORS``.
        identity: int, (5160,), index into ``identities``.
        identities: one dict each: hexcode, emoji, group, subgroup, names and tags by language.
        groups, subgroups: names in the order of Unicode's chart.
    """

    def __init__(self, path: Path = ASSET) -> None:
        import cv2

        try:
            with np.load(path, allow_pickle=False) as archive:
                stored = {name: archive[name] for name in archive.files}
            meta = json.loads(stored["meta"].tobytes())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"{path} is missing. It is part of the package: install alimm again, or build the file with "
                f"tools/data/build_emoji_products.py"
            ) from None
        except Exception as error:
            raise ValueError(f"{path} is not an EmojiProducts file or is damaged: {error}") from error
        size, offsets = int(meta["size"]), stored["offsets"]
        self.pixels = np.empty((len(offsets) - 1, size, size, 4), np.uint8)
        for row, (start, end) in enumerate(itertools.pairwise(offsets)):
            picture = cv2.imdecode(stored["pictures"][start:end], cv2.IMREAD_UNCHANGED)
            if picture is None or picture.shape[:2] != (size, size):
                raise ValueError(f"{path}: picture {row} does not decode; install alimm again")
            self.pixels[row, ..., 3] = 255  # stays for an opaque picture, which WebP stores without alpha
            self.pixels[row, ..., : picture.shape[2]] = picture[..., [2, 1, 0, 3][: picture.shape[2]]]
        self.vendor = stored["vendor"].astype(np.int64)
        self.identity = stored["identity"].astype(np.int64)
        self.identities: list[dict[str, Any]] = meta["identities"]
        self.groups: list[str] = meta["groups"]
        self.subgroups: list[str] = meta["subgroups"]
        self.languages: list[str] = meta["languages"]


@lru_cache(maxsize=1)
def load_catalogue() -> EmojiCatalogue:
    """The embedded catalogue, decoded once a process."""
    return EmojiCatalogue()


def concept_test_identities(catalogue: EmojiCatalogue, seed: int, test_ratio: float) -> np.ndarray:
    """Which identities the *concept* split keeps for the test: bool, (number of identities,).

    Drawn sub-group by sub-group, so that each one with two identities or more is on both sides.
    """
    subgroup = np.array([identity["subgroup"] for identity in catalogue.identities])
    is_test = np.zeros(len(subgroup), bool)
    for index, name in enumerate(catalogue.subgroups):
        members = np.flatnonzero(subgroup == name)
        count = min(max(round(test_ratio * len(members)), 1), len(members) - 1)
        is_test[numpy_stream(seed, "emoji_products/concept", index).permutation(members)[:count]] = True
    return is_test


@DATASETS.register_module()
class EmojiProducts(BaseDataset):
    """EmojiProducts as an MMEngine data set.

    Items carry ``img`` (uint8 RGB, 64 x 64), ``gt_label``, ``gt_identity``, ``sample_id`` (``vendor/hexcode``),
    ``vendor``, ``names`` and ``tags``. ``metainfo`` holds ``classes`` and ``class_counts`` (of the training side).

    Args:
        split: ``'style'`` trains on two vendors and tests on ``test_vendor``; ``'concept'`` shares no identity between
            the two sides; ``'all'`` has every picture on both.
        subset: ``'train'`` or ``'test'``. For identity retrieval across vendors the train side of ``'style'`` is the
            gallery and the test side the queries. Every query has its identity in the gallery, but for the 262 that
            twemoji alone has drawn, with ``test_vendor='twemoji'``.
        target: what ``gt_label`` is: ``'subgroup'`` (98 classes), ``'group'`` (9) or ``'identity'`` (1,914).
        test_vendor: ``'noto'``, ``'twemoji'`` or ``'fluent'``.
        test_ratio: share of the identities on the test side of the concept split.
        split_seed: seed of the concept split.
        background: RGB colour behind the pictures.
    """

    def __init__(
        self,
        split: str = "style",
        subset: str = "train",
        target: str = "subgroup",
        test_vendor: str = "fluent",
        test_ratio: float = 0.3,
        split_seed: int = 0,
        background: Sequence[int] = (255, 255, 255),
        **kwargs: Any,
    ) -> None:
        for name, value, allowed in (
            ("split", split, SPLITS),
            ("subset", subset, ("train", "test")),
            ("target", target, TARGETS),
            ("test_vendor", test_vendor, VENDORS),
        ):
            if value not in allowed:
                raise ValueError(f"EmojiProducts: {name} must be one of {', '.join(allowed)}, got {value!r}")
        if not 0 < test_ratio < 1:
            raise ValueError(f"EmojiProducts: test_ratio must be between 0 and 1, got {test_ratio}")
        if len(background) != 3 or not all(0 <= value <= 255 for value in background):
            raise ValueError(f"EmojiProducts: background must be three numbers of 0 to 255, got {background!r}")
        self.split, self.subset, self.target, self.test_vendor = split, subset, target, test_vendor
        self.test_ratio, self.split_seed, self.background = test_ratio, split_seed, tuple(background)
        self.catalogue = load_catalogue()
        metainfo = dict(
            classes=self._class_names(),
            class_counts=np.bincount(self._labels()[self._rows("train")], minlength=len(self._class_names())).tolist(),
        )
        super().__init__(metainfo={**metainfo, **(kwargs.pop("metainfo", None) or {})}, **kwargs)

    def _class_names(self) -> tuple[str, ...]:
        if self.target == "identity":
            return tuple(identity["names"]["en"] for identity in self.catalogue.identities)
        return tuple(self.catalogue.subgroups if self.target == "subgroup" else self.catalogue.groups)

    def _labels(self) -> np.ndarray:
        """The class of every picture of the catalogue."""
        if self.target == "identity":
            return self.catalogue.identity
        index = {name: number for number, name in enumerate(self._class_names())}
        of_identity = np.array([index[identity[self.target]] for identity in self.catalogue.identities])
        return np.asarray(of_identity[self.catalogue.identity])

    def _rows(self, subset: str) -> np.ndarray:
        """The rows of the catalogue on one side of the split."""
        catalogue = self.catalogue
        if self.split == "all":
            return np.arange(len(catalogue.identity))
        if self.split == "style":
            on_test_side = catalogue.vendor == VENDORS.index(self.test_vendor)
        else:
            on_test_side = concept_test_identities(catalogue, self.split_seed, self.test_ratio)[catalogue.identity]
        return np.flatnonzero(on_test_side if subset == "test" else ~on_test_side)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict a picture; the picture itself and its texts are added when it is asked for."""
        labels, catalogue = self._labels(), self.catalogue
        items = []
        for row in self._rows(self.subset):
            identity = catalogue.identities[catalogue.identity[row]]
            vendor = VENDORS[catalogue.vendor[row]]
            items.append(
                dict(
                    row=int(row),
                    gt_label=int(labels[row]),
                    gt_identity=int(catalogue.identity[row]),
                    sample_id=f"{vendor}/{identity['hexcode']}",
                    vendor=vendor,
                )
            )
        return items

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The item ``idx`` with its picture and texts."""
        item: dict[str, Any] = super().get_data_info(idx)
        identity = self.catalogue.identities[item["gt_identity"]]
        item["names"], item["tags"] = identity["names"], identity["tags"]
        item["img"] = composite(self.catalogue.pixels[item["row"]], self.background)
        item["img_shape"] = item["ori_shape"] = item["img"].shape[:2]
        return item

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of item ``idx``, as MMEngine's dataset wrappers ask for it."""
        return [int(super().get_data_info(idx)["gt_label"])]
