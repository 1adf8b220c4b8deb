"""The folder behind an index: what of a view is written where, and how a view comes back.

``manifest.py`` and ``wal.py`` know the files; here is what they mean to an index. A change that is small goes to the
log. A change of the segments writes new files beside the old ones, then a manifest that names them: whoever opens the
folder meanwhile sees the one state or the other.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.array_files import (
    ArrayEntry,
    DamagedIndexError,
    MissingFileError,
    open_array,
    sync_folder,
)
from alimm.projects.binary_graph.delta import Delta
from alimm.projects.binary_graph.garbage import GRACE_SECONDS, collect_garbage
from alimm.projects.binary_graph.generations import Settings, replayed, write_generation
from alimm.projects.binary_graph.manifest import MANIFEST, Manifest, load, open_index_files
from alimm.projects.binary_graph.parts import Part, RowIndex
from alimm.projects.binary_graph.place import folder_beside, replaceable
from alimm.projects.binary_graph.segment import open_segment
from alimm.projects.binary_graph.view import View
from alimm.projects.binary_graph.wal_records import Scan, scan

if TYPE_CHECKING:
    from filelock import BaseFileLock

    from alimm.projects.binary_graph.wal import WriteAheadLog

_ATTEMPTS = 5
_logger = logging.getLogger(__name__)


class IndexFolder:
    """One folder, as one index uses it. Not thread-safe: the index sees to that.

    Attributes:
        path: absolute.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self._manifest: Manifest | None = None
        self._stamp: tuple[int, ...] | None = None
        self._log: Scan | None = None
        self._lock: BaseFileLock | None = None
        self._wal: WriteAheadLog | None = None
        self._fresh: Path | None = None

    @classmethod
    def for_writing(cls, path: Path) -> IndexFolder:
        """A folder to write an index to: new, empty, or one that holds an index.

        Raises:
            ValueError: it is a file, or holds something else or an index that is damaged.
        """
        folder = cls(path)
        folder._manifest = replaceable(folder.path)
        return folder

    def lock(self) -> None:
        """Keep other writers out until `unlock`."""
        if self._lock is None:
            from alimm.projects.binary_graph.wal import writer_lock  # who only searches needs none

            self._lock = writer_lock(self.path)

    def unlock(self) -> None:
        """Let other writers in."""
        self._close_log()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Sure of the place, before any work is done: the index that is there locked, or a folder made beside it."""
        if self._manifest is None:
            with folder_beside(self.path) as self._fresh:
                yield
            return
        self.lock()
        try:
            self._manifest = load(self.path)
            yield
        finally:
            self.unlock()

    def size(self) -> int:
        """Bytes of all its files."""
        total = 0
        for folder, _, names in os.walk(self.path):
            for name in names:
                try:
                    total += os.lstat(os.path.join(folder, name)).st_size
                except FileNotFoundError:
                    continue  # a writer clears away what is old
        return total

    def load(self, verify: str) -> tuple[View, Settings]:
        """Open the newest generation and its log."""
        stamp = self._read_stamp()
        files = open_index_files(self.path, verify)
        self._stamp = stamp
        parts = [
            Part.of(segment, table) for segment, table in zip(files.segments, files.manifest.segments, strict=True)
        ]
        return self._take(files.manifest, parts, files.deleted, files.deleted_in, files.log)

    def refresh(self, view: View, settings: Settings) -> tuple[View, Settings]:
        """The view as it is now; the same object where nothing has changed."""
        for attempt in range(_ATTEMPTS):
            stamp = self._read_stamp()
            try:
                if stamp == self._stamp:
                    return self._read_on(view), settings
                fresh = self._reload(view)
            except MissingFileError:
                # A writer published and cleared away in between. If not, the file is lost.
                if attempt == _ATTEMPTS - 1 or self._read_stamp() == stamp:
                    raise
                continue
            self._stamp = stamp
            return fresh
        raise AssertionError("the last attempt returns or raises")

    def log_add(self, ids: NDArray[np.int64], codes: NDArray[np.uint64]) -> int:
        """Put added rows on the disk; the number of the record."""
        with self._appending() as log:
            return log.append_add(ids, codes)

    def log_delete(self, ids: NDArray[np.int64]) -> int:
        """Put a deletion on the disk; the number of the record."""
        with self._appending() as log:
            return log.append_delete(ids)

    def publish(self, view: View, settings: Settings, grace_seconds: float | None = None) -> View:
        """Write a view as the next generation, and return it as it lies there: mapped.

        The caller is in `locked` or holds the lock; a folder that is not there yet appears as a whole.

        Args:
            view: parts without a table are written, those with one lie here already.
            settings: go into the manifest.
            grace_seconds: files that are not needed any more go after so long; None: the usual time.

        Raises:
            OSError: it could not be written. The folder is as before.
        """
        manifest = self.write(view, settings, grace_seconds)
        parts = []
        for part, table in zip(view.parts, manifest.segments, strict=True):
            if part.table is None:
                segment = open_segment(self.path, table)
                part = replace(part, segment=segment, table=table, index=RowIndex(segment.ids))
            parts.append(part)
        applied = 0 if self._log is None else self._log.sequence
        logged = len(view.delta)
        return replace(view, parts=tuple(parts), generation=manifest.generation, applied=applied, logged=logged)

    def write(self, view: View, settings: Settings, grace_seconds: float | None = None) -> Manifest:
        """As `publish`, without opening what was written."""
        self._close_log()
        if self._manifest is None:
            manifest = self._write_folder(view, settings)
        else:
            manifest = write_generation(self.path, view, settings, self._manifest.generation + 1)
        self._manifest, self._stamp = manifest, self._read_stamp()
        self._log = scan(self.path / manifest.wal, view.words)
        try:
            collect_garbage(self.path, manifest, GRACE_SECONDS if grace_seconds is None else grace_seconds)
        except OSError as error:
            _logger.warning("old files of %s could not be removed: %s", self.path, error)
        return manifest

    def _write_folder(self, view: View, settings: Settings) -> Manifest:
        assert self._fresh is not None
        manifest = write_generation(self._fresh, view, settings, 1)
        try:
            self._fresh.rename(self.path)
        except OSError as error:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ValueError(f"{self.path} was made by somebody else meanwhile: name another folder") from error
            raise
        sync_folder(self.path.parent)
        return manifest

    def _read_stamp(self) -> tuple[int, ...] | None:
        try:
            found = os.stat(self.path / MANIFEST)
        except OSError:
            return None  # opening it will say why
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _read_on(self, view: View) -> View:
        """The view and the records that came to its log."""
        assert self._manifest is not None
        if self._wal is not None:
            return view  # ours alone
        path = self.path / self._manifest.wal
        try:
            if self._log is not None and path.stat().st_size == self._log.end:
                return view
            self._log = scan(path, view.words, self._log)
        except FileNotFoundError:
            raise MissingFileError(path, "is missing") from None
        except DamagedIndexError:
            # Perhaps only for us, who read a record that its writer took back: its disk was full.
            return self._reload(view)[0]
        return replayed(view, self._log.records)

    def _reload(self, view: View) -> tuple[View, Settings]:
        """Open a newer generation; segments that are open already stay as they are."""
        self._close_log()
        manifest = load(self.path)
        known = {part.table["name"]: part for part in view.parts if part.table is not None}
        parts = []
        for table in manifest.segments:
            part = known.get(table["name"])
            if part is None or part.table != table:
                part = Part.of(open_segment(self.path, table), table)
            parts.append(replace(part, live=None, num_live=part.segment.num_rows))
        deleted = np.empty(0, np.int64) if manifest.deleted is None else self._open_deleted(manifest.deleted)
        deleted_in = {name: self._open_deleted(table) for name, table in manifest.deleted_in.items()}
        log = scan(self.path / manifest.wal, manifest.words)
        return self._take(manifest, parts, deleted, deleted_in, log)

    def _open_deleted(self, table: dict[str, Any]) -> NDArray[np.int64]:
        return open_array(self.path / table["name"], ArrayEntry.from_json(table["array"], table["name"]))

    def _take(
        self,
        manifest: Manifest,
        parts: list[Part],
        deleted: NDArray[np.int64],
        deleted_in: dict[str, NDArray[np.int64]],
        log: Scan,
    ) -> tuple[View, Settings]:
        settings = Settings.parse(self.path, manifest.config)
        for number, part in enumerate(parts):
            assert part.table is not None
            for dead in (deleted, deleted_in.get(part.table["name"], deleted[:0])):
                rows = part.find_live(dead)
                part = part.without(rows[rows >= 0])
            parts[number] = part
        view = View(manifest.words, tuple(parts), Delta.empty(manifest.words), manifest.next_id, manifest.generation)
        view = replayed(view, log.records)
        self._manifest, self._log = manifest, log
        return view, settings

    @contextmanager
    def _appending(self) -> Iterator[WriteAheadLog]:
        assert self._manifest is not None
        assert self._lock is not None
        if self._wal is None:
            from alimm.projects.binary_graph.wal import WriteAheadLog

            self._wal = WriteAheadLog(self.path / self._manifest.wal, self._manifest.words)
        try:
            yield self._wal
        except BaseException:
            # What is in the file now is found out before the next change: it is opened and read again.
            self._close_log()
            raise

    def _close_log(self) -> None:
        if self._wal is not None:
            self._wal.close()
            self._wal = None
