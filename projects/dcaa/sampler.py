"""An endless sampler that gives every condition its turn, the same turns in every loader of a run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from torch.utils.data import Sampler

from alimm.registry import DATA_SAMPLERS
from alimm.seeding import numpy_stream


@DATA_SAMPLERS.register_module()
class ConditionSampler(Sampler[int]):
    """Draws the conditions of a dataset in turn, and for each condition its pictures in a shuffled order without end.

    Each block of K draws is a random permutation of the K conditions, so any 2 K - 1 draws in a row hold every one. The
    order of the conditions depends on the seed and K alone: the loaders of a styled source and of the target draw the
    same conditions at the same time. Which picture of a condition comes depends on the seed, ``stream`` and the
    condition. Rank r of N takes draws r, r + N, r + 2 N, ..., so N ranks of batch B see what one of batch N B sees.

    Every iterator starts at the first draw.

    Args:
        dataset: with ``condition_ids()``, one number from 0 for each picture, and optionally ``conditions``, their
            names.
        cond_prob: draw the conditions independently with these K probabilities instead of in blocks.
        shuffle: False gives conditions and pictures in the order of their numbers.
        seed: of the run; None agrees on one with the other ranks.
        round_up: ignored; MMEngine's samplers have it.
        stream: tells the pictures of two datasets apart that would otherwise be shuffled alike.
        allow_empty: leave conditions without a picture out, instead of refusing them.

    Raises:
        ValueError: the dataset knows no conditions, a condition has no picture, or ``cond_prob`` does not fit.
    """

    def __init__(
        self,
        dataset: Any,
        cond_prob: Sequence[float] | None = None,
        shuffle: bool = True,
        seed: int | None = None,
        round_up: bool = True,
        stream: str = "",
        allow_empty: bool = False,
    ) -> None:
        self.dataset = dataset
        self.rank, self.world_size = get_dist_info()
        self.shuffle = shuffle
        self.seed = int(sync_random_seed() if seed is None else seed)
        self.stream = stream
        ids = _condition_ids(dataset)
        self.size = len(ids)
        names = getattr(dataset, "conditions", None)
        count = len(names) if names is not None else int(ids.max()) + 1
        names = tuple(map(str, names)) if names is not None else tuple(str(k) for k in range(count))
        if ids.min() < 0 or ids.max() >= count:
            raise ValueError(
                f"ConditionSampler: the dataset has the {count} conditions {', '.join(names)}, numbered from 0, but "
                f"condition_ids() holds numbers from {ids.min()} to {ids.max()}. Leave out pictures without a "
                "condition, or give them one"
            )
        self.pictures = [np.flatnonzero(ids == k) for k in range(count)]
        probabilities = None if cond_prob is None else _checked_probabilities(cond_prob, names)
        wanted = [k for k in range(count) if probabilities is None or probabilities[k] > 0]
        empty = [k for k in wanted if not len(self.pictures[k])]
        if empty and not allow_empty:
            raise ValueError(
                f"ConditionSampler: no picture of the condition{'s' * (len(empty) > 1)} "
                f"{', '.join(names[k] for k in empty)} in the dataset of {self.size} pictures. Check how conditions "
                "are read, leave it out of the dataset's conditions, or set allow_empty=True"
            )
        self.drawn = [k for k in wanted if k not in empty]
        if not self.drawn:
            raise ValueError(
                f"ConditionSampler: cond_prob leaves no condition with a picture (conditions: {', '.join(names)}). "
                "Give at least one of those a probability"
            )
        self.probabilities = None
        if probabilities is not None:
            kept = probabilities[self.drawn]
            self.probabilities = kept / kept.sum()

    def _conditions(self) -> Iterator[int]:
        """The conditions of all ranks' draws, without end."""
        size = len(self.drawn)
        for block in itertools.count():
            order = np.arange(size)
            if self.probabilities is not None:
                random = numpy_stream(self.seed, "condition sampler/draws", size, block)
                order = random.choice(size, size=size, p=self.probabilities)
            elif self.shuffle:
                order = numpy_stream(self.seed, "condition sampler/order", size, block).permutation(size)
            for position in order.tolist():
                yield self.drawn[position]

    def _pictures_of(self, condition: int) -> Iterator[int]:
        """Indices of one condition's pictures, without end."""
        own = self.pictures[condition]
        for turn in itertools.count():
            if self.shuffle:
                random = numpy_stream(self.seed, f"condition sampler/pictures/{self.stream}", condition, turn)
                yield from random.permutation(own).tolist()
            else:
                yield from own.tolist()

    def _indices(self) -> Iterator[int]:
        streams = {condition: self._pictures_of(condition) for condition in self.drawn}
        for condition in self._conditions():
            yield next(streams[condition])

    def __iter__(self) -> Iterator[int]:
        """This rank's indices, without end."""
        return itertools.islice(self._indices(), self.rank, None, self.world_size)

    def __len__(self) -> int:
        """Pictures of the dataset, as MMEngine's ``InfiniteSampler`` says it."""
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Do nothing: there are no epochs here."""


def _condition_ids(dataset: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    if not callable(getattr(dataset, "condition_ids", None)):
        raise ValueError(
            f"ConditionSampler needs a dataset that knows the condition of each picture, with a method "
            f"condition_ids(), got {type(dataset).__name__}. Take one of alimm's condition datasets, or another sampler"
        )
    ids = np.asarray(dataset.condition_ids(), dtype=np.int64)
    if ids.ndim != 1 or not len(ids):
        raise ValueError(
            f"ConditionSampler: condition_ids() of {type(dataset).__name__} has the shape {ids.shape}, expected one "
            "number for each picture and at least one picture. Check the dataset's paths"
        )
    return ids


def _checked_probabilities(cond_prob: Sequence[float], names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    probabilities = np.asarray(cond_prob, dtype=np.float64)
    if probabilities.shape != (len(names),):
        raise ValueError(
            f"cond_prob needs one probability for each of the {len(names)} conditions {', '.join(names)}, got "
            f"{list(cond_prob)}"
        )
    if not (np.isfinite(probabilities).all() and (probabilities >= 0).all() and abs(probabilities.sum() - 1) < 1e-6):
        raise ValueError(f"cond_prob must hold numbers from 0 to 1 whose sum is 1, got {list(cond_prob)}")
    return probabilities
