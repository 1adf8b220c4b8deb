"""Search in one segment: entry points, a best-first walk, and from nodes to ids."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.segment import Segment
from alimm_ops.graph.beam_cpu import beam_search
from alimm_ops.graph.entry_cpu import entry_points, expand
from alimm_ops.graph.hamming_cpu import hamming_matrix, nearest_into, word_major
from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID
from alimm_ops.graph.lists_cpu import merge_lists

PROBES = 8
"""Centres whose entries are looked at, at least; a wide beam looks at one for every eight places."""
STARTS = 8
"""Entries that a walk begins with, at least; a wide beam with one for every eight places."""
EXACT_BLOCK = 1 << 16
"""Codes that a scan turns word-major at a time."""
SORTED_FROM = 512
"""From so many neighbours on a scan sorts all distances."""
BATCH_BYTES = 1 << 26
"""For the beams of the queries that walk together."""


class _Plan(NamedTuple):
    """What a search needs and a file does not hold.

    Attributes:
        centres: word-major.
        entry_codes: word-major.
        ordered: of an exact segment, its nodes by their smallest id.
    """

    centres: NDArray[np.uint64]
    entry_codes: NDArray[np.uint64]
    ordered: NDArray[np.int64] | None


_plans: WeakKeyDictionary[Segment, _Plan] = WeakKeyDictionary()


def _plan(segment: Segment) -> _Plan:
    plan = _plans.get(segment)
    if plan is None:
        ordered = None
        if len(segment.centres) == 0:
            ordered = np.argsort(segment.ids[segment.row_indptr[:-1]], kind="stable")
        plan = _Plan(word_major(segment.centres), word_major(segment.entry_codes), ordered)
        _plans[segment] = plan
    return plan


def nodes_of(segment: Segment, live_rows: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Nodes with a live row: 1, the others: 0; uint8 (n,)."""
    if not segment.num_nodes:
        return np.empty(0, np.uint8)
    return np.maximum.reduceat(live_rows.view(np.uint8), segment.row_indptr[:-1])


def search_segment(
    segment: Segment,
    queries: NDArray[np.uint64],
    k: int,
    ef: int,
    live_rows: NDArray[np.bool_] | None = None,
    live_nodes: NDArray[np.uint8] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The k nearest rows of each query, approximately; exactly where the segment has no graph or ef reaches its size.

    Args:
        segment: validated; the kernels check nothing.
        queries: uint64 (Q, W).
        k: columns of the result.
        ef: width of the walk's beam; below k it is k.
        live_rows: bool (N,) in the order of ``segment.ids``; False is never returned, but walked through. None: all.
        live_nodes: what `nodes_of` makes of them, for who searches more than once.

    Returns:
        Distances int32 and ids int64, (Q, k), sorted by (distance, id), padded with (-1, -1).
    """
    if queries.shape[1] != segment.codes.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} words, the index has {segment.codes.shape[1]}")
    queries = np.ascontiguousarray(queries, np.uint64)
    width = min(max(ef, k), segment.num_nodes)
    exact = len(segment.centres) == 0 or width == segment.num_nodes
    if live_rows is not None and live_nodes is None and not exact:
        live_nodes = nodes_of(segment, live_rows)
    step = max(1, BATCH_BYTES // (8 * max(width, k, 1)))
    found = [
        expand(
            *(
                _exact(segment, queries[start : start + step], k, live_rows)
                if exact
                else _walk(segment, queries[start : start + step], width, live_nodes)
            ),
            segment.row_indptr,
            segment.ids,
            live_rows,
            k,
        )
        for start in range(0, max(len(queries), 1), step)
    ]
    if len(found) == 1:
        return found[0]
    return np.concatenate([piece[0] for piece in found]), np.concatenate([piece[1] for piece in found])


def _walk(
    segment: Segment, queries: NDArray[np.uint64], width: int, live_nodes: NDArray[np.uint8] | None
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    plan = _plan(segment)
    # A wider beam does not help where the walk is on the wrong island: it must also begin at more places.
    probes, begin = max(PROBES, width // 8), max(STARTS, width // 8)
    starts = entry_points(
        queries, plan.centres, segment.entry_indptr, segment.entry_nodes, plan.entry_codes, probes, begin
    )
    nodes, dists, _ = beam_search(
        queries, segment.codes, segment.indptr, segment.edges, starts, width, live_nodes, trusted=True
    )
    return nodes, dists


def _exact(
    segment: Segment, queries: NDArray[np.uint64], k: int, live_rows: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """The k nearest nodes, all compared; of those as near as the k-th, the ones with the smallest ids."""
    if live_rows is None:
        ordered = _plan(segment).ordered
        nodes = np.argsort(segment.ids[segment.row_indptr[:-1]], kind="stable") if ordered is None else ordered
    else:
        rows = np.flatnonzero(live_rows)
        owners, first = np.unique(np.searchsorted(segment.row_indptr, rows, side="right") - 1, return_index=True)
        nodes = owners[np.argsort(segment.ids[rows[first]], kind="stable")]
    width = min(k, len(nodes))
    if not width:
        return np.full((len(queries), 1), NO_ID, np.int32), np.full((len(queries), 1), NO_DISTANCE, np.uint16)
    places, dists = _scan(segment.codes, nodes, queries, width)
    return np.where(places >= 0, nodes[places], NO_ID).astype(np.int32), dists


def _scan(
    codes: NDArray[np.uint64], nodes: NDArray[np.int64], queries: NDArray[np.uint64], width: int
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """The nearest of some nodes, as places in ``nodes``."""
    if width > SORTED_FROM:
        # A stable sort of 16-bit numbers is a radix sort.
        far = hamming_matrix(queries, codes[nodes])
        order = np.argsort(far, axis=1, kind="stable")[:, :width]
        return order.astype(np.int32), np.take_along_axis(far, order, axis=1)
    ids = np.full((len(queries), width), NO_ID, np.int32)
    dists = np.full((len(queries), width), NO_DISTANCE, np.uint16)
    bounds = np.full(len(queries), NO_DISTANCE - 1, np.uint16)
    for start in range(0, len(nodes), EXACT_BLOCK):
        found, far = np.full_like(ids, NO_ID), np.full_like(dists, NO_DISTANCE)
        block = word_major(codes[nodes[start : start + EXACT_BLOCK]])
        nearest_into(queries, block, start, -1, bounds, found, far)
        if start == 0:
            ids, dists = found, far
        else:
            ids, dists = merge_lists(np.concatenate([ids, found], 1), np.concatenate([dists, far], 1), width)
    return ids, dists
