"""INT8 training of any model, from a config alone.

Zhao, Huang, Pan et al., Distribution Adaptive INT8 Quantization for Training CNNs, AAAI 2021, arXiv 2102.04782. With
q(x) = round(127 clamp(x, -s, s) / s), G the gradient of a layer's output Y = X * W:

    Y  = q(X) * q(W)      one scale each
    dW = q_c(G) * q(X)    Gradient Vectorized Quantization: one scale s_c an output channel, which factors out
    dX = q(G) * q(W)      one scale

and the clip of a gradient's channel follows the shape of its distribution (`ranges`, ``alimm_ops.quantize.clipping``).
That is ``clip='paper', grad_input='global'``. Where we differ by default: the scales s_c are folded into the weights
of dX, so that one INT8 gradient serves both products with less error (`weights`), and each channel is clipped at its
current maximum, which takes less time; two seeds showed no difference in accuracy that could be told from chance.
Weights and inputs are rounded to nearest, gradients stochastically without bias; the printed formula says only "round".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from alimm.projects.int8_training.conversion import Report, convert, layers_of, revert
from alimm.projects.int8_training.options import PRODUCTS, Int8Options
from alimm.projects.int8_training.report import plan_table
from alimm.registry import HOOKS

CHECKPOINT_KEY = "int8_training"


@HOOKS.register_module()
class Int8TrainingHook(Hook):
    """Trains the convolutions and linear layers of the runner's model in INT8.

    Parameters, state dict and optimizer stay what they are: a checkpoint loads into the plain model and back. By
    default evaluation runs in floating point, as the saved model will. Layers that cannot be converted are listed in
    the log and left alone.

    Args:
        include: regular expressions; only layers whose names match one are converted. All if None.
        exclude: regular expressions; layers whose names match one are left.
        strict_all: convert the layer that reads the picture and the layers that make the predictions too.
        products: which of ``'output'``, ``'grad_input'``, ``'grad_weight'`` run in INT8.
        clip: how gradients are clipped: ``'max'``, ``'paper'``, ``'closed_form'``, ``'histogram'``, ``'hindsight'``.
        grad_input: ``'folded'``, or ``'global'`` as in the paper.
        grad_weight: one scale a ``'channel'``, or one a ``'tensor'``.
        weight: one scale of the weights a ``'tensor'`` as in the paper, or a ``'channel'``.
        rounding: of gradients, ``'stochastic'`` or ``'nearest'``.
        grad_bits: bits of a gradient, 2 to 8.
        signed: where bytes above 127 saturate: ``'split'`` computes a signed operand as two halves, exactly;
            ``'narrow'`` gives it, or the weights it meets, 7 bits. ``'auto'`` is ``'narrow'``.
        backend: what multiplies: ``'auto'``, ``'onednn'``, ``'int_mm'``; ``'fake'`` is float32 on the same integers.
        planner: time each product once and keep what is faster; off, everything that can runs in INT8.
        start_epoch: first epoch in INT8, counted from 0.
        eval_int8: evaluate in INT8 as well.
        telemetry_interval: compare gradients with their quantised form every so many iterations; 0 never.
        min_cosine: a layer whose gradient's cosine stays below this goes back to floating point.
        patience: after so many checks in a row.
        **more: further fields of `Int8Options`.

    Raises:
        ValueError: an option is wrong; the message says what is allowed.
    """

    # After the hooks that set up the model (EMA, weights), before those that log.
    priority = "NORMAL"

    def __init__(
        self,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        strict_all: bool = False,
        products: Sequence[str] = PRODUCTS,
        clip: str = "max",
        grad_input: str = "folded",
        grad_weight: str = "channel",
        weight: str = "tensor",
        rounding: str = "stochastic",
        grad_bits: int = 8,
        signed: str = "auto",
        backend: str = "auto",
        planner: bool = True,
        start_epoch: int = 0,
        eval_int8: bool = False,
        telemetry_interval: int = 100,
        min_cosine: float = 0.5,
        patience: int = 3,
        **more: Any,
    ) -> None:
        try:
            self.options = Int8Options(
                include=include,
                exclude=exclude,
                strict_all=strict_all,
                products=products,
                clip=clip,
                grad_input=grad_input,
                grad_weight=grad_weight,
                weight=weight,
                rounding=rounding,
                grad_bits=grad_bits,
                signed=signed,
                backend=backend,
                planner=planner,
                eval_int8=eval_int8,
                min_cosine=min_cosine,
                patience=patience,
                **more,
            )
        except TypeError as error:
            known = ", ".join(sorted(Int8Options.__dataclass_fields__))
            raise ValueError(
                f"Int8TrainingHook: {error}. Its options are {known}, start_epoch, telemetry_interval"
            ) from error
        if telemetry_interval < 0 or start_epoch < 0:
            raise ValueError(
                f"telemetry_interval and start_epoch must not be negative, got {telemetry_interval} and {start_epoch}"
            )
        self.start_epoch = start_epoch
        self.telemetry_interval = telemetry_interval
        self.report: Report | None = None
        self._loaded: dict[str, Any] | None = None
        self._shown = 0
        self._sick: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Convert, unless that is for a later epoch."""
        if runner.epoch >= self.start_epoch:
            self._convert(runner)

    def before_train_epoch(self, runner: Runner) -> None:
        """Convert when the epoch has come."""
        if self.report is None and runner.epoch >= self.start_epoch:
            self._convert(runner)

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Tell the layers which step this is, and what the loss is multiplied with."""
        if self.report is None:
            return
        context = self.report.context
        context.step = runner.iter
        scaler = getattr(runner.optim_wrapper, "loss_scaler", None)
        context.loss_scale = float(scaler.get_scale()) if scaler is not None else 1.0
        context.watch = bool(self.telemetry_interval) and runner.iter % self.telemetry_interval == 0

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Show new plans, log the health of the layers, name those that went back to floating point."""
        if self.report is None:
            return
        model = _plain(runner.model)
        states = dict(layers_of(model))
        planned = sum(len(state.plans) for state in states.values())
        if planned > self._shown and self._shown == 0:
            device = next(model.parameters()).device.type
            runner.logger.info(plan_table(states, device))
        self._shown = planned
        if not self.report.context.watch:
            return
        for name, state in states.items():
            if state.sick and name not in self._sick:
                self._sick.add(name)
                runner.logger.warning(
                    f"INT8 training: {name} goes back to floating point: the cosine between its gradient and the "
                    f"quantised one was {state.health.cosine:.3f}, below {state.options.min_cosine}, for "
                    f"{state.options.patience} checks"
                )
        hub = runner.message_hub
        hub.update_scalar("train/int8_sick_layers", float(len(self._sick)))
        # A layer that went back is measured no more.
        healths = [state.health for state in states.values() if not state.sick]
        seen = [health for health in healths if health.cosine == health.cosine]
        if seen:
            hub.update_scalar("train/int8_cosine_min", min(health.cosine for health in seen))
            hub.update_scalar("train/int8_clipped", sum(health.clipped for health in seen) / len(seen))
            hub.update_scalar("train/int8_zeros", sum(health.zeros for health in seen) / len(seen))
            bells = [health.bell for health in seen if health.bell == health.bell]
            if bells:
                hub.update_scalar("train/int8_bell_shaped", sum(bells) / len(bells))

    def after_train(self, runner: Runner) -> None:
        """Give the model its own classes back."""
        if self.report is not None:
            revert(_plain(runner.model))
            self.report = None

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep ranges, plans and fall-backs beside the model, so that a resumed run goes on as if never stopped."""
        if self.report is None:
            return
        checkpoint[CHECKPOINT_KEY] = {name: state.saved() for name, state in layers_of(_plain(runner.model))}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take them up again when a run is resumed; new weights alone start afresh."""
        if runner._resume:
            self._loaded = checkpoint.get(CHECKPOINT_KEY)

    def _convert(self, runner: Runner) -> None:
        model = _plain(runner.model)
        self.report = convert(model, self.options)
        self.report.context.seed = int(runner.seed or 0)
        self.report.context.rank = get_rank()
        runner.logger.info(str(self.report))
        if not self.report.converted:
            runner.logger.warning("INT8 training: no layer was converted, the model trains in floating point")
        for name, state in layers_of(model):
            if self._loaded and name in self._loaded:
                state.restore(self._loaded[name])
            if state.sick:
                self._sick.add(name)
        self._loaded = None


def _plain(model: Any) -> nn.Module:
    """The model inside a distributed wrapper, and inside `torch.compile`'s."""
    while is_model_wrapper(model):
        model = model.module
    plain: nn.Module = model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model
    return plain
