"""What the pictures of each target condition look like: a few of them, with their colour statistics.

Only pictures of the target are read, never its labels.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.apis.checkpoints import atomic_open
from alimm.datasets.loading import read_picture, to_rgb
from alimm.projects.dcaa.stylise import ColourStats, colour_statistics, pool_statistics, resize_to
from alimm.seeding import numpy_stream

Results = dict[str, Any]
POOLED = "pooled"
"""Name of the one condition that stands for all."""


@dataclass(frozen=True)
class StyleReference:
    """What a source picture is restyled after.

    Attributes:
        condition: its name.
        image: one picture of the condition, RGB uint8 (H, W, 3).
        stats: of that picture.
        pooled: of all kept pictures of the condition together.
    """

    condition: str
    image: NDArray[np.uint8]
    stats: ColourStats
    pooled: ColourStats


class StyleBank:
    """A few pictures of each condition of a target, with colour statistics.

    Args:
        dataset: has ``conditions`` (names in the order of their ids), ``condition_ids()`` and pictures that
            `load_image` reads.
        per_condition: pictures kept of each condition, all of them where there are fewer.
        seed: of the choice of pictures.
        max_side: pictures are kept with at most this longer side; their statistics are those of the full size.

    Raises:
        ValueError: the dataset knows no conditions, or one of them has no picture.
    """

    def __init__(self, dataset: Any, per_condition: int = 32, seed: int = 0, max_side: int = 512) -> None:
        if per_condition < 1 or max_side < 1:
            raise ValueError(
                f"StyleBank: per_condition and max_side must be at least 1, got {per_condition} and {max_side}"
            )
        if not hasattr(dataset, "conditions") or not hasattr(dataset, "condition_ids"):
            raise ValueError(
                f"StyleBank: {type(dataset).__name__} knows no conditions: give a dataset that has them, such as "
                "alimm.ConditionSegDataset"
            )
        ids = np.asarray(dataset.condition_ids())
        self._clear()
        for number, name in enumerate(dataset.conditions):
            members = np.flatnonzero(ids == number)
            if len(members) == 0:
                raise ValueError(
                    f"StyleBank: the condition {name!r} has no picture among the {len(ids)} of the target: add some, "
                    "or leave it out of the dataset's conditions"
                )
            draw = numpy_stream(seed, f"style_bank/{name}")
            images, stats, pixels = [], [], []
            for index in np.sort(draw.choice(members, min(per_condition, len(members)), replace=False)):
                picture = load_image(dataset, int(index))
                stats.append(colour_statistics([picture]))
                pixels.append(picture.shape[0] * picture.shape[1])
                images.append(_shrunk(picture, max_side))
            self._add(name, images, stats, pixels)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Names of the conditions, in the order of the target's ids."""
        return tuple(self.references)

    def stats(self, condition: str) -> ColourStats:
        """Statistics of the kept pictures of a condition together; of all conditions for ``'pooled'``.

        Raises:
            ValueError: there is no such condition.
        """
        if condition != POOLED or POOLED in self.references:
            return self._of(condition)[0].pooled
        return self._pooled

    def draw(self, condition: str) -> StyleReference:
        """One picture of a condition, or of all for ``'pooled'``, by the global state of NumPy.

        Raises:
            ValueError: there is no such condition.
        """
        if condition != POOLED or POOLED in self.references:
            some = self._of(condition)
            return some[np.random.randint(len(some))]
        everything = [reference for some in self.references.values() for reference in some]
        drawn = everything[np.random.randint(len(everything))]
        return dataclasses.replace(drawn, condition=POOLED, pooled=self._pooled)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything into one npz file."""
        arrays: dict[str, NDArray[Any]] = {"conditions": np.array(self.conditions, np.str_)}
        for number, (name, some) in enumerate(self.references.items()):
            arrays[f"{number}/pixels"] = np.array(self._pixels[name], np.int64)
            arrays[f"{number}/mean"] = np.stack([reference.stats.mean for reference in some])
            arrays[f"{number}/std"] = np.stack([reference.stats.std for reference in some])
            arrays |= {f"{number}/image{row}": reference.image for row, reference in enumerate(some)}
        with atomic_open(path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> StyleBank:
        """Read what `save` wrote.

        Raises:
            ValueError: the file is missing, or is no bank of styles.
        """
        bank = cls.__new__(cls)
        bank._clear()
        try:
            with np.load(path, allow_pickle=False) as file:
                for number, name in enumerate(file["conditions"].tolist()):
                    means, stds = file[f"{number}/mean"], file[f"{number}/std"]
                    stats = [ColourStats(mean, std) for mean, std in zip(means, stds, strict=True)]
                    images = [file[f"{number}/image{row}"] for row in range(len(stats))]
                    bank._add(name, images, stats, file[f"{number}/pixels"].tolist())
        except FileNotFoundError:
            raise ValueError(f"there is no bank of styles {path}: make one with StyleBank(...).save(path)") from None
        except (KeyError, EOFError, IndexError, OSError, ValueError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is no bank of styles, or is damaged ({error}): make it again with StyleBank(...).save(path)"
            ) from error
        return bank

    def _clear(self) -> None:
        self.references: dict[str, list[StyleReference]] = {}
        self._pixels: dict[str, list[int]] = {}

    def _add(self, name: str, images: list[NDArray[np.uint8]], stats: list[ColourStats], pixels: list[int]) -> None:
        pooled = pool_statistics(stats, pixels)
        pairs = zip(images, stats, strict=True)
        self.references[name] = [StyleReference(name, image, own, pooled) for image, own in pairs]
        self._pixels[name] = pixels
        everything = [reference.stats for some in self.references.values() for reference in some]
        self._pooled = pool_statistics(everything, [count for some in self._pixels.values() for count in some])

    def _of(self, condition: str) -> list[StyleReference]:
        if condition not in self.references:
            raise ValueError(f"StyleBank has no condition {condition!r}, only {', '.join(self.conditions)}")
        return self.references[condition]

    def __repr__(self) -> str:
        counts = ", ".join(f"{name}: {len(some)}" for name, some in self.references.items())
        return f"StyleBank({counts})"


def raw_results(dataset: Any, index: int) -> tuple[Results, Callable[[Results], Any]]:
    """Return what enters the pipeline of a dataset at ``index``, and that pipeline.

    Concatenated and repeated datasets are looked through. A dataset with ``raw_item(index)`` is asked for it; else its
    ``prepare_data`` runs without transforms, be it that it lists files or that it renders pictures.
    """
    while hasattr(dataset, "_get_ori_dataset_idx"):
        place = dataset._get_ori_dataset_idx(index)
        if isinstance(place, tuple):
            dataset, index = dataset.datasets[place[0]], place[1]
        else:
            dataset, index = dataset.dataset, place
    if hasattr(dataset, "raw_item"):
        return dataset.raw_item(index), dataset.pipeline
    bare = copy.copy(dataset)
    bare.pipeline = _unchanged
    return bare.prepare_data(index), dataset.pipeline


def load_image(dataset: Any, index: int) -> NDArray[np.uint8]:
    """Picture ``index`` of a dataset before its transforms, RGB uint8 (H, W, 3). Reads no label.

    Asks the dataset's own ``load_image(index)``, which returns RGB, where it has one; else takes ``img`` (BGR) of the
    item, else reads the file ``img_path``.

    Raises:
        ValueError: it cannot be read. The message names the file.
    """
    if hasattr(dataset, "load_image"):
        return to_rgb(dataset.load_image(index))
    results, _ = raw_results(dataset, index)
    image = results.get("img")
    if isinstance(image, np.ndarray):
        colours = image.ndim == 3 and image.shape[2] in (3, 4)
        return np.ascontiguousarray(to_rgb(image[..., [2, 1, 0, 3][: image.shape[2]]] if colours else image))
    path = results.get("img_path", image)
    if path is None:
        raise ValueError(
            f"item {index} of {type(dataset).__name__} has neither img nor img_path, but {', '.join(sorted(results))}"
        )
    return read_picture(path)


def _unchanged(results: Results) -> Results:
    return results


def _shrunk(picture: NDArray[np.uint8], max_side: int) -> NDArray[np.uint8]:
    share = min(1.0, max_side / max(picture.shape[:2]))
    height, width = (max(1, round(side * share)) for side in picture.shape[:2])
    return resize_to(picture, (height, width))
