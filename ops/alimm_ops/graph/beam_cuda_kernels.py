# mypy: allow-untyped-defs
"""The Numba CUDA kernels behind ``beam_cuda.py``; what they compute: ``beam_reference.py``.

A block walks for one query after the other. Its beam is an array of sorted keys, distance << 32 | node << 1 | looked
at, in shared memory; a chunk of neighbours, one a thread, is sorted by counting and merged into a second array, which
then takes the place of the first. What was seen is a bit a node in the block's own part of global memory. After a walk
only the words that were touched are cleaned: a log names them, and where it was too short all are.

No result depends on the order of threads: threads queue their keys in any order, but no two keys are equal, and ranks
are counted by value. Shared memory, barriers and atomics only: Numba's simulator runs them all. Device functions are
inlined as Numba IR, since numba-cuda compiles a called one for the device at hand, and there may be none.
"""

from __future__ import annotations

import math

from numba import cuda, float32, float64, int32, int64, uint16, uint32, uint64

THREADS = 64
LOG = 2048
"""Words of the bitmap that are remembered as touched."""
TILE = 32
"""Coordinates of a feature that are loaded at a time."""
PITCH = TILE + 1
"""Between the features of a tile: an odd number keeps the banks of shared memory apart."""

EMPTY = (1 << 64) - 1
"""Above all keys."""
COSINE, IP, L2 = range(3)
_PICK, _QUEUED, _LOGGED = range(3)
"""Places in a block's state: the first key not looked at, or ef; keys in the queue; words touched."""


@cuda.jit(device=True, inline="always")
def _bit(node):
    return uint32(uint32(1) << uint32(node & 31))


@cuda.jit(device=True, inline="always")
def _place_in(keys, start, size, key):
    """How many of the sorted keys from ``start`` on are smaller."""
    low = 0
    high = size
    while low < high:
        middle = (low + high) // 2
        if keys[start + middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@cuda.jit(device=True, inline="always")
def _absorb(keys, source, size, target, ef, queue, state, key, num):
    """Merge ``num`` new keys, at most one a thread and EMPTY where it has none, with ``size`` sorted ones.

    Every thread of the block must call; it ends with a barrier. The result is at ``target``; returns its size.
    """
    lane = cuda.threadIdx.x
    ordered = queue + THREADS
    if key != uint64(EMPTY):
        keys[queue + cuda.atomic.add(state, _QUEUED, int32(1))] = key
    cuda.syncthreads()
    if lane < num:
        own = keys[queue + lane]
        rank = 0
        for other in range(num):
            if keys[queue + other] < own:
                rank += 1
        keys[ordered + rank] = own
    if lane == 0:
        state[_QUEUED] = 0
    cuda.syncthreads()
    if lane < num:
        own = keys[ordered + lane]
        place = lane + _place_in(keys, source, size, own)
        if place < ef:
            keys[target + place] = own
    for index in range(lane, size, THREADS):
        own = keys[source + index]
        place = index + _place_in(keys, ordered, num, own)
        if place < ef:
            keys[target + place] = own
    cuda.syncthreads()
    return min(size + num, ef)


@cuda.jit
def beam_kernel(
    queries, codes, num_nodes, indptr, edges, starts, num_starts, ef, allowed, filtered, seen, ids, dists, counts
):
    """Walk for each query.

    Dynamic shared memory: two beams of ef keys, as many for results where these are filtered, two times THREADS keys,
    and the words of the query.
    """
    keys = cuda.shared.array(0, uint64)
    state = cuda.shared.array(3, int32)
    lane = cuda.threadIdx.x
    words = queries.shape[1]
    queue = 2 * ef
    if filtered:
        queue = 4 * ef
    query = queue + 2 * THREADS
    num_words = (num_nodes + 31) >> 5
    own = int64(cuda.blockIdx.x) * (num_words + LOG)
    log = own + num_words
    for word in range(lane, num_words, THREADS):
        seen[own + word] = 0
    if lane == 0:
        state[_PICK] = ef
        state[_QUEUED] = 0
        state[_LOGGED] = 0
    for row in range(cuda.blockIdx.x, queries.shape[0], cuda.gridDim.x):
        for word in range(lane, words, THREADS):
            keys[query + word] = queries[row, word]
        cuda.syncthreads()
        beam = 0
        size = 0
        worst = uint64(EMPTY)  # no key beyond it can enter: EMPTY while there is room
        best = 2 * ef
        num_best = 0
        worst_best = uint64(EMPTY)
        total = 0
        begin = int64(0)
        end = int64(num_starts)
        starting = True
        walking = True
        while walking:
            for chunk in range(begin, end, THREADS):
                node = int64(-1)
                if chunk + lane < end:
                    if starting:
                        node = int64(starts[row, chunk + lane])
                    else:
                        node = int64(edges[chunk + lane])
                fresh = int32(0)
                key = uint64(EMPTY)
                if node >= 0 and node < num_nodes:
                    before = uint32(cuda.atomic.or_(seen, own + (node >> 5), _bit(node)))
                    if uint32(before & _bit(node)) == uint32(0):
                        fresh = int32(1)
                        if before == uint32(0):
                            slot = cuda.atomic.add(state, _LOGGED, int32(1))
                            if slot < LOG:
                                seen[log + slot] = uint32(node >> 5)
                        distance = 0
                        for word in range(words):
                            distance += cuda.popc(uint64(keys[query + word] ^ codes[node, word]))
                        key = uint64(uint64(distance) << uint64(32)) | uint64(uint64(node) << uint64(1))
                total += cuda.syncthreads_count(fresh)
                if filtered:
                    wanted = uint64(EMPTY)
                    if key < worst_best and allowed[node] != 0:  # EMPTY, the key of no node, is below nothing
                        wanted = key
                    num = cuda.syncthreads_count(int32(wanted != uint64(EMPTY)))
                    if num > 0:
                        other = 5 * ef - best  # results are at 2 ef or at 3 ef
                        num_best = _absorb(keys, best, num_best, other, ef, queue, state, wanted, num)
                        best = other
                        if num_best == ef:
                            worst_best = keys[best + ef - 1]
                if key >= worst:
                    key = uint64(EMPTY)
                num = cuda.syncthreads_count(int32(key != uint64(EMPTY)))
                if num > 0:
                    other = ef - beam
                    size = _absorb(keys, beam, size, other, ef, queue, state, key, num)
                    beam = other
                    if size == ef:
                        worst = keys[beam + ef - 1]
            starting = False
            index = lane
            while index < size:
                if keys[beam + index] & uint64(1) == uint64(0):
                    cuda.atomic.min(state, _PICK, int32(index))
                    index = size
                index += THREADS
            cuda.syncthreads()
            pick = state[_PICK]
            if pick < size:
                node = int64((keys[beam + pick] & uint64(0xFFFFFFFF)) >> uint64(1))
                begin = max(int64(indptr[node]), int64(0))
                end = min(int64(indptr[node + 1]), int64(edges.size))
            else:
                walking = False
            cuda.syncthreads()  # all have read what changes now
            if lane == 0 and walking:
                keys[beam + pick] = keys[beam + pick] | uint64(1)
                state[_PICK] = ef
            cuda.syncthreads()
        if filtered:
            beam = best
            size = num_best
        for column in range(lane, ef, THREADS):
            if column < size:
                key = keys[beam + column]
                ids[row, column] = int32((key & uint64(0xFFFFFFFF)) >> uint64(1))
                dists[row, column] = uint16(key >> uint64(32))
            else:
                ids[row, column] = int32(-1)
                dists[row, column] = uint16(65535)
        if lane == 0:
            counts[row] = total
        logged = state[_LOGGED]
        if logged <= LOG:
            for index in range(lane, logged, THREADS):
                seen[own + int64(seen[log + index])] = 0
        else:
            for word in range(lane, num_words, THREADS):
                seen[own + word] = 0
        cuda.syncthreads()
        if lane == 0:
            state[_LOGGED] = 0


@cuda.jit(device=True, inline="always")
def _goes_before(score, row, index, other_score, other_row, other_index):
    """Larger scores first, NaN last, equal scores by row, and one row twice as it came."""
    nan = score != score
    other_nan = other_score != other_score
    result = score > other_score
    if nan != other_nan:
        result = other_nan
    elif nan or score == other_score:
        result = row < other_row or (row == other_row and index < other_index)
    return result


@cuda.jit
def rerank_kernel(queries, features, num_features, rows, num_rows, metric, scores, chosen):
    """Score the candidates of each query, a block a query and a thread a candidate, and order them by counting ranks.

    Dynamic shared memory: a float32 a candidate. Threads load a tile of features together, then each adds up its own.
    """
    found = cuda.shared.array(0, float32)
    tile = cuda.shared.array((THREADS, PITCH), float32)
    lane = cuda.threadIdx.x
    dim = queries.shape[1]
    for query in range(cuda.blockIdx.x, queries.shape[0], cuda.gridDim.x):
        valid = 0
        for start in range(0, num_rows, THREADS):
            index = start + lane
            row = int64(-1)
            if index < num_rows:
                row = rows[query, index]
            is_row = row >= 0 and row < num_features
            value = length = query_length = float64(0)
            for first in range(0, dim, TILE):
                for element in range(lane, THREADS * TILE, THREADS):
                    candidate = element // TILE
                    column = element % TILE
                    if start + candidate < num_rows and first + column < dim:
                        source = rows[query, start + candidate]
                        if source >= 0 and source < num_features:
                            tile[candidate, column] = float32(features[source, first + column])
                cuda.syncthreads()
                if is_row:
                    for column in range(min(TILE, dim - first)):
                        a = float64(queries[query, first + column])
                        b = float64(tile[lane, column])
                        if metric == L2:
                            value += (b - a) * (b - a)
                        else:
                            value += b * a
                            if metric == COSINE:
                                length += b * b
                                query_length += a * a
                cuda.syncthreads()
            if metric == L2:
                value = float64(0) - value
            elif metric == COSINE:
                lengths = math.sqrt(length) * math.sqrt(query_length)
                if lengths > 0:
                    value = value / lengths
                else:
                    value = float64(0)
            if index < num_rows:
                found[index] = float32(value)
            valid += cuda.syncthreads_count(int32(is_row))
        for index in range(lane, num_rows, THREADS):
            row = rows[query, index]
            if row >= 0 and row < num_features:
                rank = 0
                for other in range(num_rows):
                    other_row = rows[query, other]
                    if (
                        other_row >= 0
                        and other_row < num_features
                        and _goes_before(found[other], other_row, other, found[index], row, index)
                    ):
                        rank += 1
                if rank < scores.shape[1]:
                    scores[query, rank] = found[index]
                    chosen[query, rank] = row
        for column in range(valid + lane, scores.shape[1], THREADS):
            scores[query, column] = float32(-math.inf)
            chosen[query, column] = int64(-1)
        cuda.syncthreads()
