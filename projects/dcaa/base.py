"""What every segmentor that learns from a labelled source and an unlabelled target shares: one training step.

    read the batch and check it
    freeze the discriminators; for each part of the segmentor's loss: forward, backward     (split: graphs live in turn)
    average the gradients over the ranks; step the segmentor
    thaw; the discriminators' losses on detached outputs: backward, average, step

A subclass says what the parts are (`segmentor_losses`, a generator) and what the discriminators learn
(`discriminator_losses`). Sums are divided by counts averaged over the ranks, so that N ranks take the step of one rank
with N times the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmseg.models import SegDataPreProcessor
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from alimm.projects.dcaa.adversarial import frozen
from alimm.projects.dcaa.augment_batch import strong_augment_batch
from alimm.projects.dcaa.wrapper import average_gradients

Losses = dict[str, Tensor]


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


class AdaptationSegmentor(EncoderDecoder):
    """An encoder and decoder that is trained on a source and a target.

    Training goes through ``train_step`` alone; validation, test and inference are those of ``EncoderDecoder``.

    Args:
        conditions: names of the target's conditions in the order of their numbers, or how many there are.
        stage: where training starts, one of ``STAGES``; see `StageHook` for the moves between them.
        split_backward: run backward after each part of the loss, so that only one part's graph is held. False sums the
            parts first.
        freeze_bn: leave the statistics, scales and shifts of batch norm as they are loaded.
        **kwargs: of ``EncoderDecoder``.

    Raises:
        ValueError: no condition, one named twice, or an unknown stage.
    """

    STAGES: ClassVar[tuple[str, ...]] = ("source", "align", "self_train")
    discriminators: Any  # a ModuleList or None

    def __init__(
        self,
        conditions: Sequence[str] | int,
        *args: Any,
        stage: str = "align",
        split_backward: bool = True,
        freeze_bn: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.discriminators = None  # on the instance: on the class it would hide a module of that name
        self.conditions = condition_names(conditions, type(self).__name__)
        self.split_backward = split_backward
        self.freeze_bn = freeze_bn
        self._check_stage(stage)
        self.register_buffer("stage_index", torch.tensor(self.STAGES.index(stage)))
        self.train(self.training)  # frozen batch norm must not reach an optimiser

    @property
    def stage(self) -> str:
        """Where training is; saved with the weights."""
        return self.STAGES[int(self.stage_index)]

    def enter_stage(self, stage: str) -> None:
        """Move to a stage.

        Raises:
            ValueError: there is no such stage.
        """
        self._check_stage(stage)
        self.stage_index.fill_(self.STAGES.index(stage))

    def _check_stage(self, stage: str) -> None:
        if stage not in self.STAGES:
            raise ValueError(f"{type(self).__name__} has the stages {', '.join(self.STAGES)}, got {stage!r}")

    def train(self, mode: bool = True) -> AdaptationSegmentor:
        """Set the mode; frozen batch norm stays in evaluation, whatever MMEngine asks for every iteration."""
        super().train(mode)
        if self.freeze_bn:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
                    for parameter in module.parameters(recurse=False):
                        parameter.requires_grad_(False)
        return self

    def segmentor_losses(self, batch: StepBatch) -> Iterator[Losses]:
        """Parts of the segmentor's loss. Only the part that was yielded last has a graph in split mode."""
        raise NotImplementedError

    def discriminator_losses(self, batch: StepBatch) -> Losses:
        """What the discriminators learn, from detached outputs; empty where nothing is."""
        return {}

    def after_segmentor_step(self, batch: StepBatch) -> None:
        """Called when the segmentor has been stepped, before the discriminators are."""

    def train_step(self, data: Any, optim_wrapper: OptimWrapper | OptimWrapperDict) -> Losses:
        """One step of the segmentor and one of the discriminators.

        Args:
            data: ``dict(source=..., target=...)``, each a batch as MMSegmentation collates it.
            optim_wrapper: the wrappers ``seg`` and ``disc`` (see `AlternatingOptimWrapperConstructor`), or one wrapper
                over all parameters.

        Returns:
            What is logged.

        Raises:
            ValueError: the batch is not what training needs; the message says what to change.
        """
        seg, disc = _wrappers(optim_wrapper)
        batch = self.read_batch(data)
        logs: Losses = {}
        with frozen([] if self.discriminators is None else [self.discriminators]):
            self._step_segmentor(batch, seg, logs)
        self.after_segmentor_step(batch)
        if self.discriminators is not None:
            with disc.optim_context(self):
                losses = self.discriminator_losses(batch)
            if losses:
                total = self._log(losses, logs)
                disc.backward(total)
                self.before_discriminator_step()
                average_gradients(self.discriminators.parameters())
                disc.step()
                disc.zero_grad()
        return logs

    def before_discriminator_step(self) -> None:
        """Called with the discriminators' gradients in place."""

    def _step_segmentor(self, batch: StepBatch, seg: OptimWrapper, logs: Losses) -> None:
        parts = self.segmentor_losses(batch)
        waiting = []
        while True:
            with seg.optim_context(self):
                losses = next(parts, None)
            if losses is None:
                break
            total = self._log(losses, logs)
            del losses
            if self.split_backward:
                seg.backward(total)
            else:
                waiting.append(total)
            del total
        if waiting:
            seg.backward(torch.stack(waiting).sum())
        average_gradients(self.segmentor_parameters())
        seg.step()
        seg.zero_grad()

    def segmentor_parameters(self) -> list[nn.Parameter]:
        """All that is trained but the discriminators."""
        others = set() if self.discriminators is None else {id(p) for p in self.discriminators.parameters()}
        return [p for p in self.parameters() if id(p) not in others and p.requires_grad]

    def augmented(self, inputs_N3HW: Tensor) -> Tensor:
        """Preprocessed pictures (N, 3, H, W), strongly augmented in colour and sharpness, as a student sees them."""
        mean: Any = getattr(self.data_preprocessor, "mean", None)
        if mean is None:
            return strong_augment_batch(inputs_N3HW)
        std = self.data_preprocessor.std
        return (strong_augment_batch(inputs_N3HW * std + mean) - mean) / std

    def _log(self, losses: Losses, logs: Losses) -> Tensor:
        total, shown = self.parse_losses(losses)
        shown.pop("loss", None)
        logs.update({name: value.detach() for name, value in shown.items()})  # a log must not hold a graph
        logs["loss"] = logs.get("loss", 0.0) + total.detach()
        return total

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
        if named is not None and self._named and domain == "target" and self.conditions[int(cond_id)] != named:
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


def _wrappers(optim_wrapper: OptimWrapper | OptimWrapperDict) -> tuple[OptimWrapper, OptimWrapper]:
    if not isinstance(optim_wrapper, OptimWrapperDict):
        return optim_wrapper, optim_wrapper
    names = list(optim_wrapper.keys())
    if "seg" not in names:
        raise ValueError(
            f"the optimisers are named {', '.join(names)}, and seg and disc are needed: set constructor="
            "'alimm.AlternatingOptimWrapperConstructor' in optim_wrapper"
        )
    return optim_wrapper["seg"], optim_wrapper["disc" if "disc" in names else "seg"]
