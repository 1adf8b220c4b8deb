"""Softmax cross entropy with label smoothing and class weights.

    loss_i = - sum_c q_ic log softmax(z_i)_c,   q_ic = (1 - e) [c = y_i] + e / C
    loss   = sum_i w_{y_i} loss_i / sum_i w_{y_i},   over the samples whose label is not ``ignore_index``

Label smoothing: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016.
One difference from torch: a batch in which every label is ignored gives 0 (with a gradient of zeros), not NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from alimm.registry import MODELS


def check_labels(logits_NC: torch.Tensor, labels_N: torch.Tensor, ignore_index: int) -> None:
    """Refuse labels that name no class; torch would fail without saying which.

    Raises:
        ValueError: a label is neither in ``[0, C)`` nor ``ignore_index``.
    """
    num_classes = logits_NC.shape[1]
    wrong = ((labels_N < 0) | (labels_N >= num_classes)) & (labels_N != ignore_index)
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"label {int(labels_N[row])} in row {row} of the batch is not in [0, {num_classes}): set num_classes of "
            f"the head to the number of classes of the data set, or give the sample the label {ignore_index} to leave "
            f"it out"
        )


def cross_entropy(
    logits_NC: torch.Tensor,
    labels_N: torch.Tensor,
    class_weight_C: torch.Tensor | None = None,
    label_smooth: float = 0.0,
    ignore_index: int = -100,
) -> torch.Tensor:
    """The loss above, a scalar in float32 or float64.

    Args:
        logits_NC: scores of N samples over C classes; half precision is computed in float32.
        labels_N: int64, in [0, C) or ``ignore_index``.
        class_weight_C: a weight for each class.
        label_smooth: e in the formula, in [0, 1).
        ignore_index: samples with this label count for nothing.
    """
    if logits_NC.dtype in (torch.float16, torch.bfloat16):
        logits_NC = logits_NC.float()
    check_labels(logits_NC, labels_N, ignore_index)
    kept = labels_N != ignore_index
    target = labels_N.where(kept, torch.zeros_like(labels_N))
    log_p_NC = F.log_softmax(logits_NC, dim=1)
    loss_N = -(1 - label_smooth) * log_p_NC.gather(1, target[:, None])[:, 0] - label_smooth * log_p_NC.mean(1)
    weight_N = kept.to(loss_N.dtype)
    if class_weight_C is not None:
        weight_N = weight_N * class_weight_C.to(loss_N)[target]
    total = weight_N.sum()
    return (loss_N * weight_N).sum() / total.clamp(min=torch.finfo(total.dtype).tiny)


@MODELS.register_module()
class CrossEntropyLoss(nn.Module):
    """Softmax cross entropy as a module.

    Args:
        label_smooth: share of the target that is spread over all classes, in [0, 1).
        class_weight: one weight for each class.
        loss_weight: factor on the result.
        ignore_index: label of samples to leave out.
    """

    class_weight: torch.Tensor | None

    def __init__(
        self,
        label_smooth: float = 0.0,
        class_weight: Sequence[float] | None = None,
        loss_weight: float = 1.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not 0 <= label_smooth < 1:
            raise ValueError(f"label_smooth must be in [0, 1), got {label_smooth}")
        self.label_smooth, self.loss_weight, self.ignore_index = label_smooth, loss_weight, ignore_index
        weight = None if class_weight is None else torch.as_tensor(class_weight, dtype=torch.float32)
        self.register_buffer("class_weight", weight, persistent=False)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) and labels (N,) to a scalar.

        Raises:
            ValueError: the class weights are not as many as the classes, or a label names no class.
        """
        if self.class_weight is not None and len(self.class_weight) != logits.shape[1]:
            raise ValueError(
                f"class_weight has {len(self.class_weight)} values, but the head gives {logits.shape[1]} classes"
            )
        return self.loss_weight * cross_entropy(logits, labels, self.class_weight, self.label_smooth, self.ignore_index)
