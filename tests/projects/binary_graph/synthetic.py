"""Codes with structure, for tests: signs of projected Gaussian clusters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.packing import pack_bits


def clustered_codes(
    count: int, seed: int = 0, clusters: int = 20, inner: int = 8, bits: int = 128, noise: float = 0.3
) -> NDArray[np.uint64]:
    """Codes (count, bits / 64) in clusters; with large noise they are diffuse."""
    rng = np.random.default_rng(seed)
    shape = np.random.default_rng(12345)  # the same space for every seed: queries lie among the base
    centres, projection = shape.normal(size=(clusters, inner)), shape.normal(size=(inner, bits))
    points = centres[rng.integers(0, clusters, count)] + noise * rng.normal(size=(count, inner))
    return pack_bits(points @ projection > 0)
