"""A training loop whose batch is made of one batch of every loader: ``dict(source=..., target=...)``."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapperDict
from mmengine.runner import IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from alimm.projects.dcaa.optim import DISCRIMINATORS, SEGMENTOR, AlternatingOptimWrapperConstructor
from alimm.registry import LOOPS
from alimm.seeding import stream_seed

EXAMPLE = "train_dataloader = dict(source=dict(batch_size=..., dataset=..., sampler=...), target=dict(...))"


def seed_part_worker(worker_id: int, part: str = "", rank: int = 0, quiet: bool = False) -> None:
    """Seed a data worker from its torch seed, its part and its rank.

    MMEngine's own function knows neither, so that the first workers of all parts would make the same random choices:
    each target picture would be cropped where its source picture is.

    Args:
        worker_id: number of the worker.
        part: name of the loader.
        rank: of this process.
        quiet: hush the warnings of all workers but the first.
    """
    value = stream_seed(torch.initial_seed(), f"loader/{part}", rank)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)
    if quiet and worker_id != 0:
        warnings.simplefilter("ignore")


class _Endless:
    """Draws from a loader, and starts it again when it has ended."""

    def __init__(self, loader: DataLoader[Any], name: str) -> None:
        self._loader, self._name = loader, name
        self._batches: Iterator[Any] | None = None
        self._passes = 0

    def draw(self) -> Any:
        if self._batches is None:
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            self._passes += 1
            _set_epoch(self._loader, self._passes)
            self._batches = iter(self._loader)
        try:
            return next(self._batches)
        except StopIteration:
            raise ValueError(
                f"the loader {self._name!r} gives no batch: its dataset has {_length(self._loader.dataset)} pictures "
                f"and its batch size is {self._loader.batch_size}. Check the dataset's paths, or use a smaller batch"
            ) from None

    def close(self) -> None:
        self._batches = None
        self._loader._iterator = None


class _JointBatches:
    """Endless iterator over the batches of all parts. Nothing is started before the first is drawn."""

    def __init__(self, loaders: Mapping[str, DataLoader[Any]]) -> None:
        self._parts = {name: _Endless(loader, name) for name, loader in loaders.items()}

    def __iter__(self) -> _JointBatches:
        return self

    def __next__(self) -> dict[str, Any]:
        return {name: part.draw() for name, part in self._parts.items()}

    def close(self) -> None:
        for part in self._parts.values():
            part.close()


class _JointSampler:
    """What MMEngine's hooks ask a loader for: tells the samplers of all parts the epoch."""

    def __init__(self, loaders: Mapping[str, DataLoader[Any]]) -> None:
        self._loaders = loaders

    def set_epoch(self, epoch: int) -> None:
        for loader in self._loaders.values():
            _set_epoch(loader, epoch)


class JointLoader:
    """Several loaders that look like one to MMEngine's loops and hooks.

    An iterator over it never ends: each part starts again by itself when it has been read. Samplers without an end
    (`ConditionSampler`, MMEngine's ``InfiniteSampler``) spare the start of the workers.

    Args:
        loaders: the parts by name. A batch has the same names.

    Attributes:
        loaders: the parts by name.
        dataset: that of the first part, whose metainfo MMEngine keeps.
        sampler: passes ``set_epoch`` on.

    Raises:
        ValueError: there is no part.
    """

    def __init__(self, loaders: Mapping[str, DataLoader[Any]]) -> None:
        if not loaders:
            raise ValueError(f"a joint loader needs at least one loader, got none. Write {EXAMPLE}")
        self.loaders = dict(loaders)
        self.sampler = _JointSampler(self.loaders)
        self._current: _JointBatches | None = None

    @property
    def dataset(self) -> Any:
        """The dataset of the first part."""
        return next(iter(self.loaders.values())).dataset

    @property
    def _iterator(self) -> _JointBatches | None:
        return self._current

    @_iterator.setter
    def _iterator(self, value: None) -> None:
        # As with torch's loader: to forget the iterator is to stop its workers.
        if self._current is not None:
            self._current.close()
        self._current = value

    def __iter__(self) -> _JointBatches:
        self._iterator = None
        self._current = _JointBatches(self.loaders)
        return self._current

    def __len__(self) -> int:
        """Batches until every part was read at least once."""
        return max(len(loader) for loader in self.loaders.values())


@LOOPS.register_module()
class MultiLoaderTrainLoop(IterBasedTrainLoop):
    """MMEngine's iteration based loop over batches ``dict(source=<batch>, target=<batch>)``.

    The names are those of ``train_dataloader``, ``dict(source=<loader>, target=<loader>)``; each loader is built as
    MMEngine builds one. A resumed run skips the batches that were already trained on by drawing them, so that it goes
    on with the same ones.

    Args:
        runner: the runner.
        dataloader: a config or a ``DataLoader`` for each name, or a `JointLoader`.
        max_iters: training iterations.
        **kwargs: ``val_begin``, ``val_interval`` and ``dynamic_intervals`` of MMEngine's loop.

    Raises:
        ValueError: the loaders are not given by name, ``auto_scale_lr`` is on (which batch size would count?), or
            ``param_scheduler`` is given by name and leaves an optimiser out.
    """

    def __init__(
        self, runner: Runner, dataloader: JointLoader | Mapping[str, Any], max_iters: int, **kwargs: Any
    ) -> None:
        if (runner.auto_scale_lr or {}).get("enable"):
            raise ValueError(
                "auto_scale_lr scales with the batch size, and MultiLoaderTrainLoop has one for every loader: leave it "
                "out and set optim_wrapper.optimizer.lr for the batch sizes that you use"
            )
        _check_schedules(runner)
        joint = dataloader if isinstance(dataloader, JointLoader) else build_joint_loader(runner, dataloader)
        super().__init__(runner, joint, max_iters, **kwargs)


def build_joint_loader(runner: Runner, parts: Mapping[str, Any]) -> JointLoader:
    """Build the loader of every part with the run's seed.

    Args:
        runner: its seed and ``diff_rank_seed`` are used.
        parts: a config or a ``DataLoader`` for each name.

    Raises:
        ValueError: it is one loader's config, it is empty, or a part is not a config.
    """
    if not isinstance(parts, Mapping):
        raise ValueError(f"MultiLoaderTrainLoop needs one loader for each name, got {type(parts).__name__}: {EXAMPLE}")
    if not parts:
        raise ValueError(f"MultiLoaderTrainLoop needs one loader for each name, got an empty dict: write {EXAMPLE}")
    if single := [key for key in ("dataset", "batch_size", "sampler", "num_workers") if key in parts]:
        raise ValueError(
            f"MultiLoaderTrainLoop needs one loader for each name, got the config of a single one (it has "
            f"{', '.join(single)}): write {EXAMPLE}, or take MMEngine's IterBasedTrainLoop"
        )
    loaders: dict[str, DataLoader[Any]] = {}
    for name, part in parts.items():
        if isinstance(part, DataLoader):
            loaders[name] = part
            continue
        if not isinstance(part, Mapping) or "dataset" not in part:
            got = f"the keys {', '.join(map(str, part)) or '(none)'}" if isinstance(part, Mapping) else repr(part)
            raise ValueError(f"train_dataloader.{name} must be the config of a loader, with a dataset, got {got}")
        config = dict(part)
        quiet = config.pop("disable_subprocess_warning", False)
        if config.get("num_workers"):
            worker = dict(type=seed_part_worker, part=name, rank=get_rank(), quiet=quiet)
            config.setdefault("worker_init_fn", worker)
        differ = runner._randomness_cfg.get("diff_rank_seed", False)
        loaders[name] = runner.build_dataloader(config, seed=runner.seed, diff_rank_seed=differ)
    return JointLoader(loaders)


def _check_schedules(runner: Runner) -> None:
    schedules: Any = runner.param_schedulers
    if not isinstance(schedules, Mapping) or "type" in schedules:
        return
    if missing := [name for name in _optimiser_names(runner) if name not in schedules]:
        raise ValueError(
            f"param_scheduler has schedules for {', '.join(map(str, schedules)) or 'no optimiser'}, and the optimiser "
            f"{missing[0]!r} has none. Write param_scheduler.{missing[0]} = [dict(type='PolyLR', power=0.9, begin=0, "
            "end=max_iters, by_epoch=False)], or = [] to keep its learning rate"
        )


def _optimiser_names(runner: Runner) -> list[str]:
    """Names of the optimisers that are there or are going to be built; none where that is not known."""
    given: Any = runner.optim_wrapper
    if isinstance(given, OptimWrapperDict):
        return list(given.keys())
    constructor = given.get("constructor") if isinstance(given, Mapping) else None
    name = constructor if isinstance(constructor, str) else getattr(constructor, "__name__", "")
    if name.rpartition(".")[2] != AlternatingOptimWrapperConstructor.__name__:
        return []
    model: Any = runner.model
    while is_model_wrapper(model):
        model = model.module
    judges = getattr(model, "discriminators", None)
    trained = judges is not None and any(parameter.requires_grad for parameter in judges.parameters())
    return [SEGMENTOR, DISCRIMINATORS] if trained else [SEGMENTOR]


def _set_epoch(loader: DataLoader[Any], epoch: int) -> None:
    samplers: tuple[Any, Any] = (loader.sampler, getattr(loader.batch_sampler, "sampler", None))
    for sampler in samplers:
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
            return


def _length(dataset: Any) -> str:
    return str(len(dataset)) if hasattr(dataset, "__len__") else "an unknown number of"
