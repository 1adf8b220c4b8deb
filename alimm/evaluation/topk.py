"""Top-k accuracy from a short list of classes, for classifiers with too many of them to hand out a score for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

from alimm.evaluation.accuracy import label_place, topk_credit
from alimm.evaluation.samples import single_label, stacked
from alimm.registry import METRICS

_NOT_LISTED = 1 << 40
"""Place of a label that is not in the list: beyond every k."""


@METRICS.register_module()
class TopKAccuracy(BaseMetric):
    """Top-k accuracy in per cent, keys ``accuracy/top1``, ``accuracy/top5``, ...

    Reads ``pred_topk`` of the predictions, the classes best first with -1 where there are no more; without it
    ``pred_score``, where a label that is tied at the k-th place counts as in `alimm.Accuracy`. Keeps three numbers a
    sample, one entry each, so that MMEngine can cut what a sampler repeated to fill the last batch.

    Args:
        topk: which k, one number or several.
        target: field of the samples that holds the true class, ``'gt_label'`` or ``'gt_identity'``.
        collect_device: see BaseMetric.
        prefix: put before the keys.
        collect_dir: see BaseMetric.
    """

    default_prefix = "accuracy"

    def __init__(
        self,
        topk: int | Sequence[int] = (1, 5),
        target: str = "gt_label",
        collect_device: str = "cpu",
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise ValueError(f"topk must be one or more numbers of at least 1, got {topk}")
        self.target = target

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Take one batch of predictions (the target, and ``pred_topk`` or ``pred_score``).

        Raises:
            ValueError: a sample has neither prediction or no true class, or the list is no list of classes.
        """
        if not data_samples:
            return
        labels = [self._label(sample) for sample in data_samples]
        listed = [sample.get("pred_topk") is not None for sample in data_samples]
        if all(listed):
            for sample, label in zip(data_samples, labels, strict=True):
                self.results.append(self._place(sample, label))
            return
        poor = next(
            (s for s, has in zip(data_samples, listed, strict=True) if not has and s.get("pred_score") is None), None
        )
        if poor is not None:
            raise ValueError(
                f"TopKAccuracy needs pred_topk or pred_score, the prediction for the sample {_name(poor)} has only "
                f"{sorted(poor)}: use a head that calls set_pred_topk (alimm.ShardedHead does) or set_pred_score in "
                "predict"
            )
        if any(listed):
            raise ValueError("TopKAccuracy got pred_topk for some samples of a batch only: a head must set it for all")
        scores_BC = stacked(data_samples, "pred_score", "TopKAccuracy")
        try:
            above_B, tied_B = label_place(scores_BC, torch.tensor(labels))
        except ValueError as error:
            raise ValueError(
                f"TopKAccuracy, in the batch of {len(labels)} that starts with sample {_name(data_samples[0])}: {error}"
            ) from error
        known = [scores_BC.shape[1]] * len(labels)
        self.results.extend(zip(above_B.tolist(), tied_B.tolist(), known, strict=True))

    def _label(self, sample: Mapping[str, Any]) -> int:
        label = single_label(sample, self.target, "TopKAccuracy")
        if label < 0:
            # It would be found among the -1 that fill a list.
            raise ValueError(
                f"TopKAccuracy: sample {_name(sample)} has {self.target} {label}; leave samples without a true class "
                "out of the test set"
            )
        return label

    def _place(self, sample: Mapping[str, Any], label: int) -> tuple[int, int, int]:
        found = torch.as_tensor(sample["pred_topk"])
        if found.ndim != 1 or found.is_floating_point() or not len(found):
            raise ValueError(
                f"TopKAccuracy needs pred_topk of shape (k,) with whole numbers, the sample {_name(sample)} has "
                f"{found.dtype} of shape {tuple(found.shape)}"
            )
        hits = (found == label).nonzero()
        return (int(hits[0]) if len(hits) else _NOT_LISTED), 1, len(found)

    def compute_metrics(self, results: list[tuple[int, int, int]]) -> dict[str, float]:
        """Average over all samples.

        Raises:
            ValueError: there is no sample, or a k is larger than the lists are long.
        """
        if not results:
            raise ValueError("TopKAccuracy has no sample to judge: is the test set empty?")
        above_N, tied_N, known_N = torch.tensor(results, dtype=torch.int64).T
        shortest = int(known_N.min())
        if max(self.topk) > shortest:
            raise ValueError(
                f"TopKAccuracy was asked for topk={max(self.topk)}, but predictions name {shortest} classes: set topk "
                f"of the head to at least {max(self.topk)}, or topk of the metric to at most {shortest}"
            )
        return {f"top{k}": 100.0 * float(topk_credit(above_N, tied_N, k).mean()) for k in self.topk}


def _name(sample: Mapping[str, Any]) -> str:
    return str(sample.get("sample_id") or sample.get("img_path") or "without a sample_id")
