"""AdaBN: the statistics of batch norm are those of the pictures that the model is used on.

Li, Wang, Shi, Liu and Hou, Revisiting Batch Normalization for Practical Domain Adaptation, arXiv 2016, 1603.04779.
With x of the target, for each channel of each batch norm layer

    y = gamma (x - mean_target) / sqrt(var_target + eps) + beta

where gamma, beta and all other weights stay what the source taught. As in the paper, layers normalise by the target's
statistics while deeper ones are measured: one pass measures all, each layer normalising by its batch. The paper updates
mean and variance over the pictures one after the other; we average the means and the unbiased variances of the batches,
each weighed by its number of pictures.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.dist import all_reduce, get_world_size
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from alimm.registry import HOOKS
from alimm.seeding import seed_everything

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
Statistics = dict[str, Tensor]


@torch.no_grad()
def reestimate_bn(
    model: nn.Module,
    batches: Iterable[Any],
    momentum: float | None = None,
    forward: Callable[[Any], Any] | None = None,
) -> int:
    """Measure the running statistics of a model's batch norm layers anew, in place; nothing else changes.

    Layers that no batch reaches (those of a discriminator or a teacher) keep their statistics. Every rank gives its own
    batches, equally many, and all end with the mean of what they measured.

    Args:
        model: any model. It is in evaluation but for its batch norm layers, and its modes are put back.
        batches: what the loader gives; labels are not needed.
        momentum: None averages over the batches, each weighed by its pictures, forgetting what was there before; a
            number from 0 to 1 goes on from it as batch norm does in training.
        forward: runs the model on a batch; by default that of an MMEngine model in the mode ``'tensor'`` on
            preprocessed data, and ``model(batch)`` of any other.

    Returns:
        How many batches were read.

    Raises:
        ValueError: the model has no batch norm with running statistics, momentum is out of range, or there is no batch.
    """
    layers = norm_layers(model)
    if momentum is not None and not 0 < momentum <= 1:
        raise ValueError(f"momentum must be None or in (0, 1], got {momentum}")
    run = forward or _default_forward(model)
    before = statistics(model)
    modes = [(module, module.training) for module in model.modules()]
    momenta = [layer.momentum for layer in layers.values()]
    count = 0
    counting = ExitStack()
    try:
        for module, _ in modes:
            module.training = False
        for layer in layers.values():
            layer.training = True
            layer.momentum = momentum
            if momentum is None:
                layer.reset_running_stats()
                counting.callback(layer.register_forward_pre_hook(_WeighBySize()).remove)
            elif layer.num_batches_tracked is not None:
                layer.num_batches_tracked.zero_()
        for batch in batches:
            run(batch)
            count += 1
    finally:
        counting.close()
        for module, mode in modes:
            module.training = mode
        for layer, old in zip(layers.values(), momenta, strict=True):
            layer.momentum = old
        if not count:
            restore(model, before)
    if not count:
        raise ValueError("there is no batch to measure batch norm on: check the dataset of target pictures")
    for name, layer in layers.items():
        if layer.num_batches_tracked is not None and int(layer.num_batches_tracked) == 0:
            restore(model, {key: before[key] for key in _keys(name)})
        else:
            all_reduce(layer.running_mean, op="mean")
            all_reduce(layer.running_var, op="mean")
    return count


class _WeighBySize:
    """Before each forward pass of a layer, lets its momentum be this batch's share of all pictures until now."""

    def __init__(self) -> None:
        self._pictures = 0

    def __call__(self, layer: _BatchNorm, inputs: tuple[Tensor, ...]) -> None:
        self._pictures += len(inputs[0])
        layer.momentum = len(inputs[0]) / self._pictures


def norm_layers(model: nn.Module) -> dict[str, _BatchNorm]:
    """The batch norm layers that keep running statistics, by name.

    Raises:
        ValueError: there is none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no batch norm layer with running statistics, so AdaBN cannot adapt it: take a "
            "model with norm_cfg=dict(type='BN'), or leave AdaBN out"
        )
    return layers


def statistics(model: nn.Module) -> Statistics:
    """Copies of the statistics of the batch norm layers, named as in the state dict."""
    return {
        f"{name}.{key}" if name else key: getattr(layer, key).clone()
        for name, layer in norm_layers(model).items()
        for key in STATISTICS
        if getattr(layer, key) is not None
    }


@torch.no_grad()
def restore(model: nn.Module, saved: Statistics) -> None:
    """Put statistics back that `statistics` copied, all or some."""
    for name, layer in norm_layers(model).items():
        for key, full in zip(STATISTICS, _keys(name), strict=True):
            if full in saved:
                getattr(layer, key).copy_(saved[full])


def _keys(name: str) -> list[str]:
    return [f"{name}.{key}" if name else key for key in STATISTICS]


def _default_forward(model: Any) -> Callable[[Any], Any]:
    preprocess = getattr(model, "data_preprocessor", None)
    if preprocess is None:
        return model

    def forward(batch: Any) -> Any:
        return model._run_forward(preprocess(batch, False), mode="tensor")

    return forward


@HOOKS.register_module()
class AdaBNHook(Hook):
    """Validates and tests with the batch norm statistics of target pictures, read without their labels.

    The statistics of training come back after each validation, so that training, and a run that is resumed, do not
    notice. A measurement depends on the weights, the pictures and the run's seed, not on what was measured before.

    Args:
        dataloader: config of a loader of target pictures; pictures of a batch have the same size. Without ``sampler``,
            the pictures are shuffled by the run's seed.
        num_batches: read so many of each rank; None reads all pictures once, and as many where the sampler has no end.
        momentum: see `reestimate_bn`.
        keep: let the last checkpoint and those of the best scores hold the target's statistics, so that they give the
            same scores without this hook. By default all checkpoints hold the source's, and need the hook.

    Raises:
        ValueError: an option is wrong, the model has no batch norm, or ``EMAHook`` averages the same statistics.
    """

    # Before the checkpoint hook, whose last checkpoint holds the statistics that are kept.
    priority = "LOW"

    def __init__(
        self,
        dataloader: Mapping[str, Any],
        num_batches: int | None = None,
        momentum: float | None = None,
        keep: bool = False,
    ) -> None:
        if not isinstance(dataloader, Mapping) or "dataset" not in dataloader:
            raise ValueError(
                f"AdaBNHook: dataloader is the config of a loader of target pictures, dict(dataset=..., batch_size=..."
                f"), got {dataloader!r}"
            )
        if num_batches is not None and num_batches < 1:
            raise ValueError(f"AdaBNHook: num_batches must be at least 1, or None for all pictures, got {num_batches}")
        self.config = dict(dataloader)
        self.config.setdefault("sampler", dict(type="DefaultSampler", shuffle=True))
        self.num_batches, self.momentum, self.keep = num_batches, momentum, keep
        self._loader: Any = None
        self._source: Statistics | None = None
        self._kept = False

    def before_run(self, runner: Runner) -> None:
        """Check what can be checked before hours of training."""
        norm_layers(_plain(runner.model))
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise ValueError(
                "AdaBNHook and EMAHook exchange the same batch norm statistics: leave one of them out of custom_hooks"
            )

    def before_val(self, runner: Runner) -> None:
        """Take the target's statistics."""
        self._adapt(runner)

    def after_val(self, runner: Runner) -> None:
        """Give the source's back."""
        self._give_back(runner)

    def before_test(self, runner: Runner) -> None:
        """Take the target's statistics."""
        self._adapt(runner)

    def after_test(self, runner: Runner) -> None:
        """Give the source's back."""
        self._give_back(runner)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Take the target's statistics for good before the last checkpoint is saved."""
        if self.keep and self.is_last_train_iter(runner):
            self._adapt(runner)
            self._source, self._kept = None, True

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Save the source's statistics where the target's are in the model only for a validation."""
        # MMEngine saves the newest checkpoint again after a validation that was the best. A run may go on from that
        # one, so it gets the source's; the best one itself comes without the optimiser's state.
        if self._source is not None and ("optimizer" in checkpoint or not self.keep):
            weights = checkpoint["state_dict"]
            for name, value in self._source.items():
                weights[name] = value.to(weights[name].device)

    def _adapt(self, runner: Runner) -> None:
        if self._kept:
            return
        model = _plain(runner.model)
        seed = int(runner.seed or 0)
        if self._loader is None:
            self._loader = runner.build_dataloader(copy.deepcopy(self.config), seed=seed)
            if isinstance(self._loader.sampler, InfiniteSampler):
                raise ValueError(
                    "AdaBNHook: InfiniteSampler gives other pictures at every measurement: set the loader's sampler to "
                    "dict(type='DefaultSampler', shuffle=True)"
                )
        self._source = statistics(model)
        limit = self.num_batches or _one_pass(self._loader)
        with _own_randomness(seed):
            count = reestimate_bn(model, itertools.islice(self._loader, limit), self.momentum)
        runner.logger.info(f"AdaBN: measured batch norm on {count} batches of target pictures")

    def _give_back(self, runner: Runner) -> None:
        if self._source is not None:
            restore(_plain(runner.model), self._source)
            self._source = None


def _one_pass(loader: Any) -> int | None:
    """How many batches of each rank hold as many pictures as there are; None where the size of a batch varies."""
    if loader.batch_size is None:
        return None
    return -(-len(loader.dataset) // (loader.batch_size * get_world_size()))


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Draw from a stream of our own; afterwards the global states are what they were."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        seed_everything(seed, "adabn")
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _plain(model: Any) -> Any:
    """The model inside a distributed wrapper."""
    while is_model_wrapper(model):
        model = model.module
    return model
