"""Searches restricted to some ids, and the choice between a scan and the graph.

A walk in the graph goes through rows that are not allowed and returns those that are. To meet k allowed ones it has to
see 1 / s as many nodes, s being the share that is allowed: the beam is widened from ``ef`` to ``ef / s``. A scan
compares a query with the allowed rows and with nothing else. Costs of one query, in nanoseconds::

    scan   SCAN_START_NS + allowed * W * SCAN_NS, and the choice of k: min(k * k * SELECT_NS, allowed * SORT_NS)
    graph  b * (STEP_NS + b * KEEP_NS) with b = min(ef / s, nodes)

The cheaper one runs, for each segment on its own. Deleted rows are rows that are not allowed. Where a walk ends with
fewer results than the segment holds (allowed rows far from the query), that query is scanned: k come if k exist.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import EllipsisType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.delta import SELECT_NS, SORT_NS, Delta
from alimm.projects.binary_graph.parts import Part, RowIndex, gather, live_rows
from alimm.projects.binary_graph.segment import Segment
from alimm.projects.binary_graph.walk import nodes_of

SCAN_START_NS = 1000.0
"""What a scan takes of any number of rows."""
SCAN_NS = 0.15
"""Comparing one 64-bit word of a code that lies in order."""
GATHER_NS = 10.0
"""Fetching a row, where there are too many to keep them for the next search."""
STEP_NS = 300.0
"""One step of the beam: the codes of a node's neighbours, wherever they lie."""
KEEP_NS = 0.5
"""Keeping the beam in order: at each step, for each of its places."""
CACHE_BYTES = 64 << 20
"""Gathered codes of one segment that a filter keeps for its next search."""


class Allowed:
    """The rows of one part that a search may return.

    Args:
        segment: whose rows.
        count: how many.
        rows: gives them, ascending by id; asked at most once, and by a scan only.
        mask: bool (N,) of them, None where it is all of them; left out, it is made of the rows.
    """

    def __init__(
        self,
        segment: Segment,
        count: int,
        rows: Callable[[], NDArray[np.int64]],
        mask: NDArray[np.bool_] | EllipsisType | None = ...,
    ) -> None:
        # Holds no part: a filter keeps one of these for as long as the part lives.
        self.segment, self._count, self._make_rows, self._mask = segment, count, rows, mask
        self._rows: NDArray[np.int64] | None = None
        self._nodes: NDArray[np.uint8] | None = None
        self._gathered: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None

    def __len__(self) -> int:
        return self._count

    def rows(self) -> NDArray[np.int64]:
        """The rows, ascending by id."""
        if self._rows is None:
            self._rows = self._make_rows()
        return self._rows

    def mask(self) -> NDArray[np.bool_] | None:
        """Bool (N,), what the walk takes; None where all rows are allowed."""
        if isinstance(self._mask, EllipsisType):
            mask = np.zeros(self.segment.num_rows, np.bool_)
            mask[self.rows()] = True
            self._mask = mask
        return self._mask

    def nodes(self) -> NDArray[np.uint8] | None:
        """What `nodes_of` makes of the mask, (n,), once: it looks at every row; None where all are allowed."""
        mask = self.mask()
        if self._nodes is None and mask is not None:
            self._nodes = nodes_of(self.segment, mask)
        return self._nodes

    def blocks(self) -> Iterable[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
        """Codes and ids of the rows, in blocks, ascending by id; kept if they are small."""
        if self._gathered is None:
            if not len(self) or not _kept(len(self), self.segment.codes.shape[1]):
                return gather(self.segment, self.rows())
            codes, ids = zip(*gather(self.segment, self.rows()), strict=True)
            # In the order that the kernels read, which would turn them for each search anew.
            self._gathered = np.asfortranarray(np.concatenate(codes)), np.concatenate(ids)
        return [self._gathered]


class Filter:
    """Ids that a search may return. Make one and use it again: it remembers where its rows are.

    Ids that the index does not hold are ignored, so a filter may come from elsewhere, and outlives additions.

    Args:
        ids: whole numbers, shape (count,); in any order, may repeat.

    Raises:
        ValueError: another shape or type.
    """

    def __init__(self, ids: Any) -> None:
        ids = np.asarray(ids)
        if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
            hint = "; of a mask over index.ids, take index.ids[mask]" if ids.dtype.kind == "b" else ""
            raise ValueError(
                f"allowed must be ids, whole numbers of shape (count,), got {ids.dtype} of shape {ids.shape}{hint}"
            )
        if ids.dtype.kind == "u":
            ids = ids[ids <= np.iinfo(np.int64).max]  # no index holds a larger one
        self.ids: NDArray[np.int64] = np.unique(ids.astype(np.int64))
        self._lock = threading.Lock()
        # By identity, and only as long as an index holds them: a segment's rows stay, its live ones change.
        self._rows: weakref.WeakKeyDictionary[RowIndex, NDArray[np.int64]] = weakref.WeakKeyDictionary()
        self._allowed: weakref.WeakKeyDictionary[Part, Allowed] = weakref.WeakKeyDictionary()

    def __len__(self) -> int:
        return len(self.ids)

    def within(self, part: Part) -> Allowed:
        """The allowed rows of a part."""
        with self._lock:
            found = self._allowed.get(part)
            rows = self._rows.get(part.index)
        if found is not None:
            return found
        if rows is None:
            rows = part.index.find(self.ids)
            rows = rows[rows >= 0]
        own = rows if part.live is None else rows[part.live[rows]]
        found = Allowed(part.segment, len(own), lambda: own)
        with self._lock:
            self._rows[part.index] = rows
            self._allowed[part] = found
        return found

    def within_delta(self, delta: Delta) -> Delta:
        """The allowed rows of a delta; the delta itself where it is all of them."""
        return delta.only(self.ids)


def all_live(part: Part) -> Allowed:
    """All live rows of a part; remembered as long as the part lives."""
    found = _all_live.get(part)
    if found is None:
        found = Allowed(part.segment, part.num_live, partial(live_rows, part.index, part.live), part.live)
        _all_live[part] = found
    return found


_all_live: weakref.WeakKeyDictionary[Part, Allowed] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Choice:
    """How a part is searched.

    Attributes:
        path: ``'graph'`` or ``'exact'``.
        ef: width of the beam, 0 for a scan.
    """

    path: str
    ef: int


def choose(part: Part, allowed: int, k: int, ef: int) -> Choice:
    """Scan or walk, whichever costs less.

    Args:
        part: what is searched.
        allowed: how many of its rows may be returned, at least 1.
        k: how many are wanted, at most ``allowed``.
        ef: width of the beam if all rows were allowed.
    """
    segment = part.segment
    words = segment.codes.shape[1]
    # In exact numbers: a huge ef must neither overflow nor lose its last digits.
    wide = max(k, min(-(-ef * segment.num_rows // allowed), segment.num_nodes))
    scan = _scan_ns(allowed, words, k) + (0 if _kept(allowed, words) else allowed * GATHER_NS)
    graph = _scan_ns(segment.num_nodes, words, k) if part.is_exact else wide * (STEP_NS + wide * KEEP_NS)
    return Choice("exact", 0) if scan < graph else Choice("graph", wide)


def _scan_ns(rows: int, words: int, k: int) -> float:
    return SCAN_START_NS + rows * words * SCAN_NS + min(k * k * SELECT_NS, rows * SORT_NS)


def _kept(rows: int, words: int) -> bool:
    """Whether the codes and ids of so many rows are kept from one search to the next."""
    return rows * 8 * (words + 1) <= CACHE_BYTES
