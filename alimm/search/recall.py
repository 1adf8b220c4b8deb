"""How much of the exact result an approximate search found."""

from __future__ import annotations

import numpy as np


def recall_at_k(
    found_ids_QF: np.ndarray, true_ids_QT: np.ndarray, true_scores_QT: np.ndarray, k: int | None = None
) -> float:
    """Share of the k true nearest neighbours among the first k found, averaged over the queries.

    Items tied with the k-th true neighbour are as near as it: finding any of them counts. For that the true result must
    reach past the ties, so search exactly for more than k; with exactly k the ties beyond count as misses. A query with
    fewer than k true neighbours is judged by those it has, one with none counts as found. An id that
    was found twice counts once.

    Args:
        found_ids_QF: what the search found, best first, -1 for none; at least k columns.
        true_ids_QT: the exact result, best first, -1 for none; at least k columns.
        true_scores_QT: its scores, larger is nearer.
        k: None takes the number of columns of ``found_ids_QF``.

    Returns:
        The recall, 0 to 1.

    Raises:
        ValueError: shapes that do not fit, or true scores that are not sorted.
    """
    found_ids_QF, true_ids_QT = np.asarray(found_ids_QF), np.asarray(true_ids_QT)
    true_scores_QT = np.asarray(true_scores_QT)
    if found_ids_QF.ndim != 2 or true_ids_QT.ndim != 2 or len(found_ids_QF) != len(true_ids_QT):
        raise ValueError(
            f"expected ids of shape (queries, columns), got found {found_ids_QF.shape} and true {true_ids_QT.shape}"
        )
    if true_scores_QT.shape != true_ids_QT.shape:
        raise ValueError(f"true scores {true_scores_QT.shape} and true ids {true_ids_QT.shape} differ in shape")
    k = found_ids_QF.shape[1] if k is None else k
    if not 1 <= k <= min(found_ids_QF.shape[1], true_ids_QT.shape[1]) or len(found_ids_QF) == 0:
        raise ValueError(
            f"recall at k={k} needs a query and at least k columns, got found {found_ids_QF.shape} and true "
            f"{true_ids_QT.shape}"
        )
    # Not diff(): minus infinity, the score of the padding, has no difference to itself.
    if not (true_scores_QT[:, :-1] >= true_scores_QT[:, 1:]).all():
        raise ValueError("true scores must be sorted, largest first, without NaN")
    recalls = np.ones(len(found_ids_QF))
    for row, (found, true, scores) in enumerate(zip(found_ids_QF, true_ids_QT, true_scores_QT, strict=True)):
        count = min(k, int((true >= 0).sum()))
        if count == 0:
            continue
        near_enough = true[(true >= 0) & (scores >= scores[count - 1])]
        recalls[row] = len(np.intersect1d(found[:k], near_enough)) / count
    return float(recalls.mean())
