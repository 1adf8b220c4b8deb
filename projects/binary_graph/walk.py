"""Search in one segment: entry points, a best-first walk, and from nodes to ids."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.segment import Segment
from alimm_ops.graph.beam_cpu import beam_search
from alimm_ops.graph.entry_cpu import entry_points, expand
from alimm_ops.graph.hamming_cpu import nearest_into, word_major
from alimm_ops.graph.hamming_reference import NO_DISTANCE, NO_ID
from alimm_ops.graph.lists_cpu import merge_lists

PROBES = 8
"""Centres whose entries are looked at."""
STARTS = 8
"""Entries that a walk begins with."""
SPARE = 16
"""Places for codes that are as near as the k-th, at first."""
EXACT_BLOCK = 1 << 16
"""Codes of an exact segment that are turned word-major at a time."""


class _Plan(NamedTuple):
    """What a search needs and a file does not hold."""

    centres: NDArray[np.uint64]
    entry_codes: NDArray[np.uint64]


_plans: WeakKeyDictionary[Segment, _Plan] = WeakKeyDictionary()


def _plan(segment: Segment) -> _Plan:
    plan = _plans.get(segment)
    if plan is None:
        plan = _Plan(word_major(segment.centres), word_major(segment.entry_codes))
        _plans[segment] = plan
    return plan


def search_segment(
    segment: Segment,
    queries: NDArray[np.uint64],
    k: int,
    ef: int,
    live_rows: NDArray[np.bool_] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The k nearest rows of each query, approximately; exactly where the segment has no graph or ef reaches its size.

    Args:
        segment: validated; the kernels check nothing.
        queries: uint64 (Q, W).
        k: columns of the result.
        ef: width of the walk's beam; below k it is k.
        live_rows: bool (N,) in the order of ``segment.ids``; False is never returned, but walked through. None: all.

    Returns:
        Distances int32 and ids int64, (Q, k), sorted by (distance, id), padded with (-1, -1).
    """
    if queries.shape[1] != segment.codes.shape[1]:
        raise ValueError(f"queries have {queries.shape[1]} words, the index has {segment.codes.shape[1]}")
    queries = np.ascontiguousarray(queries, np.uint64)
    live_nodes = None
    if live_rows is not None:
        live_nodes = (np.add.reduceat(live_rows, segment.row_indptr[:-1]) > 0) if segment.num_nodes else live_rows
    if len(segment.centres) == 0:
        nodes, dists = _exact(segment, queries, k, live_nodes)
    else:
        plan = _plan(segment)
        starts = entry_points(
            queries, plan.centres, segment.entry_indptr, segment.entry_nodes, plan.entry_codes, PROBES, STARTS
        )
        allowed = None if live_nodes is None else live_nodes.view(np.uint8)
        width = min(max(ef, k), segment.num_nodes)
        nodes, dists, _ = beam_search(
            queries, segment.codes, segment.indptr, segment.edges, starts, width, allowed, trusted=True
        )
    return expand(nodes, dists, segment.row_indptr, segment.ids, live_rows, k)


def _exact(
    segment: Segment, queries: NDArray[np.uint64], k: int, live_nodes: NDArray[np.bool_] | None
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """The k nearest nodes, all compared, and those that are as near as the k-th: the smaller id decides among them."""
    nodes = np.arange(segment.num_nodes) if live_nodes is None else np.flatnonzero(live_nodes)
    width = min(k + SPARE, len(nodes))
    ids = np.full((len(queries), max(width, 1)), NO_ID, np.int32)
    dists = np.full(ids.shape, NO_DISTANCE, np.uint16)
    rows = np.arange(len(queries))
    while width and len(rows):
        found, far = _scan(segment.codes, nodes, queries[rows], width)
        if width > ids.shape[1]:
            ids = np.pad(ids, ((0, 0), (0, width - ids.shape[1])), constant_values=NO_ID)
            dists = np.pad(dists, ((0, 0), (0, width - dists.shape[1])), constant_values=NO_DISTANCE)
        ids[rows, :width], dists[rows, :width] = found, far
        if width == len(nodes):
            break
        rows = rows[far[:, -1] == far[:, k - 1]]  # the ties may go on
        width = min(4 * width, len(nodes))
    return np.where(ids >= 0, nodes[ids] if len(nodes) else ids, NO_ID).astype(np.int32), dists


def _scan(
    codes: NDArray[np.uint64], nodes: NDArray[np.int64], queries: NDArray[np.uint64], width: int
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """The nearest of some nodes, as places in ``nodes``."""
    ids = np.full((len(queries), width), NO_ID, np.int32)
    dists = np.full((len(queries), width), NO_DISTANCE, np.uint16)
    bounds = np.full(len(queries), NO_DISTANCE - 1, np.uint16)
    for start in range(0, len(nodes), EXACT_BLOCK):
        found, far = np.full_like(ids, NO_ID), np.full_like(dists, NO_DISTANCE)
        block = word_major(codes[nodes[start : start + EXACT_BLOCK]])
        nearest_into(queries, block, start, -1, bounds, found, far)
        ids, dists = merge_lists(np.concatenate([ids, found], 1), np.concatenate([dists, far], 1), width)
    return ids, dists
