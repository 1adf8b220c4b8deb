"""What the transforms of a pipeline share.

A transform is a callable from item (dict) to item. Those of alimm change ``img`` and keep ``img_shape`` in step. They
draw from Python's ``random``: torch seeds it in every data worker, and `alimm.seed_worker` and `alimm.EpochSeedHook`
set it in the main process, so the draws depend on the run's seed, the epoch and the worker alone.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.datasets.loading import to_rgb

Image = NDArray[np.uint8]


class Transform:
    """A transform of the picture alone: subclasses write ``apply``, and keep each argument under its own name.

    ``apply`` gets and returns uint8 of shape (H, W, 3), or (H, W, 1) where a data set asks for one channel; grey
    pictures (H, W) and RGBA pictures come to it as RGB.
    """

    def apply(self, img: Image) -> Image:
        """Return the changed picture; ``img`` itself must stay as it is."""
        raise NotImplementedError

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change ``results['img']`` and set ``results['img_shape']``.

        Raises:
            ValueError: there is no picture, or it does not fit.
        """
        if results.get("img") is None:
            raise ValueError(f"{type(self).__name__} found no picture: put dict(type='alimm.LoadImage') before it")
        img = self.apply(keep_grey(results["img"]))
        results["img"], results["img_shape"] = img, img.shape[:2]
        return results

    def __repr__(self) -> str:
        names = inspect.signature(type(self).__init__).parameters
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in names if name != "self")
        return f"{type(self).__name__}({values})"


def keep_grey(img: Image) -> Image:
    """RGB as `to_rgb` makes it, but a picture of shape (H, W, 1) keeps its one channel."""
    one_channel = isinstance(img, np.ndarray) and img.ndim == 3 and img.shape[2] == 1
    rgb = to_rgb(img)
    return rgb[..., :1] if one_channel else rgb


def hwc(img: Image) -> Image:
    """Give back the channel axis that OpenCV drops from pictures of one channel."""
    return img[..., None] if img.ndim == 2 else img


def fill_of(img: Image, fill: Sequence[int]) -> tuple[int, ...]:
    """A colour with as many values as the picture has channels; the first one stands for grey."""
    return tuple(fill)[: img.shape[2]]


def check_size(size: int | Sequence[int], name: str) -> tuple[int, int]:
    """Return a size as (height, width); one number is a square.

    Raises:
        ValueError: it is neither one nor two whole numbers above 0.
    """
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(value, int) and value > 0 for value in pair):
        raise ValueError(f"{name} must be a whole number above 0 or two of them (height, width), got {size!r}")
    return pair[0], pair[1]


def check_range(values: Sequence[float], name: str, low: float, high: float) -> tuple[float, float]:
    """Return (from, to) with ``low <= from <= to <= high``.

    Raises:
        ValueError: it is no such range.
    """
    pair = tuple(values)
    if len(pair) != 2 or not low <= pair[0] <= pair[1] <= high:
        raise ValueError(f"{name} must be two numbers (from, to) within {low:g} and {high:g}, got {values!r}")
    return pair[0], pair[1]


def check_number(value: float, name: str, high: float = 1.0) -> float:
    """Return a number of 0 to ``high``.

    Raises:
        ValueError: it is not.
    """
    if not 0 <= value <= high:
        raise ValueError(f"{name} must be between 0 and {high:g}, got {value!r}")
    return value


def happens(prob: float) -> bool:
    """True with the probability ``prob``; draws a number in every case."""
    return random.random() < prob


def log_uniform(low: float, high: float) -> float:
    """Draw a factor whose logarithm is uniform, so that x and 1/x are as likely."""
    return float(np.exp(random.uniform(np.log(low), np.log(high))))
