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
from typing import Any, ClassVar

import torch
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmseg.models.segmentors import EncoderDecoder
from torch import Tensor, nn

from alimm.projects.dcaa.adversarial import frozen
from alimm.projects.dcaa.augment_batch import strong_augment_batch
from alimm.projects.dcaa.batch import BatchReader, StepBatch, condition_names
from alimm.projects.dcaa.wrapper import average_gradients

Losses = dict[str, Tensor]


class AdaptationSegmentor(BatchReader, EncoderDecoder):
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
        # A single stage is not saved: other models that start from these weights would take it over.
        self.register_buffer("stage_index", torch.tensor(self.STAGES.index(stage)), persistent=len(self.STAGES) > 1)
        self.train(self.training)  # frozen batch norm must not reach an optimiser

    @property
    def stage(self) -> str:
        """Where training is; saved with the weights where there are several.

        Raises:
            ValueError: the weights that were loaded are in a stage of another class.
        """
        index = int(self.stage_index)
        if not 0 <= index < len(self.STAGES):
            raise ValueError(
                f"{type(self).__name__} has the stages {', '.join(self.STAGES)}, and the weights that were loaded are "
                f"in stage number {index}, counted from 0: they are of another class. Enter a stage after loading "
                "(alimm.StageHook does, in a run that is not resumed), or leave stage_index out of the weights"
            )
        return self.STAGES[index]

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
        """Preprocessed pictures (N, 3, H, W), strongly augmented in colour and sharpness, as a student sees them.

        In full precision, also where autocast is on.
        """
        mean: Any = getattr(self.data_preprocessor, "mean", None)
        with torch.autocast(inputs_N3HW.device.type, enabled=False):
            inputs = inputs_N3HW.float()
            if mean is None:
                return strong_augment_batch(inputs)
            std = self.data_preprocessor.std
            return (strong_augment_batch(inputs * std + mean) - mean) / std

    def _log(self, losses: Losses, logs: Losses) -> Tensor:
        total, shown = self.parse_losses(losses)
        shown.pop("loss", None)
        logs.update({name: value.detach() for name, value in shown.items()})  # a log must not hold a graph
        logs["loss"] = logs.get("loss", 0.0) + total.detach()
        return total


def _wrappers(optim_wrapper: OptimWrapper | OptimWrapperDict) -> tuple[OptimWrapper, OptimWrapper]:
    for wrapper in optim_wrapper.values() if isinstance(optim_wrapper, OptimWrapperDict) else [optim_wrapper]:
        if wrapper._accumulative_counts != 1:
            raise ValueError(
                f"accumulative_counts is {wrapper._accumulative_counts}, but gradients are dropped after every "
                "iteration: leave it out of optim_wrapper, and use a larger batch"
            )
    if not isinstance(optim_wrapper, OptimWrapperDict):
        return optim_wrapper, optim_wrapper
    names = list(optim_wrapper.keys())
    if "seg" not in names:
        raise ValueError(
            f"the optimisers are named {', '.join(names)}, and seg and disc are needed: set constructor="
            "'alimm.AlternatingOptimWrapperConstructor' in optim_wrapper"
        )
    return optim_wrapper["seg"], optim_wrapper["disc" if "disc" in names else "seg"]
