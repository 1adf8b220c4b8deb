"""Recall@k and mean average precision of a retrieval, exact under ties, without the whole score matrix in memory.

Items with equal scores have no order. Instead of the accident of a sort, every figure here is its expected value over
all orders of the tied items, in closed form. Of a group of ``g`` items with one score, ``r`` of them relevant, with
``a`` items and ``b`` relevant items scored higher:

- a query finds a relevant item among its first k, if none is scored higher, with probability
  ``1 - C(g - r, m) / C(g, m)``, where ``m = clip(k - a, 0, g)`` places fall into the group;
- the group adds to the sum of precisions at relevant places, over its places j = 1..g,
  ``r / g * (b + 1 + (j - 1) * (r - 1) / (g - 1)) / (a + j)``.

Recall@k is the share of queries with at least one relevant item among the first k, as metric learning counts it. AP
divides the sum of precisions by the number R of relevant items; AP@R sums only over the first R places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SIMILARITIES = ("cosine", "ip", "l2")


@dataclass(frozen=True)
class RetrievalScores:
    """Figures of each query, and their means. All are fractions; NaN marks a query without a relevant item.

    Attributes:
        topk: the k of each column of ``hits_QK``.
        hits_QK: probability that a relevant item is among the first k.
        average_precision_Q: AP over the whole gallery.
        average_precision_at_r_Q: AP over the first R places.
    """

    topk: tuple[int, ...]
    hits_QK: np.ndarray
    average_precision_Q: np.ndarray
    average_precision_at_r_Q: np.ndarray

    @property
    def num_skipped(self) -> int:
        """Queries without any relevant item in the gallery; no mean counts them."""
        return int(np.isnan(self.average_precision_Q).sum())

    @property
    def num_queries(self) -> int:
        """Queries that count."""
        return len(self.average_precision_Q) - self.num_skipped

    @property
    def recall(self) -> dict[int, float]:
        """Recall@k by k."""
        return {k: float(np.nanmean(self.hits_QK[:, column])) for column, k in enumerate(self.topk)}

    @property
    def mean_average_precision(self) -> float:
        """Mean AP."""
        return float(np.nanmean(self.average_precision_Q))

    @property
    def mean_average_precision_at_r(self) -> float:
        """Mean AP@R."""
        return float(np.nanmean(self.average_precision_at_r_Q))


def _tie_groups(row_N: np.ndarray, relevant: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``above``, ``tied``, ``hits`` of each distinct score of a relevant item, best first. NaN entries do not count."""
    levels, hits = np.unique(row_N[relevant], return_counts=True)
    candidates = np.sort(row_N[row_N >= levels[0]])
    first, end = (np.searchsorted(candidates, levels, side=side) for side in ("left", "right"))
    return (len(candidates) - end)[::-1], (end - first)[::-1], hits[::-1]


def _hit_probability(above: int, tied: int, hits: int, k: int) -> float:
    """Probability that one of ``hits`` relevant items, among ``tied`` equal ones below ``above``, is in the first k."""
    places = min(max(k - above, 0), tied)
    if places == 0:
        return 0.0
    if tied == hits:
        return 1.0
    return 1.0 - math.comb(tied - hits, places) / math.comb(tied, places)


def _average_precisions(above_G: np.ndarray, tied_G: np.ndarray, hits_G: np.ndarray) -> tuple[float, float]:
    """Expected AP and AP@R from the groups of ``_tie_groups``."""
    total = int(hits_G.sum())
    hits_before_G = hits_G.cumsum() - hits_G
    group_P = np.repeat(np.arange(len(tied_G)), tied_G)
    earlier_P = np.arange(len(group_P)) - np.repeat(tied_G.cumsum() - tied_G, tied_G)  # j - 1
    share_P = (hits_G / tied_G)[group_P]
    other_share_P = ((hits_G - 1) / np.maximum(tied_G - 1, 1))[group_P]
    place_P = above_G[group_P] + earlier_P + 1
    term_P = share_P * (hits_before_G[group_P] + 1 + earlier_P * other_share_P) / place_P
    return float(term_P.sum() / total), float(term_P[place_P <= total].sum() / total)


def _judge(
    blocks: Iterator[tuple[int, np.ndarray]],
    query_labels_Q: np.ndarray,
    gallery_labels_N: np.ndarray,
    topk: Sequence[int],
    exclude_Q: np.ndarray | None,
) -> RetrievalScores:
    """Judge blocks of rows, each ``(index of its first query, scores that may be overwritten)``."""
    topk = tuple(topk)
    if not topk or min(topk) < 1:
        raise ValueError(f"topk must be one or more numbers of at least 1, got {topk}")
    hits_QK = np.full((len(query_labels_Q), len(topk)), np.nan)
    precision_Q2 = np.full((len(query_labels_Q), 2), np.nan)
    order = np.argsort(gallery_labels_N, kind="stable")
    first_Q = np.searchsorted(gallery_labels_N, query_labels_Q, side="left", sorter=order)
    last_Q = np.searchsorted(gallery_labels_N, query_labels_Q, side="right", sorter=order)
    for start, block in blocks:
        bad = np.isnan(block).any(axis=1)
        if bad.any():
            raise ValueError(f"the scores of query row {start + int(bad.argmax())} hold NaN")
        for query, row_N in enumerate(block, start):
            relevant = order[first_Q[query] : last_Q[query]]
            if exclude_Q is not None and exclude_Q[query] >= 0:
                relevant = relevant[relevant != exclude_Q[query]]
                row_N[exclude_Q[query]] = np.nan  # compares false with everything, so no count sees it
            if len(relevant) == 0:
                continue
            groups = _tie_groups(row_N, relevant)
            best = [int(column[0]) for column in groups]
            hits_QK[query] = [_hit_probability(best[0], best[1], best[2], k) for k in topk]
            precision_Q2[query] = _average_precisions(*groups)
    result = RetrievalScores(topk, hits_QK, precision_Q2[:, 0], precision_Q2[:, 1])
    if result.num_queries == 0:
        raise ValueError(
            f"none of the {len(query_labels_Q)} queries has a relevant item among the {len(gallery_labels_N)} of the "
            "gallery: are the labels those of the same identities?"
        )
    return result


def _check_labels(name: str, labels: np.ndarray, count: int) -> np.ndarray:
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise ValueError(f"{name} must have the shape ({count},), got {labels.shape}")
    return labels


def retrieval_from_scores(
    scores_QN: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    topk: Sequence[int] = (1, 5, 10),
    exclude: np.ndarray | None = None,
) -> RetrievalScores:
    """Judge a retrieval by its score matrix.

    Args:
        scores_QN: row = query, column = item of the gallery, larger is nearer. It is not changed.
        query_labels: identity of each query, shape (Q,).
        gallery_labels: identity of each item, shape (N,). An item is relevant if its identity is that of the query.
        topk: which k for recall@k.
        exclude: for each query the column that is the query itself and does not count, -1 for none; shape (Q,).

    Raises:
        ValueError: shapes that do not fit, a NaN (the message names the row), or no query with a relevant item.
    """
    scores_QN = np.asarray(scores_QN)
    if scores_QN.ndim != 2:
        raise ValueError(f"scores must have the shape (queries, gallery), got {scores_QN.shape}")
    queries, items = scores_QN.shape
    query_labels = _check_labels("query_labels", query_labels, queries)
    gallery_labels = _check_labels("gallery_labels", gallery_labels, items)
    if exclude is not None:
        exclude = _check_labels("exclude", exclude, queries)
        if len(exclude) and exclude.max() >= items:
            raise ValueError(f"exclude names the column {exclude.max()}, the gallery has {items}")
    dtype = np.float64 if scores_QN.dtype.kind in "iub" else scores_QN.dtype
    blocks = ((row, scores_QN[row : row + 1].astype(dtype, copy=True)) for row in range(queries))
    return _judge(blocks, query_labels, gallery_labels, topk, exclude)


def retrieval_from_features(
    query_features_QD: np.ndarray,
    query_labels: np.ndarray,
    gallery_features_ND: np.ndarray | None = None,
    gallery_labels: np.ndarray | None = None,
    topk: Sequence[int] = (1, 5, 10),
    similarity: str = "cosine",
    block_bytes: int = 32 << 20,
) -> RetrievalScores:
    """Judge a retrieval by the features of the queries and of the gallery.

    Scores are computed in double precision, a block of queries at a time, and rounded to single precision: two items
    with one feature then have one score wherever they stand in the block, which plain single precision does not give.

    Args:
        query_features_QD: any floating type; a zero vector has the cosine 0 to everything.
        query_labels: identity of each query, shape (Q,).
        gallery_features_ND: None searches the queries among themselves, each without its own row.
        gallery_labels: identity of each item, given with the features of the gallery.
        topk: which k for recall@k.
        similarity: ``'cosine'``, ``'ip'`` (inner product) or ``'l2'`` (the nearer the better).
        block_bytes: memory for a block of scores. 100k queries in 100k items need no more than for fewer.

    Raises:
        ValueError: as ``retrieval_from_scores``; an unknown similarity, a feature that is not finite (the message names
            the row), or sets of different width.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity must be one of {', '.join(SIMILARITIES)}, got {similarity!r}")
    if (gallery_features_ND is None) != (gallery_labels is None):
        raise ValueError("give both gallery_features_ND and gallery_labels, or neither")
    query = _features("query_features", query_features_QD)
    query_labels = _check_labels("query_labels", query_labels, len(query))
    exclude = None
    if gallery_features_ND is None or gallery_labels is None:
        gallery, gallery_labels, exclude = query, query_labels, np.arange(len(query))
    else:
        gallery = _features("gallery_features", gallery_features_ND)
        gallery_labels = _check_labels("gallery_labels", gallery_labels, len(gallery))
    if query.shape[1] != gallery.shape[1]:
        raise ValueError(f"queries have {query.shape[1]} dimensions, the gallery has {gallery.shape[1]}")
    score = _scorer(query, gallery, similarity)
    rows = max(1, block_bytes // (8 * max(1, len(gallery))))
    blocks = ((row, score(slice(row, row + rows))) for row in range(0, len(query), rows))
    return _judge(blocks, query_labels, gallery_labels, topk, exclude)


def _features(name: str, values: np.ndarray) -> np.ndarray:
    values = np.asarray(values)
    if values.ndim != 2 or values.dtype.kind != "f":
        raise ValueError(f"{name} must be floating of shape (items, dim), got {values.dtype} of shape {values.shape}")
    bad = ~np.isfinite(values).all(axis=1)
    if bad.any():
        raise ValueError(f"{name} row {int(bad.argmax())} holds NaN or infinity ({int(bad.sum())} rows do)")
    return values.astype(np.float64)


def _scorer(query_QD: np.ndarray, gallery_ND: np.ndarray, similarity: str) -> Callable[[slice], np.ndarray]:
    """A function from a slice of queries to their float32 scores."""
    offset_N = None
    if similarity == "cosine":
        query_QD, gallery_ND = (
            x / np.where((norm := np.linalg.norm(x, axis=1, keepdims=True)) > 0, norm, 1.0)
            for x in (query_QD, gallery_ND)
        )
    elif similarity == "l2":
        # q.g - g.g / 2 orders the items of one query as minus their distance does, and equal items get equal scores
        # even at distance 0, where q.q - 2 q.g + g.g is nothing but rounding. Centred, so that no digits are lost.
        centre_D = gallery_ND.mean(axis=0) if len(gallery_ND) else 0.0
        query_QD, gallery_ND = query_QD - centre_D, gallery_ND - centre_D
        offset_N = (gallery_ND**2).sum(axis=1) / 2

    def score(rows: slice) -> np.ndarray:
        scores = query_QD[rows] @ gallery_ND.T
        if offset_N is not None:
            scores -= offset_N
        return scores.astype(np.float32)

    return score
