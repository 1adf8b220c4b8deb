"""Exact lists of nearest rows under the cosine, in NumPy: what a similarity is to the bit; the oracle of the kernels.

A similarity must not depend on tiles, threads, ranks or the device, so each step of it is fixed::

    x = float32(r / sqrt(<r, r>))                 the row of length one; a zero row stays zero
    s = clip(float32(<x_i, x_j>), -1, 1)          never -0.0

``<a, b>`` is a sum in double precision, coordinate d in lane d mod 8, each lane in the order of its coordinates from
+0.0, then ``((l0 + l1) + (l2 + l3)) + ((l4 + l5) + (l6 + l7))``. The product of two float32 is exact in double
precision, so a fused multiply-add gives the same bits. Rows are padded with zeros to a multiple of eight, which adds
nothing. A list is sorted by (similarity descending, id ascending), hence unique.

Shapes: N, M rows, W their padded width, K neighbours.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LANES = 8
PADDING_ID = -1
"""Stands where a list has no further neighbour; its similarity is minus infinity."""


def padded_width(dim: int) -> int:
    """The width of unit rows: the next multiple of eight, at least eight."""
    return max(LANES, -(-dim // LANES) * LANES)


def lane_sum(products: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum over the last axis, whose length is a multiple of eight, in the order given above."""
    lanes = np.zeros((*products.shape[:-1], LANES), np.float64)
    for start in range(0, products.shape[-1], LANES):
        lanes += products[..., start : start + LANES]
    pairs = lanes[..., 0::2] + lanes[..., 1::2]
    fours = pairs[..., 0::2] + pairs[..., 1::2]
    total: NDArray[np.float64] = fours[..., 0] + fours[..., 1]
    return total


def unit_rows(rows_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of length one.

    Args:
        rows_ND: finite.

    Returns:
        (N, W), zero in the padding; a zero row stays zero.
    """
    wide = np.zeros((len(rows_ND), padded_width(rows_ND.shape[1])), np.float64)
    wide[:, : rows_ND.shape[1]] = rows_ND
    length = np.sqrt(lane_sum(wide * wide))
    return (wide / np.where(length > 0, length, 1.0)[:, None]).astype(np.float32)


def similarity(x_NW: NDArray[np.float32], y_NW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Similarity of unit rows, pair by pair; the shapes broadcast but for the last axis."""
    exact = lane_sum(x_NW.astype(np.float64) * y_NW.astype(np.float64)).astype(np.float32)
    return np.clip(exact, np.float32(-1), np.float32(1)) + np.float32(0)


def nearest_rows(
    queries_MW: NDArray[np.float32],
    query_ids_M: NDArray[np.int64],
    rows_NW: NDArray[np.float32],
    k: int,
    first_id: int = 0,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The K nearest rows of each query, by comparing it with all.

    Args:
        queries_MW: unit rows.
        query_ids_M: their ids; a row of the same id is the query itself and is left out.
        rows_NW: unit rows, of the ids ``first_id``, ``first_id + 1``, ...
        k: at least 1.
        first_id: id of the first row.

    Returns:
        ids (M, K) and similarities (M, K), best first, padded with -1 and minus infinity.
    """
    ids_MK = np.full((len(queries_MW), k), PADDING_ID, np.int64)
    similarity_MK = np.full((len(queries_MW), k), -np.inf, np.float32)
    ids_N = first_id + np.arange(len(rows_NW))
    for number, query in enumerate(queries_MW):
        others = ids_N != query_ids_M[number]
        found, ids = similarity(query, rows_NW[others]), ids_N[others]
        order = np.lexsort((ids, -found))[:k]
        ids_MK[number, : len(order)], similarity_MK[number, : len(order)] = ids[order], found[order]
    return ids_MK, similarity_MK
