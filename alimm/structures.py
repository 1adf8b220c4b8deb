"""What a classification pipeline hands from part to part: one data sample a picture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.structures import BaseDataElement


def _label_tensor(value: int | Sequence[int] | np.ndarray | torch.Tensor) -> torch.Tensor:
    label = torch.as_tensor(value, dtype=torch.int64)
    return label.reshape(1) if label.ndim == 0 else label


class ClsDataSample(BaseDataElement):
    """Annotation and prediction of one picture.

    Data fields (all optional): ``gt_label`` (int64, shape (1,)), ``gt_identity`` (int64, (1,)), ``pred_label``
    (int64, (1,)), ``pred_score`` (float, (num_classes,), sums to one), ``pred_topk`` (int64, (k,), best first, -1 where
    there are no more classes) with ``pred_topk_score`` (float, (k,)), ``feature`` (float, (dim,)).
    Meta fields in use: ``sample_id`` (str, stable), ``img_path``, ``img_shape``, ``ori_shape`` (height, width).
    """

    def set_gt_label(self, value: int | Sequence[int] | np.ndarray | torch.Tensor) -> ClsDataSample:
        """Set the true class."""
        self.set_field(_label_tensor(value), "gt_label", dtype=torch.Tensor)
        return self

    def set_gt_identity(self, value: int | Sequence[int] | np.ndarray | torch.Tensor) -> ClsDataSample:
        """Set the identity: which product, person or place the picture shows."""
        self.set_field(_label_tensor(value), "gt_identity", dtype=torch.Tensor)
        return self

    def set_pred_score(self, value: torch.Tensor) -> ClsDataSample:
        """Set the class probabilities, shape (num_classes,), and the predicted label with them."""
        if value.ndim != 1:
            raise ValueError(f"pred_score must have one dimension (num_classes,), got shape {tuple(value.shape)}")
        self.set_field(value, "pred_score", dtype=torch.Tensor)
        self.set_field(value.argmax().reshape(1), "pred_label", dtype=torch.Tensor)
        return self

    def set_pred_topk(self, labels: torch.Tensor, scores: torch.Tensor) -> ClsDataSample:
        """Set the best classes, and the first of them as the predicted label; for more classes than one can score.

        Args:
            labels: int64, (k,), k at least 1, best first, -1 where there are no more classes.
            scores: float, (k,), probabilities or logits.
        """
        if labels.ndim != 1 or not len(labels) or labels.shape != scores.shape or labels.dtype != torch.int64:
            raise ValueError(
                "pred_topk must be int64 labels of shape (k,), k at least 1, with as many scores, got "
                f"{labels.dtype} of shape {tuple(labels.shape)} and scores of shape {tuple(scores.shape)}"
            )
        self.set_field(labels, "pred_topk", dtype=torch.Tensor)
        self.set_field(scores, "pred_topk_score", dtype=torch.Tensor)
        self.set_field(labels[:1], "pred_label", dtype=torch.Tensor)
        return self

    def set_feature(self, value: torch.Tensor) -> ClsDataSample:
        """Set the embedding, shape (dim,)."""
        self.set_field(value, "feature", dtype=torch.Tensor)
        return self
