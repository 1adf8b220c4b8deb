"""Baselines that know no conditions: training on the source alone, and one discriminator for the whole target.

`SourceSegmentor`
    L = L_seg(x_s, y)

`AdversarialSegmentor`, after Tsai et al., "Learning to Adapt Structured Output Space for Semantic Segmentation", CVPR
2018 (arXiv:1802.10349), and Vu et al., "ADVENT: Adversarial Entropy Minimization for Domain Adaptation in Semantic
Segmentation", CVPR 2019 (arXiv:1811.12833). With m(x) what the discriminator of a head reads,

    m(x)  = softmax(p(x))                                 AdaptSegNet, input='softmax'
    m(x)  = -softmax(p(x)) log softmax(p(x)) / log C      AdvEnt, input='entropy'
    L     = L_seg(x_s, y) + sum_heads lambda_h BCE(D_h(m_h(x_t)), source) + lambda_ent mean entropy(p(x_t))
    L_D_h = 1/2 BCE(D_h(m_h(x_s)), source) + 1/2 BCE(D_h(m_h(x_t)), target)

The heads are the decode head and, with ``auxiliary_weight``, the auxiliary head (multi-level). The term with lambda_ent
alone is MinEnt of the second paper. L_D is not scaled by lambda, in the papers and here; that of DCAA is.
Where we differ: the source is 1 and the target 0, as everywhere in this project; the papers' code has it the other way
round, which changes nothing but the sign of D. ``enlarge=False`` is ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import ModuleList
from torch import Tensor, nn

from alimm.projects.dcaa import adversarial
from alimm.projects.dcaa.base import AdaptationSegmentor, Losses
from alimm.projects.dcaa.batch import DomainBatch, StepBatch
from alimm.projects.dcaa.supervised import head_loss
from alimm.registry import MODELS

INPUTS = ("softmax", "entropy")
"""What a discriminator can read."""


class PlainSegmentor(AdaptationSegmentor):
    """An encoder and one ordinary decode head; the conditions of its batches are not looked at.

    Args:
        *args: of ``EncoderDecoder``.
        conditions: kept for those who ask for the names.
        **kwargs: of `AdaptationSegmentor` and ``EncoderDecoder``.
    """

    def __init__(self, *args: Any, conditions: Sequence[str] | int = 1, **kwargs: Any) -> None:
        super().__init__(conditions, *args, **kwargs)

    def _check_condition(self, name: str, sample: Any, domain: str) -> None:
        """Any condition will do, and none."""

    def _source_losses(self, batch: StepBatch) -> Losses:
        source = batch.source
        features = self.extract_feat(source.inputs)
        losses = _named("source", head_loss(self.decode_head, self.decode_head(features), source.samples))
        if self.with_auxiliary_head:
            losses.update(self._auxiliary_head_forward_train(features, source.samples))
        return losses

    def _check_softmax(self) -> None:
        if self.out_channels != self.num_classes:
            raise ValueError(
                f"{type(self).__name__} takes the softmax over {self.num_classes} classes, and its decode head has "
                f"{self.out_channels} output: leave out_channels out of it, and take use_sigmoid=False in its loss"
            )


@MODELS.register_module()
class SourceSegmentor(PlainSegmentor):
    """Training with labels alone: source only, with styles or strong augmentation if its loader has them, and oracles.

    Batches may be ``dict(source=...)``, with a target that is left unread, or those of an ordinary single loader. The
    pictures may be of any domain: with the labelled target as its loader this is the supervised oracle.

    Args:
        *args: of ``EncoderDecoder``.
        **kwargs: of `PlainSegmentor`.
    """

    STAGES = ("source",)

    def __init__(self, *args: Any, stage: str = "source", **kwargs: Any) -> None:
        super().__init__(*args, stage=stage, **kwargs)

    def read_batch(self, data: Any) -> StepBatch:
        """Check and preprocess the labelled pictures; the target is empty.

        Raises:
            ValueError: this is no batch, or labels are missing.
        """
        if isinstance(data, dict) and "source" in data:
            data = data["source"]
        if not isinstance(data, dict) or not {"inputs", "data_samples"} <= data.keys():
            found = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise ValueError(
                "SourceSegmentor trains on batches dict(inputs=..., data_samples=...), alone or as the source of "
                f"dict(source=...), got {found}"
            )
        source = self._read(data, "source")
        return StepBatch(source, DomainBatch(source.inputs[:0], [], source.cond_ids[:0]))

    def _check_sample(self, picture: Tensor, sample: Any, domain: str) -> None:
        self._check_labels(sample.metainfo.get("img_path", "a picture"), picture, sample, domain)

    def segmentor_losses(self, batch: StepBatch) -> Iterator[Losses]:
        """The loss of the heads on the labels."""
        yield self._source_losses(batch)


@MODELS.register_module()
class AdversarialSegmentor(PlainSegmentor):
    """AdaptSegNet, AdvEnt or MinEnt: the target's predictions are made to look like the source's.

    Args:
        *args: of ``EncoderDecoder``.
        input: what the discriminators read, one of `INPUTS`.
        adversarial_weight: lambda of the decode head; 0 leaves its discriminator out.
        auxiliary_weight: lambda of the auxiliary head, 0.0002 in the papers; 0 leaves its discriminator out.
        min_entropy: lambda_ent, 0.001 in the paper.
        discriminator: options of ``PixelDiscriminator``; ``layout='adaptsegnet'`` unless it says otherwise.
        enlarge: bring logits to the size of the pictures (bilinear) before the discriminators and the entropy, as the
            papers do. False leaves them as large as the head makes them, which is far less work; the layout's stride
            is then multiplied by the head's.
        stage: ``'source'`` or ``'align'``.
        **kwargs: of `PlainSegmentor`.

    Raises:
        ValueError: an option is out of range, or there is no one auxiliary head for ``auxiliary_weight``.
    """

    STAGES = ("source", "align")

    def __init__(
        self,
        *args: Any,
        input: str = "softmax",
        adversarial_weight: float = 0.001,
        auxiliary_weight: float = 0.0,
        min_entropy: float = 0.0,
        discriminator: dict[str, Any] | None = None,
        enlarge: bool = True,
        stage: str = "align",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, stage=stage, **kwargs)
        self._check_softmax()
        if input not in INPUTS:
            raise ValueError(f"AdversarialSegmentor: input is one of {', '.join(INPUTS)}, got {input!r}")
        weights = dict(decode=adversarial_weight, auxiliary=auxiliary_weight)
        for name, weight in {**weights, "entropy": min_entropy}.items():
            if weight < 0:
                raise ValueError(f"AdversarialSegmentor: the weight of {name} is at least 0, got {weight}")
        single = self.with_auxiliary_head and not isinstance(self.auxiliary_head, nn.ModuleList)
        if auxiliary_weight and not single:
            raise ValueError(
                "AdversarialSegmentor: auxiliary_weight aligns the output of one auxiliary head, and there is "
                f"{'a list of them' if self.with_auxiliary_head else 'none'}: give auxiliary_head=dict(...), or leave "
                "auxiliary_weight out"
            )
        if auxiliary_weight and self.auxiliary_head.out_channels != self.out_channels:
            raise ValueError(
                f"AdversarialSegmentor: the auxiliary head has {self.auxiliary_head.out_channels} outputs and the "
                f"decode head {self.out_channels}"
            )
        self.input, self.min_entropy, self.enlarge = input, min_entropy, enlarge
        self.weights = {name: weight for name, weight in weights.items() if weight > 0}
        options = {"type": "alimm.PixelDiscriminator", "layout": "adaptsegnet", **(discriminator or {})}
        if self.weights:
            judges = [MODELS.build({**options, "in_channels": self.out_channels}) for _ in self.weights]
            self.discriminators = ModuleList(judges)  # MMEngine's: init_weights reaches them

    def segmentor_losses(self, batch: StepBatch) -> Iterator[Losses]:
        """The source's part, then the target's."""
        yield self._source_losses(batch)
        if self.stage == "align" and (self.weights or self.min_entropy):
            yield self._target_losses(batch)

    def _source_losses(self, batch: StepBatch) -> Losses:
        source = batch.source
        features = self.extract_feat(source.inputs)
        logits = self._logits(features)
        losses = _named("source", head_loss(self.decode_head, logits["decode"], source.samples))
        if "auxiliary" in logits:
            losses.update(_named("aux", head_loss(self.auxiliary_head, logits["auxiliary"], source.samples)))
        elif self.with_auxiliary_head:
            losses.update(self._auxiliary_head_forward_train(features, source.samples))
        batch.kept["source"] = {name: value.detach() for name, value in logits.items()}
        return losses

    def _target_losses(self, batch: StepBatch) -> Losses:
        target = batch.target
        logits = self._logits(self.extract_feat(target.inputs))
        batch.kept["target"] = {name: value.detach() for name, value in logits.items()}
        losses: Losses = {}
        for (name, weight), judge in zip(self.weights.items(), self._judges(), strict=True):
            answer = judge(self._maps(logits[name], target))
            losses[f"target.loss_adv_{name}"] = weight * adversarial.domain_loss(answer, adversarial.SOURCE).mean()
        if self.min_entropy:
            prob = self._enlarged(logits["decode"], target).softmax(dim=1)
            losses["target.loss_entropy"] = self.min_entropy * adversarial.entropy_loss(prob)
        return losses

    def discriminator_losses(self, batch: StepBatch) -> Losses:
        """Half the loss on either domain, for the discriminator of each head."""
        losses: Losses = {}
        if self.stage != "align":
            return losses
        domains = (("source", batch.source, adversarial.SOURCE), ("target", batch.target, adversarial.TARGET))
        for domain, pictures, label in domains:
            for name, judge in zip(self.weights, self._judges(), strict=True):
                answer = judge(self._maps(batch.kept[domain][name], pictures))
                losses[f"{domain}.loss_d_{name}"] = 0.5 * adversarial.domain_loss(answer, label).mean()
                losses[f"{domain}.acc_d_{name}"] = adversarial.domain_accuracy(answer.detach(), label)
        return losses

    def _judges(self) -> list[Any]:
        return [] if self.discriminators is None else list(self.discriminators.children())

    def _logits(self, features: Any) -> dict[str, Tensor]:
        logits = {"decode": self.decode_head(features)}
        if "auxiliary" in self.weights:
            logits["auxiliary"] = self.auxiliary_head(features)
        return logits

    def _maps(self, logits: Tensor, pictures: DomainBatch) -> Tensor:
        """What a discriminator reads (N, C, H, W)."""
        prob = self._enlarged(logits, pictures).softmax(dim=1)
        return adversarial.self_information(prob) if self.input == "entropy" else prob

    def _enlarged(self, logits: Tensor, pictures: DomainBatch) -> Tensor:
        return enlarged(logits, pictures.inputs, self.align_corners) if self.enlarge else logits.float()


def enlarged(logits_NChw: Tensor, inputs_N3HW: Tensor, align_corners: bool) -> Tensor:
    """Logits on the grid of the pictures (N, C, H, W) in full precision, by bilinear interpolation."""
    size = tuple(inputs_N3HW.shape[2:])
    return F.interpolate(logits_NChw.float(), size=size, mode="bilinear", align_corners=align_corners)


def _named(prefix: str, losses: Losses) -> Losses:
    return {f"{prefix}.{name}": value for name, value in losses.items()}
