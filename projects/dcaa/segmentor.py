"""DCAA: segmentation adapted to several conditions at once, first by adversarial training, then by self-training.

Paper: Cai et al., "Exploiting Diverse Characteristics and Adversarial Ambivalence for Domain Adaptive Segmentation",
AAAI 2021 (arXiv:2012.05608). c(i) is the condition of picture i, s of the source and t of the target; D_k judges
softmax(p_k), D_g judges softmax(p_g), with 1 for the source.

Stage ``source``      L = L_seg
Stage ``align``       L = L_seg + L_adv
    L_seg = CE({p_c(i)(x_s)} and {p_g(x_s)}, y)
    L_adv = lambda [ sum_k mean_{i: c(i)=k} BCE(D_k(p_k(x_t)), 1) + mean_i BCE(D_g(p_g(x_t)), 1) ]
    L_D   = lambda / 2 [ the same with 1 for x_s and 0 for x_t, on detached predictions ]
Stage ``self_train``  L = L_seg + L_easy + L_adv on the hard pixels, with a teacher T:
    P      = 1/2 (sum_k A_k softmax(p_k) + softmax(p_g)) of T;   y' = c where P_c > tau_c, else ignored
    d      = sigmoid(D_g(p_g)) of T, high where a prediction looks like one of the source: easy
    L_easy = sum_easy d CE(p_g(x_t), y') / (1 + #easy),   easy: d > T_d and y' not ignored;   hard: the rest

Where we differ from the released code, all of it undone by ``release_compat=True``: all K + 1 discriminators learn in
stage ``align`` (there only D_g is stepped); the hard pixels' loss is normalised on one grid; d is taken at the size of
the predictions and not sixteen times larger; the parts of the loss run backward one after another.
Ours, and off by default: a moving teacher, labels for every decoder (``pseudo_on='all'``), and a student that sees its
target pictures strongly augmented (``student='strong'``) or mixed with source pictures too (``student='mixed'``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from mmengine.dist import get_world_size
from mmengine.model import ModuleList
from torch import Tensor, nn

from alimm.projects.dcaa import adversarial, ambivalence
from alimm.projects.dcaa.base import AdaptationSegmentor, Losses
from alimm.projects.dcaa.batch import DomainBatch, StepBatch, condition_names
from alimm.projects.dcaa.head import AttentiveFusionHead, BranchOutputs
from alimm.projects.dcaa.lesson import Lesson, make_lesson, mixed
from alimm.projects.dcaa.options import SelfTraining
from alimm.projects.dcaa.supervised import head_loss
from alimm.projects.dcaa.teacher import Teacher
from alimm.registry import MODELS


@MODELS.register_module()
class DCAASegmentor(AdaptationSegmentor):
    """An encoder, K decoders with attentive fusion, and K + 1 discriminators.

    Args:
        conditions: names of the target's K conditions in the order of their numbers, or K.
        decode_head: an ``AttentiveFusionHead``, or any decode head that every condition gets a copy of.
        discriminator: options of ``PixelDiscriminator``, as ``dict(channels=(64, 128, 256, 512))``.
        adversarial_weight: lambda.
        condition_adversarial: align each condition by its own discriminator.
        global_adversarial: align the fused predictions.
        global_after: begin to align the fused predictions after so many steps of stage ``align``: progressive training.
        self_training: options of `SelfTraining`, for stage ``self_train``; None leaves that stage out.
        class_weight: of the source's cross-entropy, one a class; None leaves it to the head's ``loss_decode``.
        release_compat: train as the released code does, defects included.
        *args: of ``EncoderDecoder``.
        **kwargs: of `AdaptationSegmentor` and ``EncoderDecoder``.

    Raises:
        ValueError: an option is out of range, or names and heads do not fit together.
    """

    routes_by_condition = True

    def __init__(
        self,
        conditions: Sequence[str] | int,
        backbone: dict[str, Any],
        decode_head: dict[str, Any],
        *args: Any,
        discriminator: dict[str, Any] | None = None,
        adversarial_weight: float = 0.01,
        condition_adversarial: bool = True,
        global_adversarial: bool = True,
        global_after: int = 0,
        self_training: dict[str, Any] | None = None,
        class_weight: Sequence[float] | None = None,
        release_compat: bool = False,
        **kwargs: Any,
    ) -> None:
        names = condition_names(conditions, "DCAASegmentor")
        if release_compat:
            kwargs["split_backward"] = False
        super().__init__(names, backbone, _fusion_config(decode_head, len(names)), *args, **kwargs)
        if not isinstance(self.decode_head, AttentiveFusionHead) or self.decode_head.num_conditions != len(names):
            raise ValueError(
                f"DCAASegmentor has {len(names)} conditions, and its head is for "
                f"{getattr(self.decode_head, 'num_conditions', 'none')}: set decode_head.num_conditions, or give the "
                "head of one condition alone"
            )
        if self.out_channels != self.num_classes:
            raise ValueError(
                f"DCAASegmentor takes the softmax over {self.num_classes} classes, and its decode head has "
                f"{self.out_channels} output: leave out_channels out of it, and take use_sigmoid=False in its loss"
            )
        if adversarial_weight < 0:
            raise ValueError(f"adversarial_weight is at least 0, got {adversarial_weight}")
        self.conditions = condition_names(conditions, "DCAASegmentor")
        self.adversarial_weight = adversarial_weight
        self.condition_adversarial = condition_adversarial
        self.global_adversarial = global_adversarial
        self.global_after = global_after
        self.release_compat = release_compat
        options = dict(type="alimm.PixelDiscriminator", in_channels=self.out_channels, **(discriminator or {}))
        self.discriminators = ModuleList([MODELS.build(options) for _ in range(len(names) + 1)])
        self.self_training: Any = None if self_training is None else SelfTraining.of(self_training, release_compat)
        self.teacher: Any = None
        if self.self_training is not None:
            self.teacher = Teacher(self._taught(), self.self_training.momentum, self.self_training.interval)
        if self.stage == "self_train":
            self._check_teacher()
        self.register_buffer("stage_steps", torch.tensor(0))
        weights = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float32)
        if weights is not None and weights.shape != (self.num_classes,):
            raise ValueError(f"class_weight has {weights.numel()} weights for {self.num_classes} classes")
        self.register_buffer("class_weight", weights, persistent=False)
        self._register_load_state_dict_pre_hook(self._spread_stock_head)
        self.train(self.training)

    def _taught(self) -> dict[str, nn.Module]:
        taught: dict[str, nn.Module] = {"backbone": self.backbone, "decode_head": self.decode_head}
        if self.with_neck:
            taught["neck"] = self.neck
        return taught | {"discriminator": self.discriminators[-1]}

    def enter_stage(self, stage: str) -> None:
        """Move to a stage; self-training begins with the teacher copied from what is there."""
        if stage == "self_train":
            self._check_teacher()
        super().enter_stage(stage)
        self.stage_steps.zero_()
        if stage == "self_train":
            self.teacher.copy_from(self._taught())

    def _check_teacher(self) -> None:
        if self.teacher is None:
            raise ValueError("DCAASegmentor has no stage self_train without self_training=dict(...)")

    def segmentor_losses(self, batch: StepBatch) -> Iterator[Losses]:
        """The source's part, then the target's."""
        if self.stage == "self_train":
            self._check_teacher()  # the stage may come from a checkpoint
            if int(self.stage_steps) == 0:  # and weights may have been loaded since the stage was entered
                self.teacher.copy_from(self._taught())
        yield self._source_losses(batch)
        if self.stage != "source":
            losses = self._target_losses(batch)
            if losses:  # there are none before `global_after` or where all terms are off
                yield losses

    def _source_losses(self, batch: StepBatch) -> Losses:
        source = batch.source
        features = self.extract_feat(source.inputs)
        outputs = self.decode_head.forward_all(features)
        matched = outputs.matched(source.cond_ids)
        batch.kept["source"] = matched.detach().softmax(dim=1), outputs.att.detach().softmax(dim=1)
        losses = {f"source.{name}": value for name, value in self._segmentation(matched, outputs.att, source).items()}
        if self.with_auxiliary_head:
            losses.update(self._auxiliary_head_forward_train(features, source.samples))
        return losses

    def _segmentation(self, matched: Tensor, att: Tensor, source: DomainBatch) -> Losses:
        logits = torch.cat([matched, att])
        if self.class_weight is None and not self.release_compat:
            return head_loss(self.decode_head, logits, source.samples * 2)
        labels = torch.cat([sample.gt_sem_seg.data for sample in source.samples])
        value, total = ambivalence.segmentation_loss(
            [matched, att], labels, self.class_weight, self.decode_head.ignore_index
        )
        return {"loss_ce": value / adversarial.over_ranks(total)}

    def _target_losses(self, batch: StepBatch) -> Losses:
        target = batch.target
        inputs, lesson = target.inputs, None
        losses: Losses = {}
        options = self.self_training
        if self.stage == "self_train":
            taught, lesson = self.lesson(target)
            if options.student == "mixed":
                inputs, lesson = mixed(batch.source, target, lesson, self.decode_head.ignore_index)
            if options.student != "weak":
                inputs = self.augmented(inputs)
        outputs = self.decode_head.forward_all(self.extract_feat(inputs))
        matched = outputs.matched(target.cond_ids)
        probabilities = matched.softmax(dim=1), outputs.att.softmax(dim=1)
        batch.kept["target"] = probabilities[0].detach(), probabilities[1].detach()
        if lesson is not None:
            if options.student == "mixed":  # the discriminators learn from whole pictures, as the teacher sees them
                batch.kept["target"] = taught.matched(target.cond_ids).softmax(dim=1), taught.att.softmax(dim=1)
            losses["target.loss_easy"] = self._easy(outputs, matched, lesson.labels, lesson.easy)
            losses["target.easy"] = (lesson.easy > 0).float().mean()
        hard = lesson.hard if lesson is not None and options.hard_only else None
        losses.update(self._adversarial(probabilities, target.cond_ids, hard))
        return losses

    @torch.no_grad()
    def lesson(self, target: DomainBatch) -> tuple[BranchOutputs, Lesson]:
        """What the teacher makes of target pictures, and what a student should learn from that."""
        with self.teacher.batch_statistics(self.self_training.batch_statistics):
            taught = self.teach(target.inputs)
        d = self._ambivalence(taught.att) if self.self_training.ambivalence else None
        return taught, make_lesson(taught, d, target.inside(), self.self_training, self.decode_head.ignore_index)

    def teach(self, inputs: Tensor) -> BranchOutputs:
        """What the teacher makes of pictures (N, 3, H, W); what the model itself makes of them where there is none."""
        parts: Any = self.teacher.parts if self.teacher is not None else self._taught()
        features = parts["backbone"](inputs)
        if self.with_neck:
            features = parts["neck"](features)
        return parts["decode_head"].forward_all(features)

    def _ambivalence(self, logits: Tensor) -> Tensor:
        judge = self.teacher.parts["discriminator"] if self.teacher is not None else self.discriminators[-1]
        mode = "release" if self.release_compat else "native"
        return ambivalence.ambivalence(logits, judge, mode, upsample=judge.total_stride)

    def _easy(self, outputs: BranchOutputs, matched: Tensor, labels: Tensor, easy: Tensor) -> Tensor:
        predictions = [outputs.att]
        if self.self_training.pseudo_on == "all":
            predictions.append(matched)
        ignore = self.decode_head.ignore_index
        weight = self.class_weight if self.release_compat else None
        loss = labels.new_zeros((), dtype=outputs.att.dtype)
        for logits in predictions:
            value, count = ambivalence.easy_loss(logits, labels, easy, weight, ignore)
            loss = loss + value / adversarial.over_ranks(count + 1.0 / get_world_size())
        return self.self_training.weight * loss

    def _adversarial(self, probabilities: tuple[Tensor, Tensor], cond_ids: Tensor, hard: Tensor | None) -> Losses:
        matched, att = probabilities
        losses: Losses = {}
        if self.condition_adversarial:
            values = self._judged(matched, cond_ids, adversarial.SOURCE, hard)
            losses["target.loss_adv_cond"] = self.adversarial_weight * self._mean_by_condition(values, cond_ids)
        if self.global_adversarial and (self.stage != "align" or int(self.stage_steps) >= self.global_after):
            logits = self.discriminators[-1](att)
            values = self._domain_loss(logits, adversarial.SOURCE, hard)
            losses["target.loss_adv_global"] = self.adversarial_weight * values.mean()
        return losses

    def _judged(self, prob: Tensor, cond_ids: Tensor, label: float, hard: Tensor | None = None) -> Tensor:
        """Loss (N,) of the discriminator of each picture's condition."""
        values = prob.new_zeros(len(prob))
        for k in cond_ids.unique().tolist():
            chosen = (cond_ids == k).nonzero()[:, 0]
            logits = self.discriminators[k](prob[chosen])
            found = self._domain_loss(logits, label, None if hard is None else hard[chosen])
            values = values.index_put((chosen,), found.to(values.dtype))
        return values

    def _domain_loss(self, logits: Tensor, label: float, hard: Tensor | None) -> Tensor:
        if hard is None:
            return adversarial.domain_loss(logits, label)
        return adversarial.masked_domain_loss(logits, label, hard, release=self.release_compat)

    def _mean_by_condition(self, values: Tensor, cond_ids: Tensor) -> Tensor:
        counts = adversarial.over_ranks(adversarial.condition_counts(cond_ids, len(self.conditions)))
        return adversarial.mean_by_condition(values, cond_ids, len(self.conditions), counts)

    def discriminator_losses(self, batch: StepBatch) -> Losses:
        """Half of lambda times the loss on either domain, of every discriminator that has a part in training."""
        if self.stage == "source":
            return {}
        losses: Losses = {}
        half = 0.5 * self.adversarial_weight
        domains = (("source", batch.source, adversarial.SOURCE), ("target", batch.target, adversarial.TARGET))
        for name, domain, label in domains:
            matched, att = batch.kept[name]
            if self.condition_adversarial:
                values = self._judged(matched, domain.cond_ids, label)
                losses[f"{name}.loss_d_cond"] = half * self._mean_by_condition(values, domain.cond_ids)
            if self.global_adversarial:
                logits = self.discriminators[-1](att)
                losses[f"{name}.loss_d_global"] = half * adversarial.domain_loss(logits, label).mean()
                losses[f"{name}.acc_d_global"] = adversarial.domain_accuracy(logits.detach(), label)
        return losses

    def before_discriminator_step(self) -> None:
        """The released stage ``align`` steps D_g alone; the others' gradients are dropped."""
        if self.release_compat and self.stage == "align":
            for judge in list(self.discriminators)[:-1]:
                judge.zero_grad(set_to_none=True)

    def after_segmentor_step(self, batch: StepBatch) -> None:
        """Let the teacher follow, and count the step."""
        self.stage_steps += 1
        if self.teacher is not None and self.stage == "self_train":
            self.teacher.follow(self._taught())

    @torch.no_grad()
    def explain_tensors(self, inputs: Tensor) -> dict[str, Any]:
        """What lies behind a prediction, for pictures (N, 3, H, W) as the preprocessor leaves them.

        Returns:
            ``att`` logits (N, C, h, w), ``cond`` K of them, ``mask`` (N, K, h, w), ``ambivalence`` (N, h, w), which is
            None for pictures that are too small for the discriminator.
        """
        outputs = self.decode_head.forward_all(self.extract_feat(inputs))
        judge = self.discriminators[-1]
        small = min(outputs.att.shape[2:]) < judge.minimum_size
        d = None if small else ambivalence.ambivalence(outputs.att, judge)
        return {"att": outputs.att, "cond": outputs.cond, "mask": outputs.mask, "ambivalence": d}

    def _spread_stock_head(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Let weights of a plain segmentor fill the decoder and classifier of every condition."""
        head = f"{prefix}decode_head."
        if f"{head}conv_seg.weight" not in state or any(key.startswith(f"{head}branches.") for key in state):
            return
        for key in [key for key in state if key.startswith(head)]:
            value, rest = state.pop(key), key.removeprefix(head)
            for k in range(len(self.conditions)):
                if rest.startswith("conv_seg."):
                    state[f"{head}classifiers.{k}.{rest.removeprefix('conv_seg.')}"] = value
                else:
                    state[f"{head}branches.{k}.{rest}"] = value


def _fusion_config(decode_head: dict[str, Any], num_conditions: int) -> dict[str, Any]:
    if not isinstance(decode_head, dict):
        raise ValueError(f"DCAASegmentor takes one decode_head=dict(...), not a cascade, got {decode_head!r}")
    kind = decode_head["type"]
    name = kind if isinstance(kind, str) else kind.__name__
    if name.rpartition(".")[2] == "AttentiveFusionHead":
        return {"num_conditions": num_conditions, **decode_head}
    return dict(type="alimm.AttentiveFusionHead", num_conditions=num_conditions, branch=decode_head)
