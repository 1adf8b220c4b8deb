"""Which class is taken for which: the dense matrix, and the list that stays short for a million classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Confusion(NamedTuple):
    """One wrong pair: ``samples`` of class ``true`` were called ``predicted``, out of ``total`` of ``true``."""

    true: int
    predicted: int
    samples: int
    total: int


def _check(labels_N: np.ndarray, predictions_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels_N, predictions_N = np.asarray(labels_N), np.asarray(predictions_N)
    if labels_N.ndim != 1 or labels_N.shape != predictions_N.shape:
        raise ValueError(
            f"expected labels and predictions of one shape (N,), got {labels_N.shape} and {predictions_N.shape}"
        )
    for name, values in (("labels", labels_N), ("predictions", predictions_N)):
        if len(values) and values.dtype.kind not in "iu":
            raise ValueError(f"{name} must be whole numbers, got {values.dtype}")
        if len(values) and values.min() < 0:
            raise ValueError(f"{name} must be at least 0, got {values.min()} at row {int(values.argmin())}")
    return labels_N.astype(np.int64), predictions_N.astype(np.int64)


def confusion_matrix(labels_N: np.ndarray, predictions_N: np.ndarray, num_classes: int) -> np.ndarray:
    """Count each (true, predicted) pair.

    Args:
        labels_N: true classes, whole numbers.
        predictions_N: predicted classes, whole numbers.
        num_classes: C; memory is 8 * C * C bytes, see ``top_confusions`` for large C.

    Returns:
        int64 (C, C): row = true class, column = predicted class.

    Raises:
        ValueError: shapes that differ, or a class that is not in 0 to C - 1.
    """
    labels_N, predictions_N = _check(labels_N, predictions_N)
    for name, values in (("labels", labels_N), ("predictions", predictions_N)):
        if len(values) and values.max() >= num_classes:
            raise ValueError(
                f"{name} hold class {values.max()} at row {int(values.argmax())}, there are {num_classes} classes"
            )
    flat = np.bincount(labels_N * num_classes + predictions_N, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes)


def top_confusions(labels_N: np.ndarray, predictions_N: np.ndarray, count: int) -> list[Confusion]:
    """The most frequent wrong pairs, most frequent first; equal counts in order of the class numbers.

    Needs memory for the N samples only, whatever the number of classes.
    """
    labels_N, predictions_N = _check(labels_N, predictions_N)
    classes, totals = np.unique(labels_N, return_counts=True)
    wrong = labels_N != predictions_N
    pairs, counts = np.unique(np.stack([labels_N[wrong], predictions_N[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")[:count]  # np.unique gave the pairs in order of their numbers
    total_of = dict(zip(classes.tolist(), totals.tolist(), strict=True))
    return [Confusion(int(pairs[0, i]), int(pairs[1, i]), int(counts[i]), total_of[int(pairs[0, i])]) for i in order]
