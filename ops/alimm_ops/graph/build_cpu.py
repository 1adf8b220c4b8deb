# mypy: allow-untyped-defs
"""Small kernels of a graph build on the CPU: hashing, renumbering, merging blocks, connected parts and reach."""

from __future__ import annotations

import numpy as np
from numba import njit, uint32, uint64
from numpy.typing import NDArray

from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID
from alimm_ops.graph.intrinsics import popcount
from alimm_ops.graph.lists_cpu import check_ids

_options = dict(nogil=True, cache=True, error_model="numpy")


@njit(inline="always")
def _mix(word):
    # The finaliser of SplitMix64.
    word = (word ^ (word >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> uint64(27))) * uint64(0x94D049BB133111EB)
    return word ^ (word >> uint64(31))


@njit(**_options)
def _hash(codes, seed, out):
    for row in range(codes.shape[0]):
        value = _mix(uint64(seed) + uint64(0x9E3779B97F4A7C15))
        for word in range(codes.shape[1]):
            value = _mix(value ^ codes[row, word]) + uint64(0x9E3779B97F4A7C15)
        out[row] = _mix(value)


def hash_codes(codes_NW: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """A hash of each code, uint64 (N,): equal for equal codes on every machine, spread evenly."""
    out = np.empty(len(codes_NW), np.uint64)
    _hash(codes_NW, np.uint64(seed), out)
    return out


class Renumbering:
    """From nodes of the whole graph to places in a sorted selection of them, in constant time each.

    Args:
        num_nodes: of the whole graph; a bit and half a bit more is held for each.
    """

    def __init__(self, num_nodes: int) -> None:
        self.num_nodes = num_nodes
        self._bits = np.zeros((num_nodes + 63) // 64, np.uint64)
        self._before = np.zeros(len(self._bits) + 1, np.int32)

    def add(self, ids: NDArray[np.int32]) -> None:
        """Select nodes; -1 is passed over."""
        check_ids("ids", ids, self.num_nodes)
        _mark(self._bits, ids.ravel())

    def finish(self) -> NDArray[np.int32]:
        """The selected nodes, ascending; afterwards `places` answers."""
        _count_before(self._bits, self._before)
        nodes = np.empty(self._before[-1], np.int32)
        _list_bits(self._bits, nodes)
        return nodes

    def places(self, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """Place of each node in the selection; -1 where it is not in it."""
        check_ids("ids", ids, self.num_nodes)
        out = np.empty(ids.size, np.int32)
        _places(self._bits, self._before, ids.ravel(), out)
        return out.reshape(ids.shape)


@njit(**_options)
def _mark(bits, ids):
    for node in ids:
        if node >= 0:
            bits[node >> 6] |= uint64(1) << uint64(node & 63)


@njit(**_options)
def _count_before(bits, before):
    for word in range(bits.size):
        before[word + 1] = before[word] + np.int32(popcount(bits[word]))


@njit(**_options)
def _list_bits(bits, nodes):
    count = 0
    for word in range(bits.size):
        rest = bits[word]
        while rest:
            lowest = rest & (~rest + uint64(1))
            nodes[count] = (word << 6) + np.int64(popcount(lowest - uint64(1)))
            count += 1
            rest ^= lowest


@njit(**_options)
def _places(bits, before, ids, out):
    for index in range(ids.size):
        node = ids[index]
        out[index] = -1
        if node >= 0:
            bit = uint64(1) << uint64(node & 63)
            word = bits[node >> 6]
            if word & bit:
                out[index] = before[node >> 6] + np.int32(popcount(word & (bit - uint64(1))))


def insert_blocks(
    owners_B: NDArray[np.int32],
    starts_B: NDArray[np.int64],
    new_ids: NDArray[np.int32],
    new_dists: NDArray[np.uint16],
    ids_RK: NDArray[np.int32],
    dists_RK: NDArray[np.uint16],
    fresh_RK: NDArray[np.uint8],
) -> None:
    """Put entries into sorted lists, in place; one that is there already changes nothing.

    Args:
        owners_B: row that each block of entries is for.
        starts_B: int64 (B + 1,), where its entries begin.
        new_ids: entries of all blocks.
        new_dists: their distances.
        ids_RK: lists, changed.
        dists_RK: their distances, changed.
        fresh_RK: goes with the entries; 1 for the new ones.
    """
    if len(owners_B) and not 0 <= owners_B.min() <= owners_B.max() < len(ids_RK):
        raise ValueError(f"owners must be from 0 to {len(ids_RK) - 1}, got {owners_B.min()} to {owners_B.max()}")
    if len(starts_B) != len(owners_B) + 1 or (np.diff(starts_B) < 0).any() or starts_B[-1] != len(new_ids):
        raise ValueError("starts of blocks must rise from 0 to the number of entries")
    if not ids_RK.shape == dists_RK.shape == fresh_RK.shape or len(new_ids) != len(new_dists):
        raise ValueError("ids, distances and flags differ in shape")
    _insert_blocks(owners_B, starts_B, new_ids, new_dists, ids_RK, dists_RK, fresh_RK)


def insert_edges(
    targets_E: NDArray[np.int32],
    sources_E: NDArray[np.int32],
    dists_E: NDArray[np.uint16],
    flags_E: NDArray[np.uint8],
    rows: int,
    keep: int,
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.uint8]]:
    """The nearest sources of each target: ids and distances (rows, keep), sorted by (distance, id), and their flags.

    No pair of target and source may come twice.
    """
    if len(targets_E) and not 0 <= targets_E.min() <= targets_E.max() < rows:
        raise ValueError(f"targets must be from 0 to {rows - 1}, got {targets_E.min()} to {targets_E.max()}")
    if not len(targets_E) == len(sources_E) == len(dists_E) == len(flags_E):
        raise ValueError("targets, sources, distances and flags differ in number")
    ids = np.full((rows, keep), NO_ID, np.int32)
    dists = np.full((rows, keep), NO_DISTANCE, np.uint16)
    flags = np.zeros((rows, keep), np.uint8)
    _insert_edges(targets_E, sources_E, dists_E, flags_E, np.zeros(rows, np.int32), ids, dists, flags)
    return ids, dists, flags


@njit(**_options)
def _insert_edges(targets, sources, new_dists, new_flags, counts, ids, dists, flags):
    keep = ids.shape[1]
    for edge in range(targets.size):
        row, node, distance = targets[edge], sources[edge], new_dists[edge]
        count = counts[row]
        if count == keep:
            last = dists[row, keep - 1]
            if distance > last or (distance == last and node > ids[row, keep - 1]):
                continue
            count -= 1
        place = count
        while place > 0:
            before = dists[row, place - 1]
            if before < distance or (before == distance and ids[row, place - 1] < node):
                break
            ids[row, place], dists[row, place] = ids[row, place - 1], before
            flags[row, place] = flags[row, place - 1]
            place -= 1
        ids[row, place], dists[row, place], flags[row, place] = node, distance, new_flags[edge]
        counts[row] = count + 1


@njit(**_options)
def _insert_blocks(owners, starts, new_ids, new_dists, ids, dists, fresh):
    k = ids.shape[1]
    for block in range(owners.size):
        row = np.int64(owners[block])
        count = k
        while count > 0 and ids[row, count - 1] < 0:
            count -= 1
        for entry in range(starts[block], starts[block + 1]):
            node, distance = new_ids[entry], new_dists[entry]
            place = count
            known = False
            while place > 0:
                before = dists[row, place - 1]
                if before < distance or (before == distance and ids[row, place - 1] <= node):
                    known = before == distance and ids[row, place - 1] == node
                    break
                place -= 1
            if known or place == k:
                continue
            count = min(count + 1, k)
            for other in range(count - 1, place, -1):
                ids[row, other], dists[row, other] = ids[row, other - 1], dists[row, other - 1]
                fresh[row, other] = fresh[row, other - 1]
            ids[row, place], dists[row, place], fresh[row, place] = node, distance, 1


def union_edges(parents_N: NDArray[np.int32], first_node: int, ids_RD: NDArray[np.int32]) -> None:
    """Union-find over edges ``first_node + row -> ids[row]``, in place; a root is the least node of its part."""
    check_ids("ids", ids_RD, len(parents_N))
    if first_node < 0 or first_node + len(ids_RD) > len(parents_N):
        raise ValueError(f"rows {first_node} to {first_node + len(ids_RD)} are not among {len(parents_N)} nodes")
    _union(parents_N, first_node, ids_RD)


@njit(**_options)
def find_root(parents, node):
    """Root of a node; the way to it is halved."""
    while parents[node] != node:
        parents[node] = parents[parents[node]]
        node = np.int64(parents[node])
    return node


@njit(**_options)
def _union(parents, first_node, ids):
    for row in range(ids.shape[0]):
        a = find_root(parents, np.int64(first_node + row))
        for column in range(ids.shape[1]):
            if ids[row, column] < 0:
                continue
            b = find_root(parents, np.int64(ids[row, column]))
            if a < b:
                parents[b] = a
            elif b < a:
                parents[a] = b
                a = b


@njit(**_options)
def roots(parents):
    """Root of every node, int32 (N,)."""
    out = np.empty(parents.size, np.int32)
    for node in range(parents.size):
        out[node] = find_root(parents, node)
    return out


def spread(reached_N: NDArray[np.uint8], first_node: int, ids_RD: NDArray[np.int32]) -> int:
    """Mark what can be reached along the edges of these rows, in place; how many nodes are new."""
    check_ids("ids", ids_RD, len(reached_N))
    return int(_spread(reached_N, first_node, ids_RD))


@njit(**_options)
def _spread(reached, first_node, ids):
    total = uint32(0)
    rows = ids.shape[0]
    stack = np.empty(rows, np.int32)
    looked = np.zeros(rows, np.bool_)
    for begin in range(rows):
        if not reached[first_node + begin] or looked[begin]:
            continue
        looked[begin] = True
        stack[0] = begin
        depth = 1
        while depth:
            depth -= 1
            row = stack[depth]
            for column in range(ids.shape[1]):
                node = np.int64(ids[row, column])
                if node < 0 or reached[node]:
                    continue
                reached[node] = 1
                total += uint32(1)
                local = node - first_node
                if 0 <= local < rows and not looked[local]:
                    looked[local] = True
                    stack[depth] = local
                    depth += 1
    return total
