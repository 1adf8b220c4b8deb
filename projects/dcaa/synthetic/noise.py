"""Smooth random fields: what clouds, leaves, snow cover and soft textures are made of."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Field = NDArray[np.float64]


@lru_cache(maxsize=256)
def _spread(length: int, knots: int) -> Field:
    """Weights (length, knots + 1) of a line through values at the knots, eased at each of them."""
    place = (np.arange(length) + 0.5) / length * knots
    left = np.minimum(place.astype(np.int64), knots - 1)
    share = place - left
    share = share * share * (3 - 2 * share)
    weights = np.zeros((length, knots + 1))
    rows = np.arange(length)
    weights[rows, left] = 1 - share
    weights[rows, left + 1] = share
    weights.flags.writeable = False
    return weights


def smooth_noise(generator: np.random.Generator, height: int, width: int, cell: float) -> Field:
    """A smooth random field.

    Args:
        generator: of the values at the knots.
        height: rows.
        width: columns.
        cell: distance of two knots in pixels; about the size of a blot.

    Returns:
        float64 (height, width), normal values of mean 0; variance 1 at the knots and less between them.
    """
    rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
    knots = generator.standard_normal((rows + 1, columns + 1))
    return _spread(height, rows) @ knots @ _spread(width, columns).T
