"""Samplers whose draw depends on seed and epoch alone.

Every rank makes the same draw of the whole epoch and takes its own part of it, so that the parts are disjoint and the
draw does not change with the number of ranks. A resumed run calls ``set_epoch`` and goes on as if never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sized
from typing import Any

import numpy as np
from mmengine.dist import get_dist_info, sync_random_seed
from numpy.typing import NDArray
from torch.utils.data import Sampler

from alimm.registry import DATA_SAMPLERS
from alimm.seeding import numpy_stream


def field_of(dataset: Any, field: str) -> NDArray[np.int64]:
    """The whole number under ``field`` (``gt_label``, ``gt_identity``) of every item, shape (N,), before transforms.

    Raises:
        ValueError: the data set does not give its items without transforms, or an item has no such field.
    """
    labels_only = field == "gt_label" and hasattr(dataset, "get_cat_ids")
    if not labels_only and not hasattr(dataset, "get_data_info"):
        raise ValueError(
            f"{type(dataset).__name__} has no get_data_info, so its {field} is unknown; use a data set of MMEngine's "
            f"BaseDataset kind"
        )
    values = np.empty(len(dataset), np.int64)
    for row in range(len(dataset)):
        if labels_only:
            try:
                values[row] = dataset.get_cat_ids(row)[0]
                continue
            except NotImplementedError:
                labels_only = False
        item = dataset.get_data_info(row)
        if field not in item:
            raise ValueError(
                f"item {row} of {type(dataset).__name__} has no {field}; its keys: {', '.join(sorted(item))}"
            )
        values[row] = item[field]
    return values


def _rows_by_value(values: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """The rows of each value that occurs, values in ascending order."""
    order = np.argsort(values, kind="stable")
    _, starts = np.unique(values[order], return_index=True)
    return np.split(order, starts[1:])


@DATA_SAMPLERS.register_module()
class ClassBalancedSampler(Sampler[int]):
    """Draw classes with the probability P(c) ~ n_c ** gamma, where n_c counts the items of class c.

    Each position of the epoch draws its class independently; within a class the items come in random order, each once
    before any comes again. ``gamma=1`` draws as the data are, ``gamma=0`` every class as often, 0.5 (square root) lies
    between.

    Args:
        dataset: of MMEngine's BaseDataset kind.
        gamma: 0 to 1.
        num_samples: items of an epoch, over all ranks; by default the length of the data set. Where the ranks do not
            divide it, the first items are drawn once more at the end, so that all ranks have equally many.
        seed: the same on all ranks; None agrees on a random one.
        field: what counts as the class.
    """

    def __init__(
        self,
        dataset: Sized,
        gamma: float = 0.5,
        num_samples: int | None = None,
        seed: int | None = None,
        field: str = "gt_label",
    ) -> None:
        if not 0 <= gamma <= 1:
            raise ValueError(f"ClassBalancedSampler: gamma must be between 0 and 1, got {gamma!r}")
        if num_samples is not None and num_samples < 1:
            raise ValueError(f"ClassBalancedSampler: num_samples must be at least 1, got {num_samples!r}")
        if len(dataset) == 0:
            raise ValueError("ClassBalancedSampler: the data set is empty")
        self.dataset, self.gamma = dataset, gamma
        self.rank, self.world_size = get_dist_info()
        self.seed = sync_random_seed() if seed is None else seed
        self.epoch = 0
        self.draws = len(dataset) if num_samples is None else num_samples
        self._rows = _rows_by_value(field_of(dataset, field))
        counts = np.array([len(rows) for rows in self._rows], np.float64)
        self.probabilities = counts**gamma / np.sum(counts**gamma)

    def draw(self) -> NDArray[np.int64]:
        """The rows of the whole epoch, over all ranks, shape (num_samples,)."""
        stream = numpy_stream(self.seed, "sampler/class_balanced", self.epoch)
        classes = stream.choice(len(self._rows), size=self.draws, p=self.probabilities)
        drawn = np.empty(self.draws, np.int64)
        order = np.argsort(classes, kind="stable")
        chosen, starts = np.unique(classes[order], return_index=True)
        for number, places in zip(chosen, np.split(order, starts[1:]), strict=True):
            rows = self._rows[number]
            rounds = math.ceil(len(places) / len(rows))
            drawn[places] = np.concatenate([stream.permutation(rows) for _ in range(rounds)])[: len(places)]
        return drawn

    def __iter__(self) -> Iterator[int]:
        """This rank's rows."""
        rows = np.resize(self.draw(), len(self) * self.world_size)
        return iter(rows[self.rank :: self.world_size].tolist())

    def __len__(self) -> int:
        """How many rows this rank draws in an epoch."""
        return math.ceil(self.draws / self.world_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which the draw follows."""
        self.epoch = epoch


@DATA_SAMPLERS.register_module()
class IdentityBatchSampler(Sampler[list[int]]):
    """Batches of P identities with K pictures each, for losses that compare pictures.

    In a config: ``batch_size=64, sampler=dict(type=DefaultSampler), batch_sampler=dict(type=IdentityBatchSampler,
    images=4)`` gives 16 identities a batch. The sampler lends its data set, seed and epoch; its order is not used.

    In every epoch each identity's pictures are shuffled and cut into groups of K; the last group is filled up with
    other pictures of the identity, repeated only where it has fewer than K in all. No batch holds an identity twice.
    The number of batches is the largest for which that can be done. With B batches, an identity uses at most B groups,
    and what is left over at the end of the layout is dropped, another part in each epoch.

    Args:
        sampler: any that has ``dataset``, ``seed`` and ``epoch``, as MMEngine's DefaultSampler.
        batch_size: P * K, on each rank.
        images: K.
        field: what tells identities apart, ``'gt_identity'`` or ``'gt_label'``.
        min_images: identities with fewer pictures are left out. 2 or more keeps those out that can only be compared
            with themselves.

    Raises:
        ValueError: K does not divide the batch size, or the identities do not fill one batch on every rank.
    """

    def __init__(
        self, sampler: Any, batch_size: int, images: int = 4, field: str = "gt_identity", min_images: int = 1
    ) -> None:
        if images < 1 or batch_size < 1 or batch_size % images:
            raise ValueError(
                f"IdentityBatchSampler: batch_size must be a multiple of images (pictures an identity), got "
                f"batch_size={batch_size} and images={images}"
            )
        if missing := [name for name in ("dataset", "seed", "epoch") if not hasattr(sampler, name)]:
            raise ValueError(
                f"IdentityBatchSampler: {type(sampler).__name__} has no {', '.join(missing)}; use MMEngine's "
                f"DefaultSampler as the sampler"
            )
        self.sampler, self.batch_size, self.images = sampler, batch_size, images
        self.identities = batch_size // images
        self.drop_last = True
        self.rank, self.world_size = get_dist_info()
        rows = _rows_by_value(field_of(sampler.dataset, field))
        self._rows = [members for members in rows if len(members) >= min_images]
        self._groups = np.array([math.ceil(len(members) / images) for members in self._rows], np.int64)
        self.batches = most_batches(self._groups, self.identities)
        if self.batches < self.world_size:
            raise ValueError(
                f"IdentityBatchSampler: {len(self._rows)} identities with at least {min_images} pictures give "
                f"{self.batches} batches of {self.identities} different ones, and {self.world_size} are needed, one a "
                f"rank. Take a smaller batch_size, or larger images (now {images})"
            )

    def draw(self) -> NDArray[np.int64]:
        """The batches of the whole epoch, over all ranks: rows, shape (batches, batch_size)."""
        stream = numpy_stream(self.sampler.seed, "sampler/identity_batches", self.sampler.epoch)
        layout: list[NDArray[np.int64]] = []
        for number in stream.permutation(len(self._rows)):
            members = stream.permutation(self._rows[number])
            groups = int(self._groups[number])
            # np.resize repeats from the start: the last group takes pictures of the first ones.
            layout.extend(np.resize(members, groups * self.images).reshape(groups, -1)[: self.batches])
        # Groups of one identity lie side by side and are at most `batches` many, so that dealing them out in turn puts
        # no two of them into one batch.
        dealt = np.stack(layout[: self.batches * self.identities]).reshape(self.identities, self.batches, -1)
        batches = dealt.transpose(1, 0, 2).reshape(self.batches, self.batch_size)
        return np.asarray(batches[stream.permutation(self.batches)])

    def __iter__(self) -> Iterator[list[int]]:
        """This rank's batches."""
        own = self.draw()[self.rank :: self.world_size][: len(self)]
        return iter(own.tolist())

    def __len__(self) -> int:
        """How many batches this rank gets in an epoch."""
        return self.batches // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, from which the draw follows."""
        self.sampler.set_epoch(epoch)


def most_batches(groups: NDArray[np.int64], identities: int) -> int:
    """The largest number B of batches with ``sum(min(groups, B)) >= B * identities``.

    ``groups`` counts the groups of each identity; each batch takes ``identities`` groups of different ones.
    """
    low, high = 0, int(groups.sum()) // identities
    # The left side is concave in B and both sides start at 0, so that the condition holds up to the answer only.
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(groups, middle).sum()) >= middle * identities:
            low = middle
        else:
            high = middle - 1
    return low
