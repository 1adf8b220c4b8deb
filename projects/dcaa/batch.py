"""The batch of a training step, source and target, read and checked before anything is computed.

    dict(source=dict(inputs=[...], data_samples=[...]), target=dict(...))

Every picture knows its condition; pictures of the source bring labels, pictures of the target must not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from mmseg.models import SegDataPreProcessor
from torch import Tensor


@dataclass
class DomainBatch:
    """Pictures of one domain, preprocessed.

    Attributes:
        inputs: (N, 3, H, W) float.
        samples: their N data samples.
        cond_ids: (N,) long, the condition of each; of a source picture the condition whose style it has.
    """

    inputs: Tensor
    samples: list[Any]
    cond_ids: Tensor

    def inside(self) -> Tensor:
        """Which pixels (N, H, W) are of the picture, and not padding at its right and its bottom."""
        inside = torch.ones_like(self.inputs[:, 0], dtype=torch.bool)
        for mask, sample in zip(inside, self.samples, strict=True):
            _, right, _, bottom = sample.metainfo.get("padding_size", (0, 0, 0, 0))
            mask[mask.shape[0] - bottom :] = False
            mask[:, mask.shape[1] - right :] = False
        return inside


@dataclass
class StepBatch:
    """Both domains, and what the segmentor's part of the step leaves for the discriminators' part.

    Attributes:
        source: labelled.
        target: without labels.
        kept: name -> detached tensor.
    """

    source: DomainBatch
    target: DomainBatch
    kept: dict[str, Any] = field(default_factory=dict)


class BatchReader:
    """The part of a segmentor that reads batches.

    Attributes:
        routes_by_condition: whether a source picture trains what belongs to its condition alone; the condition's name
            must be known then.
        conditions: names in the order of their numbers.
    """

    routes_by_condition: ClassVar[bool] = False
    conditions: tuple[str, ...]
    data_preprocessor: Any
    decode_head: Any
    num_classes: int

    def read_batch(self, data: Any) -> StepBatch:
        """Check both domains of a batch, then preprocess them.

        Raises:
            ValueError: as `train_step` says.
        """
        if not isinstance(data, dict) or not {"source", "target"} <= data.keys():
            found = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                f"{type(self).__name__} trains on batches dict(source=..., target=...), got {found}. Write "
                "train_dataloader = dict(source=dict(...), target=dict(...)) and train_cfg = "
                "dict(type='alimm.MultiLoaderTrainLoop', max_iters=...)"
            )
        return StepBatch(self._read(data["source"], "source"), self._read(data["target"], "target"))

    def _read(self, data: dict[str, Any], domain: str) -> DomainBatch:
        for picture, sample in zip(data["inputs"], data["data_samples"], strict=True):
            self._check_sample(picture, sample, domain)
        sizes = (getattr(self.data_preprocessor, name, None) for name in ("size", "size_divisor"))
        if isinstance(self.data_preprocessor, SegDataPreProcessor) and all(size is None for size in sizes):
            raise ValueError(
                "SegDataPreProcessor does not know what to pad training pictures to: give data_preprocessor "
                "size=(height, width) of the crops, or size_divisor=32"
            )
        ready = self.data_preprocessor(data, True)
        samples = ready["data_samples"]
        ids = torch.tensor([sample.metainfo.get("cond_id", 0) for sample in samples], device=ready["inputs"].device)
        return DomainBatch(ready["inputs"], samples, ids)

    def _check_sample(self, picture: Tensor, sample: Any, domain: str) -> None:
        name = sample.metainfo.get("img_path", "a picture")
        given = sample.metainfo.get("domain", domain)
        if given != domain:
            raise ValueError(f"{name} of the {domain} loader belongs to the domain {given!r}: are the loaders swapped?")
        self._check_condition(name, sample, domain)
        self._check_labels(name, picture, sample, domain)

    def _check_condition(self, name: str, sample: Any, domain: str) -> None:
        cond_id = sample.metainfo.get("cond_id")
        if cond_id is None:
            raise ValueError(
                f"{name} comes without its condition: end the {domain} pipeline with dict(type="
                "'alimm.PackConditionInputs'), and use a data set that knows conditions (alimm.ConditionSegDataset)"
            )
        if not 0 <= int(cond_id) < len(self.conditions):
            raise ValueError(
                f"{name} has condition {sample.metainfo.get('condition', cond_id)!r} with number {cond_id}, and the "
                f"model has {len(self.conditions)}: {', '.join(self.conditions)}. Give model.conditions those of the "
                "data set"
            )
        named = sample.metainfo.get("condition")
        if named is None or not self._named:
            return
        if domain == "source" and named not in self.conditions:
            if self.routes_by_condition and len(self.conditions) > 1:
                raise ValueError(
                    f"{name} of the source has condition {named!r}, and the model knows {', '.join(self.conditions)}. "
                    f"{type(self).__name__} needs each source picture in the style of a condition: wrap it in "
                    "alimm.StyledDataset or give GTA5ConditionDataset styles"
                )
            return
        if self.conditions[int(cond_id)] != named:
            raise ValueError(
                f"{name} has condition {named!r} as number {cond_id}, which the model calls "
                f"{self.conditions[int(cond_id)]!r}: give model and data sets the conditions in one order"
            )

    def _check_labels(self, name: str, picture: Tensor, sample: Any, domain: str) -> None:
        labels = getattr(sample, "gt_sem_seg", None)
        if domain == "target":
            if labels is not None:
                raise ValueError(
                    f"{name} of the target comes with labels, which training must not see: set with_labels=False in "
                    "its data set and take LoadAnnotations out of its pipeline"
                )
            return
        if labels is None:
            raise ValueError(f"{name} of the source has no labels: add dict(type='LoadAnnotations') to its pipeline")
        if labels.data.shape[-2:] != picture.shape[-2:]:
            raise ValueError(
                f"the labels of {name} are {tuple(labels.data.shape[-2:])} and the picture is "
                f"{tuple(picture.shape[-2:])}: resize both alike (mmseg's Resize and RandomCrop do)"
            )
        ignore = self.decode_head.ignore_index
        wrong = labels.data[((labels.data < 0) | (labels.data >= self.num_classes)) & (labels.data != ignore)]
        if wrong.numel():  # on a GPU the loss would only say that an assertion failed
            raise ValueError(
                f"the labels of {name} have the value {int(wrong[0])}; classes are 0 .. {self.num_classes - 1}, and "
                f"{ignore} is left out: set num_classes, reduce_zero_label or the data set's map of labels"
            )

    @property
    def _named(self) -> bool:
        return self.conditions != condition_names(len(self.conditions), "")


def condition_names(conditions: Sequence[str] | int, who: str) -> tuple[str, ...]:
    """Names of the conditions; a number becomes ``condition0``, ``condition1``, ...

    Raises:
        ValueError: none, a name twice, or one text.
    """
    if isinstance(conditions, str):
        raise ValueError(f"{who} takes a list of conditions or their number, got the text {conditions!r}")
    if isinstance(conditions, int):
        names = tuple(f"condition{k}" for k in range(conditions))
    else:
        names = tuple(conditions)
    if not names:
        raise ValueError(f"{who} needs at least one condition, got {conditions!r}")
    if len(set(names)) < len(names):
        raise ValueError(f"{who} got a condition twice: {', '.join(names)}")
    return names
