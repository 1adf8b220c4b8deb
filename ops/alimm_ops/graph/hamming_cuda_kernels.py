# mypy: allow-untyped-defs
"""The Numba CUDA kernels behind ``hamming_cuda.py``, and how a block keeps the k best of many, for lists as well.

A block holds its best so far as sorted keys (distance << 32 | id) in shared memory. What is smaller than the last of
them goes into a queue; when the next step might not fit, `absorb` merges the queue by counting ranks. The k smallest of
a set depend on no order, so neither do results, although threads queue in any order. Shared memory, barriers and
atomics only: Numba's simulator runs them all. Device functions are inlined as Numba IR, since numba-cuda compiles a
called one for the device at hand, and there may be none.
"""

from __future__ import annotations

from numba import cuda, int32, int64, uint16, uint64

THREADS = 128
TILE = 64
"""Rows and columns of a tile of the distance matrix."""
TILE_WORDS = 64 * 17
"""64-bit words of a tile's codes. An odd distance between them keeps the banks of shared memory apart."""

MAX_K = 256
"""Columns of the longest result."""
QUEUE = 256
"""Keys that wait; at least the threads of a block."""

EMPTY = (65535 << 32) | 0xFFFFFFFF
"""The key of the padding (-1, 65535): above all others."""


@cuda.jit(device=True, inline="always")
def between(one, first, other, second):
    """The distance of ``one[first]`` and ``other[second]``."""
    count = 0
    for word in range(one.shape[1]):
        count += cuda.popc(uint64(one[first, word] ^ other[second, word]))
    return count


@cuda.jit(device=True, inline="always")
def make_key(distance, index):
    """What sorts by (distance, id)."""
    return int64(int64(distance) << int64(32)) | int64(index)


@cuda.jit(device=True, inline="always")
def begin(best, count, k):
    """Forget everything; every thread of the block must call. A thread clears what it alone has read in `store`."""
    for place in range(cuda.threadIdx.x, k, cuda.blockDim.x):
        best[place] = EMPTY
    if cuda.threadIdx.x == 0:
        count[0] = 0
    cuda.syncthreads()


@cuda.jit(device=True, inline="always")
def offer(key, best, k, queue, count):
    """Queue a key that is among the best so far; 1 where it is."""
    taken = int32(0)
    if key < best[k - 1]:
        queue[cuda.atomic.add(count, 0, int32(1))] = key
        taken = int32(1)
    return taken


@cuda.jit(device=True, inline="always")
def _place_in(best, k, key):
    """How many of the best are smaller."""
    low = 0
    high = k
    while low < high:
        middle = (low + high) // 2
        if best[middle] < key:
            low = middle + 1
        else:
            high = middle
    return low


@cuda.jit(device=True, inline="always")
def _num_smaller(distinct, size, key):
    num = 0
    for place in range(size):
        if distinct[place] < key:
            num += 1
    return num


@cuda.jit(device=True, inline="always")
def absorb(best, merged, queue, distinct, count, k):
    """Merge the queue into the best and empty it; every thread of the block must call, after a barrier."""
    lane = cuda.threadIdx.x
    step = cuda.blockDim.x
    size = count[0]
    for place in range(lane, k, step):
        merged[place] = EMPTY
    for place in range(lane, size, step):
        key = queue[place]
        rank = _place_in(best, k, key)
        repeated = rank < k and best[rank] == key
        for other in range(place):
            if queue[other] == key:
                repeated = True
        if repeated:
            key = EMPTY
        distinct[place] = key
    cuda.syncthreads()
    for place in range(lane, size, step):
        key = distinct[place]
        if key != EMPTY:
            rank = _place_in(best, k, key) + _num_smaller(distinct, size, key)
            if rank < k:
                merged[rank] = key
    for place in range(lane, k, step):
        key = best[place]
        if key != EMPTY:
            rank = place + _num_smaller(distinct, size, key)
            if rank < k:
                merged[rank] = key
    cuda.syncthreads()
    for place in range(lane, k, step):
        best[place] = merged[place]
    if lane == 0:
        count[0] = 0
    cuda.syncthreads()


@cuda.jit(device=True, inline="always")
def settle(pending, taken, best, merged, queue, distinct, count, k):
    """End a step in which each thread offered at most one key; the keys that wait, the same number in all threads."""
    pending += cuda.syncthreads_count(taken)
    if pending > queue.size - cuda.blockDim.x:
        absorb(best, merged, queue, distinct, count, k)
        pending = 0
    return pending


@cuda.jit(device=True, inline="always")
def store(best, k, ids, dists, row):
    """Write the best into a row."""
    for place in range(cuda.threadIdx.x, k, cuda.blockDim.x):
        key = best[place]
        if key == EMPTY:
            ids[row, place] = -1
            dists[row, place] = 65535
        else:
            ids[row, place] = int32(key & int64(0x7FFFFFFF))
            dists[row, place] = uint16(key >> int64(32))


@cuda.jit
def matrix_kernel(queries, base, distances):
    """All distances, a block a tile."""
    rows = cuda.shared.array(TILE_WORDS, uint64)
    columns = cuda.shared.array(TILE_WORDS, uint64)
    words = base.shape[1]
    stride = words | 1
    across = (base.shape[0] + TILE - 1) // TILE
    tiles = across * ((queries.shape[0] + TILE - 1) // TILE)
    for tile in range(cuda.blockIdx.x, tiles, cuda.gridDim.x):
        first_row = tile // across * TILE
        first_column = tile % across * TILE
        for index in range(cuda.threadIdx.x, TILE * words, cuda.blockDim.x):
            place = index // words
            word = index % words
            if first_row + place < queries.shape[0]:
                rows[place * stride + word] = queries[first_row + place, word]
            if first_column + place < base.shape[0]:
                columns[place * stride + word] = base[first_column + place, word]
        cuda.syncthreads()
        for pair in range(cuda.threadIdx.x, TILE * TILE, cuda.blockDim.x):
            row = pair // TILE
            column = pair % TILE
            if first_row + row < queries.shape[0] and first_column + column < base.shape[0]:
                count = 0
                for word in range(words):
                    count += cuda.popc(uint64(rows[row * stride + word] ^ columns[column * stride + word]))
                distances[first_row + row, first_column + column] = uint16(count)
        cuda.syncthreads()


@cuda.jit
def nearest_kernel(distances, num_base, k, first_own, ids, dists):
    """The best of each row of distances, a block a row. ``distances`` is flat: a base of size 0 has no rows."""
    best = cuda.shared.array(MAX_K, int64)
    merged = cuda.shared.array(MAX_K, int64)
    queue = cuda.shared.array(QUEUE, int64)
    distinct = cuda.shared.array(QUEUE, int64)
    count = cuda.shared.array(1, int32)
    for row in range(cuda.blockIdx.x, ids.shape[0], cuda.gridDim.x):
        own = int64(-1)
        if first_own >= 0:
            own = first_own + row
        begin(best, count, k)
        pending = 0
        for start in range(0, num_base, cuda.blockDim.x):
            index = start + cuda.threadIdx.x
            taken = int32(0)
            if index < num_base and index != own:
                taken = offer(make_key(distances[row * num_base + index], index), best, k, queue, count)
            pending = settle(pending, taken, best, merged, queue, distinct, count, k)
        absorb(best, merged, queue, distinct, count, k)
        store(best, k, ids, dists, row)


@cuda.jit
def clear_kernel(array):
    """Zeros everywhere."""
    for index in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[index] = 0


@cuda.jit
def ones_kernel(codes, labels, num_centres, ones, sizes):
    """Count the codes of each centre and, bit by bit, the ones in them. A thread has a bit of a code."""
    bits = codes.shape[1] * 64
    for index in range(cuda.grid(1), codes.shape[0] * bits, cuda.gridsize(1)):
        code = index // bits
        bit = index % bits
        centre = int64(labels[code])
        if centre >= 0 and centre < num_centres:
            if uint64(uint64(codes[code, bit >> 6]) >> uint64(bit & 63)) & uint64(1) != uint64(0):
                cuda.atomic.add(ones, centre * bits + bit, int32(1))
            if bit == 0:
                cuda.atomic.add(sizes, centre, int32(1))


@cuda.jit
def majority_kernel(old, ones, sizes, new, counts):
    """Set each bit to that of most codes of the centre; a tie keeps the old one. A thread has a word of a centre."""
    words = old.shape[1]
    for index in range(cuda.grid(1), old.shape[0] * words, cuda.gridsize(1)):
        centre = index // words
        word = index % words
        before = uint64(old[centre, word])
        size = int64(sizes[centre])
        result = uint64(0)
        for bit in range(64):
            mask = uint64(uint64(1) << uint64(bit))
            twice = 2 * int64(ones[index * 64 + bit])
            if twice > size or (twice == size and before & mask != uint64(0)):
                result = uint64(result | mask)
        new[centre, word] = result
        if word == 0:
            counts[centre] = size
