# mypy: allow-untyped-defs
"""Hamming distances on the CPU, in Numba: the results of ``hamming_reference.py``.

The base is turned word-major, (W, N): the distances of one query to a tile of the base are then a loop over contiguous
words, which LLVM turns into vector popcounts. A tile of 512 codes stays in the first cache while all queries of a block
pass. Distances are small, so the k nearest need no heap: a bound is found by counting how many distances lie below it,
32 distances an instruction, and only what lies within is ever sorted.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint16, uint64
from numpy.typing import NDArray

from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID, check_pair
from alimm_ops.graph.intrinsics import LANES, lowest_bit, popcount, within

_options = dict(nogil=True, cache=True, error_model="numpy")

TILE = 512
"""Codes of the base that are compared at a time: 16 kB of 256-bit codes."""


def word_major(codes_NW: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """(W, N), contiguous: the layout that the kernels below read."""
    return np.ascontiguousarray(codes_NW.T)


def hamming_matrix(queries_QW: NDArray[np.uint64], base_NW: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """All distances, (Q, N); see the reference."""
    check_pair(queries_QW, base_NW)
    result = np.empty((len(queries_QW), len(base_NW)), np.uint16)
    if result.size:
        _matrix(np.ascontiguousarray(queries_QW), word_major(base_NW), result)
    return result


def nearest(
    queries_QW: NDArray[np.uint64], base_NW: NDArray[np.uint64], k: int, first_own: int = -1
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """The k nearest codes of each query, exactly, in O(Q N) time and O(N) memory; see the reference.

    Raises:
        ValueError: codes of different widths, or a k below 1.
    """
    check_pair(queries_QW, base_NW)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if first_own < -1 or (first_own >= 0 and first_own + len(queries_QW) > len(base_NW)):
        raise ValueError(f"queries {first_own} to {first_own + len(queries_QW)} are not among {len(base_NW)} codes")
    ids = np.full((len(queries_QW), k), NO_ID, np.int32)
    dists = np.full((len(queries_QW), k), NO_DISTANCE, np.uint16)
    if len(queries_QW) and len(base_NW):
        bounds = np.full(len(queries_QW), NO_DISTANCE - 1, np.uint16)
        nearest_into(np.ascontiguousarray(queries_QW), word_major(base_NW), 0, first_own, bounds, ids, dists)
    return ids, dists


@njit(**_options)
def _tile_distances(queries, first, last, base, start, stop, out, column):
    """Distances of the queries ``first`` to ``last`` to the columns ``start`` to ``stop`` of the base.

    They go to ``out[: last - first, column : column + stop - start]``, which lies row by row in memory. Four words are
    taken at a time, and what they have in common is looked up once for all queries: the inner loop is nothing but
    loads, popcounts and sums.
    """
    words, count = base.shape[0], stop - start
    word = 0
    while word + 4 <= words:
        a, b = base[word, start:stop], base[word + 1, start:stop]
        c, d = base[word + 2, start:stop], base[word + 3, start:stop]
        for row in range(first, last):
            q0, q1, q2, q3 = queries[row, word], queries[row, word + 1], queries[row, word + 2], queries[row, word + 3]
            near = out[row - first, column : column + count]
            if word == 0:
                for j in range(count):
                    near[j] = uint16(
                        popcount(a[j] ^ q0) + popcount(b[j] ^ q1) + popcount(c[j] ^ q2) + popcount(d[j] ^ q3)
                    )
            else:
                for j in range(count):
                    near[j] += uint16(
                        popcount(a[j] ^ q0) + popcount(b[j] ^ q1) + popcount(c[j] ^ q2) + popcount(d[j] ^ q3)
                    )
        word += 4
    while word < words:
        a = base[word, start:stop]
        for row in range(first, last):
            q0, near = queries[row, word], out[row - first, column : column + count]
            if word == 0:
                for j in range(count):
                    near[j] = uint16(popcount(a[j] ^ q0))
            else:
                for j in range(count):
                    near[j] += uint16(popcount(a[j] ^ q0))
        word += 1


@njit(**_options)
def _matrix(queries, base, out):
    for start in range(0, base.shape[1], TILE):
        stop = min(start + TILE, base.shape[1])
        _tile_distances(queries, 0, queries.shape[0], base, start, stop, out, start)


@njit(**_options)
def _count_within(row, size, bound):
    """How many of the first ``size`` distances, a multiple of 32, are at most ``bound``."""
    count = np.int64(0)
    for start in range(0, size, LANES):
        count += np.int64(popcount(within(row, start, bound)))
    return count


@njit(**_options)
def _threshold(row, size, wanted, low, high):
    """The smallest bound within [low, high] with at least ``wanted`` distances up to it, or ``high``."""
    while low < high:
        middle = (low + high) >> 1
        if _count_within(row, size, uint16(middle)) >= wanted:
            high = middle
        else:
            low = middle + 1
    return high


@njit(**_options)
def nearest_into(queries, base, first_id, first_own, bounds, ids, dists):
    """Put the k nearest of each query into ``ids`` (Q, k) and ``dists``, sorted; rows are padded by the caller.

    Args:
        queries: (Q, W).
        base: word-major (W, N); the id of column j is ``first_id + j``.
        first_id: see above.
        first_own: where not -1, query q is column ``first_own + q``, which its own row leaves out.
        bounds: uint16 (Q,), candidates beyond it are left out.
        ids: int32 (Q, k), filled with -1.
        dists: uint16 (Q, k), filled with 65535.
    """
    k = ids.shape[1]
    size = base.shape[1]
    padded = (size + LANES - 1) // LANES * LANES
    block = max(1, min(queries.shape[0], (1 << 18) // (2 * padded)))
    buffer = np.full((block, padded), np.uint16(NO_DISTANCE), np.uint16)
    keys = np.empty(k + 1, np.uint64)
    limit = 64 * base.shape[0]
    for first in range(0, queries.shape[0], block):
        last = min(first + block, queries.shape[0])
        for start in range(0, size, TILE):
            stop = min(start + TILE, size)
            _tile_distances(queries, first, last, base, start, stop, buffer, start)
        for query in range(first, last):
            row = buffer[query - first]
            if first_own >= 0:
                row[first_own + query] = NO_DISTANCE
            _select(row, k, min(np.int64(bounds[query]), limit), first_id, keys, ids[query], dists[query])


@njit(**_options)
def _select(row, k, high, first_id, keys, ids, dists):
    """The k least (distance, id) of the row within the bound ``high``, sorted; its length is a multiple of 32."""
    total = _count_within(row, row.size, uint16(high))
    bound = high
    sample = min(row.size, (16 * k + LANES - 1) // LANES * LANES)
    if total > k:
        if sample < row.size:
            # No bound of the whole row lies above that of a part of it.
            bound = _threshold(row, sample, k, 0, high)
        bound = _threshold(row, row.size, k, 0, bound)
    below = 0
    if total > k and bound > 0:
        below = min(k, _count_within(row, row.size, uint16(bound - 1)))
    ties = k - below  # of those at the bound itself the first ones, in order of id
    count = 0
    for start in range(0, row.size, LANES):
        hits = within(row, start, uint16(bound))
        while hits != uint64(0):
            j = start + np.int64(lowest_bit(hits))
            hits &= hits - uint64(1)
            distance = np.int64(row[j])
            if distance == bound:
                if ties == 0:
                    continue
                ties -= 1
            place = count
            key = (uint64(distance) << uint64(32)) | uint64(j)
            while place > 0 and keys[place - 1] > key:
                keys[place] = keys[place - 1]
                place -= 1
            keys[place] = key
            count += 1
    for place in range(count):
        ids[place] = first_id + np.int64(keys[place] & uint64(0xFFFFFFFF))
        dists[place] = uint16(keys[place] >> uint64(32))
    return count


def majority(
    codes_NW: NDArray[np.uint64], labels_N: NDArray[np.int32], old_centres_MW: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """One step of binary k-means; see the reference.

    Raises:
        ValueError: codes of different widths, or a label out of range.
    """
    check_pair(codes_NW, old_centres_MW)
    if len(labels_N) != len(codes_NW):
        raise ValueError(f"expected {len(codes_NW)} labels, got {len(labels_N)}")
    if len(labels_N) and not -1 <= labels_N.min() <= labels_N.max() < len(old_centres_MW):
        raise ValueError(f"labels must be from -1 to {len(old_centres_MW) - 1}")
    return _majority(np.ascontiguousarray(codes_NW), labels_N, np.ascontiguousarray(old_centres_MW))


@njit(**_options)
def _majority(codes, labels, old):
    num, words = old.shape
    counts = np.zeros(num, np.int64)
    for label in labels:
        if label >= 0:
            counts[label] += 1
    ends = np.cumsum(counts)
    order = np.empty(labels.size, np.int64)
    place = ends - counts
    for row in range(labels.size):
        if labels[row] >= 0:
            order[place[labels[row]]] = row
            place[labels[row]] += 1
    centres = old.copy()
    ones = np.empty(64, np.int64)
    for centre in range(num):
        if counts[centre] == 0:
            continue
        for word in range(words):
            ones[:] = 0
            for entry in range(ends[centre] - counts[centre], ends[centre]):
                bits = codes[order[entry], word]
                for bit in range(64):
                    ones[bit] += np.int64((bits >> uint64(bit)) & uint64(1))
            result = uint64(0)
            for bit in range(64):
                twice = 2 * ones[bit]
                if twice > counts[centre]:
                    result |= uint64(1) << uint64(bit)
                elif twice == counts[centre]:
                    result |= old[centre, word] & (uint64(1) << uint64(bit))
            centres[centre, word] = result
    return centres, counts
