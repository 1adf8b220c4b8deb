"""Randomness as a function of (seed, epoch, iteration, rank), so that a resumed run repeats the uninterrupted one."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop, Runner

from alimm.registry import FUNCTIONS, HOOKS
from alimm.seeding import seed_everything


@FUNCTIONS.register_module()
def seed_worker(worker_id: int, disable_subprocess_warning: bool = False) -> None:
    """Seed ``random`` and NumPy of a data worker from its torch seed.

    torch draws that seed anew whenever the workers start, so the augmentation differs from epoch to epoch. MMEngine's
    own function derives it from the run's seed alone, and every epoch of non-persistent workers sees the same one.

    Args:
        worker_id: number of the worker.
        disable_subprocess_warning: hush the warnings of all workers but the first, as MMEngine's function can.
    """
    seed = torch.initial_seed()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    if disable_subprocess_warning and worker_id != 0:
        warnings.simplefilter("ignore")


class _SeededBatches:
    """Sets the states of the generators before every batch is drawn."""

    def __init__(self, batches: Iterator[Any], seed: int, rank: int) -> None:
        self._batches, self._seed, self._rank, self._drawn = batches, seed, rank, 0

    def __iter__(self) -> _SeededBatches:
        return self

    def __next__(self) -> Any:
        seed_everything(self._seed, "train/batch", self._rank, self._drawn)
        self._drawn += 1
        return next(self._batches)


@HOOKS.register_module()
class EpochSeedHook(Hook):
    """Sets the states of ``random``, NumPy and torch from named streams at every epoch and every iteration.

    With it and ``seed_worker``, training that is resumed at the end of an epoch (or, in an iteration based loop, at any
    checkpoint) gives the same bits as training that was never interrupted, on the same device, number of ranks and
    number of workers, where the operators themselves are deterministic. What it cannot repeat: a checkpoint saved in
    the middle of an epoch of an epoch based loop, since MMEngine starts that epoch again; and persistent workers with
    ``restart_workers=False``, whose generators live on from epoch to epoch.

    Args:
        restart_workers: start persistent workers of an epoch based loop afresh in every epoch. Costs the start of the
            workers, some 50 ms each where processes are forked.
    """

    priority = "VERY_HIGH"

    def __init__(self, restart_workers: bool = True) -> None:
        self.restart_workers = restart_workers

    def before_train(self, runner: Runner) -> None:
        """Seed each batch of an iteration based loop, which skips old batches by drawing them when it resumes."""
        loop = runner.train_loop
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = _SeededBatches(loop.dataloader_iterator, runner.seed, get_rank())

    def before_train_epoch(self, runner: Runner) -> None:
        """Seed the epoch: torch derives the seeds of the workers from this state."""
        seed_everything(runner.seed, "train/epoch", get_rank(), runner.epoch)
        loader = runner.train_dataloader
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        if self.restart_workers and by_epoch and getattr(loader, "persistent_workers", False):
            loader._iterator = None

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Seed the iteration."""
        seed_everything(runner.seed, "train/iter", get_rank(), runner.iter)
