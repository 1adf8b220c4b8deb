"""HanGlyphs: Han characters as classes, rendered from several font families; 20 to 57 thousand true classes.

``tools/data/prepare_han_glyphs.py`` fetches the fonts and renders. The test side is a family that training never sees,
so that a figure says how well characters are known, not how well one drawing of them is. ``wqy-zenhei`` (print) and
``arphic-ukai`` (brush) are fit for that. ``arphic-uming`` and ``babelstone-han`` go back to the same drawings: 29 % of
the characters of both have a cosine above 0.95 between their pictures, and hardly any of another pair has. Where one
of them is the test family, leave the other out of ``train_families``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.dataset import BaseDataset
from numpy.typing import NDArray

from alimm.datasets.fashion_mnist import prepare_command
from alimm.paths import data_root as default_data_root
from alimm.registry import DATASETS

FOLDER = "han_glyphs"
INDEX = "index.json"
FORMAT = 1


class GlyphStore:
    """The rendered glyphs on disk: for each family, pixels and the sorted code points they show.

    Attributes:
        families: names, in the order of the index.
        size: side of a picture in pixels.
        codepoints: family -> int64, sorted, shape (glyphs of the family,).
        pixels: family -> uint8, dark on white, shape (glyphs, size, size), mapped from disk and not loaded.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / INDEX
        if not path.is_file():
            command = prepare_command("prepare_han_glyphs.py", folder, default_data_root() / FOLDER)
            raise FileNotFoundError(
                f"HanGlyphs: {path} is missing. Fetch the fonts (40 MB) and render the glyphs with: {command}"
            )
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            if index["format"] != FORMAT:
                raise ValueError(f"its format is {index['format']!r}, expected {FORMAT}")
            self.size = int(index["size"])
            self.families = tuple(str(family["name"]) for family in index["families"])
            self.pixels: dict[str, NDArray[np.uint8]] = {}
            self.codepoints: dict[str, NDArray[np.int64]] = {}
            for family in index["families"]:
                name, count = str(family["name"]), int(family["glyphs"])
                pixels = np.load(folder / f"{name}.pixels.npy", mmap_mode="r", allow_pickle=False)
                codepoints = np.load(folder / f"{name}.codepoints.npy", allow_pickle=False).astype(np.int64)
                if pixels.shape != (count, self.size, self.size) or codepoints.shape != (count,):
                    raise ValueError(
                        f"{name} has {pixels.shape} pixels and {codepoints.shape} code points, not {count}"
                    )
                self.pixels[name], self.codepoints[name] = pixels, codepoints
        except (OSError, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder} does not hold glyphs as the prepare script leaves them, or they are damaged: {error}. "
                f"Remove the folder and prepare it again"
            ) from error

    def __reduce__(self) -> tuple[type[GlyphStore], tuple[Path]]:
        """Copies and data workers open the files again instead of carrying the pixels."""
        return GlyphStore, (self.folder,)


@DATASETS.register_module()
class HanGlyphs(BaseDataset):
    """Rendered Han characters as an MMEngine data set.

    Items carry ``img`` (uint8, dark on white), ``gt_label`` (the character), ``gt_identity`` (its code point),
    ``sample_id`` (``family/U+6F22``) and ``family``. ``metainfo`` holds ``classes`` (the characters, by code point) and
    ``class_counts`` (pictures of each on the train side: its families).

    Args:
        subset: ``'train'`` (all families but the test one) or ``'test'``.
        test_family: the family that training does not see.
        train_families: the families to train on; all others by default.
        class_set: ``'shared'`` has the characters that a train family and the test family both have; ``'train'`` all
            that a train family has, and the test side covers some of them. Both sides number them alike.
        min_fonts: leave out characters with fewer train families.
        num_classes: keep the first so many classes by code point; None keeps all.
        data_root: the folder with the glyphs; by default ``han_glyphs`` in alimm's data folder.
        channels: 3 repeats the grey values, 1 does not.
        **kwargs: of MMEngine's BaseDataset.

    Raises:
        FileNotFoundError: the glyphs are not there. The message holds the command that renders them.
        ValueError: an argument is wrong, the files are, or no class is left.
    """

    def __init__(
        self,
        subset: str = "train",
        test_family: str = "wqy-zenhei",
        train_families: Sequence[str] | None = None,
        class_set: str = "shared",
        min_fonts: int = 1,
        num_classes: int | None = None,
        data_root: str | os.PathLike[str] | None = None,
        channels: int = 3,
        metainfo: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        choices: tuple[tuple[str, object, tuple[object, ...]], ...] = (
            ("subset", subset, ("train", "test")),
            ("class_set", class_set, ("shared", "train")),
            ("channels", channels, (1, 3)),
        )
        for name, value, allowed in choices:
            if value not in allowed:
                raise ValueError(f"HanGlyphs: {name} must be {allowed[0]} or {allowed[1]}, got {value!r}")
        if num_classes is not None and num_classes < 1:
            raise ValueError(f"HanGlyphs: num_classes must be at least 1, got {num_classes!r}")
        folder = default_data_root() / FOLDER if data_root is None else Path(data_root).expanduser()
        self.store = GlyphStore(folder)
        others = tuple(name for name in self.store.families if name != test_family)
        train = others if train_families is None else tuple(train_families)
        for name in (test_family, *train):
            if name not in self.store.families:
                raise ValueError(f"HanGlyphs: no family {name!r} in {folder}; it has {', '.join(self.store.families)}")
        if test_family in train or not train:
            raise ValueError(f"HanGlyphs: train_families must be families other than {test_family}, got {train}")
        self.channels, self.side_families = channels, train if subset == "train" else (test_family,)
        in_train = np.concatenate([self.store.codepoints[name] for name in train])
        classes, counts = np.unique(in_train, return_counts=True)
        keep = counts >= min_fonts
        if class_set == "shared":
            keep &= np.isin(classes, self.store.codepoints[test_family])
        self.class_codepoints = classes[keep][:num_classes]
        if not len(self.class_codepoints):
            raise ValueError(
                f"HanGlyphs: no character is in {min_fonts} of the families {', '.join(train)}"
                + (f" and in {test_family}" if class_set == "shared" else "")
                + "; lower min_fonts or prepare more glyphs"
            )
        given = {
            "classes": tuple(chr(codepoint) for codepoint in self.class_codepoints),
            "class_counts": counts[keep][:num_classes].tolist(),
        }
        super().__init__(data_root=os.fspath(folder), metainfo={**given, **(metainfo or {})}, **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """One dict a picture, by family and code point; the picture itself is added when it is asked for."""
        items = []
        for family in self.side_families:
            codepoints = self.store.codepoints[family]
            for label, row in _labels(codepoints, self.class_codepoints):
                codepoint = int(codepoints[row])
                items.append(
                    dict(
                        row=row,
                        family=family,
                        gt_label=label,
                        gt_identity=codepoint,
                        sample_id=f"{family}/U+{codepoint:04X}",
                    )
                )
        return items

    def get_data_info(self, idx: int) -> dict[str, Any]:
        """The item ``idx`` with its picture."""
        item: dict[str, Any] = super().get_data_info(idx)
        item["img"] = np.repeat(self.store.pixels[item["family"]][item["row"]][..., None], self.channels, axis=2)
        item["img_shape"] = item["ori_shape"] = item["img"].shape[:2]
        return item

    def get_cat_ids(self, idx: int) -> list[int]:
        """The class of item ``idx``, as MMEngine's dataset wrappers ask for it."""
        return [int(super().get_data_info(idx)["gt_label"])]


def _labels(codepoints: NDArray[np.int64], classes: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(label, row) of the code points that are classes; both arrays are sorted."""
    rows = np.flatnonzero(np.isin(codepoints, classes))
    labels = np.searchsorted(classes, codepoints[rows])
    return list(zip(labels.tolist(), rows.tolist(), strict=True))
