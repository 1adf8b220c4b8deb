"""Neighbour lists of binary codes in NumPy: the oracle of ``lists_cpu.py`` and ``lists_cuda.py``.

A list is a row of ids int32 and distances uint16, sorted by (distance, id), without repetition and without the owner;
(-1, 65535) pads it. "The k best under a total order" is idempotent, commutative and associative: lists may be merged in
any order and more than once with the same result.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID, hamming_matrix

Lists = tuple[NDArray[np.int32], NDArray[np.uint16]]


def merge_lists(ids_RA: NDArray[np.int32], dists_RA: NDArray[np.uint16], k: int) -> Lists:
    """The k best entries of each row, (R, k); entries come in any order and may repeat."""
    ids, dists = _empty(len(ids_RA), k)
    for row in range(len(ids_RA)):
        entries = {(int(d), int(i)) for d, i in zip(dists_RA[row], ids_RA[row], strict=True) if i >= 0}
        _fill(ids, dists, row, sorted(entries)[:k])
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
    """One breadth-first round: the list of a row takes the best of its neighbours' lists.

    A pair (neighbour, entry of its list) that was there a round ago has been looked at; it is skipped unless one of its
    two edges is fresh.

    Args:
        codes_LW: codes of all nodes that occur.
        ids_LK: neighbour lists of the nodes; where a list is not needed, -1.
        dists_LK: their distances.
        fresh_LK: 1 where an entry came in the last round.
        rows_R: the nodes to update.
        hops_RH: for each row the nodes whose lists it looks into (its neighbours, and nodes that have it for a
            neighbour); -1 pads, at any place.
        hop_fresh_RH: 1 where that edge is fresh.
        width: how many entries of each list are looked at.

    Returns:
        New ids and distances (R, K), and 1 where an entry is not in the old list.
    """
    num, k = len(rows_R), ids_LK.shape[1]
    ids, dists = _empty(num, k)
    fresh = np.zeros((num, k), np.uint8)
    for row, node in enumerate(rows_R):
        old = {(int(d), int(i)) for d, i in zip(dists_LK[node], ids_LK[node], strict=True) if i >= 0}
        found = set()
        for hop, hop_fresh in zip(hops_RH[row], hop_fresh_RH[row], strict=True):
            if hop < 0:
                continue
            for column in range(min(width, k)):
                candidate = int(ids_LK[hop, column])
                if candidate >= 0 and candidate != node and (hop_fresh or fresh_LK[hop, column]):
                    found.add(candidate)
        candidates = np.array(sorted(found), np.int64)
        distances = hamming_matrix(codes_LW[[node]], codes_LW[candidates])[0] if len(candidates) else []
        best = sorted(old | {(int(d), int(i)) for d, i in zip(distances, candidates, strict=True)})[:k]
        _fill(ids, dists, row, best)
        for column, entry in enumerate(best):
            fresh[row, column] = entry not in old
    return ids, dists, fresh


def reverse_lists(
    ids_LK: NDArray[np.int32], dists_LK: NDArray[np.uint16], num_nodes: int, width: int, keep: int, first_node: int = 0
) -> Lists:
    """Who has a node in the first ``width`` places of its list: the ``keep`` nearest such, sorted by (distance, id).

    Args:
        ids_LK: lists of the nodes ``first_node`` to ``first_node + L - 1``; entries in [0, num_nodes).
        dists_LK: their distances.
        num_nodes: rows of the result.
        width: places looked at.
        keep: columns of the result.
        first_node: node of row 0.
    """
    ids, dists = _empty(num_nodes, keep)
    sources: list[list[tuple[int, int]]] = [[] for _ in range(num_nodes)]
    for row in range(len(ids_LK)):
        for column in range(min(width, ids_LK.shape[1])):
            if ids_LK[row, column] >= 0:
                sources[ids_LK[row, column]].append((int(dists_LK[row, column]), first_node + row))
    for node, entries in enumerate(sources):
        _fill(ids, dists, node, sorted(entries)[:keep])
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
    """Drop the edges that another edge makes superfluous.

    Candidates are taken nearest first. The first ``min_near`` stay. A later one, j, of node i goes where some q that
    stays is much nearer to it than i is: ``alpha_num * h(q, j) < alpha_den * h(i, j)``; and where it is exactly as near
    and q and j are equally far from i, so that of codes that are all equally far from one another not all stay.

    Args:
        codes_LW: codes of all nodes that occur.
        rows_R: the nodes i.
        ids_RC: candidates of each, as lists; they never hold i.
        dists_RC: their distances to i.
        max_degree: columns of the result.
        alpha_num: with ``alpha_den`` the relaxation of Vamana (alpha = num / den >= 1 keeps more edges).
        alpha_den: see above.
        min_near: at least so many nearest stay.
    """
    ids, dists = _empty(len(rows_R), max_degree)
    for row in range(len(rows_R)):
        kept: list[tuple[int, int]] = []
        for d_ij, j in zip(dists_RC[row].tolist(), ids_RC[row].tolist(), strict=True):
            if j < 0 or len(kept) == max_degree:
                break
            if len(kept) >= min_near:
                between = hamming_matrix(codes_LW[[j]], codes_LW[[q for _, q in kept]])[0].tolist()
                if any(
                    alpha_num * d_qj < alpha_den * d_ij or (d_qj == d_ij and d_iq == d_ij)
                    for d_qj, (d_iq, _) in zip(between, kept, strict=True)
                ):
                    continue
            kept.append((d_ij, j))
        _fill(ids, dists, row, kept)
    return ids, dists


def _empty(rows: int, columns: int) -> Lists:
    return np.full((rows, columns), NO_ID, np.int32), np.full((rows, columns), NO_DISTANCE, np.uint16)


def _fill(ids: NDArray[np.int32], dists: NDArray[np.uint16], row: int, entries: list[tuple[int, int]]) -> None:
    for column, (distance, node) in enumerate(entries):
        ids[row, column], dists[row, column] = node, distance
