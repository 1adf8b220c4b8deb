"""Intersection over union by weather condition, in one pass.

With the confusion N_k[t, p] of condition k (pixels of true class t that were called p, pixels to ignore left out),

    IoU_k[c]  = N_k[c, c] / (sum_p N_k[c, p] + sum_t N_k[t, c] - N_k[c, c])
    mIoU_k    = mean of IoU_k[c] over the classes c that condition k shows or that were called there
    mIoU      = the same from the pooled confusion, sum_k N_k

The pooled number is not the mean over conditions: a condition with many pixels weighs more in it, and a class that is
rare at night hides behind the days. So the mean over conditions and the worst one stand beside it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from numpy.typing import NDArray
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from alimm.registry import METRICS

_TAKEN = ("mean", "worst", "adverse")
"""Keys ``mIoU/...`` that no condition may be called."""


def confusion(pred: NDArray[Any], gt: NDArray[Any], num_classes: int, ignore_index: int = 255) -> NDArray[np.int64]:
    """Count each (true, predicted) pair of classes.

    Args:
        pred: predicted classes, whole numbers, any shape. What stands where ``gt`` is ``ignore_index`` does not matter.
        gt: true classes, of the same shape: 0 to C - 1, or ``ignore_index``.
        num_classes: C.
        ignore_index: value of the pixels that do not count.

    Returns:
        (C, C) pixels: row = true class, column = predicted class.

    Raises:
        ValueError: shapes that differ, values that are no whole numbers, a class that is not in 0 to C - 1.
    """
    if pred.shape != gt.shape:
        raise ValueError(f"expected a prediction and a ground truth of one size, got {pred.shape} and {gt.shape}")
    for name, values in (("prediction", pred), ("ground truth", gt)):
        if values.dtype.kind not in "iu":
            raise ValueError(f"the {name} must hold whole numbers, the classes; got {values.dtype}")
    counts = gt != ignore_index
    true_N, pred_N = gt[counts].astype(np.int64), pred[counts].astype(np.int64)
    for name, values in (("prediction", pred_N), ("ground truth", true_N)):
        beyond = np.unique(values[(values < 0) | (values >= num_classes)])
        if len(beyond):
            more = ", ..." if len(beyond) > 8 else ""
            raise ValueError(
                f"the {name} holds {', '.join(map(str, beyond[:8]))}{more}, but the classes are 0 to "
                f"{num_classes - 1} and the pixels to ignore are {ignore_index}"
            )
    flat = np.bincount(true_N * num_classes + pred_N, minlength=num_classes * num_classes)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def iou(confusion_CC: NDArray[np.int64]) -> NDArray[np.float64]:
    """Intersection over union of each class, 0 to 1.

    Args:
        confusion_CC: pixels, see `confusion`.

    Returns:
        (C,); NaN for a class that neither occurs nor was predicted.
    """
    hit_C = np.diagonal(confusion_CC).astype(np.float64)
    union_C = confusion_CC.sum(axis=0) + confusion_CC.sum(axis=1) - hit_C
    return np.divide(hit_C, union_C, out=np.full(len(hit_C), np.nan), where=union_C > 0)


@METRICS.register_module()
class ConditionIoUMetric(BaseMetric):
    """Mean IoU in per cent: pooled, of each condition, over the conditions, and of the worst.

    Keys: ``mIoU`` (all pixels pooled), ``mIoU/<condition>``, ``mIoU/mean`` (mean over the conditions), ``mIoU/worst``,
    ``mIoU/adverse`` (mean over the adverse ones), ``aAcc`` (pixels that are right, pooled) and, with ``source_miou``,
    ``gap``. In a key, "_" stands for what is no letter, no digit and none of "_", "-", "+", ".". A condition without a
    labelled pixel has no key and counts in no mean; the log says so.

    Reads ``pred_sem_seg`` and ``gt_sem_seg`` of the samples, and ``condition`` of their metainfo. After an evaluation
    ``confusions`` holds the (C, C) pixels of each condition, on the rank that computes the metrics.

    Args:
        conditions: names in the order of the report; those of the data set (``metainfo['conditions']``) if None, and
            those that occur where it has none.
        ignore_index: value of the pixels that do not count.
        source_miou: mIoU in per cent of the same model on the source's own validation set; ``gap`` is this minus
            ``mIoU``, the points that the change of domain still costs.
        adverse: names of the adverse conditions; all but ``clear_names`` if None.
        clear_names: conditions that are not adverse.
        print_table: log the IoU of each class in each condition; else one line of means.
        collect_device: see BaseMetric.
        prefix: put before the keys.
        collect_dir: see BaseMetric.

    Raises:
        ValueError: a name that would hide a key, names given twice or with one key, a ``source_miou`` that is no per
            cent.
    """

    def __init__(
        self,
        conditions: Sequence[str] | None = None,
        ignore_index: int = 255,
        source_miou: float | None = None,
        adverse: Sequence[str] | None = None,
        clear_names: Sequence[str] = ("clear",),
        print_table: bool = True,
        collect_device: str = "cpu",
        prefix: str | None = None,
        collect_dir: str | None = None,
    ) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix, collect_dir=collect_dir)
        if source_miou is not None and not 1 < source_miou <= 100:
            raise ValueError(f"source_miou must be per cent, above 1 and at most 100, got {source_miou}")
        self.conditions = None if conditions is None else _check_names(conditions)
        self.ignore_index = ignore_index
        self.source_miou = source_miou
        self.adverse = None if adverse is None else _check_names(adverse)
        self.clear_names = _check_names(clear_names)
        self.print_table = print_table
        self.confusions: dict[str, NDArray[np.int64]] = {}
        self._seen: dict[str, None] = {}
        if self.conditions is not None and self.adverse is not None:
            _check_known(self.adverse, self.conditions)

    def process(self, data_batch: Any, data_samples: Sequence[Any]) -> None:
        """Take one batch of predictions; keeps the condition and one confusion a sample.

        Raises:
            ValueError: a sample lacks its prediction, ground truth or condition, or they do not fit together or with
                the data set.
        """
        num_classes, known = len(self._classes()), self._known()
        for sample in data_samples:
            name = _sample_name(sample)
            condition = self._condition(sample, name, known)
            pred, gt = _labels(sample, "pred_sem_seg", name), _labels(sample, "gt_sem_seg", name)
            if pred.shape != gt.shape:
                raise ValueError(
                    f"ConditionIoUMetric: the prediction for sample {name} is {pred.shape[0]} x {pred.shape[1]}, its "
                    f"ground truth {gt.shape[0]} x {gt.shape[1]} pixels: the model resizes predictions to the loaded "
                    "image (ori_shape), so let LoadAnnotations come after Resize in the test pipeline, or test with "
                    "label maps of the size of the images"
                )
            try:
                counts_CC = confusion(pred, gt, num_classes, self.ignore_index)
            except ValueError as error:
                raise ValueError(
                    f"ConditionIoUMetric, sample {name}: {error}. Check reduce_zero_label, ignore_index and the "
                    "classes of the data set, and num_classes of the model"
                ) from error
            self.results.append((condition, counts_CC.astype(np.int32)))

    def compute_metrics(self, results: list[tuple[str, NDArray[np.int32]]]) -> dict[str, float]:
        """Add up the confusions of each condition; per cent.

        Raises:
            ValueError: there is no sample, no labelled pixel at all, or no sample of a condition called adverse.
        """
        if not results:
            raise ValueError("ConditionIoUMetric has no sample to judge: is the validation set empty?")
        _check_names(list(dict.fromkeys(condition for condition, _ in results)))
        classes = self._classes()
        found: dict[str, NDArray[np.int64]] = {}
        for condition, counts_CC in results:
            found[condition] = found.get(condition, np.zeros((len(classes), len(classes)), np.int64)) + counts_CC
        known = self._known()
        self.confusions = {name: found[name] for name in known or found if name in found and found[name].any()}
        missing = [name for name in known or found if name not in self.confusions]
        if not self.confusions:
            raise ValueError(
                f"ConditionIoUMetric: no pixel of {len(results)} samples is labelled, all are {self.ignore_index}: "
                "check seg_map_path and ignore_index"
            )
        if missing:
            print_log(f"ConditionIoUMetric: no labelled pixel of {', '.join(missing)}", logger="current")
        if self.adverse is not None:
            _check_known(self.adverse, tuple(known or found))
        pooled_CC = np.sum(list(self.confusions.values()), axis=0)
        iou_KC = {name: 100.0 * iou(counts_CC) for name, counts_CC in self.confusions.items()}
        pooled_C = 100.0 * iou(pooled_CC)
        means = {name: float(np.nanmean(iou_C)) for name, iou_C in iou_KC.items()}
        metrics = {"mIoU": float(np.nanmean(pooled_C))}
        metrics.update({f"mIoU/{_key(name)}": mean for name, mean in means.items()})
        metrics["mIoU/mean"] = float(np.mean(list(means.values())))
        metrics["mIoU/worst"] = min(means.values())
        adverse = [name for name in means if self._is_adverse(name)]
        if adverse:
            metrics["mIoU/adverse"] = float(np.mean([means[name] for name in adverse]))
        metrics["aAcc"] = 100.0 * float(np.trace(pooled_CC) / pooled_CC.sum())
        if self.source_miou is not None:
            metrics["gap"] = self.source_miou - metrics["mIoU"]
        self._log(classes, {**iou_KC, "pooled": pooled_C})
        return metrics

    def _is_adverse(self, name: str) -> bool:
        return name not in self.clear_names if self.adverse is None else name in self.adverse

    def _classes(self) -> Sequence[str]:
        classes: Sequence[str] | None = (self.dataset_meta or {}).get("classes")
        if not classes:
            raise ValueError("ConditionIoUMetric needs the classes of the data set: give it metainfo=dict(classes=...)")
        return classes

    def _known(self) -> tuple[str, ...] | None:
        if self.conditions is not None:
            return self.conditions
        names = (self.dataset_meta or {}).get("conditions")
        return _check_names(names) if names else None

    def _condition(self, sample: Any, name: str, known: tuple[str, ...] | None) -> str:
        condition = sample.get("condition")
        if condition is None:
            raise ValueError(
                f"ConditionIoUMetric: sample {name} has no 'condition' in its metainfo: end the test pipeline with "
                "alimm.PackConditionInputs, or put 'condition' into meta_keys of PackSegInputs"
            )
        if known is not None and condition not in known:
            raise ValueError(
                f"ConditionIoUMetric: sample {name} is of condition {condition!r}, known are {', '.join(known)}: add "
                "it to conditions of the metric or of the data set"
            )
        if known is None and condition not in self._seen:
            _check_names([*self._seen, condition])
            self._seen[condition] = None
        return str(condition)

    def _log(self, classes: Sequence[str], iou_of: Mapping[str, NDArray[np.float64]]) -> None:
        if self.print_table:
            print_log("\n" + table_text(classes, iou_of), logger="current")
            return
        parts = [
            f"{name} {np.nanmean(iou_C):.2f} ({np.isfinite(iou_C).sum()} of {len(classes)} classes)"
            for name, iou_C in iou_of.items()
        ]
        print_log("mIoU: " + ", ".join(parts), logger="current")


def table_text(classes: Sequence[str], iou_of: Mapping[str, NDArray[np.float64]]) -> str:
    """A table of classes by conditions, with the means and the numbers of classes that count in them.

    Args:
        classes: names, C.
        iou_of: title of the column -> per cent, (C,); NaN where a class does not count.
    """
    table = Table(box=box.ASCII)
    table.add_column("class", no_wrap=True)
    for name in iou_of:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for index, name in enumerate(classes):
        cells = ["-" if np.isnan(iou_C[index]) else f"{iou_C[index]:.2f}" for iou_C in iou_of.values()]
        table.add_row(Text(str(name)), *cells)
    table.add_section()
    table.add_row("mIoU", *(f"{np.nanmean(iou_C):.2f}" for iou_C in iou_of.values()))
    table.add_row("classes counted", *(str(np.isfinite(iou_C).sum()) for iou_C in iou_of.values()))
    stream = io.StringIO()
    Console(file=stream, width=20 + sum(len(n) + 12 for n in iou_of) + max(map(len, classes)), no_color=True).print(
        table
    )
    return stream.getvalue().rstrip("\n")


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str):
        raise ValueError(f"expected a list of names of conditions, got the string {names!r}: write [{names!r}]")
    for name in names:
        if not isinstance(name, str) or not name or name in _TAKEN:
            raise ValueError(
                f"the condition {name!r} cannot be part of a metric's key: give it a name, and none of "
                f"{', '.join(_TAKEN)}"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"a condition is named twice in {list(names)}")
    first: dict[str, str] = {}
    for name in names:
        other = first.setdefault(_key(name), name)
        if other != name:
            raise ValueError(f"the conditions {other!r} and {name!r} would both be mIoU/{_key(name)}: rename one")
    return tuple(names)


def _key(name: str) -> str:
    """The condition in a metric's key, without what MMEngine's log would take apart."""
    return re.sub(r"[^\w.+-]", "_", name)


def _check_known(adverse: Sequence[str], known: Sequence[str]) -> None:
    strange = [name for name in adverse if name not in known]
    if strange:
        raise ValueError(f"adverse names {', '.join(strange)}, but the conditions are {', '.join(known)}")


def _sample_name(sample: Any) -> str:
    return str(sample.get("sample_id") or sample.get("img_path") or "without a path")


def _labels(sample: Any, key: str, name: str) -> NDArray[Any]:
    value = sample.get(key)
    if value is None:
        mend = (
            "load label maps in the test pipeline (LoadAnnotations) and let the data set name them (seg_map_path)"
            if key == "gt_sem_seg"
            else "does the model return data samples in mode 'predict'?"
        )
        raise ValueError(f"ConditionIoUMetric: sample {name} has no {key}: {mend}")
    data = torch.as_tensor(value["data"] if isinstance(value, Mapping) else value.data)
    labels: NDArray[Any] = data.detach().cpu().numpy()
    if labels.ndim == 3 and len(labels) == 1:
        labels = labels[0]
    if labels.ndim != 2:
        raise ValueError(
            f"ConditionIoUMetric needs {key}.data of shape (1, height, width), sample {name} has {tuple(data.shape)}"
        )
    return labels
