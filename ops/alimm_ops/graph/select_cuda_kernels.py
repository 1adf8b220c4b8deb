# mypy: allow-untyped-defs
"""The Numba CUDA kernels behind ``select_cuda.py``, where their order is; what they compute: ``select_reference.py``.

No result depends on the order of threads: bits are set by atomic or, counts by atomic add, and of all ranks at which a
neighbour appears the smallest wins. Shared memory, barriers and atomics only: Numba's simulator runs them all. Device
functions are inlined as Numba IR, since numba-cuda compiles a called one for the device at hand, and there may be none.
"""

from __future__ import annotations

from numba import cuda, int32, uint8, uint32

from alimm_ops.graph.permute import id_hash, position

THREADS = 256
BIN_BITS = 12
"""Hashes of the level that is cut are counted by their upper bits; only those in one bin are compared in pairs."""

NEIGHBOURS, CUT, ROOM, BIN, NEED, CANDIDATES, INVALID = range(7)
"""Places in ``state``: neighbours taken; 1 + the level that is cut, or 0; how many of it are taken; the bin in which
they end, and how many of that bin are taken; its ids so far; arguments that were out of range."""

STATE = 8


@cuda.jit(device=True, inline="always")
def _sum_before(shared, lane, value):
    """The sum of the values of lower lanes; every thread of the block must call."""
    shared[lane] = value
    cuda.syncthreads()
    step = 1
    while step < THREADS:
        other = int32(0)
        if lane >= step:
            other = shared[lane - step]
        cuda.syncthreads()
        shared[lane] += other
        cuda.syncthreads()
        step *= 2
    return shared[lane] - value


@cuda.jit(device=True, inline="always")
def _bit(index):
    return uint32(uint32(1) << uint32(index & 31))


@cuda.jit(device=True, inline="always")
def _is_marked(bitmap, index):
    return uint32(bitmap[index >> 5] & _bit(index)) != uint32(0)


@cuda.jit(device=True, inline="always")
def _bin(value, words):
    return int32(id_hash(value, words) >> uint32(32 - BIN_BITS))


@cuda.jit
def clear_kernel(work, active, filled, state):
    """Zeros everywhere; in the results too, so that ids stay in range even where arguments do not."""
    for index in range(cuda.grid(1), work.size, cuda.gridsize(1)):
        work[index] = 0
    for index in range(cuda.grid(1), active.size, cuda.gridsize(1)):
        active[index] = 0
        filled[index] = 0
    for index in range(cuda.grid(1), state.size, cuda.gridsize(1)):
        state[index] = 0


@cuda.jit
def label_kernel(labels, size, marked, state):
    """Mark the labels; a repeated one is as wrong as one out of range."""
    for index in range(cuda.grid(1), labels.size, cuda.gridsize(1)):
        label = labels[index]
        if label < 0 or label >= size:
            cuda.atomic.add(state, INVALID, 1)
        else:
            before = cuda.atomic.or_(marked, label >> 5, _bit(label))
            if uint32(before & _bit(label)) != uint32(0):
                cuda.atomic.add(state, INVALID, 1)


@cuda.jit
def insert_kernel(neighbours, ranks, size, levels, words, marked, keys, best, state):
    """Put each neighbour that is no label into a hash table once: id + 1, and levels - its smallest rank."""
    for edge in range(cuda.grid(1), neighbours.size, cuda.gridsize(1)):
        local = neighbours[edge]
        level = int32(ranks[edge])
        if local < 0 or local >= size or level >= levels:
            cuda.atomic.add(state, INVALID, 1)
        elif not _is_marked(marked, local):
            slot = int32(id_hash(local, words) & uint32(keys.size - 1))
            searching = True
            while searching:
                found = cuda.atomic.cas(keys, slot, int32(0), int32(local + 1))
                if found == 0 or found == local + 1:
                    searching = False
                else:
                    slot = int32((slot + 1) & (keys.size - 1))
            cuda.atomic.max(best, slot, int32(levels - level))


@cuda.jit
def level_kernel(levels, keys, best, counts):
    """Count the ids of each level."""
    for slot in range(cuda.grid(1), keys.size, cuda.gridsize(1)):
        if keys[slot] != 0:
            cuda.atomic.add(counts, levels - best[slot], 1)


@cuda.jit
def scan_kernel(counts):
    """Turn counts into the sums of those before them. One block."""
    shared = cuda.shared.array(THREADS, int32)
    lane = cuda.threadIdx.x
    carry = int32(0)
    for start in range(0, counts.size, THREADS):
        value = int32(0)
        if start + lane < counts.size:
            value = counts[start + lane]
        before = _sum_before(shared, lane, value)
        if start + lane < counts.size:
            counts[start + lane] = carry + before
        carry += shared[THREADS - 1]
        cuda.syncthreads()


@cuda.jit
def cut_kernel(before, room, state):
    """Find the level in which the room for neighbours ends; ``before`` has one more element than levels."""
    levels = before.size - 1
    for level in range(cuda.grid(1), levels, cuda.gridsize(1)):
        if before[level] <= room and room < before[level + 1]:
            state[CUT] = level + 1
            state[ROOM] = room - before[level]
    if cuda.grid(1) == 0:
        state[NEIGHBOURS] = min(room, before[levels])


@cuda.jit
def mark_kernel(levels, words, keys, best, state, marked, bins):
    """Mark the levels before the cut, and count the hashes of the cut one by bin."""
    cut = state[CUT] - 1
    for slot in range(cuda.grid(1), keys.size, cuda.gridsize(1)):
        if keys[slot] != 0:
            local = keys[slot] - 1
            level = levels - best[slot]
            if cut < 0 or level < cut:
                cuda.atomic.or_(marked, local >> 5, _bit(local))
            elif level == cut:
                cuda.atomic.add(bins, _bin(local, words), 1)


@cuda.jit
def bin_kernel(before, state):
    """Find the bin in which the room of the cut level ends; ``before`` has one more element than bins."""
    if state[CUT] != 0:
        room = state[ROOM]
        for index in range(cuda.grid(1), before.size - 1, cuda.gridsize(1)):
            if before[index] <= room and room < before[index + 1]:
                state[BIN] = index
                state[NEED] = room - before[index]


@cuda.jit
def take_kernel(levels, words, keys, best, state, marked, candidates):
    """Mark the ids of the cut level in lower bins, and list those in the bin that is divided."""
    cut = state[CUT] - 1
    if cut >= 0:
        for slot in range(cuda.grid(1), keys.size, cuda.gridsize(1)):
            if keys[slot] != 0 and levels - best[slot] == cut:
                local = keys[slot] - 1
                index = _bin(local, words)
                if index < state[BIN]:
                    cuda.atomic.or_(marked, local >> 5, _bit(local))
                elif index == state[BIN]:
                    candidates[cuda.atomic.add(state, CANDIDATES, 1)] = local


@cuda.jit
def divide_kernel(words, candidates, state, marked):
    """Mark the listed ids with the smallest hashes; no two hashes are equal."""
    for index in range(cuda.grid(1), state[CANDIDATES], cuda.gridsize(1)):
        local = candidates[index]
        own = id_hash(local, words)
        smaller = 0
        for other in range(state[CANDIDATES]):
            if id_hash(candidates[other], words) < own:
                smaller += 1
        if smaller < state[NEED]:
            cuda.atomic.or_(marked, local >> 5, _bit(local))


@cuda.jit
def fill_count_kernel(size, bits, words, target, marked, counts):
    """Count, a block, the positions among the first ``target`` of the permutation that are not taken."""
    index = cuda.grid(1)
    free = int32(0)
    if index < target and not _is_marked(marked, int32(position(index, size, bits, words))):
        free = int32(1)
    count = cuda.syncthreads_count(free)
    if cuda.threadIdx.x == 0:
        counts[cuda.blockIdx.x] = count


@cuda.jit
def fill_kernel(size, bits, words, target, labels, marked, counts, state, filled):
    """Take the first free positions, as many as are wanted: what walking the permutation one by one takes.

    ``target`` positions are always enough, since no more than those taken already can be in the way.
    """
    shared = cuda.shared.array(THREADS, int32)
    index = cuda.grid(1)
    local = int32(0)
    free = int32(0)
    if index < target:
        local = int32(position(index, size, bits, words))
        if not _is_marked(marked, local):
            free = int32(1)
    before = counts[cuda.blockIdx.x] + _sum_before(shared, cuda.threadIdx.x, free)
    if free != 0 and before < target - labels - state[NEIGHBOURS]:
        cuda.atomic.or_(filled, local >> 5, _bit(local))


@cuda.jit
def pack_count_kernel(marked, filled, counts):
    """Count, a block, the ids of both bitmaps; a thread has one word."""
    shared = cuda.shared.array(THREADS, int32)
    word = cuda.grid(1)
    count = int32(0)
    if word < marked.size:
        count = int32(cuda.popc(uint32(marked[word] | filled[word])))
    before = _sum_before(shared, cuda.threadIdx.x, count)
    if cuda.threadIdx.x == THREADS - 1:
        counts[cuda.blockIdx.x] = before + count


@cuda.jit
def pack_kernel(marked, filled, counts, active, random):
    """Write the ids of both bitmaps in ascending order, and whether they are of the second."""
    shared = cuda.shared.array(THREADS, int32)
    word = cuda.grid(1)
    bits = uint32(0)
    if word < marked.size:
        bits = uint32(marked[word] | filled[word])
    place = counts[cuda.blockIdx.x] + _sum_before(shared, cuda.threadIdx.x, int32(cuda.popc(bits)))
    while bits != uint32(0):
        local = int32(word * 32 + cuda.ffs(bits) - 1)
        if place < active.size:  # ids out of range, which the state tells of, leave the counts wrong
            active[place] = local
            random[place] = uint8(1) if _is_marked(filled, local) else uint8(0)
        place += 1
        bits = uint32(bits & uint32(bits - uint32(1)))
