"""The truth that tests of an index compare with, and a stand-in for build and walk that is exact and quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alimm.projects.binary_graph.segment import Segment


def random_codes(count: int, words: int = 2, seed: int = 0, spread: int = 6) -> np.ndarray:
    """Codes around a few centres: near neighbours, ties and some copies."""
    generator = np.random.default_rng(seed)
    centres = generator.integers(0, 2**63, (max(1, count // 20), words), np.uint64)
    codes = centres[generator.integers(0, len(centres), count)]
    for _ in range(spread):
        flips = np.uint64(1) << generator.integers(0, 64, count).astype(np.uint64)
        codes[np.arange(count), generator.integers(0, words, count)] ^= flips
    return codes


def distances_between(queries: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Hamming distances, (Q, N), by unpacked bits."""
    left = np.unpackbits(np.ascontiguousarray(queries).view(np.uint8), axis=1)
    right = np.unpackbits(np.ascontiguousarray(codes).view(np.uint8), axis=1)
    return (left[:, None] != right[None]).sum(axis=2)


def brute_force(queries: np.ndarray, codes: np.ndarray, ids: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest by (distance, id), padded with -1."""
    found = np.full((len(queries), k), -1, np.int32), np.full((len(queries), k), -1, np.int64)
    all_distances = distances_between(queries, codes) if len(ids) else np.zeros((len(queries), 0), int)
    for row, distances in enumerate(all_distances):
        order = np.lexsort((ids, distances))[:k]
        found[0][row, : len(order)], found[1][row, : len(order)] = distances[order], ids[order]
    return found


def exact_segment(source: Any, ids: Any = None, **_: Any) -> Segment:
    """What `build_segment` makes of few rows: distinct codes, in order of the words, and no graph."""
    source = np.ascontiguousarray(source, dtype=np.uint64)
    ids = np.arange(len(source), dtype=np.int64) if ids is None else np.asarray(ids, np.int64)
    codes, nodes = np.unique(source, axis=0, return_inverse=True)
    order = np.lexsort((ids, nodes.ravel()))
    starts = np.concatenate([[0], np.bincount(nodes.ravel(), minlength=len(codes)).cumsum()])
    words = source.shape[1]
    return Segment(
        codes=np.ascontiguousarray(codes),
        indptr=np.zeros(len(codes) + 1, np.int64),
        edges=np.empty(0, np.int32),
        row_indptr=starts.astype(np.int64),
        ids=np.ascontiguousarray(ids[order]),
        centres=np.empty((0, words), np.uint64),
        entry_indptr=np.zeros(1, np.int64),
        entry_nodes=np.empty(0, np.int32),
        entry_codes=np.empty((0, words), np.uint64),
        info={},
    )


def exact_search(
    segment: Segment, queries: np.ndarray, k: int, ef: int, live_rows: Any = None, live_nodes: Any = None
) -> Any:
    """`search_segment` without a graph."""
    assert ef >= k, "ef is raised to k"
    keep = np.ones(segment.num_rows, bool) if live_rows is None else np.asarray(live_rows)
    assert keep.shape == (segment.num_rows,)
    assert keep.dtype == bool
    codes = np.repeat(segment.codes, np.diff(segment.row_indptr), axis=0)
    return brute_force(queries, codes[keep], segment.ids[keep], k)


def use_stand_ins(patch: pytest.MonkeyPatch) -> None:
    """Build and search without graphs."""
    from alimm.projects.binary_graph import pipeline, view

    patch.setattr(pipeline, "build_segment", exact_segment)
    patch.setattr(view, "search_segment", exact_search)


def all_bytes(folder: Path) -> bytes:
    """The content of all files of a folder."""
    return b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())
