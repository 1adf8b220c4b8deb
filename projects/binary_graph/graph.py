"""An index of binary codes that is built once, searched by many, and changed while it is in use.

Binary Distributed Graph (CIKM 2019, arXiv 2102.04656) describes how a graph over binary codes is built by many workers
and searched. Additions, deletions, filters and merges are ours; what of them the authors had is not known.

An index is a list of immutable segments, the rows that are deleted in them, and a delta of recent rows that is scanned.
On disk it is a folder: each change is in a log before it counts, and segments are published as a whole. One process
writes (a lock file sees to it), any number read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph import building, updates
from alimm.projects.binary_graph.delta import Delta
from alimm.projects.binary_graph.folder import IndexFolder
from alimm.projects.binary_graph.generations import Settings
from alimm.projects.binary_graph.packing import check_codes
from alimm.projects.binary_graph.parts import Part
from alimm.projects.binary_graph.reader import IndexReader, at_least_one
from alimm.projects.binary_graph.segment import Segment
from alimm.projects.binary_graph.view import View
from alimm.projects.binary_graph.wal_records import MOST_BYTES

if TYPE_CHECKING:
    from alimm.projects.binary_graph.config import BuildConfig
    from alimm.projects.binary_graph.engine import Engine
    from alimm.projects.binary_graph.sources import CodeSource

DELTA_LIMIT = 8192
MAX_SEGMENTS = 8
LOG_ROWS = 1 << 16
"""Rows in the log, at least, before a change publishes a generation instead: reading a log must stay cheap."""


class BinaryGraph(IndexReader):
    """Approximate nearest neighbours by Hamming distance. Make one with `build` or `open`.

    All methods may be called from several threads: searches run beside a change and see the index before it or after
    it; changes wait for one another. A change that fails leaves the index as it was.
    """

    @classmethod
    def build(
        cls,
        codes: NDArray[Any] | CodeSource,
        ids: Any = None,
        *,
        path: str | Path | None = None,
        config: BuildConfig | dict[str, Any] | None = None,
        engine: str | Engine = "threads",
        workers: int | None = None,
        worker_memory: int | None = None,
        run_dir: str | Path | None = None,
        progress: bool = False,
        delta_limit: int = DELTA_LIMIT,
        max_segments: int = MAX_SEGMENTS,
    ) -> BinaryGraph:
        """Build an index of codes.

        Args:
            codes: uint64 (N, W) or uint8 (N, 8 W), or a source of them (see ``sources.py``). N may be 0.
            ids: whole numbers from 0 to 2**63 - 1, unique, one a row; None takes those of the source, or 0 to N - 1.
            path: the folder to publish the index in: new, empty, or an index, which is replaced. None: it lives in
                memory only.
            config: how to build, as a `BuildConfig` or its settings by name; also what later flushes and compactions
                use.
            engine: ``'threads'``, ``'processes'`` or ``'ray'``, or an engine, which stays open.
            workers: of an engine given by name; None takes the CPUs that this process may use.
            worker_memory: bytes that a worker is planned to need.
            run_dir: the folder of the build, to resume it from; None takes a temporary one.
            progress: show bars on standard error.
            delta_limit: rows that are kept in the delta; more become a segment.
            max_segments: more than these are merged.

        Raises:
            OSError: the folder cannot be made. That and another writer are found out before anything is built.
            ValueError: codes, ids, options or a folder that do not fit, or another process writes to it.
        """
        config = building.config_of(config)
        limits = at_least_one("delta_limit", delta_limit), at_least_one("max_segments", max_segments)
        settings = Settings(config.to_dict(), *limits)
        folder = None if path is None else IndexFolder.for_writing(Path(path))
        source, count, words = building.source_of(codes)
        if ids is not None:
            ids = updates.check_ids(ids, count)
            updates.check_unique(ids)
        parts: tuple[Part, ...] = ()
        with nullcontext() if folder is None else folder.locked():
            if count:
                with building.engine_of(engine, workers, worker_memory) as runner, building.bars(progress) as bars:
                    options = dict(
                        config=config, engine=runner, worker_memory=worker_memory, run_dir=run_dir, progress=bars
                    )
                    parts = (Part.of(building.build_segment(source, ids, **options)),)
            view = View(words, parts, Delta.empty(words), next_id=parts[0].index.last + 1 if parts else 0)
            if folder is not None:
                view = folder.publish(view, settings)
        return cls(view, settings, folder)

    def save(self, path: str | Path) -> None:
        """Write a copy of the index as it is now to a folder, whole or not at all; this index stays where it is.

        Args:
            path: new or empty; or an index, which is replaced by a new generation. The index's own folder: everything
                is published as segments, as `flush` does.

        Raises:
            ValueError: the folder holds something else, or another process writes to it.
        """
        target = Path(path)
        if self._folder is not None and target.resolve() == self._folder.path.resolve():
            with self._writing() as view:
                self._publish(self._flushed(view))
            return
        view = self._current()
        # Written anew: their files lie in another folder, or nowhere.
        copied = replace(view, parts=tuple(replace(part, table=None) for part in view.parts))
        folder = IndexFolder.for_writing(target)
        with folder.locked():
            folder.write(copied, self._settings)

    def add(self, codes: NDArray[Any], ids: Any = None) -> NDArray[np.int64]:
        """Add rows. When this returns, they are on the disk.

        Rows go to the delta; where it would become longer than ``delta_limit``, it and they become a segment.

        Args:
            codes: as `build` takes them, shape (count, W).
            ids: none of them live in the index; one that was deleted may come back. None numbers on from the largest
                id that was ever added.

        Returns:
            The ids, int64 (count,).

        Raises:
            ValueError: codes or ids that do not fit. Nothing is added then.
        """
        with self._writing() as view:
            codes = check_codes("codes", np.asarray(codes), view.words)
            new_ids = updates.new_ids(view, ids, len(codes))
            if len(codes):
                changed = updates.added(view, codes, new_ids)
                if self._belongs_in_log(changed, codes.nbytes + new_ids.nbytes):
                    self._log(changed, lambda folder: folder.log_add(new_ids, codes))
                else:
                    self._publish(self._flushed(changed))
            return new_ids

    def delete(self, ids: Any, missing: str = "error") -> int:
        """Delete rows. When this returns, that is on the disk, and no search that begins will find them.

        Their codes stay in the files until `compact`, or until so many of a segment's rows are deleted that a flush
        builds it anew.

        Args:
            ids: whole numbers, shape (count,).
            missing: what to do about ids that are not in the index: ``'error'`` or ``'ignore'``.

        Returns:
            How many rows were deleted.

        Raises:
            ValueError: ids of a wrong kind, or missing. Nothing is deleted then.
        """
        if missing not in ("error", "ignore"):
            raise ValueError(f"missing must be 'error' or 'ignore', got {missing!r}")
        ids = updates.check_ids(ids)
        with self._writing() as view:
            changed, gone = updates.deleted(view, ids, missing == "ignore")
            if len(gone):
                if self._belongs_in_log(changed, gone.nbytes):
                    self._log(changed, lambda folder: folder.log_delete(gone))
                else:
                    self._publish(self._flushed(changed))
            return len(gone)

    def flush(self) -> None:
        """Make a segment of the delta, and of segments with too many deleted rows or too many small segments."""
        with self._writing() as view:
            changed = self._flushed(view)
            if changed is not view:
                self._publish(changed)

    def compact(self) -> None:
        """Build everything anew as one segment. Afterwards nothing of the deleted rows is on the disk.

        The segment is the one that `build` makes of the live rows in ascending order of their ids, byte for byte. The
        rows are gathered in memory.
        """
        with self._writing() as view:
            self._publish(updates.rebuild(view, set(view.parts), self._build_small), grace_seconds=0.0)

    def merge(self, other: BinaryGraph) -> None:
        """Take in the live rows of another index. Its segments are copied, not built anew; it stays as it is.

        Raises:
            ValueError: codes of another width, or ids that both have. Nothing is taken then.
        """
        if other is self:
            raise ValueError("an index cannot be merged with itself: all of its ids are there already")
        theirs = other._current()
        with self._writing() as view:
            self._publish(updates.joined(view, theirs, self._build_small))

    @contextmanager
    def _writing(self) -> Iterator[View]:
        """The newest view, while nobody else changes the index."""
        with self._lock:
            self._current()
            if self._read_only:
                raise ValueError("the index was opened read-only: open it with read_only=False to change it")
            if self._folder is not None:
                self._folder.lock()
                # Another process may have written before the lock was ours.
                self._refresh()
            yield self._view

    def _publish(self, view: View, grace_seconds: float | None = None) -> None:
        if self._folder is not None:
            view = self._folder.publish(view, self._settings, grace_seconds)
        else:
            view = replace(view, generation=view.generation + 1, logged=0)
        self._view = view

    def _log(self, view: View, append: Callable[[IndexFolder], int]) -> None:
        """Put a change in the log, then in place."""
        self._view = view if self._folder is None else replace(view, applied=append(self._folder))

    def _belongs_in_log(self, view: View, size: int) -> bool:
        """Whether a change that leads to the view, of so many bytes, is small enough for delta and log."""
        limit = self._settings.delta_limit
        if self._folder is None:
            return len(view.delta) <= limit
        return len(view.delta) <= limit and size <= MOST_BYTES and view.logged <= max(LOG_ROWS, 4 * limit)

    def _flushed(self, view: View) -> View:
        return updates.flushed(view, self._build_small, self._settings.max_segments)

    def _build_small(self, codes: NDArray[np.uint64], ids: NDArray[np.int64]) -> Segment:
        return building.build_segment(codes, ids, config=self._settings.config)
