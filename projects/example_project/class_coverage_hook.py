"""Which classes has training seen? A hook that answers after every epoch.

With a long tail and a sampler, "one epoch" may leave classes out, and a run that is resumed or spread over many
processes hides it. The hook counts the labels that reach the model,

    n_c = number of samples with label c since the start of training, over all ranks,

logs the covered share, |{c : n_c > 0}| / C, as ``train/class_coverage``, and names the classes never seen. The counts
are kept in the checkpoint, so a resumed run goes on counting. No paper: this project shows how a method plugs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.runner import Runner

from alimm.registry import HOOKS


@HOOKS.register_module()
class ClassCoverageHook(Hook):
    """Logs the share of classes that training has seen.

    Args:
        num_classes: C, the number of classes of the training set.
        show: name at most so many unseen classes in the log.

    Raises:
        ValueError: ``num_classes`` is not positive, or a label is not below it.
    """

    def __init__(self, num_classes: int, show: int = 10) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}: give the number of training classes")
        self.counts_C = torch.zeros(num_classes, dtype=torch.int64)
        self._epoch_counts_C = torch.zeros(num_classes, dtype=torch.int64)
        self.show = show

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Count the labels of this rank's batch."""
        labels_N = torch.cat([sample.gt_label for sample in data_batch["data_samples"]]).cpu()
        num_classes = len(self._epoch_counts_C)
        low, high = int(labels_N.min()), int(labels_N.max())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f"a training label lies outside 0..{num_classes - 1}: got {low}..{high}. "
                "Set num_classes of ClassCoverageHook to that of the data set"
            )
        self._epoch_counts_C += torch.bincount(labels_N, minlength=num_classes)

    def after_train_epoch(self, runner: Runner) -> None:
        """Add the epoch's counts over all ranks, and log. One collective of C integers an epoch."""
        all_reduce(self._epoch_counts_C)
        self.counts_C += self._epoch_counts_C
        self._epoch_counts_C.zero_()
        unseen = torch.nonzero(self.counts_C == 0).flatten().tolist()
        coverage = 1 - len(unseen) / len(self.counts_C)
        runner.message_hub.update_scalar("train/class_coverage", coverage)
        runner.logger.info(f"class coverage {coverage:.1%} after epoch {runner.epoch + 1}{self._name(unseen)}")

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the counts."""
        checkpoint["class_coverage"] = self.counts_C.clone()

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Go on from the counts of the checkpoint when a run is resumed; with new weights only, start at zero."""
        if runner._resume and "class_coverage" in checkpoint:
            self.counts_C = checkpoint["class_coverage"].clone()

    def _name(self, unseen: Sequence[int]) -> str:
        if not unseen:
            return ""
        more = ", ..." if len(unseen) > self.show else ""
        return f"; never seen: {', '.join(map(str, unseen[: self.show]))}{more}"
