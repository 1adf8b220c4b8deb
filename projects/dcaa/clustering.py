"""Find conditions that nobody labelled: k-means over what a picture's style is, not over what it shows.

Each picture is shrunk to 64 x 32 pixels and described by

    mean and deviation of L, a, b                   (6)   colour cast, contrast
    quantiles of L                                  (5)   darkness, haze
    mean and deviation of the saturation            (2)   fog and snow are grey
    mean of L, a, b above and below                 (6)   a bright ground under a grey sky is snow
    mean of the dark channel                        (1)   min over colours and a 5 x 5 window: large in fog
    log of the spectrum's amplitude in 5 rings      (5)   fog smooths, rain and snow roughen
    log of the finest differences at full size      (2)   streaks and noise

Every entry is brought to mean 0 and deviation 1 over the pictures, and faiss finds k centres. The clusters are numbered
by their mean luminance, darkest first, so that the numbers depend on the pictures and the seed alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.loading import read_picture, to_rgb
from alimm.seeding import stream_seed

WIDTH, HEIGHT = 64, 32
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
RINGS = (0.5, 1.5, 3.5, 6.5, 10.5, 16.5)
"""Bounds of the rings, in waves a picture height."""
FORMAT = "dcaa-clusters-1"

Picture = str | os.PathLike[str] | NDArray[np.uint8]


def style_features(picture: Picture) -> NDArray[np.float64]:
    """Describe the style of one picture.

    Args:
        picture: a path, or RGB uint8 (H, W, 3).

    Returns:
        float64 (27,), not standardised; the first entry is the mean luminance, 0 to 100.

    Raises:
        ValueError: the picture cannot be read or is no picture.
    """
    import cv2

    full = to_rgb(picture) if isinstance(picture, np.ndarray) else read_picture(os.fspath(picture))
    small = cv2.resize(full, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    lab = cv2.cvtColor(small, cv2.COLOR_RGB2LAB).astype(np.float64)
    luminance, colours = lab[..., 0], lab.reshape(-1, 3)
    saturation = small.max(axis=2) - small.min(axis=2)
    dark = cv2.erode(small.min(axis=2), np.ones((5, 5), np.uint8))
    grey = cv2.cvtColor(full, cv2.COLOR_RGB2GRAY).astype(np.float32)
    return np.concatenate(
        [
            colours.mean(axis=0),
            colours.std(axis=0),
            np.quantile(luminance, QUANTILES),
            [saturation.mean(), saturation.std()],
            lab[: HEIGHT // 2].mean(axis=(0, 1)),
            lab[HEIGHT // 2 :].mean(axis=(0, 1)),
            [dark.mean()],
            _rings(luminance),
            [_roughness(grey, 0), _roughness(grey, 1)],
        ]
    )


def _rings(luminance: NDArray[np.float64]) -> NDArray[np.float64]:
    spectrum = np.abs(np.fft.fft2(luminance - luminance.mean())) / luminance.size
    rows = np.fft.fftfreq(HEIGHT)[:, None] * HEIGHT
    columns = np.fft.fftfreq(WIDTH)[None, :] * HEIGHT
    radius = np.hypot(rows, columns)
    means = [spectrum[(radius >= low) & (radius < high)].mean() for low, high in pairwise(RINGS)]
    return np.log(np.array(means) + 1e-4)


def _roughness(grey: NDArray[np.float32], axis: int) -> float:
    """Log of the mean size of the second difference along an axis: edges count little, noise everywhere counts."""
    if grey.shape[axis] < 3:
        return 0.0
    return float(np.log(np.minimum(np.abs(np.diff(grey, n=2, axis=axis)), 32).mean() + 0.1))


@dataclass(frozen=True)
class Clusters:
    """Styles found by `cluster_conditions`.

    Attributes:
        ids: int64 (N,), the cluster of each picture that they were found on.
        centres: float32 (k, F), in standardised features.
        mean: float64 (F,), of the features.
        std: float64 (F,), of the features; 1 where a feature is constant.
        keys: the names of those N pictures, or nothing.
    """

    ids: NDArray[np.int64]
    centres: NDArray[np.float32]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    keys: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """``style0`` (darkest) and so on."""
        return tuple(f"style{number}" for number in range(len(self.centres)))

    def assign(self, picture: Picture) -> int:
        """The nearest style of a picture that may be new."""
        return int(self.assign_features(style_features(picture)[None])[0])

    def assign_features(self, features: NDArray[np.float64]) -> NDArray[np.int64]:
        """The nearest styles of rows of `style_features`, (N, F)."""
        rows = ((features - self.mean) / self.std).astype(np.float32)
        return _nearest(rows, self.centres)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, whole or not at all."""
        content = {"format": FORMAT, "keys": list(self.keys)}
        content |= {name: getattr(self, name).tolist() for name in ("ids", "centres", "mean", "std")}
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f"{target.name}.{os.getpid()}.part")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Clusters:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such file, or it is something else.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ValueError(f"there is no file of styles {path}") from None
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): remove it and let the styles be found again") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"{path} holds no styles of this version ({FORMAT}): remove it and let it be made again")
        return cls(
            ids=np.array(content["ids"], np.int64),
            centres=np.array(content["centres"], np.float32),
            mean=np.array(content["mean"], np.float64),
            std=np.array(content["std"], np.float64),
            keys=tuple(content["keys"]),
        )


def cluster_conditions(pictures: Sequence[Picture], k: int, seed: int = 0, restarts: int = 20) -> Clusters:
    """Group pictures by style.

    Args:
        pictures: paths, or RGB uint8 arrays.
        k: number of styles.
        seed: of the first centres.
        restarts: how often to begin anew; the tightest result is kept.

    Raises:
        ValueError: k is less than 1, there are fewer pictures than k, or one cannot be read.
    """
    if k < 1:
        raise ValueError(f"the number of styles must be at least 1, got k={k}")
    if len(pictures) < k:
        raise ValueError(f"{len(pictures)} pictures cannot form k={k} styles: lower k or give more pictures")
    features = np.stack([style_features(picture) for picture in pictures])
    mean, std = features.mean(axis=0), features.std(axis=0)
    std = np.where(std > 1e-6, std, 1.0)
    rows = ((features - mean) / std).astype(np.float32)
    centres = _k_means(rows, k, stream_seed(seed, "dcaa.clusters") % 2**31, restarts)
    darkest_first = np.argsort(centres[:, 0], kind="stable")
    centres = centres[darkest_first]
    keys = tuple(os.fspath(picture) for picture in pictures if not isinstance(picture, np.ndarray))
    return Clusters(_nearest(rows, centres), centres, mean, std, keys if len(keys) == len(pictures) else ())


def assign_or_cluster(
    paths: Sequence[str], k: int, file: str | os.PathLike[str] | None = None, seed: int = 0, fit: bool = True
) -> list[int]:
    """The styles of picture files: those of a file where it exists, else found now and kept there.

    Args:
        paths: of the pictures.
        k: number of styles.
        file: where the styles are kept; None finds them each time. Remove it when the pictures were changed.
        seed: of the clustering.
        fit: False insists on the file, as a test set must: its own clusters would bear other numbers.

    Raises:
        ValueError: the file holds another number of styles, or is missing although ``fit`` is False.
    """
    if file is None or not Path(file).exists():
        if not fit:
            raise ValueError(f"there is no file of styles {file}: build the training set first, with the same file")
        clusters = cluster_conditions(paths, k, seed)
        if file is not None:
            clusters.save(file)
        return clusters.ids.tolist()
    clusters = Clusters.load(file)
    if len(clusters.centres) != k:
        raise ValueError(f"{file} holds {len(clusters.centres)} styles, wanted k={k}: remove the file or mend k")
    known = dict(zip(clusters.keys, clusters.ids.tolist(), strict=False))
    return [known[path] if path in known else clusters.assign(path) for path in paths]


def _nearest(rows: NDArray[np.float32], centres: NDArray[np.float32]) -> NDArray[np.int64]:
    distances = ((rows[:, None].astype(np.float64) - centres[None]) ** 2).sum(axis=2)
    return distances.argmin(axis=1).astype(np.int64)


def _k_means(rows: NDArray[np.float32], k: int, seed: int, restarts: int) -> NDArray[np.float32]:
    import faiss

    with _one_thread():
        means: Any = faiss.Kmeans(
            rows.shape[1],
            k,
            niter=50,
            nredo=restarts,
            seed=seed,
            spherical=False,
            min_points_per_centroid=1,
            max_points_per_centroid=len(rows),
        )
        means.train(np.ascontiguousarray(rows))
    return np.array(means.centroids, np.float32)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Sums of several threads come in any order; one gives the same centres each time."""
    import faiss

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
