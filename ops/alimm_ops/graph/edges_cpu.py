# mypy: allow-untyped-defs
"""Edges of a graph of classes cut over ranks, on the CPU in Numba: counting, packing and finding them.

A row of ``lists`` (n, K) holds the neighbours of a label, nearest first; -1 fills up where there are fewer. Shard p
owns the ids in ``[bounds[p], bounds[p + 1])``. An edge is kept where its target is owned: as a local id, label after
label, with the number of edges of each label (``degree``) and, every ``BLOCK`` labels, the edges before (``before``).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

BLOCK = 256
"""Labels between two stored offsets: an offset costs 8 bytes, finding a label at most 255 additions."""

_options = dict(nogil=True, cache=True, error_model="numpy")


@njit(**_options)
def first_bad_list(lists, num_rows):
    """The first row with an id outside [-1, num_rows) or with an id behind a -1; -1 if there is none."""
    for row in range(lists.shape[0]):
        ended = False
        for rank in range(lists.shape[1]):
            target = lists[row, rank]
            if target < -1 or target >= num_rows or (ended and target >= 0):
                return row
            ended = ended or target < 0
    return -1


@njit(**_options)
def _owner(bounds, target):
    """The shard of an id: the last one that begins at it or before, for empty shards begin where the next one does."""
    low = 0
    high = bounds.size - 1
    while high - low > 1:
        middle = (low + high) >> 1
        if bounds[middle] <= target:
            low = middle
        else:
            high = middle
    return low


@njit(**_options)
def count_edges(lists, bounds):
    """How many neighbours each label has in each shard: uint16 (shards, n)."""
    degree = np.zeros((bounds.size - 1, lists.shape[0]), np.uint16)
    for row in range(lists.shape[0]):
        for rank in range(lists.shape[1]):
            if lists[row, rank] >= 0:
                degree[_owner(bounds, lists[row, rank]), row] += 1
    return degree


@njit(**_options)
def pack_edges(lists, bounds, ids, ranks):
    """Write the edges shard after shard, in each label after label, nearest first; return how many each shard gets.

    Args:
        lists: int32 or int64 (n, K).
        bounds: int64 (shards + 1,).
        ids: int32, at least as long as there are edges, written: local ids in the shard of the target.
        ranks: unsigned, as long, written: ranks in the lists.
    """
    shards = bounds.size - 1
    counts = np.zeros(shards, np.int64)
    for row in range(lists.shape[0]):
        for rank in range(lists.shape[1]):
            if lists[row, rank] >= 0:
                counts[_owner(bounds, lists[row, rank])] += 1
    place = np.zeros(shards, np.int64)
    for shard in range(1, shards):
        place[shard] = place[shard - 1] + counts[shard - 1]
    for row in range(lists.shape[0]):
        for rank in range(lists.shape[1]):
            target = lists[row, rank]
            if target >= 0:
                shard = _owner(bounds, target)
                ids[place[shard]] = target - bounds[shard]
                ranks[place[shard]] = rank
                place[shard] += 1
    return counts


@njit(**_options)
def place_edges(lists, degree, ids, ranks, start):
    """The inverse of `pack_edges` for the edges of one shard, which begins at ``start``; ``degree`` is (n,)."""
    edge = 0
    for row in range(degree.size):
        for _ in range(degree[row]):
            lists[row, ranks[edge]] = ids[edge] + start
            edge += 1


def block_offsets(degree: NDArray[np.uint16]) -> NDArray[np.int64]:
    """The edges before each block of labels, and after them the number of edges: one element more than blocks.

    Args:
        degree: (N,), edges of each label.
    """
    before = np.zeros(-(-len(degree) // BLOCK) + 1, np.int64)
    if len(degree):
        np.cumsum(np.add.reduceat(degree, np.arange(0, len(degree), BLOCK), dtype=np.int64), out=before[1:])
    return before


@njit(**_options)
def edge_offset(degree, before, label):
    """The edges before a label, which may be the one after the last."""
    block = label // BLOCK
    offset = before[block]
    for other in range(block * BLOCK, label):
        offset += degree[other]
    return offset


@njit(**_options)
def find_edges(labels, degree, before, local_ids, ranks):
    """The edges of some labels: ``indptr`` int64 (U + 1,), local ids int32, ranks uint16.

    With ``ranks`` empty all edges are at hand, so that the rank of an edge is its place in its list.
    """
    indptr = np.zeros(labels.size + 1, np.int64)
    for index in range(labels.size):
        indptr[index + 1] = indptr[index] + degree[labels[index]]
    found = np.empty(indptr[-1], np.int32)
    found_ranks = np.empty(indptr[-1], np.uint16)
    for index in range(labels.size):
        source = edge_offset(degree, before, labels[index])
        for edge in range(indptr[index + 1] - indptr[index]):
            found[indptr[index] + edge] = local_ids[source + edge]
            found_ranks[indptr[index] + edge] = ranks[source + edge] if ranks.size else edge
    return indptr, found, found_ranks


@njit(**_options)
def own_edges(lists, start, stop):
    """The edges of lists (U, K) whose target lies in [start, stop), in the form of `find_edges`."""
    indptr = np.zeros(lists.shape[0] + 1, np.int64)
    for row in range(lists.shape[0]):
        indptr[row + 1] = indptr[row]
        for rank in range(lists.shape[1]):
            indptr[row + 1] += start <= lists[row, rank] < stop
    found = np.empty(indptr[-1], np.int32)
    found_ranks = np.empty(indptr[-1], np.uint16)
    edge = 0
    for row in range(lists.shape[0]):
        for rank in range(lists.shape[1]):
            if start <= lists[row, rank] < stop:
                found[edge] = lists[row, rank] - start
                found_ranks[edge] = rank
                edge += 1
    return indptr, found, found_ranks
