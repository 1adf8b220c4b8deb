# mypy: allow-untyped-defs
"""The Numba CUDA kernels behind ``lists_cuda.py``; what they compute: ``lists_reference.py``.

How a block keeps the best of many entries, whatever their order: ``hamming_cuda_kernels.py``. Ids outside the arrays
that they index are passed over, so that no memory but that of the arguments is touched.
"""

from __future__ import annotations

from numba import cuda, int32, int64, uint8

from alimm_ops.graph.hamming_cuda_kernels import MAX_K, QUEUE, absorb, begin, between, make_key, offer, settle, store

SEEN = 1024
"""Slots, a power of two, for candidates of a row that were looked at: a filter that may forget, never invent."""


@cuda.jit
def merge_kernel(old_ids, old_dists, k, ids, dists):
    """The best distinct entries of each row, a block a row."""
    best = cuda.shared.array(MAX_K, int64)
    merged = cuda.shared.array(MAX_K, int64)
    queue = cuda.shared.array(QUEUE, int64)
    distinct = cuda.shared.array(QUEUE, int64)
    count = cuda.shared.array(1, int32)
    for row in range(cuda.blockIdx.x, ids.shape[0], cuda.gridDim.x):
        begin(best, count, k)
        pending = 0
        for start in range(0, old_ids.shape[1], cuda.blockDim.x):
            column = start + cuda.threadIdx.x
            taken = int32(0)
            if column < old_ids.shape[1] and old_ids[row, column] >= 0:
                taken = offer(make_key(old_dists[row, column], old_ids[row, column]), best, k, queue, count)
            pending = settle(pending, taken, best, merged, queue, distinct, count, k)
        absorb(best, merged, queue, distinct, count, k)
        store(best, k, ids, dists, row)


@cuda.jit
def propagate_kernel(codes, old_ids, old_dists, old_fresh, rows, hops, hop_fresh, width, ids, dists, fresh):
    """The best of a node's list and the lists of its hops, a block a node.

    A candidate is remembered by the last digits of its id. Whoever finds it remembered may leave it out: it was
    offered, or will be by the thread that wrote it, and bounds only fall.
    """
    best = cuda.shared.array(MAX_K, int64)
    merged = cuda.shared.array(MAX_K, int64)
    queue = cuda.shared.array(QUEUE, int64)
    distinct = cuda.shared.array(QUEUE, int64)
    count = cuda.shared.array(1, int32)
    seen = cuda.shared.array(SEEN, int32)
    lane = cuda.threadIdx.x
    step = cuda.blockDim.x
    k = old_ids.shape[1]
    for row in range(cuda.blockIdx.x, rows.size, cuda.gridDim.x):
        node = int64(rows[row])
        is_node = node >= 0 and node < codes.shape[0]
        for slot in range(lane, SEEN, step):
            seen[slot] = -1
        begin(best, count, k)

        pending = 0
        for start in range(0, k + hops.shape[1] * width, step):
            index = start + lane
            taken = int32(0)
            if is_node and index < k:
                if old_ids[node, index] >= 0:
                    taken = offer(make_key(old_dists[node, index], old_ids[node, index]), best, k, queue, count)
                    seen[old_ids[node, index] & (SEEN - 1)] = old_ids[node, index]
            elif is_node and index < k + hops.shape[1] * width:
                place = (index - k) // width
                column = (index - k) % width
                hop = int64(hops[row, place])
                if hop >= 0 and hop < codes.shape[0] and (hop_fresh[row, place] != 0 or old_fresh[hop, column] != 0):
                    candidate = old_ids[hop, column]
                    slot = candidate & (SEEN - 1)
                    if candidate >= 0 and candidate < codes.shape[0] and candidate != node and seen[slot] != candidate:
                        seen[slot] = candidate
                        key = make_key(between(codes, node, codes, candidate), candidate)
                        taken = offer(key, best, k, queue, count)
            pending = settle(pending, taken, best, merged, queue, distinct, count, k)
        absorb(best, merged, queue, distinct, count, k)

        store(best, k, ids, dists, row)
        for place in range(lane, k, step):
            is_fresh = uint8(0)
            if ids[row, place] >= 0:
                is_fresh = uint8(1)
                for column in range(k):
                    if make_key(old_dists[node, column], old_ids[node, column]) == best[place]:
                        is_fresh = uint8(0)
            fresh[row, place] = is_fresh


@cuda.jit
def clear_kernel(array):
    """Zeros everywhere."""
    for index in range(cuda.grid(1), array.size, cuda.gridsize(1)):
        array[index] = 0


@cuda.jit
def count_kernel(old_ids, width, counts):
    """How often each node stands in the first places of a list."""
    for index in range(cuda.grid(1), old_ids.shape[0] * width, cuda.gridsize(1)):
        node = int64(old_ids[index // width, index % width])
        if node >= 0 and node < counts.size:
            cuda.atomic.add(counts, node, int32(1))


@cuda.jit
def allot_kernel(counts, places, cursor):
    """Give each node room for its entries; whose comes first does not matter."""
    for node in range(cuda.grid(1), counts.size, cuda.gridsize(1)):
        places[node] = cuda.atomic.add(cursor, 0, counts[node])


@cuda.jit
def scatter_kernel(old_ids, width, places, entries):
    """Write each entry, as its number, to its node; the place of a node moves to the end of its room."""
    for index in range(cuda.grid(1), old_ids.shape[0] * width, cuda.gridsize(1)):
        node = int64(old_ids[index // width, index % width])
        if node >= 0 and node < places.size:
            entries[cuda.atomic.add(places, node, int32(1))] = int32(index)


@cuda.jit
def reverse_kernel(old_dists, width, first_node, counts, places, entries, k, ids, dists):
    """The best entries of each node, a block a node."""
    best = cuda.shared.array(MAX_K, int64)
    merged = cuda.shared.array(MAX_K, int64)
    queue = cuda.shared.array(QUEUE, int64)
    distinct = cuda.shared.array(QUEUE, int64)
    count = cuda.shared.array(1, int32)
    for node in range(cuda.blockIdx.x, ids.shape[0], cuda.gridDim.x):
        begin(best, count, k)
        size = int64(counts[node])
        first = places[node] - size
        pending = 0
        for start in range(0, size, cuda.blockDim.x):
            taken = int32(0)
            if start + cuda.threadIdx.x < size:
                index = int64(entries[first + start + cuda.threadIdx.x])
                row = index // width
                taken = offer(make_key(old_dists[row, index % width], first_node + row), best, k, queue, count)
            pending = settle(pending, taken, best, merged, queue, distinct, count, k)
        absorb(best, merged, queue, distinct, count, k)
        store(best, k, ids, dists, node)


@cuda.jit
def diversify_kernel(codes, old_ids, old_dists, max_degree, alpha_num, alpha_den, min_near, ids, dists):
    """Take the candidates of a row one after the other, a block a row; threads share out those that stay."""
    kept_ids = cuda.shared.array(MAX_K, int32)
    kept_dists = cuda.shared.array(MAX_K, int32)
    lane = cuda.threadIdx.x
    for row in range(cuda.blockIdx.x, ids.shape[0], cuda.gridDim.x):
        kept = 0
        column = 0
        while column < old_ids.shape[1]:
            node = int64(old_ids[row, column])
            far = int64(old_dists[row, column])
            if node < 0 or node >= codes.shape[0] or kept == max_degree:
                column = old_ids.shape[1]  # the list is over, or full
            else:
                near = int32(0)
                if kept >= min_near:
                    for place in range(lane, kept, cuda.blockDim.x):
                        distance = int64(between(codes, kept_ids[place], codes, node))
                        if alpha_num * distance < alpha_den * far or (distance == far and kept_dists[place] == far):
                            near = int32(1)
                if cuda.syncthreads_or(near) == 0:
                    if lane == 0:
                        kept_ids[kept] = int32(node)
                        kept_dists[kept] = int32(far)
                        ids[row, kept] = int32(node)
                        dists[row, kept] = old_dists[row, column]
                    kept += 1
                    cuda.syncthreads()
                column += 1
        for place in range(kept + lane, max_degree, cuda.blockDim.x):
            ids[row, place] = -1
            dists[row, place] = 65535
