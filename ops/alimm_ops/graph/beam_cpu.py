# mypy: allow-untyped-defs
"""Best-first search in a graph of binary codes on the CPU, in Numba: the results of ``beam_reference.py``.

The beam is a sorted array of (distance, node) in one 64-bit word each; a bit a node says what was seen. Most of a walk
is waiting for codes that lie anywhere in memory, so the codes of a node's neighbours are asked for before the first of
them is compared.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint16, uint64
from numpy.typing import NDArray

from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID, check_pair
from alimm_ops.graph.intrinsics import LANES, lowest_bit, popcount, prefetch, within
from alimm_ops.graph.lists_cpu import check_ids

_options = dict(nogil=True, cache=True, error_model="numpy")
_LOW = 0xFFFFFFFF
_LARGEST = NO_DISTANCE << 32
_ALL = np.empty(0, np.uint8)


def check_graph(codes_NW: NDArray[np.uint64], indptr: NDArray[np.int64], edges: NDArray[np.int32]) -> None:
    """Raise ValueError unless the edges are those of a graph of these nodes: the kernel checks no bounds."""
    if len(indptr) != len(codes_NW) + 1 or indptr[0] != 0 or indptr[-1] != len(edges) or (np.diff(indptr) < 0).any():
        raise ValueError(f"indptr must rise from 0 to {len(edges)} in {len(codes_NW) + 1} steps")
    if len(edges) and not 0 <= edges.min() <= edges.max() < len(codes_NW):
        raise ValueError(f"edges must be from 0 to {len(codes_NW) - 1}, got {edges.min()} to {edges.max()}")


def beam_search(
    queries_QW: NDArray[np.uint64],
    codes_NW: NDArray[np.uint64],
    indptr: NDArray[np.int64],
    edges: NDArray[np.int32],
    starts_QE: NDArray[np.int32],
    ef: int,
    allowed_N: NDArray[np.uint8] | None = None,
    trusted: bool = False,
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.int64]]:
    """Walk from the start nodes of each query; see the reference.

    ``trusted`` says that `check_graph` was passed before, once for many calls.

    Raises:
        ValueError: an id out of range, shapes that do not fit, or an ef below 1.
    """
    check_pair(queries_QW, codes_NW)
    check_ids("starts", starts_QE, len(codes_NW))
    if not trusted:
        check_graph(codes_NW, indptr, edges)
    if ef < 1:
        raise ValueError(f"ef must be at least 1, got {ef}")
    if len(starts_QE) != len(queries_QW):
        raise ValueError(f"expected starts of {len(queries_QW)} queries, got {starts_QE.shape}")
    if allowed_N is not None and (allowed_N.shape != (len(codes_NW),) or allowed_N.dtype not in (np.bool_, np.uint8)):
        raise ValueError(
            f"allowed must be bool or uint8 of shape ({len(codes_NW)},), got {allowed_N.dtype} of {allowed_N.shape}"
        )
    ids = np.full((len(queries_QW), ef), NO_ID, np.int32)
    dists = np.full((len(queries_QW), ef), NO_DISTANCE, np.uint16)
    counts = np.zeros(len(queries_QW), np.int64)
    allowed = _ALL if allowed_N is None else np.ascontiguousarray(allowed_N).view(np.uint8)
    _beam(np.ascontiguousarray(queries_QW), codes_NW, indptr, edges, starts_QE, ef, allowed, ids, dists, counts)
    return ids, dists, counts


@njit(inline="always")
def _distance(query, codes, node):
    result = popcount(query[0] ^ codes[node, uint64(0)])
    for word in range(1, codes.shape[1]):
        result += popcount(query[word] ^ codes[node, uint64(word)])
    return result


@njit(inline="always")
def _put(beam, count, key):
    """Insert a key into the sorted beam, which forgets its last where it is full; the new count and the key's place."""
    if count == beam.size:
        count -= 1
    place = uint64(count)
    while place > uint64(0) and beam[place - uint64(1)] > key:
        beam[place] = beam[place - uint64(1)]
        place -= uint64(1)
    beam[place] = key
    return count + 1, np.int64(place)


@njit(**_options)
def _beam(queries, codes, indptr, edges, starts, ef, allowed, ids, dists, counts):
    # A key is distance << 32 | node << 1 | done: sorted by (distance, node), since no node is there twice.
    seen = np.zeros((codes.shape[0] + 63) >> 6, np.uint64)
    touched = np.empty(1024, np.int32)
    beam = np.empty(ef, np.uint64)
    best = np.empty(ef if allowed.size else 1, np.uint64)
    near = np.full(LANES, NO_DISTANCE, np.uint16)
    for row in range(queries.shape[0]):
        query = queries[row]
        num_seen = count = num_best = 0
        following = ef
        worst = uint64(_LARGEST)
        best_worst = uint64(_LARGEST if allowed.size else 0)  # without a filter no key is below it
        source, offset, stop = np.int64(-1), np.int64(0), np.int64(starts.shape[1])
        while True:
            # The new ones among the targets, and their codes on the way to the cache.
            first = num_seen
            while touched.size <= num_seen + stop - offset:
                larger = np.empty(2 * touched.size, np.int32)
                larger[:num_seen] = touched[:num_seen]
                touched = larger
            for edge in range(offset, stop):
                target = starts[row, edge] if source < 0 else edges[uint64(edge)]
                if target < 0:
                    continue
                node = uint64(target)
                shift = node & uint64(63)
                word = node >> uint64(6)
                bits = seen[word]
                seen[word] = bits | (uint64(1) << shift)
                touched[uint64(num_seen)] = target
                # No branch: the processor could not foresee it.
                num_seen += int(~(bits >> shift) & uint64(1))
                prefetch(codes, np.int64(node))
            for start in range(first, num_seen, LANES):
                size = min(num_seen - start, LANES)
                for index in range(size):
                    near[index] = uint16(_distance(query, codes, uint64(touched[uint64(start + index)])))
                hits = within(near, 0, uint16(max(worst, best_worst) >> uint64(32)))
                hits &= (uint64(1) << uint64(size)) - uint64(1)
                while hits != uint64(0):
                    index = lowest_bit(hits)
                    hits &= hits - uint64(1)
                    node = uint64(touched[uint64(start) + index])
                    key = (uint64(near[index]) << uint64(32)) | (node << uint64(1))
                    if key < best_worst and allowed[node]:
                        num_best, _ = _put(best, num_best, key)
                        if num_best == ef:
                            best_worst = best[ef - 1]
                    if key > worst:
                        continue
                    count, place = _put(beam, count, key)
                    if count == ef:
                        worst = beam[ef - 1]
                    following = min(following, place)
            while following < count and beam[following] & uint64(1):
                following += 1
            if following >= count:
                break
            source = np.int64((beam[following] & uint64(_LOW)) >> uint64(1))
            beam[following] |= uint64(1)
            offset, stop = indptr[source], indptr[source + 1]
            if following + 1 < count:
                # Likely the next one: its edges are on the way while these are looked at.
                ahead = np.int64((beam[following + 1] & uint64(_LOW)) >> uint64(1))
                prefetch(edges, indptr[ahead])
        counts[row] = num_seen
        for index in range(num_seen):
            seen[touched[index] >> 6] = 0
        results, size = (best, num_best) if allowed.size else (beam, count)
        for column in range(size):
            ids[row, column] = np.int32((results[column] & uint64(_LOW)) >> uint64(1))
            dists[row, column] = uint16(results[column] >> uint64(32))
