"""The half of an index that changes nothing: opening a folder, searching, and taking up what others have written."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.delta import Delta
from alimm.projects.binary_graph.filters import Filter
from alimm.projects.binary_graph.folder import IndexFolder
from alimm.projects.binary_graph.generations import Settings
from alimm.projects.binary_graph.packing import check_codes
from alimm.projects.binary_graph.view import SearchReport, View

if TYPE_CHECKING:
    from alimm.projects.binary_graph.config import BuildConfig

T = TypeVar("T", bound="IndexReader")


class FilteredResult(NamedTuple):
    """What `BinaryGraph.search_filtered` returns: the result, and how it was found."""

    distances: NDArray[np.int32]
    ids: NDArray[np.int64]
    report: SearchReport


class IndexReader:
    """What `BinaryGraph` inherits: an index as its readers use it."""

    def __init__(
        self, view: View, settings: Settings, folder: IndexFolder | None = None, read_only: bool = False
    ) -> None:
        self._view, self._settings, self._folder, self._read_only = view, settings, folder, read_only
        self._lock = threading.RLock()
        self._closed = False

    @classmethod
    def open(cls: type[T], path: str | Path, *, verify: str = "header", read_only: bool = False) -> T:
        """Open the index in a folder. Its arrays are mapped, not read.

        The folder is locked for other writers from the first change until `close`; a search needs no lock.

        Args:
            path: the folder.
            verify: ``'header'`` checks what a search relies on; ``'full'`` reads every byte.
            read_only: refuse changes.

        Raises:
            ValueError: there is no index, or it is damaged; the message names the file.
        """
        folder = IndexFolder(Path(path))
        view, settings = folder.load(verify)
        return cls(view, settings, folder, read_only)

    def close(self) -> None:
        """Unlock and forget the folder. The index cannot be used any more; searches that run come to their end."""
        with self._lock:
            self._closed = True
            if self._folder is not None:
                self._folder.unlock()
            self._view = View(self._view.words, (), Delta.empty(self._view.words))

    def __enter__(self: T) -> T:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._current())

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 64 * self._view.words

    @property
    def ids(self) -> NDArray[np.int64]:
        """The ids of all live rows, ascending."""
        return self._current().live_ids()

    @property
    def config(self) -> BuildConfig:
        """How segments are built."""
        return self._settings.config

    def stats(self) -> dict[str, Any]:
        """Numbers about the index: what is live, what is deleted, how it is stored. Bytes are 0 in memory."""
        view = self._current()
        return {
            "rows": len(view),
            "bits": 64 * view.words,
            "segments": len(view.parts),
            "segment_rows": [part.segment.num_rows for part in view.parts],
            "nodes": sum(part.segment.num_nodes for part in view.parts),
            "edges": sum(len(part.segment.edges) for part in view.parts),
            "deleted": view.num_dead,
            "delta": len(view.delta),
            "generation": view.generation,
            "bytes": 0 if self._folder is None else self._folder.size(),
            "next_id": view.next_id,
        }

    def refresh(self) -> bool:
        """Take up what another process has written since. Cheap where nothing has changed.

        Returns:
            Whether anything was new.
        """
        with self._lock:
            return self._refresh()

    def search(
        self, queries: NDArray[Any], k: int = 10, *, ef: int = 64, allowed: Any = None, threads: int = 1
    ) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Find the k nearest rows of each query.

        Args:
            queries: codes as `build` takes them, shape (Q, W).
            k: at least 1; may be more than the index holds.
            ef: width of the beam: more finds more and takes longer. Raised to k.
            allowed: restricts the result to some ids: whole numbers, or a `Filter`, which is faster when used again.
                Ids that the index does not hold are ignored.
            threads: queries are split among so many.

        Returns:
            Distances int32 and ids int64, both (Q, k), nearest first, equal distances by id; -1 in both past the end.

        Raises:
            ValueError: queries of another type, shape or width; numbers below 1.
        """
        found = self.search_filtered(queries, k, ef=ef, allowed=allowed, threads=threads)
        return found.distances, found.ids

    def search_filtered(
        self, queries: NDArray[Any], k: int = 10, *, ef: int = 64, allowed: Any = None, threads: int = 1
    ) -> FilteredResult:
        """As `search`, and a report: which path was taken, how many rows were allowed."""
        view = self._current()
        queries = check_codes("queries", np.asarray(queries), view.words)
        k, ef, threads = at_least_one("k", k), at_least_one("ef", ef), at_least_one("threads", threads)
        if allowed is not None and not isinstance(allowed, Filter):
            allowed = Filter(allowed)
        return FilteredResult(*view.search(queries, k, ef, allowed, threads))

    def _current(self) -> View:
        if self._closed:
            raise ValueError("the index is closed: open it again with BinaryGraph.open")
        return self._view

    def _refresh(self) -> bool:
        view = self._current()
        if self._folder is None:
            return False
        fresh, settings = self._folder.refresh(view, self._settings)
        self._view, self._settings = fresh, settings
        return fresh is not view


def at_least_one(name: str, value: Any) -> int:
    """Refuse what is no whole number of at least 1."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)
