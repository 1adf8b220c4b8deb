"""Appending to the log of an index, by one writer at a time (``wal_records`` has the format and reads it)."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.array_files import fresh_name, replace_file
from alimm.projects.binary_graph.wal_records import (
    ADD,
    DELETE,
    MOST_BYTES,
    Scan,
    WalRecord,
    encode_header,
    encode_record,
    repair,
    replay,
    scan,
)

if TYPE_CHECKING:
    from filelock import BaseFileLock

__all__ = ["ADD", "DELETE", "Scan", "WalRecord", "WriteAheadLog", "repair", "replay", "scan", "writer_lock"]

LOCK = ".lock"


def writer_lock(root: Path, timeout: float = 0.0) -> BaseFileLock:
    """Lock an index for writing; readers need no lock. The system unlocks it when the process ends, however it ends.

    Args:
        root: the folder of the index.
        timeout: seconds to wait for another writer.

    Returns:
        The lock, held; ``release()`` gives it up, and so does leaving it as a context manager.

    Raises:
        ValueError: another writer has it, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout  # who only searches needs none

    # Not per thread: an index may be opened in one thread and closed in another.
    lock = FileLock(str(root / LOCK), timeout=timeout, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"another writer has {root} open: close it there, or open the index with read_only=True"
        ) from None
    except OSError as error:
        raise ValueError(f"{root} cannot be written to ({error}): open the index with read_only=True") from error
    return lock


class WriteAheadLog:
    """A log that is open for appending. What an append returns from is on the disk as a whole.

    Opening cuts off the tail that an interrupted append left. The caller holds the ``writer_lock``.

    Args:
        path: of a log that ``create`` made.
        words: of a code.
        durable: wait for the disk after each append; else only a crash of the process loses nothing.

    Raises:
        DamagedIndexError: the log is damaged.
    """

    def __init__(self, path: Path, words: int, durable: bool = True) -> None:
        found = scan(path, words)
        self.path, self.words, self.durable = path, words, durable
        self._end, self._sequence, self._seed = found.end, found.sequence, found.seed
        self._why_not: str | None = None
        self._descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if found.torn:
                self._cut()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, root: Path, words: int, generation: int, durable: bool = True) -> WriteAheadLog:
        """Make an empty log under a new name; it counts from when a manifest names it.

        Args:
            root: the folder of the index.
            words: of a code.
            generation: of the manifest that will name it.
            durable: as of the class.
        """
        path = root / fresh_name(root, "wal", generation, ".log")
        replace_file(path, [encode_header(words, generation)], durable)
        return cls(path, words, durable)

    @property
    def name(self) -> str:
        """The file's name, for the manifest."""
        return self.path.name

    @property
    def size(self) -> int:
        """Bytes of the log."""
        return self._end

    @property
    def sequence(self) -> int:
        """Number of records."""
        return self._sequence

    def append_add(self, ids: NDArray[np.int64], codes: NDArray[np.uint64]) -> int:
        """Log rows that are added: all of them or, if this raises or the process ends, none.

        Args:
            ids: (n,) int64 >= 0. No rows, no record.
            codes: (n, W) uint64.

        Returns:
            The record's number.

        Raises:
            ValueError: arrays of another kind, or more rows than a record takes.
            OSError: it could not be written, e.g. the disk is full; the log is as before.
        """
        if codes.dtype != np.uint64 or codes.shape != (len(ids), self.words):
            raise ValueError(f"codes must be uint64 {(len(ids), self.words)}, got {codes.dtype} {codes.shape}")
        return self._append(ADD, ids, codes)

    def append_delete(self, ids: NDArray[np.int64]) -> int:
        """Log ids that are deleted; as ``append_add``."""
        return self._append(DELETE, ids)

    def close(self) -> None:
        """Close the file; further appends are refused."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1
        self._why_not = "is closed: open the index again"

    def __enter__(self) -> WriteAheadLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, kind: int, ids: NDArray[np.int64], *codes: NDArray[Any]) -> int:
        if self._why_not is not None:
            raise ValueError(f"{self.path} {self._why_not}")
        if ids.ndim != 1 or ids.dtype != np.int64 or (len(ids) and ids.min() < 0):
            raise ValueError(f"ids must be int64 (n,) and >= 0, got {ids.dtype} {ids.shape}")
        if not len(ids):
            return self._sequence
        row = 8 + 8 * sum(array.shape[1] for array in codes)
        if len(ids) * row > MOST_BYTES:
            # Not split: half of a change would be left if the process ended in between.
            raise ValueError(f"one change takes at most {MOST_BYTES // row} rows, got {len(ids)}: make several of it")
        payload = b"".join(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in (ids, *codes))
        record = memoryview(encode_record(kind, self._sequence + 1, self._seed, payload))
        try:
            done = 0
            while done < len(record):
                done += os.pwrite(self._descriptor, record[done:], self._end + done)
            if self.durable:
                os.fsync(self._descriptor)
        except BaseException:
            self._take_back()
            raise
        self._end += len(record)
        self._sequence += 1
        return self._sequence

    def _cut(self) -> None:
        os.ftruncate(self._descriptor, self._end)
        os.fsync(self._descriptor)

    def _take_back(self) -> None:
        try:
            self._cut()
        except OSError:
            # A record that nobody acknowledged may be in the file: nothing may follow it.
            self._why_not = "could not be mended after a failed append: open the index again"
