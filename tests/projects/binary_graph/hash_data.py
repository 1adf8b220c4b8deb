"""Two real data sets that need no network, and how much of the float neighbours a hash finds."""

from __future__ import annotations

import numpy as np
import skimage.data
from sklearn.datasets import load_digits

from alimm.projects.binary_graph.packing import unpack_bits

PHOTOGRAPHS = ("camera", "coins", "moon", "brick", "grass", "gravel", "page", "astronaut", "coffee", "chelsea")


def digits() -> np.ndarray:
    """Handwritten digits, (1797, 64), in a random order."""
    data = load_digits().data.astype(np.float32)
    return data[np.random.default_rng(1).permutation(len(data))]


def patches(each: int = 200) -> np.ndarray:
    """Grey patches of 20 x 20 cut from photographs that scikit-image carries, each without its mean brightness."""
    rng = np.random.default_rng(0)
    found = []
    for name in PHOTOGRAPHS:
        picture = getattr(skimage.data, name)().astype(np.float32) / 255
        if picture.ndim == 3:
            picture = picture[..., :3].mean(axis=2)
        for _ in range(each):
            row, column = rng.integers(picture.shape[0] - 20), rng.integers(picture.shape[1] - 20)
            found.append(picture[row : row + 20, column : column + 20].ravel())
    data = np.stack(found)
    return (data - data.mean(axis=1, keepdims=True))[rng.permutation(len(data))]


def recall(hasher, data: np.ndarray, candidates: int = 100, queries: int = 200) -> float:
    """Recall@10 of the float neighbours among the candidates of the nearest codes, which re-ranking would find."""
    asked, held = data[:queries].astype(np.float64), data[queries:].astype(np.float64)
    hasher.fit(data[queries:])
    signs = [unpack_bits(hasher.encode(part)).astype(np.float32) * 2 - 1 for part in (data[:queries], data[queries:])]
    near = np.argsort(-(signs[0] @ signs[1].T), axis=1, kind="stable")[:, :candidates]
    squares = (held**2).sum(axis=1) - 2 * asked @ held.T
    true = np.argsort(squares, axis=1, kind="stable")[:, :10]
    return float(np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(near, true, strict=True)]))
