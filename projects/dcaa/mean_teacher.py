"""Self-training with a mean teacher, and ClassMix: the baseline that needs no discriminator.

Tarvainen and Valpola, "Mean teachers are better role models", NeurIPS 2017 (arXiv:1703.01780); Tranheden et al., "DACS:
Domain Adaptation via Cross-domain Mixed Sampling", WACV 2021 (arXiv:2007.08702). For the teacher's logits g, enlarged
to the size of the picture:

    P       = softmax(up(g(x_t)))                                 on the target as its loader gives it
    y'      = argmax_c P_c
    w       = share of the picture's pixels with max_c P_c > tau  weighting='image'
              [max_c P_c > tau] of each pixel                     weighting='pixel'
    x, y, w = x_t, y', w  under the source's pixels of half its classes, with their labels and weight 1   (ClassMix)
    L       = L_seg(x_s, y_s) + lambda sum w CE(p(strong(x)), y) / #{y not ignored}
    g       follows p: theta_g <- (1 - m_t) theta_g + m_t theta_p after every step, m_t = max(m, 1 / (t + 1))

Where we differ: the share of sure pixels is of each picture, as the text of DACS has it, and not of the batch, as its
code has it; the loss is a mean over the pixels with a label, not over all; what the preprocessor pads gets no label.
Running statistics of the teacher are copied and, by default, not used; the prediction of a test is the student's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alimm.projects.dcaa import adversarial
from alimm.projects.dcaa.augment_batch import class_mix
from alimm.projects.dcaa.base import Losses
from alimm.projects.dcaa.baselines import PlainSegmentor, enlarged
from alimm.projects.dcaa.batch import DomainBatch, StepBatch
from alimm.projects.dcaa.teacher import Teacher
from alimm.registry import MODELS

WEIGHTINGS = ("image", "pixel")
"""How sure the teacher must be: a weight a picture, or a mask of pixels."""


@MODELS.register_module()
class MeanTeacherSegmentor(PlainSegmentor):
    """A student that learns from the source's labels and from a slowly following copy of itself.

    The teacher is a copy of the student at the first step of stage ``self_train``, with whatever weights were loaded by
    then; resumed training goes on with the teacher that was saved.

    Args:
        *args: of ``EncoderDecoder``.
        momentum: m, the weight of the student's new value.
        threshold: tau.
        weighting: one of `WEIGHTINGS`.
        pseudo_weight: lambda.
        class_mix: paste half the classes of a source picture over each target picture. All pictures need one size.
        strong: the student sees its target pictures strongly augmented, after mixing. False: as the teacher sees them.
        batch_statistics: the teacher normalises by the batch of target pictures. False: by its running statistics,
            which are those of the source where training began there.
        stage: ``'source'`` or ``'self_train'``.
        **kwargs: of `PlainSegmentor`.

    Raises:
        ValueError: an option is out of range.
    """

    STAGES = ("source", "self_train")

    def __init__(
        self,
        *args: Any,
        momentum: float = 0.001,
        threshold: float = 0.968,
        weighting: str = "image",
        pseudo_weight: float = 1.0,
        class_mix: bool = False,
        strong: bool = True,
        batch_statistics: bool = True,
        stage: str = "self_train",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, stage=stage, **kwargs)
        self._check_softmax()
        if weighting not in WEIGHTINGS:
            raise ValueError(f"MeanTeacherSegmentor: weighting is one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
        if not 0 <= threshold < 1:
            raise ValueError(f"MeanTeacherSegmentor: threshold lies in [0, 1), got {threshold}")
        if pseudo_weight < 0:
            raise ValueError(f"MeanTeacherSegmentor: pseudo_weight is at least 0, got {pseudo_weight}")
        self.threshold, self.weighting, self.pseudo_weight = threshold, weighting, pseudo_weight
        self.class_mix, self.strong = class_mix, strong
        self.batch_statistics = batch_statistics
        self.teacher = Teacher(self._taught(), momentum)

    def _taught(self) -> dict[str, nn.Module]:
        taught: dict[str, nn.Module] = {"backbone": self.backbone, "decode_head": self.decode_head}
        if self.with_neck:
            taught["neck"] = self.neck
        return taught

    def enter_stage(self, stage: str) -> None:
        """Move to a stage; self-training begins with the teacher copied from what is there."""
        super().enter_stage(stage)
        if stage == "self_train":
            self.teacher.copy_from(self._taught())

    def segmentor_losses(self, batch: StepBatch) -> Iterator[Losses]:
        """The source's part, then the target's."""
        teaching = self.stage == "self_train"
        if teaching and not self.teacher.steps:  # before a forward pass moves the student's batch statistics
            self.teacher.copy_from(self._taught())
        yield self._source_losses(batch)
        if teaching:
            yield self._target_losses(batch)

    def after_segmentor_step(self, batch: StepBatch) -> None:
        """Let the teacher follow."""
        if self.stage == "self_train":
            self.teacher.follow(self._taught())

    def _target_losses(self, batch: StepBatch) -> Losses:
        inputs = batch.target.inputs
        labels, weights = self.pseudo_labels(batch.target)
        sure = weights.mean()
        if self.class_mix:
            inputs, labels, weights = self._mixed(batch, labels, weights)
        if self.strong:
            inputs = self.augmented(inputs)
        logits = enlarged(self.decode_head(self.extract_feat(inputs)), inputs, self.align_corners)
        ignore = self.decode_head.ignore_index
        ce = F.cross_entropy(logits, labels, ignore_index=ignore, reduction="none")
        loss = (weights * ce).sum() / adversarial.over_ranks((labels != ignore).sum())
        return {"target.loss_pseudo": self.pseudo_weight * loss, "target.sure": sure}

    @torch.no_grad()
    def teach(self, inputs_N3HW: Tensor) -> Tensor:
        """What the teacher makes of pictures: probabilities (N, C, H, W) on their own grid."""
        parts = self.teacher.parts
        with self.teacher.batch_statistics(self.batch_statistics):
            features = parts["backbone"](inputs_N3HW)
            if self.with_neck:
                features = parts["neck"](features)
            logits = parts["decode_head"](features)
        return enlarged(logits, inputs_N3HW, self.align_corners).softmax(dim=1)

    @torch.no_grad()
    def pseudo_labels(self, target: DomainBatch) -> tuple[Tensor, Tensor]:
        """The teacher's labels (N, H, W), ignored where the picture is padded, and the weight of each pixel."""
        confidence, labels = self.teach(target.inputs).max(dim=1)
        inside = target.inside()
        labels = torch.where(inside, labels, self.decode_head.ignore_index)
        sure = ((confidence > self.threshold) & inside).to(confidence.dtype)
        if self.weighting == "image":
            share_N = sure.sum((1, 2)) / inside.sum((1, 2)).clamp_min(1)
            sure = share_N[:, None, None].expand_as(sure)
        return labels, sure

    def _mixed(self, batch: StepBatch, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        source, target = batch.source, batch.target
        if source.inputs.shape[2:] != target.inputs.shape[2:]:
            raise ValueError(
                f"class_mix pastes source pictures {tuple(source.inputs.shape[2:])} into target pictures "
                f"{tuple(target.inputs.shape[2:])}: give both pipelines the same crop size"
            )
        source_labels = torch.cat([sample.gt_sem_seg.data for sample in source.samples]).long()
        turn = torch.arange(len(target.inputs), device=source_labels.device) % len(source.inputs)
        ignore = self.decode_head.ignore_index
        return class_mix(source.inputs[turn], source_labels[turn], target.inputs, labels, weights, ignore_index=ignore)
