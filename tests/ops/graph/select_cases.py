"""Random arguments of a selection, shared by the tests of its three implementations."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    indptr: np.ndarray
    neighbours: np.ndarray
    ranks: np.ndarray
    own_labels: np.ndarray
    num_local: int
    budget: int
    key: int

    def with_(self, **changes: Any) -> Case:
        return self._replace(**changes)


def make_case(
    seed: int, num_local: int, num_labels: int = 6, length: int = 5, budget: int = 20, own: int | None = None
) -> Case:
    """Lists with gaps in their ranks, as those that are cut over shards; ids repeat between lists and with labels."""
    generator = np.random.default_rng(seed)
    degree = generator.integers(0, min(length, num_local) + 1, num_labels)
    indptr = np.concatenate([[0], np.cumsum(degree)]).astype(np.int64)
    neighbours = [generator.permutation(num_local)[:count] for count in degree]
    ranks = [np.sort(generator.permutation(length)[:count]) for count in degree]
    own_count = int(generator.integers(0, num_labels + 1)) if own is None else own
    return Case(
        indptr,
        np.concatenate([*neighbours, []]).astype(np.int32),
        np.concatenate([*ranks, []]).astype(np.uint16),
        np.sort(generator.permutation(num_local)[:own_count]).astype(np.int32),
        num_local,
        budget,
        int(generator.integers(0, 2**64, dtype=np.uint64)),
    )


def chosen_by_hand(case: Case) -> tuple[set[int], set[int]]:
    """Labels, and the neighbours of all levels that fit whole, counted level by level from the lists."""
    labels, kept = set(case.own_labels.tolist()), set(case.own_labels.tolist())
    for level in range(int(case.ranks.max(initial=0)) + 1):
        more = kept | set(case.neighbours[case.ranks == level].tolist())
        if len(more) > case.budget and more != kept:
            break
        kept = more
    return labels, kept - labels
