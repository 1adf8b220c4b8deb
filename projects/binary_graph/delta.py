"""Rows that are too few or too new for a graph: a flat, exact scan, and how results of several scans become one.

The delta holds what was added since the last segment was built. It is immutable: adding gives another delta, so a
search that has begun sees what it began with. Rows are ascending by id; then "the first of equal distances" is "the
smallest id", and the kernel's order is the order of the results. A result is a pair: distances int32 (Q, c) and ids
int64 (Q, c), rows sorted by (distance, id), padded with -1 in both.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm_ops.graph.hamming_cpu import hamming_matrix, nearest
from alimm_ops.graph.hamming_reference import NO_DISTANCE

Result = tuple[NDArray[np.int32], NDArray[np.int64]]

PADDING = -1
"""Distance and id where there is no further neighbour."""

SELECT_NS = 0.15
"""Choosing the k nearest takes so much k times k."""
SORT_NS = 4.0
"""Sorting all distances takes so much a row."""

_FAR = np.int32(NO_DISTANCE)
_SORTED_BYTES = 1 << 26


class _Buffer:
    """Memory that deltas share: each sees the rows up to its own length, and those are never written again."""

    def __init__(self, capacity: int, words: int) -> None:
        self.codes = np.empty((capacity, words), np.uint64)
        self.ids = np.empty(capacity, np.int64)
        self.filled = 0


class Delta:
    """Codes and their ids, scanned exactly. Immutable for its readers; one writer at a time may call `with_added`.

    Attributes:
        codes: uint64 (D, W).
        ids: int64 (D,), ascending, unique.
    """

    def __init__(self, codes: NDArray[np.uint64], ids: NDArray[np.int64], buffer: _Buffer | None = None) -> None:
        self.codes, self.ids, self._buffer = codes, ids, buffer

    @classmethod
    def empty(cls, words: int) -> Delta:
        """No rows of ``words`` words."""
        return cls(np.empty((0, words), np.uint64), np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self.ids)

    def with_added(self, codes: NDArray[np.uint64], ids: NDArray[np.int64]) -> Delta:
        """This delta and more rows, whose ids are not in it; in any order."""
        order = np.argsort(ids, kind="stable")
        codes, ids = codes[order], ids[order]
        buffer, held = self._buffer, len(self)
        total = held + len(ids)
        later = not held or not len(ids) or ids[0] > self.ids[-1]
        if not later or buffer is None or buffer.filled != held or total > len(buffer.ids):
            # The usual case, ids that grow, copies only when the memory is full; half as much again each time.
            fresh = _Buffer(max(64, total + total // 2), self.codes.shape[1])
            places = np.searchsorted(self.ids, ids)
            fresh.codes[:total] = np.insert(self.codes, places, codes, axis=0)
            fresh.ids[:total] = np.insert(self.ids, places, ids)
            buffer = fresh
        else:
            buffer.codes[held:total], buffer.ids[held:total] = codes, ids
        buffer.filled = total
        return Delta(buffer.codes[:total], buffer.ids[:total], buffer)

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of the ids are in it, bool (len(ids),)."""
        places = np.searchsorted(self.ids, ids)
        found = places < len(self)
        found[found] = self.ids[places[found]] == ids[found]
        return found

    def without(self, ids: NDArray[np.int64]) -> Delta:
        """This delta without the rows of some ids, ascending; ids that are not in it change nothing."""
        return self._kept(~self._among(ids))

    def only(self, ids: NDArray[np.int64]) -> Delta:
        """The rows of some ids, ascending."""
        return self._kept(self._among(ids))

    def _among(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows have one of the ids. They may be millions and come again with each search: nothing sorts them."""
        places = np.searchsorted(ids, self.ids) if len(self) else np.empty(0, np.int64)
        found = places < len(ids)
        found[found] = ids[places[found]] == self.ids[found]
        return found

    def _kept(self, keep: NDArray[np.bool_]) -> Delta:
        return self if keep.all() else Delta(self.codes[keep], self.ids[keep])

    def search(self, queries: NDArray[np.uint64], k: int) -> Result:
        """The k nearest rows of each query; at most len(self) columns."""
        return scan(queries, self.codes, self.ids, k)


def scan(queries: NDArray[np.uint64], codes: NDArray[np.uint64], ids: NDArray[np.int64], k: int) -> Result:
    """The k nearest of rows that are ascending by id, exactly.

    Args:
        queries: (Q, W).
        codes: (R, W).
        ids: (R,), ascending.
        k: at least 1.

    Returns:
        A result of min(k, R) columns.
    """
    width = min(k, len(ids))
    if not width or not len(queries):
        return nothing(len(queries), width)
    if SELECT_NS * width * width <= SORT_NS * len(ids):
        places, distances = nearest(queries, codes, width)
        return distances.astype(np.int32), ids[places]
    found = nothing(len(queries), width)
    step = max(1, _SORTED_BYTES // (10 * len(ids)))
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        far = hamming_matrix(queries[block], codes)
        # A stable sort of 16-bit numbers is a radix sort; equal distances stay in the order of the ids.
        order = np.argsort(far, axis=1, kind="stable")[:, :width]
        found[0][block], found[1][block] = np.take_along_axis(far, order, axis=1), ids[order]
    return found


def nothing(queries: int, k: int) -> Result:
    """A result in which nothing was found."""
    return np.full((queries, k), PADDING, np.int32), np.full((queries, k), PADDING, np.int64)


def merge(results: list[Result], queries: int, k: int) -> Result:
    """The k best of several results of the same queries, by (distance, id); exactly k columns.

    Args:
        results: of any number of columns; an id is in one of them only.
        queries: how many rows they have.
        k: columns of the merged one.
    """
    results = [result for result in results if result[1].shape[1]]
    if not results:
        return nothing(queries, k)
    if len(results) == 1:
        distances, ids = results[0]
    else:
        distances, ids = (np.concatenate(arrays, axis=1) for arrays in zip(*results, strict=True))
        order = np.lexsort((ids, np.where(ids < 0, _FAR, distances)), axis=1)[:, :k]
        distances, ids = np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
    if distances.shape[1] < k:
        padding = ((0, 0), (0, k - distances.shape[1]))
        distances = np.pad(distances, padding, constant_values=PADDING)
        ids = np.pad(ids, padding, constant_values=PADDING)
    return distances[:, :k], ids[:, :k]
