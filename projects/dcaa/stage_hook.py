"""The stages of training as a schedule: source alone, alignment, self-training."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner

from alimm.registry import HOOKS

STAGE_BUFFER = "stage_index"
"""Name of the buffer in which a model saves its stage."""


@HOOKS.register_module()
class StageHook(Hook):
    """Moves the model from stage to stage when training reaches the iterations of a schedule.

    A model has ``STAGES``, the names in their order, ``stage``, where it is, saved in the buffer ``stage_index``, and
    ``enter_stage(name)``. A run that is resumed within a stage stays there: to enter it again would, for example, copy
    the teacher again. A new run that starts from weights enters its first stage, whatever stage the weights were saved
    in.

    Args:
        stages: ``dict(begin=<iteration, from 0>, stage=<name>)`` for each stage, in order.

    Raises:
        ValueError: the schedule does not fit itself, the model, the run or the checkpoint that it resumes.
    """

    # Before the hooks that log what the iteration does.
    priority = "HIGH"

    def __init__(self, stages: Sequence[Mapping[str, Any]]) -> None:
        example = "stages=[dict(begin=0, stage='align'), dict(begin=20000, stage='self_train')]"
        schedule: list[tuple[int, str]] = []
        for entry in stages:
            if not isinstance(entry, Mapping) or set(entry) != {"begin", "stage"}:
                raise ValueError(f"StageHook: a stage is dict(begin=..., stage=...), got {entry!r}. Example: {example}")
            begin = entry["begin"]
            if isinstance(begin, bool) or not isinstance(begin, int):
                raise ValueError(f"StageHook: begin is the number of an iteration, got {begin!r}. Example: {example}")
            schedule.append((begin, str(entry["stage"])))
        if not schedule:
            raise ValueError(f"StageHook needs at least one stage. Example: {example}")
        begins = [begin for begin, _ in schedule]
        if begins[0] != 0:
            raise ValueError(f"StageHook: the first stage must begin at 0, got {begins[0]}. Example: {example}")
        if any(later <= earlier for earlier, later in itertools.pairwise(begins)):
            raise ValueError(f"StageHook: stages must begin one after the other, got {begins}. Put them in order")
        self.schedule = schedule
        self._loaded = False

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Note whether the checkpoint says a stage."""
        weights = checkpoint.get("state_dict", checkpoint)
        self._loaded = any(str(name).rsplit(".", 1)[-1] == STAGE_BUFFER for name in weights)

    def before_train(self, runner: Runner) -> None:
        """Check the schedule, and enter the stage of the iteration at which training starts."""
        self._check(runner)
        if self._loaded and not _resumed(runner):
            wanted = self._stage_at(runner.iter)
            _plain(runner.model).enter_stage(wanted)
            runner.logger.info(f"iteration {runner.iter}: with the weights that were loaded, stage {wanted!r} begins")
        self._move(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Enter the stage that begins here."""
        # To read the stage waits for the GPU, so only where it can change.
        if any(begin == runner.iter for begin, _ in self.schedule):
            self._move(runner)

    def _check(self, runner: Runner) -> None:
        model = _plain(runner.model)
        known = getattr(model, "STAGES", None)
        if known is None or not callable(getattr(model, "enter_stage", None)):
            raise ValueError(
                f"StageHook: {type(model).__name__} has no stages (no enter_stage): leave the hook out of custom_hooks"
            )
        for begin, name in self.schedule:
            if name not in known:
                raise ValueError(f"StageHook: {type(model).__name__} has the stages {', '.join(known)}, not {name!r}")
            if begin >= runner.max_iters:
                raise ValueError(
                    f"StageHook: the stage {name!r} begins at iteration {begin}, but training ends at max_iters="
                    f"{runner.max_iters}: train longer, or leave that stage out"
                )
        order = [known.index(name) for _, name in self.schedule]
        if any(later <= earlier for earlier, later in itertools.pairwise(order)):
            names = ", ".join(name for _, name in self.schedule)
            raise ValueError(f"StageHook: a model only moves forward through {', '.join(known)}, got {names}")
        wanted = self._stage_at(runner.iter)
        if self._loaded and _resumed(runner) and known.index(model.stage) > known.index(wanted):
            raise ValueError(
                f"StageHook: the checkpoint is in the stage {model.stage!r}, but the schedule has {wanted!r} at "
                f"iteration {runner.iter}: resume with the schedule it was trained with, or begin the schedule with "
                f"{model.stage!r}"
            )

    def _stage_at(self, iteration: int) -> str:
        return [name for begin, name in self.schedule if begin <= iteration][-1]

    def _move(self, runner: Runner) -> None:
        model = _plain(runner.model)
        before, wanted = model.stage, self._stage_at(runner.iter)
        if before != wanted:
            model.enter_stage(wanted)
            runner.logger.info(f"iteration {runner.iter}: the model moves from the stage {before!r} to {wanted!r}")


def _resumed(runner: Runner) -> bool:
    return runner._resume or runner.iter > 0


def _plain(model: Any) -> Any:
    """The model inside a distributed wrapper."""
    while is_model_wrapper(model):
        model = model.module
    return model
