"""What a search sees: the segments, which rows are live, and the delta, all of one moment.

A view never changes. A writer makes another one and puts it in place with one assignment; searches that have begun keep
the view that they took, and those that begin see the new one as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.delta import Delta, Result, merge, nothing, scan
from alimm.projects.binary_graph.filters import Allowed, Filter, all_live, choose
from alimm.projects.binary_graph.parts import Part
from alimm.projects.binary_graph.walk import search_segment

MIN_QUERIES = 8
"""A thread is not worth less."""


@dataclass(frozen=True)
class SearchReport:
    """How a search ran.

    Attributes:
        path: ``'graph'``, ``'exact'``, ``'mixed'`` where segments differ, ``'empty'`` where nothing may be returned.
        allowed: rows that may be returned.
        selectivity: their share of the rows in segments and delta, deleted ones included; 0 of an empty index.
        rescanned: pairs of query and segment whose walk found too few, so that a scan followed.
    """

    path: str
    allowed: int
    selectivity: float
    rescanned: int


@dataclass(frozen=True, eq=False)
class View:
    """An index at one moment.

    Attributes:
        words: 64-bit words of a code.
        parts: its segments, oldest first.
        delta: rows that are in no segment yet; none of its ids is live in a part.
        next_id: the number after the largest id ever added.
        generation: of the manifest that names the parts; 0 before the first.
        applied: number of the last record of the log that is in it.
        logged: rows in the records of the log so far.
    """

    words: int
    parts: tuple[Part, ...]
    delta: Delta
    next_id: int = 0
    generation: int = 0
    applied: int = 0
    logged: int = 0

    def __len__(self) -> int:
        return sum(part.num_live for part in self.parts) + len(self.delta)

    @property
    def num_dead(self) -> int:
        """Deleted rows that segments still hold."""
        return sum(part.num_dead for part in self.parts)

    def live_ids(self) -> NDArray[np.int64]:
        """Ids of all live rows, ascending."""
        return np.sort(np.concatenate([*(part.live_ids() for part in self.parts), self.delta.ids]))

    def is_live(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which ids are live, bool (len(ids),)."""
        live = self.delta.find(ids)
        for part in self.parts:
            live |= part.find_live(ids) >= 0
        return live

    def search(
        self, queries: NDArray[np.uint64], k: int, ef: int, allowed: Filter | None = None, threads: int = 1
    ) -> tuple[NDArray[np.int32], NDArray[np.int64], SearchReport]:
        """The k nearest live and allowed rows of each query; see `BinaryGraph.search`."""
        rows = [all_live(part) if allowed is None else allowed.within(part) for part in self.parts]
        delta = self.delta if allowed is None else allowed.within_delta(self.delta)
        count = sum(map(len, rows)) + len(delta)
        # The columns past the last row hold nothing: they cost neither a wider beam nor a wider merge.
        width = min(k, count)
        plan = _Plan(list(zip(self.parts, rows, strict=True)), delta, width, max(ef, width))
        pieces = max(1, min(threads, len(queries) // MIN_QUERIES))
        if not width or not len(queries):
            found = [(nothing(len(queries), k), 0)]
        elif pieces == 1:
            found = [plan.run(queries)]
        else:
            with ThreadPoolExecutor(pieces) as pool:
                found = list(pool.map(plan.run, np.array_split(queries, pieces)))
        distances, ids = _stack([result for result, _ in found], k)
        total = sum(part.segment.num_rows for part in self.parts) + len(self.delta)
        report = SearchReport(plan.path, count, count / total if total else 0.0, sum(number for _, number in found))
        return distances, ids, report


class _Plan:
    """One search of a view: the way through each part is chosen once for all queries."""

    def __init__(self, parts: Sequence[tuple[Part, Allowed]], delta: Delta, k: int, ef: int) -> None:
        self._delta, self._k = delta, k
        self._steps = [
            (part, rows, min(k, len(rows)), choose(part, len(rows), min(k, len(rows)), ef))
            for part, rows in parts
            if len(rows)
        ]
        for part, rows, _, choice in self._steps:
            if choice.path == "graph" and not part.is_exact:
                rows.nodes()  # here, where it is made once, and not in every thread
        paths = {choice.path for _, _, _, choice in self._steps} | ({"exact"} if len(delta) else set())
        self.path = "empty" if not paths else "mixed" if len(paths) > 1 else paths.pop()

    def run(self, queries: NDArray[np.uint64]) -> tuple[Result, int]:
        """The result of some queries, and how many walks had to be followed by a scan."""
        results, rescanned = [self._delta.search(queries, self._k)], 0
        for part, rows, wanted, choice in self._steps:
            if choice.path == "exact":
                results.append(_scan(rows, queries, wanted))
                continue
            nodes = None if part.is_exact else rows.nodes()
            distances, ids = search_segment(part.segment, queries, wanted, choice.ef, rows.mask(), nodes)
            short = np.flatnonzero(ids[:, wanted - 1] < 0)
            if len(short):
                rescanned += len(short)
                distances[short], ids[short] = _scan(rows, queries[short], wanted)
            results.append((distances, ids))
        return merge(results, len(queries), self._k), rescanned


def _scan(rows: Allowed, queries: NDArray[np.uint64], k: int) -> Result:
    best = nothing(len(queries), 0)
    for codes, ids in rows.blocks():
        best = merge([best, scan(queries, codes, ids, k)], len(queries), min(k, best[1].shape[1] + len(ids)))
    return best


def _stack(results: list[Result], k: int) -> Result:
    """The results of consecutive queries as one of k columns."""
    queries = sum(len(ids) for _, ids in results)
    distances, ids = nothing(queries, k)
    start = 0
    for part_distances, part_ids in results:
        stop, width = start + len(part_ids), part_ids.shape[1]
        distances[start:stop, :width], ids[start:stop, :width] = part_distances, part_ids
        start = stop
    return distances, ids
