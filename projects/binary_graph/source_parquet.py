"""Codes and ids in columns of Parquet files, decoded a block of rows at a time."""

from __future__ import annotations

import os
import threading
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from alimm.extras import require
from alimm.projects.binary_graph.packing import MAX_WORDS
from alimm.projects.binary_graph.source_base import BLOCK_ROWS, SourceBase, check_ids
from alimm.projects.binary_graph.source_columns import code_bytes, holds_codes, id_values
from alimm.projects.binary_graph.source_npy import NpyRows, scan_ids


class ParquetFile(NamedTuple):
    """One file of an input."""

    path: str
    rows: int
    bytes: int


def _open(path: str) -> Any:
    parquet = require("pyarrow.parquet", "reading Parquet files")
    try:
        # A buffer makes Arrow stream a column instead of reading its whole chunk at once.
        return parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is no Parquet file that can be read: {error}") from error


class _Cursor:
    """Reads one column forward; a jump starts again at the row group that holds the row.

    Sequential ranges decode each row once. Only one block is held, whatever the size of a row group.
    """

    def __init__(self, files: Sequence[ParquetFile], column: str, block: int) -> None:
        self._files, self._column, self._block = files, column, block
        self._ends = list(accumulate(file.rows for file in files))
        self._batches: Iterator[Any] = iter(())
        self._file: Any = None
        self._number = -1
        self._group_ends: list[int] = []
        self._pending: Any = None
        self._position = 0  # row of the first pending one
        self._group_stop = 0

    def read(self, start: int, stop: int) -> Iterator[tuple[int, str, int, Any]]:
        """Arrow arrays that hold the rows [start, stop): first row, path, first row in that file, array."""
        while start < stop:
            if not self._position <= start < self._group_stop:
                self._seek(start)
            while self._pending is None or self._position + len(self._pending) <= start:
                if self._pending is not None:
                    self._position += len(self._pending)
                self._pending = next(self._batches).column(0)
            skip = start - self._position
            part = self._pending.slice(skip, min(stop - start, len(self._pending) - skip))
            file = self._files[self._number]
            yield start, file.path, start - (self._ends[self._number] - file.rows), part
            start += len(part)

    def _seek(self, row: int) -> None:
        number = bisect_right(self._ends, row)
        file = self._files[number]
        if number != self._number:
            self.close()
            if os.path.exists(file.path) and os.path.getsize(file.path) != file.bytes:
                raise ValueError(f"{file.path} has changed while it was read; leave the input alone and start again")
            self._file = _open(file.path)
            self._number = number
            metadata = self._file.metadata
            groups = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
            self._group_ends = list(accumulate(groups))
        base = self._ends[number] - file.rows
        group = bisect_right(self._group_ends, row - base)
        self._position = base + (self._group_ends[group - 1] if group else 0)
        self._group_stop = base + self._group_ends[group]
        self._pending = None
        self._batches = self._file.iter_batches(
            batch_size=self._block, row_groups=[group], columns=[self._column], use_threads=False
        )

    def close(self) -> None:
        self._batches, self._pending, self._number = iter(()), None, -1
        self._position = self._group_stop = 0
        if self._file is not None:
            self._file.close()
        self._file = None


class ParquetSource(SourceBase):
    """A column of codes, and perhaps one of ids, of Parquet files that are read as one.

    The column holds the bytes of a code (binary, binary of fixed size, lists of uint8) or its words (lists of uint64).
    Reading is meant to go forward: each range continues where the one before it ended, in each thread for itself.

    Args:
        files: the files.
        words: 64-bit words of a code.
        column: name of the column of codes.
        id_column: name of the column of external ids, or None.
        ids: files of external ids, or None.
        block: rows that are decoded at a time.
    """

    def __init__(
        self,
        files: Sequence[ParquetFile],
        words: int,
        column: str,
        id_column: str | None = None,
        ids: NpyRows | None = None,
        block: int = BLOCK_ROWS,
    ) -> None:
        self.files = [ParquetFile(*file) for file in files]
        self.count = sum(file.rows for file in self.files)
        self.words, self.column, self.id_column, self.block = words, column, id_column, block
        self.has_ids = id_column is not None or ids is not None
        self._ids = ids
        self._local = threading.local()

    @classmethod
    def scan(
        cls,
        paths: Sequence[Path],
        column: str | None = None,
        id_column: str | None = None,
        ids: Sequence[Path] | None = None,
        block: int = BLOCK_ROWS,
    ) -> ParquetSource:
        """Read the schemas, and the first code for its width.

        Args:
            paths: at least one file.
            column: the codes; None: the only column that can hold some.
            id_column: the external ids, or None.
            ids: ``.npy`` files of external ids, or None.
            block: rows that are decoded at a time.

        Raises:
            FileNotFoundError: a file is not there.
            ImportError: pyarrow is not installed.
            ValueError: columns that are missing or hold something else, or no row at all.
        """
        files = []
        for path in map(Path.absolute, paths):
            opened = _open(str(path))
            schema = opened.schema_arrow
            column = column if column is not None else _only_code_column(schema, id_column, path)
            for name in [column] if id_column is None else [column, id_column]:
                if name not in schema.names:
                    raise ValueError(f"{path} has no column {name!r}; it has {', '.join(schema.names)}")
            holds_codes(schema.field(column).type, f"column {column!r} of {path}")
            files.append(ParquetFile(str(path), opened.metadata.num_rows, path.stat().st_size))
            opened.close()
        assert column is not None
        count = sum(file.rows for file in files)
        if count == 0:
            raise ValueError(f"{paths[0]} has no rows; an input needs at least one")
        _, path_, row, first = next(_Cursor(files, column, 1).read(0, 1))
        width = code_bytes(first, f"column {column!r} of {path_}", row, None).shape[1]
        words, rest = divmod(width, 8)
        if rest or not 1 <= words <= MAX_WORDS:
            raise ValueError(
                f"column {column!r} of {path_} has codes of {width} bytes; a code has a multiple of 8, at most "
                f"{8 * MAX_WORDS}; pad with zeros"
            )
        return cls(files, words, column, id_column, None if ids is None else scan_ids(ids, count), block)

    def read(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Codes of the rows [start, stop): a copy of shape (stop - start, W).

        Raises:
            ValueError: a row without a code, or with one of another width; it is named.
        """
        self._check_range(start, stop)
        out = np.empty((stop - start, 8 * self.words), np.uint8)
        for row, path, row_in_file, part in self._cursor(self.column).read(start, stop):
            raw = code_bytes(part, f"column {self.column!r} of {path}", row_in_file, 8 * self.words)
            out[row - start : row - start + len(raw)] = raw
        return out.view("<u8").astype(np.uint64, copy=False)

    def ids(self, start: int, stop: int) -> NDArray[np.int64] | None:
        """External ids of the rows [start, stop), or None.

        Raises:
            ValueError: a row without an id, or with a negative one; it is named.
        """
        self._check_range(start, stop)
        if self._ids is not None:
            return check_ids("ids", self._ids.read(start, stop), start)
        if self.id_column is None:
            return None
        out = np.empty(stop - start, np.int64)
        for row, path, row_in_file, part in self._cursor(self.id_column).read(start, stop):
            where = f"column {self.id_column!r} of {path}"
            values = check_ids(where, id_values(part, where, row_in_file), row_in_file)
            out[row - start : row - start + len(values)] = values
        return out

    def _cursor(self, column: str) -> _Cursor:
        # One for each thread: threads that shared a position would send each other back to the start of the group.
        cursors: dict[str, _Cursor] = self._local.__dict__.setdefault("cursors", {})
        if column not in cursors:
            cursors[column] = _Cursor(self.files, column, self.block)
        return cursors[column]

    def describe(self, folder: Path | None = None) -> dict[str, Any]:
        """What ``open_source`` needs, as JSON; nothing is written."""
        return {
            "kind": "parquet",
            "files": [list(file) for file in self.files],
            "words": self.words,
            "column": self.column,
            "id_column": self.id_column,
            "ids": None if self._ids is None else self._ids.describe(),
            "block": self.block,
        }

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> ParquetSource:
        """The source that ``describe`` described."""
        given = {name: value for name, value in description.items() if name != "kind"}
        given["ids"] = None if given["ids"] is None else NpyRows(**given["ids"])
        return cls(**given)

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return ParquetSource.from_description, (self.describe(),)


def _only_code_column(schema: Any, id_column: str | None, path: Path) -> str:
    found, refused = [], []
    for field in schema:
        try:
            holds_codes(field.type, f"column {field.name!r} of {path}")
        except ValueError as error:
            refused.append(error)
            continue
        if field.name != id_column:
            found.append(field.name)
    if len(found) == 1:
        return str(found[0])
    if not found and len(refused) == 1:
        raise refused[0]
    what = f"more than one column that can hold codes: {', '.join(found)}" if found else "no column that holds codes"
    raise ValueError(f"{path} has {what} (columns: {', '.join(schema.names)}); name it with column=, --column")
