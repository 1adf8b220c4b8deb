"""What a teacher tells a student about target pictures, and mixing it with labelled source pictures.

Stage ``self_train`` of DCAA (Cai et al., AAAI 2021, arXiv:2012.05608; equations in ``segmentor.py``): labels of the
easy pixels with their weights, and the mask of the hard ones. `mixed` is ours, after DACS (Tranheden et al., WACV
2021): half the classes of a source picture in the style of the same condition are pasted over the target picture. It is
done at the size of the pictures; labels, weights and masks come back to the grid of the predictions by their nearest
pixel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from alimm.projects.dcaa import ambivalence
from alimm.projects.dcaa.augment_batch import class_mix
from alimm.projects.dcaa.batch import DomainBatch
from alimm.projects.dcaa.head import BranchOutputs
from alimm.projects.dcaa.options import SelfTraining


class Lesson(NamedTuple):
    """What to learn from target pictures, on the grid of the predictions.

    Attributes:
        labels: pseudo labels (N, h, w), ignored where there is none.
        easy: weight of each pixel with a label (N, h, w).
        hard: mask of the pixels that are aligned instead (N, h, w).
    """

    labels: Tensor
    easy: Tensor
    hard: Tensor


def labels_of(outputs: BranchOutputs, options: SelfTraining, ignore_index: int) -> Tensor:
    """Pseudo labels (N, h, w) by the options' threshold, which may be a quantile of each class."""
    parts = outputs.cond, outputs.att, outputs.mask
    threshold: Any = options.threshold
    if isinstance(threshold, str):
        _, prob = ambivalence.pseudo_labels(*parts, 0.0, ignore_index, correlate=options.correlate)
        threshold = ambivalence.class_thresholds(prob, int(threshold[1:]) / 100)
    return ambivalence.pseudo_labels(*parts, threshold, ignore_index, correlate=options.correlate)[0]


def make_lesson(
    outputs: BranchOutputs, d_Nhw: Tensor | None, inside_NHW: Tensor, options: SelfTraining, ignore_index: int
) -> Lesson:
    """The lesson of a teacher.

    Args:
        outputs: of the teacher.
        d_Nhw: how much each pixel's prediction looks like one of the source; None weighs all labels by 1.
        inside_NHW: which pixels of the batch are no padding.
        options: of self-training.
        ignore_index: the label of pixels without one.
    """
    labels = labels_of(outputs, options, ignore_index)
    inside = functional.interpolate(inside_NHW[:, None].float(), size=labels.shape[1:])[:, 0]
    labels = torch.where(inside > 0, labels, ignore_index)
    if d_Nhw is None:
        easy = (labels != ignore_index).float()
        return Lesson(labels, easy, inside * (1 - easy))
    seen = d_Nhw[inside > 0] if inside.any() else d_Nhw
    least = ambivalence.resolve_threshold(seen, options.ambivalence_threshold)
    easy, hard = ambivalence.split(d_Nhw, labels, least, ignore_index)
    return Lesson(labels, easy, inside * hard)


def mixed(source: DomainBatch, target: DomainBatch, lesson: Lesson, ignore_index: int) -> tuple[Tensor, Lesson]:
    """Target pictures (N, 3, H, W) under half the classes of source pictures, and the lesson on them.

    What is pasted has its true label, weight 1, and is not hard. Each target picture gets a source picture in its own
    condition's style where the batch has one.

    Raises:
        ValueError: the pictures of both domains differ in size.
    """
    if source.inputs.shape[2:] != target.inputs.shape[2:]:
        raise ValueError(
            f"student='mixed' pastes source pictures {tuple(source.inputs.shape[2:])} into target pictures "
            f"{tuple(target.inputs.shape[2:])}: give both pipelines the same crop size"
        )
    partners = _partners(source.cond_ids, target.cond_ids)
    true_labels = torch.cat([sample.gt_sem_seg.data for sample in source.samples]).long()[partners]
    size, grid = target.inputs.shape[2:], lesson.labels.shape[1:]
    pictures, labels, weights = class_mix(
        source.inputs[partners], true_labels, target.inputs,
        _nearest(lesson.labels, size), _nearest(lesson.easy, size) - _nearest(lesson.hard, size),
        ignore_index=ignore_index,
    )  # fmt: skip
    # Easy weights are positive and hard pixels were given -1, so that one map carries both through the mixing.
    weights = _nearest(weights, grid)
    return pictures, Lesson(_nearest(labels, grid), weights.clamp_min(0), (weights < 0).to(weights.dtype))


def _partners(source_ids: Tensor, target_ids: Tensor) -> Tensor:
    used: dict[int, int] = {}
    chosen = []
    for number, condition in enumerate(target_ids.tolist()):
        same = (source_ids == condition).nonzero()[:, 0].tolist()
        turn = used.get(condition, 0)
        used[condition] = turn + 1
        chosen.append(same[turn % len(same)] if same else number % len(source_ids))
    return torch.tensor(chosen, device=source_ids.device)


def _nearest(maps_NHW: Tensor, size: torch.Size) -> Tensor:
    return functional.interpolate(maps_NHW[:, None].double(), size=size, mode="nearest")[:, 0].to(maps_NHW.dtype)
