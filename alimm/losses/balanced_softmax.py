"""Balanced softmax for long-tailed data.

Ren et al., Balanced Meta-Softmax for Long-Tailed Visual Recognition, NeurIPS 2020 (with exponent 1); with an exponent
it is the logit-adjusted loss of Menon et al., ICLR 2021:

    loss_i = - log softmax(z_i + t log n)_{y_i}

n_c is the number of training samples of class c, t the exponent. Trained so, the plain logits z rank classes as if each
were equally frequent, so nothing changes at test time. A class without training samples counts as one sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from alimm.losses.cross_entropy import cross_entropy
from alimm.registry import MODELS


@MODELS.register_module()
class BalancedSoftmaxLoss(nn.Module):
    """Cross entropy over logits that are shifted by the log of the class counts.

    Args:
        class_counts: training samples of each class. If None, `alimm.ClassCountsHook` takes them from the training
            data set before the first epoch.
        exponent: t in the formula; 0 is plain cross entropy.
        label_smooth: share of the target that is spread over all classes.
        loss_weight: factor on the result.
        ignore_index: label of samples to leave out.
    """

    log_counts: torch.Tensor | None

    def __init__(
        self,
        class_counts: Sequence[int] | None = None,
        exponent: float = 1.0,
        label_smooth: float = 0.0,
        loss_weight: float = 1.0,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self.exponent, self.label_smooth = exponent, label_smooth
        self.loss_weight, self.ignore_index = loss_weight, ignore_index
        self.register_buffer("log_counts", None, persistent=False)
        if class_counts is not None:
            self.set_class_counts(class_counts)

    def set_class_counts(self, class_counts: Sequence[int]) -> None:
        """Take the number of training samples of each class.

        Raises:
            ValueError: a count is negative, or there are none.
        """
        counts = torch.as_tensor(class_counts, dtype=torch.float32)
        if counts.ndim != 1 or not len(counts) or bool((counts < 0).any()):
            raise ValueError(f"class_counts must be one number >= 0 for each class, got {class_counts!r:.200}")
        self.log_counts = counts.clamp(min=1).log()

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Logits (N, C) and labels (N,) to a scalar.

        Raises:
            ValueError: the counts are not known or not as many as the classes.
        """
        if self.log_counts is None:
            raise ValueError(
                "BalancedSoftmaxLoss does not know the class counts: give class_counts=[...], or add "
                "dict(type='alimm.ClassCountsHook') to custom_hooks and a data set with metainfo['class_counts']"
            )
        if len(self.log_counts) != logits.shape[1]:
            raise ValueError(
                f"class_counts has {len(self.log_counts)} values, but the head gives {logits.shape[1]} classes"
            )
        shifted = logits.float() + self.exponent * self.log_counts.to(logits.device)
        return self.loss_weight * cross_entropy(shifted, labels, None, self.label_smooth, self.ignore_index)
