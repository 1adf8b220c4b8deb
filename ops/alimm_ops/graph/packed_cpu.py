# mypy: allow-untyped-defs
"""Best-first search with the codes of a node's neighbours beside the node: the results of ``beam_reference.py``.

A walk over `beam_cpu` waits for one line of memory a neighbour. Here a node has a block with its neighbours' codes,
word after word, and their ids: one read of about a kilobyte in sequence, and the distances are vector popcounts. What
the block costs is memory, (8 W + 4) bytes a place. Only nodes that entered the beam are remembered as seen: one that
was turned away once would be again, since the beam only gets better.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types, uint16, uint64
from numba.core import cgutils
from numba.extending import intrinsic
from numpy.typing import NDArray

from alimm_ops.graph.beam_cpu import check_graph
from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID, check_pair
from alimm_ops.graph.intrinsics import LANES, lowest_bit, popcount, within
from alimm_ops.graph.lists_cpu import check_ids

_options = dict(nogil=True, cache=True, error_model="numpy")
_LOW = 0xFFFFFFFF
_ALL_ONES = 0xFFFFFFFFFFFFFFFF
_LARGEST = NO_DISTANCE << 32
_ALL = np.empty(0, np.uint8)
PLACES = 8
"""A block holds a multiple of so many neighbours."""


class PackedGraph(NamedTuple):
    """Blocks of all nodes, one after the other.

    Attributes:
        places: int64 (N + 1,), where each node's places begin, a multiple of 8.
        codes: uint64 (places * W,), for each node its neighbours' words, word-major.
        ids: int32 (places,), -1 pads.
        words: W.
    """

    places: NDArray[np.int64]
    codes: NDArray[np.uint64]
    ids: NDArray[np.int32]
    words: int

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks."""
        return self.places.nbytes + self.codes.nbytes + self.ids.nbytes


def pack(codes_NW: NDArray[np.uint64], indptr: NDArray[np.int64], edges: NDArray[np.int32]) -> PackedGraph:
    """Lay the codes of neighbours beside each node.

    Raises:
        ValueError: the edges are not those of a graph of these nodes.
    """
    check_graph(codes_NW, indptr, edges)
    places = np.zeros(len(indptr), np.int64)
    np.cumsum((np.diff(indptr) + PLACES - 1) // PLACES * PLACES, out=places[1:])
    words = codes_NW.shape[1]
    codes = np.zeros(int(places[-1]) * words, np.uint64)
    ids = np.full(int(places[-1]), NO_ID, np.int32)
    _pack(codes_NW, indptr, edges, places, codes, ids)
    return PackedGraph(places, codes, ids, words)


def packed_search(
    queries_QW: NDArray[np.uint64],
    codes_NW: NDArray[np.uint64],
    graph: PackedGraph,
    starts_QE: NDArray[np.int32],
    ef: int,
    allowed_N: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """Walk from the start nodes of each query; nodes and distances as of `beam_reference.beam_search`.

    Raises:
        ValueError: an id out of range, shapes that do not fit, or an ef below 1.
    """
    check_pair(queries_QW, codes_NW)
    check_ids("starts", starts_QE, len(codes_NW))
    if graph.words != codes_NW.shape[1] or len(graph.places) != len(codes_NW) + 1:
        raise ValueError(
            f"the packed graph has {len(graph.places) - 1} nodes of {graph.words} words, not those of codes"
        )
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
    allowed = _ALL if allowed_N is None else np.ascontiguousarray(allowed_N).view(np.uint8)
    most = int(np.diff(graph.places).max()) if len(codes_NW) else 0
    scratch = np.full(max(LANES, (most + LANES - 1) // LANES * LANES), NO_DISTANCE, np.uint16)
    queries = np.ascontiguousarray(queries_QW)
    _walk(queries, codes_NW, graph.places, graph.codes, graph.ids, starts_QE, ef, allowed, scratch, ids, dists)
    return ids, dists


@njit(**_options)
def _pack(codes, indptr, edges, places, packed, ids):
    words = codes.shape[1]
    for node in range(codes.shape[0]):
        start, size = places[node], places[node + 1] - places[node]
        for index in range(indptr[node + 1] - indptr[node]):
            target = np.int64(edges[indptr[node] + index])
            ids[start + index] = np.int32(target)
            for word in range(words):
                packed[start * words + word * size + index] = codes[target, word]


@intrinsic
def _eight_distances(_context, query, block, place, stride, out, target):
    """``out[target + j]``, j < 8: the distance to the code whose word w is ``block[place + w * stride + j]``."""

    def generate(context, builder, signature, arguments):
        query, block, out = (
            context.make_array(signature.args[index])(context, builder, arguments[index]) for index in (0, 1, 4)
        )
        place, stride, target = arguments[2], arguments[3], arguments[5]
        lanes = ir.VectorType(ir.IntType(64), PLACES)
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), PLACES), [0] * PLACES)
        total = cgutils.alloca_once_value(builder, ir.Constant(lanes, [0] * PLACES))
        kind = ir.FunctionType(lanes, [lanes])
        ctpop = cgutils.get_or_insert_function(builder.module, kind, f"llvm.ctpop.v{PLACES}i64")
        with cgutils.for_range(builder, builder.extract_value(query.shape, 0)) as loop:
            offset = builder.add(place, builder.mul(loop.index, stride))
            words = builder.load(builder.bitcast(builder.gep(block.data, [offset]), lanes.as_pointer()), align=8)
            word = builder.load(builder.gep(query.data, [loop.index]))
            single = builder.insert_element(ir.Constant(lanes, ir.Undefined), word, cgutils.int32_t(0))
            same = builder.shuffle_vector(single, ir.Constant(lanes, ir.Undefined), zeros)
            builder.store(builder.add(builder.load(total), builder.call(ctpop, [builder.xor(words, same)])), total)
        short = ir.VectorType(ir.IntType(16), PLACES)
        result = builder.trunc(builder.load(total), short)
        builder.store(result, builder.bitcast(builder.gep(out.data, [target]), short.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(query, block, types.int64, types.int64, out, types.int64), generate


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
def _walk(queries, codes, places, packed, packed_ids, starts, ef, allowed, scratch, ids, dists):
    # A key is distance << 32 | node << 1 | done: sorted by (distance, node), since no node is there twice.
    words = codes.shape[1]
    seen = np.zeros((codes.shape[0] + 63) >> 6, np.uint64)
    touched = np.empty(1024, np.int32)
    beam = np.empty(ef, np.uint64)
    best = np.empty(ef if allowed.size else 1, np.uint64)
    for row in range(queries.shape[0]):
        query = queries[row]
        num_seen = count = num_best = 0
        worst = best_worst = uint64(_ALL_ONES)
        following = ef
        source, size, start = np.int64(-1), np.int64(starts.shape[1]), np.int64(0)
        while True:
            if touched.size < num_seen + size:
                larger = np.empty(2 * touched.size + size, np.int32)
                larger[:num_seen] = touched[:num_seen]
                touched = larger
            if source >= 0:
                for first in range(0, size, PLACES):
                    _eight_distances(query, packed, start * words + first, size, scratch, first)
            bound = uint16(min(max(worst, best_worst) if allowed.size else worst, uint64(_LARGEST)) >> uint64(32))
            for first in range(0, size, LANES):
                hits = uint64(_LOW)
                if source >= 0:
                    hits = within(scratch, first, bound)
                if size - first < LANES:
                    hits &= (uint64(1) << uint64(size - first)) - uint64(1)
                while hits != uint64(0):
                    place = first + np.int64(lowest_bit(hits))
                    hits &= hits - uint64(1)
                    target = starts[row, place] if source < 0 else packed_ids[start + place]
                    if target < 0:
                        continue
                    node = uint64(target)
                    word, bit = node >> uint64(6), uint64(1) << (node & uint64(63))
                    if seen[word] & bit:
                        continue
                    if source < 0:
                        distance = popcount(query[0] ^ codes[node, 0])
                        for index in range(1, words):
                            distance += popcount(query[index] ^ codes[node, index])
                    else:
                        distance = uint64(scratch[place])
                    key = (distance << uint64(32)) | (node << uint64(1))
                    seen[word] |= bit
                    touched[uint64(num_seen)] = target
                    num_seen += 1
                    if allowed.size and allowed[node] and key < best_worst:
                        num_best, _ = _put(best, num_best, key)
                        if num_best == ef:
                            best_worst = best[ef - 1]
                    if key < worst:
                        count, position = _put(beam, count, key)
                        following = min(following, position)
                        if count == ef:
                            worst = beam[ef - 1]
            while following < count and beam[following] & uint64(1):
                following += 1
            if following >= count:
                break
            source = np.int64((beam[following] & uint64(_LOW)) >> uint64(1))
            beam[following] |= uint64(1)
            start = places[source]
            size = places[source + 1] - start
        for index in range(num_seen):
            seen[touched[index] >> 6] = 0
        results, num_results = (best, num_best) if allowed.size else (beam, count)
        for column in range(num_results):
            ids[row, column] = np.int32((results[column] & uint64(_LOW)) >> uint64(1))
            dists[row, column] = uint16(results[column] >> uint64(32))
