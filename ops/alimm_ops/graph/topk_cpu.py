# mypy: allow-untyped-defs
"""From tiles of rough scores to exact lists of nearest rows on the CPU, in Numba.

A matrix product in low precision gives a tile of scores; `scan_rows` and `scan_columns` keep the best few of each query
in a `Reservoir`, `rank` computes their similarities exactly and sorts them. `collect` takes a tile of better precision
and lists whatever reaches a floor. The similarity and the order are those of ``topk_reference.py``, bit for bit.

How the scan is fast: hardly any score enters a reservoir, so a chunk of 32 scores is compared with the thresholds
first, free of branches, which LLVM turns into vector instructions; only a chunk with a hit is looked at closer. Scores
are compared as integers: for the bits b of a float, ``b ^ ((b >> 15) & 0x7fff)`` (for 32 bits 31 and 0x7fffffff) sorts
as the float does. A score equal to the threshold does not enter, so what a reservoir turned away or dropped never
exceeds its threshold. A reservoir has room for more than its width; when full it is cut to the width, in linear time.

Queries are written to by one thread each: rows of a tile are shared out in `scan_rows`, columns in `scan_columns`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

from alimm_ops.graph.topk_reference import PADDING_ID

CHUNK = 32
STRIP = 512
"""Columns of one task of `scan_columns`."""

_options = dict(nogil=True, cache=True, error_model="numpy")


@dataclass(frozen=True)
class Reservoir:
    """The best scores of each query so far.

    Attributes:
        keys: sortable bits of the scores, int16 or int32 (queries, room).
        ids: ids of the rows that they belong to, int32 or int64 (queries, room).
        counts: how many are held, int64 (queries,).
        thresholds: no score that is not held has a larger key (queries,).
        width: how many are kept when the room is used up.
    """

    keys: NDArray[Any]
    ids: NDArray[Any]
    counts: NDArray[np.int64]
    thresholds: NDArray[Any]
    width: int

    @classmethod
    def empty(cls, queries: int, width: int, key_type: Any, id_type: Any) -> Reservoir:
        """A reservoir that takes anything."""
        room = width + max(CHUNK, width // 2)
        return cls(
            np.zeros((queries, room), key_type),
            np.zeros((queries, room), id_type),
            np.zeros(queries, np.int64),
            np.full(queries, np.iinfo(key_type).min, key_type),
            width,
        )

    def scan_rows(self, tile_MN: NDArray[Any], first: int, query_ids: NDArray[np.int64], first_id: int) -> None:
        """Offer row m of a tile to query ``first + m``.

        Args:
            tile_MN: bits of the scores, contiguous, of the type of the keys; no NaN.
            first: the query of the tile's first row.
            query_ids: the ids of all queries; none is its own neighbour.
            first_id: the id of the tile's first column.
        """
        _scan_rows(tile_MN, *self._state(), first, query_ids, first_id, *_mapping(self.keys.dtype))

    def scan_columns(self, tile_MN: NDArray[Any], first: int, query_ids: NDArray[np.int64], first_id: int) -> None:
        """Offer column n of a tile to query ``first + n``; ``first_id`` is the id of the tile's first row."""
        _scan_columns(tile_MN, *self._state(), first, query_ids, first_id, *_mapping(self.keys.dtype))

    def _state(self) -> tuple[Any, ...]:
        return self.keys, self.ids, self.counts, self.thresholds, self.width


def _mapping(key_type: Any) -> tuple[Any, Any]:
    kind = np.dtype(key_type).type
    return kind(8 * np.dtype(key_type).itemsize - 1), kind(np.iinfo(key_type).max)


def key_bits(keys: NDArray[Any]) -> NDArray[Any]:
    """The bits of the scores that the keys stand for (the mapping is its own inverse)."""
    shift, low = _mapping(keys.dtype)
    bits: NDArray[Any] = keys ^ ((keys >> shift) & low)
    return bits


@njit(nogil=True, cache=True, error_model="numpy", inline="always")
def _offer(keys, ids, counts, thresholds, width, query, key, row_id):
    count = counts[query]
    keys[query, count] = key
    ids[query, count] = row_id
    count += 1
    if count == keys.shape[1]:
        _cut(keys[query], ids[query], width)
        thresholds[query] = keys[query, width - 1]
        count = width
    counts[query] = count


@njit(**_options)
def _cut(keys, ids, width):
    """Bring the ``width`` largest keys to the front, the least of them last of those (Hoare's selection)."""
    low, high, place = 0, len(keys) - 1, width - 1
    while low < high:
        pivot = keys[(low + high) // 2]
        left, right = low, high
        while left <= right:
            while keys[left] > pivot:
                left += 1
            while keys[right] < pivot:
                right -= 1
            if left <= right:
                keys[left], keys[right] = keys[right], keys[left]
                ids[left], ids[right] = ids[right], ids[left]
                left += 1
                right -= 1
        if place <= right:
            high = right
        elif place >= left:
            low = left
        else:
            return


@njit(parallel=True, **_options)
def _scan_rows(tile, keys, ids, counts, thresholds, width, first, query_ids, first_id, shift, low):
    columns = tile.shape[1]
    for row in prange(tile.shape[0]):
        query = first + row
        own = query_ids[query]
        whole = columns - columns % CHUNK
        for start in range(0, whole, CHUNK):
            part = tile[row, start : start + CHUNK]
            threshold = thresholds[query]
            hit = False
            for index in range(CHUNK):
                bits = part[index]
                hit |= (bits ^ ((bits >> shift) & low)) > threshold
            if hit:
                for index in range(CHUNK):
                    key = part[index] ^ ((part[index] >> shift) & low)
                    row_id = first_id + start + index
                    if key > thresholds[query] and row_id != own:
                        _offer(keys, ids, counts, thresholds, width, query, key, row_id)
        for index in range(whole, columns):
            key = tile[row, index] ^ ((tile[row, index] >> shift) & low)
            if key > thresholds[query] and first_id + index != own:
                _offer(keys, ids, counts, thresholds, width, query, key, first_id + index)


@njit(parallel=True, **_options)
def _scan_columns(tile, keys, ids, counts, thresholds, width, first, query_ids, first_id, shift, low):
    rows, columns = tile.shape
    for strip in prange((columns + STRIP - 1) // STRIP):
        begin = strip * STRIP
        end = min(begin + STRIP, columns)
        whole = end - (end - begin) % CHUNK
        for row in range(rows):
            row_id = first_id + row
            for start in range(begin, whole, CHUNK):
                part = tile[row, start : start + CHUNK]
                least = thresholds[first + start : first + start + CHUNK]
                hit = False
                for index in range(CHUNK):
                    bits = part[index]
                    hit |= (bits ^ ((bits >> shift) & low)) > least[index]
                if hit:
                    for index in range(CHUNK):
                        query = first + start + index
                        key = part[index] ^ ((part[index] >> shift) & low)
                        if key > thresholds[query] and row_id != query_ids[query]:
                            _offer(keys, ids, counts, thresholds, width, query, key, row_id)
            for index in range(whole, end):
                query = first + index
                key = tile[row, index] ^ ((tile[row, index] >> shift) & low)
                if key > thresholds[query] and row_id != query_ids[query]:
                    _offer(keys, ids, counts, thresholds, width, query, key, row_id)


@njit(**_options)
def similarity(x, y):
    """The similarity of two unit rows, as ``topk_reference.similarity``."""
    a0 = a1 = a2 = a3 = a4 = a5 = a6 = a7 = 0.0
    for d in range(0, len(x), 8):
        a0 += np.float64(x[d]) * np.float64(y[d])
        a1 += np.float64(x[d + 1]) * np.float64(y[d + 1])
        a2 += np.float64(x[d + 2]) * np.float64(y[d + 2])
        a3 += np.float64(x[d + 3]) * np.float64(y[d + 3])
        a4 += np.float64(x[d + 4]) * np.float64(y[d + 4])
        a5 += np.float64(x[d + 5]) * np.float64(y[d + 5])
        a6 += np.float64(x[d + 6]) * np.float64(y[d + 6])
        a7 += np.float64(x[d + 7]) * np.float64(y[d + 7])
    exact = np.float32(((a0 + a1) + (a2 + a3)) + ((a4 + a5) + (a6 + a7)))
    return min(max(exact, np.float32(-1)), np.float32(1)) + np.float32(0)


@njit(**_options)
def _insert(list_ids, list_similarity, row_id, value):
    """Put a row in its place in a sorted list; it falls off the end where it is not among the best."""
    place = len(list_ids)
    while place > 0:
        held = list_similarity[place - 1]
        if held > value or (held == value and list_ids[place - 1] != PADDING_ID and list_ids[place - 1] < row_id):
            break
        place -= 1
    for index in range(len(list_ids) - 1, place, -1):
        list_ids[index] = list_ids[index - 1]
        list_similarity[index] = list_similarity[index - 1]
    if place < len(list_ids):
        list_ids[place] = row_id
        list_similarity[place] = value


@njit(parallel=True, **_options)
def rank(scores, slack, ids, counts, queries, rows, first_id, tolerance, list_ids, list_similarity, broken):
    """Compute the similarity of each candidate exactly and merge it into the sorted list of its query.

    Candidates are visited by falling score; the rest is skipped as soon as the bound of a score cannot reach the list.

    Args:
        scores: rough scores, float32 (queries, room).
        slack: how far a score may lie from the similarity, besides the tolerance, float32 (queries, room).
        ids: ids of the rows, (queries, room); those outside the given rows are passed over, a negative id too.
        counts: how many candidates there are, (queries,).
        queries: unit rows, float32 (queries, W).
        rows: unit rows, float32 (rows, W), of the ids from ``first_id`` on.
        first_id: the id of the first row.
        tolerance: bound of the error of each query's scores, float64 (queries,); infinite where there is none.
        list_ids: sorted lists, int64 (queries, K), changed in place.
        list_similarity: their similarities, float32 (queries, K), changed in place.
        broken: set to True where a score lay further off than its bound, bool (queries,).
    """
    k = list_ids.shape[1]
    for query in prange(len(queries)):
        order = np.argsort(-scores[query, : counts[query]])
        for place in order:
            row = ids[query, place] - first_id
            if row < 0 or row >= len(rows):
                continue
            bound = tolerance[query] + slack[query, place]
            if scores[query, place] + bound < list_similarity[query, k - 1]:
                break  # score + slack is the middle of two neighbouring scores, so it falls with the score
            value = similarity(queries[query], rows[row])
            if abs(np.float64(scores[query, place]) - value) > bound:
                broken[query] = True
            _insert(list_ids[query], list_similarity[query], first_id + row, value)


@njit(parallel=True, **_options)
def collect(tile, select, queries, query_ids, rows, first_id, tolerance, floors, list_ids, list_similarity, broken):
    """Merge every row whose score may reach the floor or the end of the list.

    Args:
        tile: scores, float32 or float64 (selected, rows).
        select: the query of each row of the tile, int64 (selected,).
        queries: unit rows of all queries, float32 (queries, W).
        query_ids: their ids, int64 (queries,).
        rows: unit rows, float32 (rows, W).
        first_id: the id of the first row.
        tolerance: bound of the error of a score.
        floors: a similarity that the list of each query is known to reach, float32 (queries,).
        list_ids: sorted lists, int64 (queries, K), changed in place.
        list_similarity: their similarities, float32 (queries, K), changed in place.
        broken: set to True where a score lay further off than its bound, bool (queries,).
    """
    k = list_ids.shape[1]
    columns = tile.shape[1]
    for line in prange(len(select)):
        query = select[line]
        own = query_ids[query]
        for start in range(0, columns, CHUNK):
            end = min(start + CHUNK, columns)
            least = max(np.float64(floors[query]), np.float64(list_similarity[query, k - 1])) - tolerance
            part = tile[line, start:end]
            hit = False
            for index in range(len(part)):
                hit |= part[index] >= least
            if not hit:
                continue
            for index in range(len(part)):
                row_id = first_id + start + index
                last = list_similarity[query, k - 1]
                if part[index] < max(np.float64(floors[query]), np.float64(last)) - tolerance or row_id == own:
                    continue
                # Nothing is more similar than one: with a full list of copies, a later copy needs no second look.
                if last == 1 and row_id > list_ids[query, k - 1]:
                    continue
                value = similarity(queries[query], rows[start + index])
                if abs(np.float64(part[index]) - value) > tolerance:
                    broken[query] = True
                _insert(list_ids[query], list_similarity[query], row_id, value)
