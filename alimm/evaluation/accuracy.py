"""Accuracy of a classifier from scores: top-k, by class, by how often a class was seen in training.

A model may give several classes the same score. Which of them is "the" prediction is then an accident of the sort, so
a label that is tied at the k-th place counts its expected value: with ``above`` classes scored higher than the label
and ``tied`` classes scored like it (itself included), a random order of the tied ones puts the label among the first k
with probability ``clip((k - above) / tied, 0, 1)``. A model that gives all C classes one score gets exactly k / C.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def label_place(scores_BC: torch.Tensor, labels_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the true label stands among the scores of each row.

    Args:
        scores_BC: larger is better; any floating type.
        labels_B: the true class of each row, 0 to C - 1.

    Returns:
        ``above_B``, the number of classes scored higher than the label, and ``tied_B``, the number scored like it, the
        label included (at least 1). Both int64, on the device of the scores.

    Raises:
        ValueError: shapes that do not fit, a label out of range, a score that is NaN.
    """
    if scores_BC.ndim != 2 or labels_B.ndim != 1 or len(scores_BC) != len(labels_B):
        raise ValueError(
            "expected scores of shape (batch, classes) and labels of shape (batch,), "
            f"got {tuple(scores_BC.shape)} and {tuple(labels_B.shape)}"
        )
    labels_B = labels_B.to(scores_BC.device)
    classes = scores_BC.shape[1]
    bad = ((labels_B < 0) | (labels_B >= classes)).nonzero()
    if len(bad):
        row = int(bad[0])
        raise ValueError(f"row {row} has the label {int(labels_B[row])}, the scores are of classes 0 to {classes - 1}")
    nan_rows = scores_BC.isnan().any(dim=1).nonzero()
    if len(nan_rows):
        raise ValueError(
            f"the scores of row {int(nan_rows[0])} hold NaN ({len(nan_rows)} of {len(scores_BC)} rows do); "
            "a model that diverged has no accuracy"
        )
    own_B1 = scores_BC.gather(1, labels_B[:, None])
    return (scores_BC > own_B1).sum(dim=1), (scores_BC == own_B1).sum(dim=1)


def topk_credit(above_B: torch.Tensor, tied_B: torch.Tensor, k: int) -> torch.Tensor:
    """Probability that the label is among the first k when ties are ordered at random; float64, 0 to 1.

    Args:
        above_B: classes scored higher than the label.
        tied_B: classes scored like the label, itself included.
        k: how many places count, at least 1.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    return ((k - above_B).double() / tied_B.double()).clamp(0.0, 1.0)


def class_accuracy(labels_N: np.ndarray, credit_N: np.ndarray, num_classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of each class.

    Args:
        labels_N: true classes.
        credit_N: what each sample counts, 0 to 1 (see ``topk_credit``).
        num_classes: C.

    Returns:
        ``accuracy_C`` (float64, NaN where a class has no sample) and ``counts_C`` (int64).
    """
    counts_C = np.bincount(labels_N, minlength=num_classes)
    sums_C = np.bincount(labels_N, weights=credit_N, minlength=num_classes)
    accuracy_C = np.divide(sums_C, counts_C, out=np.full(len(counts_C), np.nan), where=counts_C > 0)
    return accuracy_C, counts_C


def shot_groups(train_counts_C: Sequence[int] | np.ndarray, many_above: int = 100, few_below: int = 20) -> np.ndarray:
    """Name the group of each class by its number of training samples.

    Args:
        train_counts_C: training samples of each class.
        many_above: a class with more than so many is ``'many'``.
        few_below: a class with fewer than so many is ``'few'``, the rest is ``'medium'``.

    Returns:
        Strings, shape (C,). A class without any training sample is ``'unseen'`` and in no other group.
    """
    counts_C = np.asarray(train_counts_C)
    if counts_C.ndim != 1 or counts_C.dtype.kind not in "iu" or (counts_C < 0).any():
        raise ValueError(
            f"train counts must be whole numbers of at least 0, one a class; got {counts_C.dtype} of shape "
            f"{counts_C.shape}"
        )
    if few_below > many_above + 1 or few_below < 1:
        raise ValueError(
            f"expected 1 <= few_below <= many_above + 1, got few_below {few_below}, many_above {many_above}"
        )
    conditions = [counts_C == 0, counts_C > many_above, counts_C < few_below]
    return np.select(conditions, ["unseen", "many", "few"], default="medium")
