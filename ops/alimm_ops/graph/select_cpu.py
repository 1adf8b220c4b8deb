# mypy: allow-untyped-defs
"""The active classes of a batch on the CPU, in Numba: the ids of ``select_reference.py``, in one pass over edges.

A bitmap of the shard says which ids are taken; reading it word by word gives them sorted, so nothing is sorted and
nothing as long as the shard is held but two bits an id. Time and memory are O(edges + budget + num_local / 64).
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint32, uint64
from numpy.typing import NDArray

from alimm_ops.graph.permute import domain_bits, id_hash, key_words, position
from alimm_ops.graph.select_reference import Selection, SelectionStats, check_arguments

_options = dict(nogil=True, cache=True, error_model="numpy")

_DE_BRUIJN = 0x03F79D71B4CB0A89
_LOWEST_BIT = np.zeros(64, np.uint8)
for _bit in range(64):
    _LOWEST_BIT[((_DE_BRUIJN << _bit) & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


def select_active(
    indptr: NDArray[np.int64],
    neighbours: NDArray[np.int32],
    ranks: NDArray[np.uint16],
    own_labels: NDArray[np.int32],
    num_local: int,
    budget: int,
    key: int,
) -> Selection:
    """Choose ``min(max(budget, L), num_local)`` ids of a shard; see `alimm_ops.graph.select_reference.select_active`.

    Args:
        indptr: (U + 1,), where the edges of each label begin.
        neighbours: (E,), local ids of the neighbours in this shard, label after label.
        ranks: (E,), rank of each in the list of its label.
        own_labels: (L,), local ids of the labels in this shard, ascending, without repetition.
        num_local: rows of the shard.
        budget: ids wanted.
        key: in [0, 2**64).

    Raises:
        ValueError: an argument breaks a rule of the reference.
    """
    check_arguments(indptr, neighbours, ranks, own_labels, num_local, budget, key)
    budget = min(budget, num_local)
    target = max(budget, len(own_labels))
    active, filled, num_neighbours, cut_level = _select(
        neighbours, ranks, own_labels, num_local, budget, target, domain_bits(num_local), key_words(key)
    )
    num_labels = len(own_labels)
    num_random = target - num_labels - num_neighbours
    stats = SelectionStats(num_labels, num_neighbours, num_random, max(num_labels - budget, 0), cut_level)
    return Selection(active, filled, stats)


@njit(**_options)
def _select(neighbours, ranks, own_labels, num_local, budget, target, bits, words):
    marked = np.zeros((num_local + 63) >> 6, np.uint64)
    for label in own_labels:
        _mark(marked, label)
    count, cut_level = _mark_neighbours(marked, neighbours, ranks, own_labels.size, budget, words)
    num_neighbours = count - own_labels.size

    random = np.zeros_like(marked)
    index = 0
    while count < target:
        candidate = position(index, num_local, bits, words)
        index += 1
        if not _is_marked(marked, candidate):
            _mark(random, candidate)
            count += 1
    active, filled = _compact(marked, random, target)
    return active, filled, num_neighbours, cut_level


@njit(**_options)
def _mark_neighbours(marked, neighbours, ranks, count, budget, words):
    """Mark level after level; return the number of marked ids and the level that was cut."""
    levels = 0
    for rank in ranks:
        levels = max(levels, int(rank) + 1)
    first = np.zeros(levels + 1, np.int64)
    for rank in ranks:
        first[int(rank) + 1] += 1
    for level in range(levels):
        first[level + 1] += first[level]
    by_level = np.empty(neighbours.size, np.int32)
    place = first.copy()
    for edge in range(neighbours.size):
        level = int(ranks[edge])
        by_level[place[level]] = neighbours[edge]
        place[level] += 1

    for level in range(levels):
        # The new ids of the level move to its front; what they overwrite has been looked at.
        end = first[level]
        for edge in range(first[level], first[level + 1]):
            if not _is_marked(marked, by_level[edge]):
                _mark(marked, by_level[edge])
                by_level[end] = by_level[edge]
                end += 1
        fresh = by_level[first[level] : end]
        if fresh.size and count + fresh.size > budget:
            room = max(budget - count, 0)
            _keep_smallest(marked, fresh, room, words)
            return count + room, level
        count += fresh.size
    return count, -1


@njit(**_options)
def _keep_smallest(marked, fresh, room, words):
    """Unmark all of ``fresh`` but the ``room`` ids of the smallest hash."""
    hashes = np.empty(fresh.size, np.uint32)
    counts = np.zeros(4097, np.int64)
    for index in range(fresh.size):
        hashes[index] = id_hash(fresh[index], words)
        counts[(hashes[index] >> uint32(20)) + 1] += 1
    bound = 0
    while counts[bound + 1] <= room:  # ends: there are more than ``room`` in all
        counts[bound + 1 + 1] += counts[bound + 1]
        bound += 1
    undecided = np.sort(hashes[(hashes >> uint32(20)) == bound])
    limit = undecided[room - counts[bound]]
    for index in range(fresh.size):
        if hashes[index] >= limit:
            _unmark(marked, fresh[index])


@njit(**_options)
def _compact(marked, random, size):
    """The ids of both bitmaps, ascending, and which of them are of the second."""
    active = np.empty(size, np.int32)
    filled = np.empty(size, np.bool_)
    end = 0
    for word in range(marked.size):
        bits = marked[word] | random[word]
        while bits:
            lowest = bits & (~bits + uint64(1))
            bits ^= lowest
            bit = _LOWEST_BIT[uint64(lowest * uint64(_DE_BRUIJN)) >> uint64(58)]
            active[end] = (word << 6) + bit
            filled[end] = (random[word] & lowest) != uint64(0)
            end += 1
    return active, filled


@njit(inline="always")
def _mark(bitmap, index):
    bitmap[index >> 6] |= uint64(1) << uint64(index & 63)


@njit(inline="always")
def _unmark(bitmap, index):
    bitmap[index >> 6] &= ~(uint64(1) << uint64(index & 63))


@njit(inline="always")
def _is_marked(bitmap, index):
    return (bitmap[index >> 6] >> uint64(index & 63)) & uint64(1) != uint64(0)
