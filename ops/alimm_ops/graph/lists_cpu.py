# mypy: allow-untyped-defs
"""Neighbour lists of binary codes on the CPU, in Numba: the results of ``lists_reference.py``.

Each function works through its rows one after the other and releases the interpreter's lock: who wants more processors
calls it from more threads or processes, with rows of their own.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint16
from numpy.typing import NDArray

from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID
from alimm_ops.graph.intrinsics import popcount, prefetch
from alimm_ops.graph.lists_reference import Lists

_options = dict(nogil=True, cache=True, error_model="numpy")


def merge_lists(ids_RA: NDArray[np.int32], dists_RA: NDArray[np.uint16], k: int) -> Lists:
    """The k best entries of each row; see the reference."""
    _check_same_shape(ids_RA, dists_RA, len(ids_RA))
    _check_columns("k", k)
    ids, dists = _empty(len(ids_RA), k)
    _merge(ids_RA, dists_RA, ids, dists)
    return ids, dists


def propagate(
    codes_LW: NDArray[np.uint64],
    ids_LK: NDArray[np.int32],
    dists_LK: NDArray[np.uint16],
    fresh_LK: NDArray[np.uint8],
    rows_R: NDArray[np.int32],
    hops_RH: NDArray[np.int32],
    hop_fresh_RH: NDArray[np.uint8],
    width: int,
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.uint8]]:
    """One breadth-first round; see the reference.

    A candidate that the triangle inequality rules out, |h(i, b) - h(b, j)| above the k-th distance of i, is never
    compared; that changes no list, so long as the distances of the old ones are the true ones.

    Raises:
        ValueError: shapes that do not fit, or an id out of range.
    """
    check_ids("ids", ids_LK, len(codes_LW))
    check_ids("rows", rows_R, len(codes_LW))
    check_ids("hops", hops_RH, len(codes_LW))
    if not ids_LK.shape == dists_LK.shape == fresh_LK.shape or len(ids_LK) != len(codes_LW):
        raise ValueError(f"expected lists of {len(codes_LW)} nodes, got {ids_LK.shape}, {dists_LK.shape}")
    _check_columns("the lists' length", ids_LK.shape[1])
    if len(rows_R) and rows_R.min() < 0:
        raise ValueError("rows must be nodes, got -1")
    if hops_RH.shape != hop_fresh_RH.shape or len(hops_RH) != len(rows_R):
        raise ValueError(f"expected hops of {len(rows_R)} rows, got {hops_RH.shape} and {hop_fresh_RH.shape}")
    ids, dists = _empty(len(rows_R), ids_LK.shape[1])
    fresh = np.zeros(ids.shape, np.uint8)
    _propagate(
        np.ascontiguousarray(codes_LW),
        np.ascontiguousarray(ids_LK),
        np.ascontiguousarray(dists_LK),
        np.ascontiguousarray(fresh_LK),
        rows_R,
        hops_RH,
        hop_fresh_RH,
        width,
        ids,
        dists,
        fresh,
    )
    return ids, dists, fresh


def reverse_lists(
    ids_LK: NDArray[np.int32], dists_LK: NDArray[np.uint16], num_nodes: int, width: int, keep: int, first_node: int = 0
) -> Lists:
    """Who has a node near the front of its list; see the reference.

    Raises:
        ValueError: an id out of range.
    """
    check_ids("ids", ids_LK, num_nodes)
    _check_columns("keep", keep)
    _check_same_shape(ids_LK, dists_LK, len(ids_LK))
    ids, dists = _empty(num_nodes, keep)
    _reverse(ids_LK, dists_LK, min(width, ids_LK.shape[1]), first_node, ids, dists)
    return ids, dists


def diversify(
    codes_LW: NDArray[np.uint64],
    rows_R: NDArray[np.int32],
    ids_RC: NDArray[np.int32],
    dists_RC: NDArray[np.uint16],
    max_degree: int,
    alpha_num: int,
    alpha_den: int,
    min_near: int,
) -> Lists:
    """Drop the edges that another edge makes superfluous; see the reference.

    Raises:
        ValueError: an id out of range.
    """
    check_ids("rows", rows_R, len(codes_LW))
    check_ids("ids", ids_RC, len(codes_LW))
    _check_columns("max_degree", max_degree)
    _check_same_shape(ids_RC, dists_RC, len(rows_R))
    ids, dists = _empty(len(rows_R), max_degree)
    _diversify(np.ascontiguousarray(codes_LW), ids_RC, dists_RC, alpha_num, alpha_den, min_near, ids, dists)
    return ids, dists


def check_ids(name: str, ids: NDArray[np.int32], stop: int) -> None:
    """Raise ValueError unless every id is -1 or in [0, stop): the kernels check no bounds."""
    if ids.size and not -1 <= ids.min() <= ids.max() < stop:
        raise ValueError(f"{name} must be from 0 to {stop - 1}, or -1; got {ids.min()} to {ids.max()}")


def _check_columns(name: str, columns: int) -> None:
    if columns < 1:
        raise ValueError(f"{name} must be at least 1, got {columns}")


def _check_same_shape(ids: NDArray[np.int32], dists: NDArray[np.uint16], rows: int) -> None:
    if ids.shape != dists.shape or len(ids) != rows:
        raise ValueError(f"expected ids and distances of {rows} rows, got {ids.shape} and {dists.shape}")


def _empty(rows: int, columns: int) -> Lists:
    return np.full((rows, columns), NO_ID, np.int32), np.full((rows, columns), NO_DISTANCE, np.uint16)


@njit(**_options)
def distance_between(codes, a, b):
    """Hamming distance of two rows of ``codes``."""
    result = popcount(codes[a, 0] ^ codes[b, 0])
    for word in range(1, codes.shape[1]):
        result += popcount(codes[a, word] ^ codes[b, word])
    return np.int64(result)


@njit(**_options)
def insert(ids, dists, count, node, distance):
    """Put an entry that is not there into a sorted row of which ``count`` are used; the new count."""
    size = ids.size
    if count == size:
        last = np.int64(dists[size - 1])
        if distance > last or (distance == last and node > ids[size - 1]):
            return count
        count -= 1
    place = count
    while place > 0:
        before = np.int64(dists[place - 1])
        if before < distance or (before == distance and ids[place - 1] < node):
            break
        ids[place] = ids[place - 1]
        dists[place] = dists[place - 1]
        place -= 1
    ids[place] = node
    dists[place] = uint16(distance)
    return count + 1


@njit(**_options)
def _merge(given_ids, given_dists, ids, dists):
    for row in range(given_ids.shape[0]):
        count = 0
        for column in range(given_ids.shape[1]):
            node = given_ids[row, column]
            if node < 0:
                continue
            known = False
            for place in range(count):
                if ids[row, place] == node and dists[row, place] == given_dists[row, column]:
                    known = True
            if not known:
                count = insert(ids[row], dists[row], count, node, np.int64(given_dists[row, column]))


@njit(**_options)
def _propagate(codes, old_ids, old_dists, old_fresh, rows, hops, hop_fresh, width, ids, dists, fresh):
    k = old_ids.shape[1]
    width = min(width, k)
    seen = np.full(codes.shape[0], -1, np.int32)
    found = np.empty(width, np.int32)
    for row in range(rows.size):
        node = np.int64(rows[row])
        own_ids, own_dists = ids[row], dists[row]
        count = 0
        seen[node] = row
        for column in range(k):
            if old_ids[node, column] < 0:
                break
            own_ids[column] = old_ids[node, column]
            own_dists[column] = old_dists[node, column]
            seen[own_ids[column]] = row
            count += 1
        farthest = np.int64(own_dists[k - 1])  # 65535 while there is room
        for column in range(hops.shape[1]):
            hop = np.int64(hops[row, column])
            if hop < 0:
                continue
            if column + 1 < hops.shape[1] and hops[row, column + 1] >= 0:
                # Lists lie anywhere in memory: the next one is on the way while this one is looked at.
                ahead = np.int64(hops[row, column + 1])
                prefetch(codes, ahead)
                prefetch(old_ids, ahead)
                prefetch(old_dists, ahead)
                prefetch(old_fresh, ahead)
            all_of_it = hop_fresh[row, column] != 0
            num_found = 0
            to_hop = distance_between(codes, node, hop)
            for place in range(width):
                candidate = old_ids[hop, place]
                if candidate < 0:
                    break
                if not (all_of_it or old_fresh[hop, place] != 0) or seen[candidate] == row:
                    continue
                seen[candidate] = row
                if abs(to_hop - np.int64(old_dists[hop, place])) > farthest:
                    # Its true distance is no less, from whichever hop it is looked at.
                    continue
                prefetch(codes, np.int64(candidate))
                found[num_found] = candidate
                num_found += 1
            for index in range(num_found):
                distance = distance_between(codes, node, np.int64(found[index]))
                if distance > farthest:
                    continue
                count = insert(own_ids, own_dists, count, found[index], distance)
                farthest = np.int64(own_dists[k - 1])
        place = 0
        for column in range(count):
            # Both lists are sorted: an entry is old where it meets itself.
            while (
                place < k
                and old_ids[node, place] >= 0
                and _before(old_dists, old_ids, node, place, dists, ids, row, column)
            ):
                place += 1
            same = place < k and old_ids[node, place] == ids[row, column]
            fresh[row, column] = 0 if same else 1


@njit(**_options)
def _before(dists_a, ids_a, row_a, column_a, dists_b, ids_b, row_b, column_b):
    a, b = dists_a[row_a, column_a], dists_b[row_b, column_b]
    return a < b or (a == b and ids_a[row_a, column_a] < ids_b[row_b, column_b])


@njit(**_options)
def _reverse(given_ids, given_dists, width, first_node, ids, dists):
    keep = ids.shape[1]
    for row in range(given_ids.shape[0]):
        for column in range(width):
            node = np.int64(given_ids[row, column])
            if node < 0:
                break
            distance = np.int64(given_dists[row, column])
            if distance > np.int64(dists[node, keep - 1]):
                continue
            count = keep
            while count > 0 and ids[node, count - 1] < 0:
                count -= 1
            insert(ids[node], dists[node], count, np.int32(first_node + row), distance)


@njit(**_options)
def _diversify(codes, given_ids, given_dists, alpha_num, alpha_den, min_near, ids, dists):
    max_degree = ids.shape[1]
    for row in range(given_ids.shape[0]):
        count = 0
        for column in range(given_ids.shape[1]):
            node = np.int64(given_ids[row, column])
            if node < 0 or count == max_degree:
                break
            distance = np.int64(given_dists[row, column])
            keep = True
            if count >= min_near:
                for place in range(count):
                    between = distance_between(codes, np.int64(ids[row, place]), node)
                    if alpha_num * between < alpha_den * distance or (
                        between == distance and np.int64(dists[row, place]) == distance
                    ):
                        keep = False
                        break
            if keep:
                ids[row, count] = np.int32(node)
                dists[row, count] = uint16(distance)
                count += 1
