# mypy: allow-untyped-defs
"""Where a walk begins: the nearest entry codes of the nearest centres, by vector popcounts on the CPU.

Also `expand`, which turns nodes into rows: a node is a distinct code, a row an id that has it.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint16
from numpy.typing import NDArray

from alimm_ops.graph.hamming_cpu import TILE, _select, _tile_distances
from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID
from alimm_ops.graph.intrinsics import LANES

_options = dict(nogil=True, cache=True, error_model="numpy")


def entry_points(
    queries_QW: NDArray[np.uint64],
    centres_WM: NDArray[np.uint64],
    entry_indptr: NDArray[np.int64],
    entry_nodes: NDArray[np.int32],
    entry_codes_WE: NDArray[np.uint64],
    probes: int,
    starts: int,
) -> NDArray[np.int32]:
    """The ``starts`` nearest entries of the ``probes`` nearest centres, int32 (Q, starts); -1 pads.

    Ties go to the smaller centre, and among entries to the one that is listed first under the nearer centre.

    Args:
        queries_QW: codes.
        centres_WM: centres, word-major.
        entry_indptr: int64 (M + 1,), where the entries of each centre begin.
        entry_nodes: int32 (E,).
        entry_codes_WE: their codes, word-major.
        probes: centres looked at.
        starts: columns of the result.
    """
    if len(entry_indptr) != centres_WM.shape[1] + 1 or entry_indptr[0] != 0 or entry_indptr[-1] != len(entry_nodes):
        raise ValueError(f"entry_indptr must rise from 0 to {len(entry_nodes)} in {centres_WM.shape[1] + 1} steps")
    if (np.diff(entry_indptr) < 0).any() or entry_codes_WE.shape[1] != len(entry_nodes):
        raise ValueError("entry_indptr falls, or entry codes and nodes differ in number")
    out = np.full((len(queries_QW), starts), NO_ID, np.int32)
    probes = min(probes, centres_WM.shape[1])
    if probes and len(queries_QW):
        widest = int(np.sort(np.diff(entry_indptr))[-probes:].sum())
        _entries(queries_QW, centres_WM, entry_indptr, entry_nodes, entry_codes_WE, probes, widest, out)
    return out


@njit(**_options)
def _entries(queries, centres, entry_indptr, entry_nodes, entry_codes, probes, widest, out):
    num_centres, starts = centres.shape[1], out.shape[1]
    limit = 64 * centres.shape[0]
    far = np.full((1, (num_centres + LANES - 1) // LANES * LANES), np.uint16(NO_DISTANCE), np.uint16)
    near = np.full((1, (widest + 2 * LANES) // LANES * LANES), np.uint16(NO_DISTANCE), np.uint16)
    keys = np.empty(max(probes, starts) + 1, np.uint64)
    chosen, chosen_far = np.empty(probes, np.int32), np.empty(probes, np.uint16)
    found, found_far = np.empty(starts, np.int32), np.empty(starts, np.uint16)
    for row in range(queries.shape[0]):
        for start in range(0, num_centres, TILE):
            stop = min(start + TILE, num_centres)
            _tile_distances(queries, row, row + 1, centres, start, stop, far, start)
        count = _select(far[0], probes, limit, 0, keys, chosen, chosen_far)
        used = 0
        for place in range(count):
            first, last = entry_indptr[chosen[place]], entry_indptr[chosen[place] + 1]
            for start in range(first, last, TILE):
                stop = min(start + TILE, last)
                _tile_distances(queries, row, row + 1, entry_codes, start, stop, near, used)
                used += stop - start
        padded = (used + LANES - 1) // LANES * LANES
        near[0, used:padded] = uint16(NO_DISTANCE)
        count = _select(near[0, :padded], starts, limit, 0, keys, found, found_far)
        for column in range(count):
            index = np.int64(found[column])
            for place in range(probes):
                first, last = entry_indptr[chosen[place]], entry_indptr[chosen[place] + 1]
                if index < last - first:
                    out[row, column] = entry_nodes[first + index]
                    break
                index -= last - first


def expand(
    nodes_QE: NDArray[np.int32],
    dists_QE: NDArray[np.uint16],
    row_indptr: NDArray[np.int64],
    ids: NDArray[np.int64],
    live_rows: NDArray[np.bool_] | None,
    k: int,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The k nearest rows of nodes.

    Args:
        nodes_QE: sorted by distance, -1 pads.
        dists_QE: their distances.
        row_indptr: int64 (n + 1,), where the rows of each node begin.
        ids: int64 (N,), ascending inside a node.
        live_rows: bool (N,), rows that may be returned; None: all.
        k: columns of the result.

    Returns:
        Distances int32 and ids int64, (Q, k), sorted by (distance, id), padded with (-1, -1).
    """
    distances = np.full((len(nodes_QE), k), -1, np.int32)
    found = np.full((len(nodes_QE), k), -1, np.int64)
    live = np.empty(0, np.bool_) if live_rows is None else live_rows
    _expand(nodes_QE, dists_QE, row_indptr, ids, live, distances, found)
    return distances, found


@njit(**_options)
def _expand(nodes, dists, row_indptr, ids, live, distances, found):
    k = found.shape[1]
    for query in range(nodes.shape[0]):
        count = 0
        for column in range(nodes.shape[1]):
            node = np.int64(nodes[query, column])
            if node < 0:
                break
            distance = np.int32(dists[query, column])
            if count == k and distance > distances[query, k - 1]:
                break
            taken = 0
            for row in range(row_indptr[node], row_indptr[node + 1]):
                if live.size and not live[row]:
                    continue
                if taken == k:
                    break  # the ids of a node ascend
                taken += 1
                place = count
                if count == k:
                    if ids[row] > found[query, k - 1] and distance == distances[query, k - 1]:
                        break
                    place -= 1
                while place > 0 and distances[query, place - 1] == distance and found[query, place - 1] > ids[row]:
                    distances[query, place] = distances[query, place - 1]
                    found[query, place] = found[query, place - 1]
                    place -= 1
                distances[query, place] = distance
                found[query, place] = ids[row]
                count = min(count + 1, k)
