"""A segment as an index sees it: which of its rows are live, and where the row of an id is."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.segment import Segment

BLOCK = 1 << 16
"""Rows that are gathered at a time."""


class RowIndex:
    """Finds rows by external id. It is made when first asked: a search without a filter needs none.

    Memory once made: 8 bytes a row for the ids, and 4 (8 from 2**31 rows on) for the rows.
    """

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self._ids = ids
        self._lock = threading.Lock()
        self._made: tuple[NDArray[np.int64], NDArray[np.int32] | NDArray[np.int64]] | None = None
        self._last: int | None = None

    @property
    def last(self) -> int:
        """The largest id, -1 without rows."""
        if self._last is None:
            self._last = int(self._ids.max(initial=-1))
        return self._last

    def sorted(self) -> tuple[NDArray[np.int64], NDArray[np.int32] | NDArray[np.int64]]:
        """All ids, ascending, and the row of each."""
        with self._lock:
            if self._made is None:
                rows = np.argsort(self._ids, kind="stable")
                ids = self._ids[rows]
                self._made = ids, rows.astype(np.int32) if len(rows) < 2**31 else rows
        return self._made

    def find(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each id, -1 for an id that is not here."""
        rows = np.full(len(ids), -1, np.int64)
        if not len(ids) or ids.min() > self.last:
            return rows
        own, own_rows = self.sorted()
        places = np.minimum(np.searchsorted(own, ids), len(own) - 1)
        found = own[places] == ids
        rows[found] = own_rows[places[found]]
        return rows


@dataclass(frozen=True, eq=False)
class Part:
    """A segment of an index. Immutable: a deletion gives another part with another ``live``.

    Attributes:
        segment: its arrays.
        live: bool (N,) by row, False where deleted; None where all are live.
        table: what the manifest says of its files; None while it is in memory only.
        index: finds its rows; shared by all parts of the segment.
        num_live: how many rows are live.
    """

    segment: Segment
    live: NDArray[np.bool_] | None
    table: dict[str, Any] | None
    index: RowIndex
    num_live: int = field(default=-1)

    @classmethod
    def of(cls, segment: Segment, table: dict[str, Any] | None = None) -> Part:
        """A part all of whose rows are live."""
        return cls(segment, None, table, RowIndex(segment.ids), segment.num_rows)

    @property
    def num_dead(self) -> int:
        """How many rows are deleted."""
        return self.segment.num_rows - self.num_live

    @property
    def is_exact(self) -> bool:
        """Whether a search scans all codes: a small segment has no graph."""
        return not len(self.segment.edges) and not len(self.segment.centres)

    def find_live(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each id, -1 for an id that is not here or deleted."""
        rows = self.index.find(ids)
        if self.live is not None:
            rows[(rows >= 0) & ~self.live[rows]] = -1
        return rows

    def without(self, rows: NDArray[np.int64]) -> Part:
        """This part with some live rows deleted; the mask is copied, N bytes."""
        if not len(rows):
            return self
        live = np.ones(self.segment.num_rows, np.bool_) if self.live is None else self.live.copy()
        live[rows] = False
        live.flags.writeable = False
        return replace(self, live=live, num_live=self.num_live - len(rows))

    def live_ids(self) -> NDArray[np.int64]:
        """Ids of the live rows, by row."""
        return self.segment.ids if self.live is None else self.segment.ids[self.live]

    def dead_ids(self) -> NDArray[np.int64]:
        """Ids of the deleted rows, by row."""
        return self.segment.ids[:0] if self.live is None else self.segment.ids[~self.live]

    def live_rows(self) -> NDArray[np.int64]:
        """The live rows, ascending by id."""
        return live_rows(self.index, self.live)


def gather(segment: Segment, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.uint64], NDArray[np.int64]]]:
    """Codes and ids of rows of a segment, a block at a time, in the order of ``rows``."""
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        nodes = np.searchsorted(segment.row_indptr, block, side="right") - 1
        yield segment.codes[nodes], segment.ids[block]


def live_rows(index: RowIndex, live: NDArray[np.bool_] | None) -> NDArray[np.int64]:
    """The live rows of a segment, ascending by id; ``live`` as of `Part`."""
    rows = index.sorted()[1]
    return (rows if live is None else rows[live[rows]]).astype(np.int64, copy=False)
