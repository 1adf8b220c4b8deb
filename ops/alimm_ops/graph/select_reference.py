"""The active classes of a batch, in plain Python: the oracle that the Numba kernels for the CPU and for CUDA equal.

KNN softmax (Song et al., Large-Scale Training System for 100-Million Classification at Alibaba, KDD 2020) computes
logits only for the labels of a batch, for their nearest neighbours in a graph of the classes, and for random classes
where these fall short of a budget. On each rank, for its own rows::

    A_0     = own labels of the batch                          all of them, even above the budget
    A_(r+1) = A_r + {neighbours of rank r of any label}        while the whole of it fits the budget
    cut     : of the first level that does not fit, the new ids with the smallest hash(id, key)
    fill    : if all levels fit, pi(0), pi(1), pi(2), ...      those not taken yet, until the budget is reached

pi is the keyed permutation of ``permute.py``. The full text of the paper was not at hand: that labels stay, that all
first neighbours come before all second ones and that random classes fill up is what is known of it. The cut inside a
level by a hash, the rule for labels above the budget, and a fill that is a pure function of a key are ours.

Shapes: U distinct labels of the global batch, E edges of them that end in this shard, L labels in this shard, A active.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from alimm_ops.graph.permute import MAX_SIZE, id_hashes, key_words, positions


class SelectionStats(NamedTuple):
    """What a selection is made of.

    Attributes:
        num_labels: active ids that are labels.
        num_neighbours: active ids that are neighbours of a label, and no labels.
        num_random: active ids filled in at random.
        overflow: labels above the budget.
        cut_level: the rank of the first neighbours that did not all fit; -1 if all did.
    """

    num_labels: int
    num_neighbours: int
    num_random: int
    overflow: int
    cut_level: int


class Selection(NamedTuple):
    """The active ids of a shard.

    Attributes:
        active: int32 (A,), local ids, ascending.
        filled: bool (A,), whether the id was filled in at random. Each id that is neither label nor neighbour is so
            with probability ``num_random / (num_local - num_labels - num_neighbours)`` over the keys.
        stats: the counts.
    """

    active: NDArray[np.int32]
    filled: NDArray[np.bool_]
    stats: SelectionStats


def select_active(
    indptr: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    ranks: NDArray[np.uint16],
    own_labels: NDArray[np.int32],
    num_local: int,
    budget: int,
    key: int,
) -> Selection:
    """Choose ``min(max(budget, L), num_local)`` ids of a shard.

    Args:
        indptr: (U + 1,), where the edges of each label begin; the last element is E.
        neighbours: (E,), local ids of the neighbours in this shard, label after label.
        ranks: (E,), rank of each in the list of its label, 0 for the nearest; ascending within a label, with gaps where
            a neighbour lies in another shard.
        own_labels: (L,), local ids of the labels in this shard, ascending, without repetition.
        num_local: rows of the shard, at most 2**31 - 1.
        budget: ids wanted, at least 0; above ``num_local`` all are chosen.
        key: in [0, 2**64), for example a hash of seed, step and rank.

    Raises:
        ValueError: an argument breaks one of these rules.
    """
    check_arguments(indptr, neighbours, ranks, own_labels, num_local, budget, key)
    labels = {int(label) for label in own_labels}
    chosen = set(labels)
    cut_level = -1
    for level in sorted({int(rank) for rank in ranks}):
        fresh = {int(i) for i, rank in zip(neighbours, ranks, strict=True) if rank == level} - chosen
        if len(chosen) + len(fresh) > budget and fresh:
            by_hash = sorted(fresh, key=lambda i: (int(id_hashes(np.array([i]), key)[0]), i))
            chosen |= set(by_hash[: max(budget - len(chosen), 0)])
            cut_level = level
            break
        chosen |= fresh
    num_neighbours = len(chosen) - len(labels)

    target = min(max(budget, len(labels)), num_local)
    filled: set[int] = set()
    for candidate in positions(np.arange(target), num_local, key).tolist():
        if candidate not in chosen and len(chosen) + len(filled) < target:
            filled.add(candidate)
    active = sorted(chosen | filled)
    stats = SelectionStats(len(labels), num_neighbours, len(filled), max(len(labels) - budget, 0), cut_level)
    return Selection(np.array(active, np.int32), np.array([i in filled for i in active], bool), stats)


def check_arguments(
    indptr: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    ranks: NDArray[np.uint16],
    own_labels: NDArray[np.int32],
    num_local: int,
    budget: int,
    key: int,
) -> None:
    """Refuse what `select_active` cannot work with; compiled kernels check no bounds.

    Raises:
        ValueError: which argument, what was expected, and what came.
    """
    kinds = dict(indptr=np.int64, neighbours=np.int32, ranks=np.uint16, own_labels=np.int32)
    for (name, kind), array in zip(kinds.items(), (indptr, neighbours, ranks, own_labels), strict=True):
        if not isinstance(array, np.ndarray) or array.dtype != kind or array.ndim != 1:
            what = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
            raise ValueError(f"{name} must be a NumPy array of {np.dtype(kind)} with one dimension, got {what}")
    if not 0 <= num_local <= MAX_SIZE:
        raise ValueError(f"num_local must be from 0 to {MAX_SIZE}, got {num_local}: cut the classes over more ranks")
    if budget < 0:
        raise ValueError(f"budget must be at least 0, got {budget}")
    key_words(key)
    if len(neighbours) != len(ranks):
        raise ValueError(f"neighbours and ranks must be equally long, got {len(neighbours)} and {len(ranks)}")
    if not len(indptr) or indptr[0] != 0 or indptr[-1] != len(neighbours) or (np.diff(indptr) < 0).any():
        raise ValueError(
            f"indptr must rise from 0 to {len(neighbours)}, the number of neighbours, got {_short(indptr)}"
        )
    for name, ids in (("neighbours", neighbours), ("own_labels", own_labels)):
        if len(ids) and not (ids.min() >= 0 and ids.max() < num_local):
            found = f"ids from {ids.min()} to {ids.max()}"
            raise ValueError(
                f"{name} must be local ids in [0, {num_local}), got {found}: take the start of the shard off"
            )
    if (own_labels[1:] <= own_labels[:-1]).any():
        raise ValueError(f"own_labels must ascend without repetition (numpy.unique), got {_short(own_labels)}")
    falls = ranks[1:] <= ranks[:-1]
    if falls.any():
        inner = np.ones(len(ranks) + 1, bool)
        inner[indptr] = False  # between the last edge of one label and the first of the next the rank may fall
        if (falls & inner[1:-1]).any():
            raise ValueError("ranks must ascend within each label, nearest first; they do not")


def _short(array: NDArray[np.integer]) -> str:
    return np.array2string(array, threshold=8, edgeitems=3)
