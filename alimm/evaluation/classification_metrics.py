"""MMEngine metrics of a classifier. They keep a few numbers a sample, never the scores of all classes.

MMEngine gathers the samples of all ranks in the order of the data set and cuts what the sampler added to fill the last
batch, which is right as long as ``results`` holds exactly one entry a sample: so it does here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log

from alimm.evaluation.accuracy import class_accuracy, label_place, shot_groups, topk_credit
from alimm.evaluation.samples import single_label, stacked
from alimm.registry import METRICS


class _PlaceMetric(BaseMetric):
    """Keeps (label, classes scored higher, classes scored alike, number of classes) of each sample."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Take one batch of predictions (``gt_label``, ``pred_score``)."""
        name = type(self).__name__
        scores_BC = stacked(data_samples, "pred_score", name)
        labels = [single_label(sample, "gt_label", name) for sample in data_samples]
        try:
            above_B, tied_B = label_place(scores_BC, torch.tensor(labels))
        except ValueError as error:
            first = data_samples[0].get("sample_id") or data_samples[0].get("img_path")
            raise ValueError(
                f"{name}, in the batch of {len(labels)} that starts with sample {first}: {error}"
            ) from error
        classes = [scores_BC.shape[1]] * len(labels)
        self.results.extend(zip(labels, above_B.tolist(), tied_B.tolist(), classes, strict=True))

    def columns(self, results: list[tuple[int, int, int, int]]) -> tuple[Any, Any, Any, int]:
        """Labels, places and ties as tensors of one length, and the number of classes."""
        if not results:
            raise ValueError(f"{type(self).__name__} has no sample to judge: is the test set empty?")
        table = torch.tensor(results, dtype=torch.int64)
        sizes = table[:, 3].unique()
        if len(sizes) > 1:
            raise ValueError(f"{type(self).__name__} got scores of different numbers of classes: {sizes.tolist()}")
        return table[:, 0], table[:, 1], table[:, 2], int(sizes[0])


@METRICS.register_module()
class Accuracy(_PlaceMetric):
    """Top-k accuracy in per cent, keys ``accuracy/top1``, ``accuracy/top5``, ...

    A label that is tied with other classes at the k-th place counts its expected value over a random order of the ties.

    Args:
        topk: which k, one number or several; each at most the number of classes.
        collect_device: see BaseMetric.
        prefix: put before the keys.
        collect_dir: see BaseMetric.
    """

    default_prefix = "accuracy"

    def __init__(
        self,
        topk: int | Sequence[int] = (1,),
        collect_device: str = "cpu",
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.topk = (topk,) if isinstance(topk, int) else tuple(topk)
        if not self.topk or min(self.topk) < 1:
            raise ValueError(f"topk must be one or more numbers of at least 1, got {topk}")

    def compute_metrics(self, results: list[tuple[int, int, int, int]]) -> dict[str, float]:
        """Average over all samples."""
        _, above_N, tied_N, classes = self.columns(results)
        if max(self.topk) > classes:
            raise ValueError(f"topk={max(self.topk)} was asked for with {classes} classes; take at most {classes}")
        return {f"top{k}": 100.0 * float(topk_credit(above_N, tied_N, k).mean()) for k in self.topk}


@METRICS.register_module()
class PerClassAccuracy(_PlaceMetric):
    """Mean of the classes' own top-1 accuracies in per cent, key ``accuracy/mean_class``, and a table in the log.

    Classes without a test sample have no accuracy and are left out of the mean; the table's last line counts them.

    Args:
        table_rows: log so many classes, worst first; 0 logs no table.
        collect_device: see BaseMetric.
        prefix: put before the keys.
        collect_dir: see BaseMetric.
    """

    default_prefix = "accuracy"

    def __init__(
        self,
        table_rows: int = 100,
        collect_device: str = "cpu",
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.table_rows = table_rows

    def compute_metrics(self, results: list[tuple[int, int, int, int]]) -> dict[str, float]:
        """Average over the classes that have samples."""
        labels_N, above_N, tied_N, classes = self.columns(results)
        credit_N = topk_credit(above_N, tied_N, 1).numpy()
        accuracy_C, counts_C = class_accuracy(labels_N.numpy(), credit_N, classes)
        if self.table_rows:
            print_log("\n" + self.table(accuracy_C, counts_C), logger="current")
        return {"mean_class": 100.0 * float(np.nanmean(accuracy_C))}

    def table(self, accuracy_C: np.ndarray, counts_C: np.ndarray) -> str:
        """The classes with samples, worst first, as lines of text."""
        names = (self.dataset_meta or {}).get("classes") or [str(index) for index in range(len(counts_C))]
        tested = np.flatnonzero(counts_C)
        shown = tested[np.argsort(accuracy_C[tested], kind="stable")][: self.table_rows]
        width = max(len("class"), *(len(str(names[index])) for index in shown))
        lines = [f"{'class':<{width}}  samples  accuracy (%)"]
        lines += [f"{names[i]!s:<{width}}  {counts_C[i]:7d}  {100 * accuracy_C[i]:12.2f}" for i in shown]
        hidden, untested = len(tested) - len(shown), len(counts_C) - len(tested)
        lines.append(f"{hidden} more classes with samples, {untested} classes without")
        return "\n".join(lines)


@METRICS.register_module()
class ShotAccuracy(_PlaceMetric):
    """Accuracy on classes with many, medium and few training samples, in per cent.

    Keys ``shot/many``, ``shot/medium``, ``shot/few``, and ``shot/unseen`` for classes with no training sample. Each is
    the mean of its classes' own accuracies, over the classes that have test samples; a group without any has no key.

    Args:
        train_counts: training samples of each class: numbers, or a ``.json`` or ``.npy`` file that holds them. None
            takes them from ``class_counts`` in the meta information of the test set.
        many_above: more training samples than this is many.
        few_below: fewer than this is few.
        collect_device: see BaseMetric.
        prefix: put before the keys.
        collect_dir: see BaseMetric.
    """

    default_prefix = "shot"

    def __init__(
        self,
        train_counts: Sequence[int] | str | None = None,
        many_above: int = 100,
        few_below: int = 20,
        collect_device: str = "cpu",
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        self.many_above, self.few_below = many_above, few_below
        counts = read_counts(Path(train_counts)) if isinstance(train_counts, str) else train_counts
        # Judged now, so that a wrong file fails before the training and not after it.
        self.groups_C = None if counts is None else shot_groups(counts, many_above, few_below)

    def compute_metrics(self, results: list[tuple[int, int, int, int]]) -> dict[str, float]:
        """Average over the classes of each group."""
        labels_N, above_N, tied_N, classes = self.columns(results)
        groups_C = self.groups_C
        if groups_C is None:
            counts = (self.dataset_meta or {}).get("class_counts")
            if counts is None:
                raise ValueError(
                    "ShotAccuracy does not know how many training samples each class has: set train_counts to the "
                    "numbers or to a .json or .npy file, or use a data set with 'class_counts' in its metainfo"
                )
            groups_C = shot_groups(counts, self.many_above, self.few_below)
        if len(groups_C) != classes:
            raise ValueError(f"ShotAccuracy got train counts of {len(groups_C)} classes, the model has {classes}")
        credit_N = topk_credit(above_N, tied_N, 1).numpy()
        accuracy_C, counts_C = class_accuracy(labels_N.numpy(), credit_N, classes)
        metrics = {}
        for group in ("many", "medium", "few", "unseen"):
            members = (groups_C == group) & (counts_C > 0)
            if members.any():
                metrics[group] = 100.0 * float(accuracy_C[members].mean())
        return metrics


def read_counts(path: Path) -> np.ndarray:
    """Read one whole number a class from a ``.json`` list or a ``.npy`` array.

    Raises:
        ValueError: the file cannot be read or holds something else. The message names it.
    """
    try:
        if path.suffix == ".npy":
            counts = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            counts = np.asarray(json.loads(path.read_text(encoding="utf-8")))
        else:
            raise ValueError("expected a file that ends in .json or .npy")
    except (OSError, ValueError) as error:
        raise ValueError(f"train_counts: cannot read {path}: {error}") from error
    if counts.ndim != 1 or counts.dtype.kind not in "iu":
        raise ValueError(f"train_counts: {path} must hold a list of whole numbers, one a class")
    return counts
