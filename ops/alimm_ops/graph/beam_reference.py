"""Best-first search in a graph of binary codes, re-ranking with float features, in NumPy: the oracle of the kernels.

The walk keeps the ``ef`` nearest nodes seen so far, ordered by (distance, node), looks at the neighbours of the nearest
one not looked at yet, and ends when all that it keeps have been. Nothing in it depends on chance or on time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID, hamming_matrix

METRICS = ("cosine", "ip", "l2")


def beam_search(
    queries_QW: NDArray[np.uint64],
    codes_NW: NDArray[np.uint64],
    indptr: NDArray[np.int64],
    edges: NDArray[np.int32],
    starts_QE: NDArray[np.int32],
    ef: int,
    allowed_N: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.int64]]:
    """Walk from the start nodes of each query.

    Args:
        queries_QW: codes.
        codes_NW: codes of the nodes.
        indptr: int64 (N + 1,), where the out-edges of each node begin.
        edges: int32, targets in [0, N).
        starts_QE: nodes to begin with; -1 pads; may repeat.
        ef: width of the beam, at least 1.
        allowed_N: where given, only nodes with a 1 are results. The walk goes through the others all the same: the beam
            is then judged without regard to it, and the ef nearest allowed nodes among all that were seen are returned.

    Returns:
        Nodes int32 (Q, ef) and distances uint16, sorted by (distance, node), padded with (-1, 65535); and the number of
        distances computed for each query, int64 (Q,).
    """
    ids = np.full((len(queries_QW), ef), NO_ID, np.int32)
    dists = np.full((len(queries_QW), ef), NO_DISTANCE, np.uint16)
    counts = np.zeros(len(queries_QW), np.int64)
    for row, query in enumerate(queries_QW):
        distance_to = hamming_matrix(query[None], codes_NW)[0]
        seen = {int(node) for node in starts_QE[row] if node >= 0}
        looked_at: set[int] = set()
        while True:
            beam = sorted((int(distance_to[node]), node) for node in seen)[:ef]
            ahead = [node for _, node in beam if node not in looked_at]
            if not ahead:
                break
            looked_at.add(ahead[0])
            seen.update(edges[indptr[ahead[0]] : indptr[ahead[0] + 1]].tolist())
        counts[row] = len(seen)
        results = seen if allowed_N is None else {node for node in seen if allowed_N[node]}
        for column, (distance, node) in enumerate(sorted((int(distance_to[node]), node) for node in results)[:ef]):
            ids[row, column], dists[row, column] = node, distance
    return ids, dists, counts


def rerank(
    queries_QD: NDArray[np.float32],
    features_ND: NDArray[np.floating],
    rows_QR: NDArray[np.int64],
    k: int,
    metric: str,
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Order candidates by their float features.

    Args:
        queries_QD: float32.
        features_ND: float32 or float16.
        rows_QR: candidates of each query, rows of the features; -1 pads; none twice in a row.
        k: how many to return, at most R.
        metric: ``'cosine'`` (0 where a length is 0), ``'ip'`` or ``'l2'`` (minus the squared distance).

    Returns:
        Scores float32 (Q, k), computed in double precision and rounded once, larger is nearer, and rows int64 (Q, k),
        best first, equal scores by row; (minus infinity, -1) pads.
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    scores = np.full((len(queries_QD), k), -np.inf, np.float32)
    rows = np.full((len(queries_QD), k), NO_ID, np.int64)
    for q, query in enumerate(queries_QD.astype(np.float64)):
        own = rows_QR[q][rows_QR[q] >= 0]
        vectors = features_ND[own].astype(np.float64)
        if metric == "l2":
            values = 0.0 - ((vectors - query) ** 2).sum(axis=1)
        else:
            values = vectors @ query
            if metric == "cosine":
                lengths = np.sqrt((vectors**2).sum(axis=1)) * np.sqrt((query**2).sum())
                values = np.divide(values, lengths, out=np.zeros_like(values), where=lengths > 0)
        values = values.astype(np.float32)
        order = np.lexsort((own, -values))[:k]
        scores[q, : len(order)], rows[q, : len(order)] = values[order], own[order]
    return scores, rows
