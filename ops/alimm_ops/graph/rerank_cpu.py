# mypy: allow-untyped-defs
"""Re-ranking of candidates with float features on the CPU, in Numba: the results of ``beam_reference.rerank``.

Sums are in double precision and in the order of the dimensions, so that a score does not depend on what is beside it.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from alimm_ops.graph.beam_reference import METRICS
from alimm_ops.graph.hamming_reference import NO_ID

_options = dict(nogil=True, cache=True, error_model="numpy")
_BLOCK = 1 << 22


def rerank(
    queries_QD: NDArray[np.float32],
    features_ND: NDArray[np.floating],
    rows_QR: NDArray[np.int64],
    k: int,
    metric: str,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Order candidates by their float features; see the reference.

    Raises:
        ValueError: shapes or types that do not fit, a row out of range, an unknown metric.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    if features_ND.dtype not in (np.float32, np.float16):
        raise ValueError(f"features must be float32 or float16, got {features_ND.dtype}")
    if queries_QD.ndim != 2 or features_ND.ndim != 2 or queries_QD.shape[1] != features_ND.shape[1]:
        raise ValueError(f"queries {queries_QD.shape} and features {features_ND.shape} differ in width")
    if rows_QR.ndim != 2 or len(rows_QR) != len(queries_QD):
        raise ValueError(f"expected candidates of {len(queries_QD)} queries, got {rows_QR.shape}")
    if rows_QR.size and not -1 <= rows_QR.min() <= rows_QR.max() < len(features_ND):
        raise ValueError(f"rows must be from 0 to {len(features_ND) - 1}, or -1")
    if not 1 <= k <= rows_QR.shape[1]:
        raise ValueError(f"k must be from 1 to the {rows_QR.shape[1]} candidates, got {k}")
    if queries_QD.shape[1] == 0:
        raise ValueError("queries and features must have at least one dimension")
    scores = np.full((len(queries_QD), k), -np.inf, np.float32)
    rows = np.full((len(queries_QD), k), NO_ID, np.int64)
    # Numba knows no half precision: those rows are widened block by block.
    step = max(1, _BLOCK // (rows_QR.shape[1] * queries_QD.shape[1]))
    for start in range(0, len(queries_QD), step):
        block = slice(start, start + step)
        own = rows_QR[block]
        features, places = features_ND, own
        if features_ND.dtype == np.float16:
            wanted, inverse = np.unique(own, return_inverse=True)
            features = np.take(features_ND, np.maximum(wanted, 0), axis=0).astype(np.float32)
            places = np.where(own >= 0, inverse.reshape(own.shape), NO_ID)
        _rerank(
            np.ascontiguousarray(queries_QD[block]),
            features,
            np.ascontiguousarray(places),
            np.ascontiguousarray(own),
            METRICS.index(metric),
            scores[block],
            rows[block],
        )
    return scores, rows


@njit(**_options)
def _rerank(queries, features, places, given, metric, scores, rows):
    k, width = rows.shape[1], queries.shape[1]
    for query in range(queries.shape[0]):
        length = 0.0
        for column in range(width):
            length += np.float64(queries[query, column]) ** 2
        length = np.sqrt(length)
        count = 0
        for candidate in range(places.shape[1]):
            place = places[query, candidate]
            if place < 0:
                continue
            total = own = 0.0
            for column in range(width):
                a, b = np.float64(queries[query, column]), np.float64(features[place, column])
                if metric == 2:
                    total -= (a - b) * (a - b)
                else:
                    total += a * b
                    own += b * b
            if metric == 0:
                scale = length * np.sqrt(own)
                total = total / scale if scale > 0 else 0.0
            score, row = np.float32(total + 0.0), given[query, candidate]
            if np.isnan(score):
                score = np.float32(-np.inf)  # of features that are no numbers: behind all that are
            if count == k:
                last = scores[query, k - 1]
                if score < last or (score == last and row > rows[query, k - 1]):
                    continue
                count -= 1
            position = count
            while position > 0:
                before = scores[query, position - 1]
                if before > score or (before == score and rows[query, position - 1] < row):
                    break
                scores[query, position] = before
                rows[query, position] = rows[query, position - 1]
                position -= 1
            scores[query, position] = score
            rows[query, position] = row
            count += 1
