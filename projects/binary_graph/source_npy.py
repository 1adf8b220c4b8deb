"""Codes and ids in ``.npy`` files, read by ranges of rows, several files as one."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray

from alimm.projects.binary_graph.packing import MAX_WORDS
from alimm.projects.binary_graph.source_base import SourceBase, check_ids, refuse_values

_HEADER_LIMIT = 10_000


class NpyFile(NamedTuple):
    """Where the rows of one file lie."""

    path: str
    rows: int
    offset: int
    bytes: int


class NpyRows:
    """The rows of one or more ``.npy`` files of the same type and row shape, one after the other.

    Ranges are read with plain reads instead of a mapping: a mapping's pages would count as memory of the worker.

    Args:
        files: from ``scan``.
        dtype: NumPy's text for the type of an element.
        row_shape: shape of a row, ``()`` for a file of one dimension.
    """

    def __init__(self, files: Sequence[NpyFile], dtype: str, row_shape: Sequence[int]) -> None:
        self.files = [NpyFile(*file) for file in files]
        self.dtype = np.dtype(dtype)
        self.row_shape = tuple(row_shape)
        self._ends = list(accumulate(file.rows for file in self.files))

    @classmethod
    def scan(cls, paths: Sequence[Path]) -> NpyRows:
        """Read the headers.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: a file is no ``.npy`` file, or cannot be read by rows, or differs from the first.
        """
        assert paths
        files, first = [], None
        for path in paths:
            file, dtype, row_shape = _scan(path.absolute())
            kind = dtype.str, row_shape
            if first is not None and kind != first:
                raise ValueError(
                    f"{paths[0]} has rows of {_shown(*first)}, {path} of {_shown(*kind)}: all files of an input must "
                    "be alike; give the others in a command of their own"
                )
            first = kind
            files.append(file)
        assert first is not None
        return cls(files, *first)

    @property
    def count(self) -> int:
        """Number of rows of all files."""
        return self._ends[-1]

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows [start, stop) as they are in the files.

        Raises:
            FileNotFoundError: a file is gone.
            ValueError: a file has another size than when it was scanned.
        """
        out = np.empty((stop - start, *self.row_shape), self.dtype)
        done = 0
        number = bisect_right(self._ends, start)
        while done < len(out):
            file = self.files[number]
            skip = start + done - (self._ends[number] - file.rows)
            take = min(file.rows - skip, len(out) - done)
            if take:
                self._read_file(file, skip, out[done : done + take])
            done += take
            number += 1
        return out

    def _read_file(self, file: NpyFile, skip: int, out: NDArray[Any]) -> None:
        row_bytes = out[:1].nbytes
        with open(file.path, "rb", buffering=0) as stream:
            if os.fstat(stream.fileno()).st_size != file.bytes:
                raise ValueError(
                    f"{file.path} has changed: {os.fstat(stream.fileno()).st_size} bytes, at the start it had "
                    f"{file.bytes}; leave the input alone while it is read, and start again"
                )
            stream.seek(file.offset + skip * row_bytes)
            view = out.view(np.uint8).reshape(-1).data
            while view:
                # One call returns at most 2 GiB.
                got = stream.readinto(view)
                if not got:
                    raise ValueError(f"{file.path} ended while it was read; it has been cut, start again")
                view = view[got:]

    def describe(self) -> dict[str, Any]:
        """Arguments of the class, as JSON."""
        return {"files": [list(file) for file in self.files], "dtype": self.dtype.str, "row_shape": [*self.row_shape]}


def _shown(dtype: str, row_shape: tuple[int, ...]) -> str:
    return f"{np.dtype(dtype).name} x {'x'.join(map(str, row_shape)) or '1'}"


def _scan(path: Path) -> tuple[NpyFile, np.dtype[Any], tuple[int, ...]]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    with path.open("rb") as stream:
        try:
            shape, fortran, dtype = _header(stream)
        except ValueError as error:
            raise ValueError(f"{path} is no .npy file that can be read: {error}") from error
        offset, size = stream.tell(), os.fstat(stream.fileno()).st_size
    if dtype.hasobject or dtype.names is not None:
        raise ValueError(f"{path} holds Python objects or records ({dtype}); save a plain array of numbers")
    if len(shape) == 0:
        raise ValueError(f"{path} holds a single number; an input has one row for each item")
    if fortran and len(shape) > 1:
        raise ValueError(f"{path} is stored by columns; save numpy.ascontiguousarray(codes) instead")
    need = offset + dtype.itemsize * int(np.prod(shape, dtype=object))
    if size != need:
        raise ValueError(f"{path} has {size} bytes, its header asks for {need}: the file is damaged, write it again")
    return NpyFile(str(path), shape[0], offset, size), dtype, shape[1:]


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = npy_format.read_magic(stream)
    if version == (1, 0):
        return npy_format.read_array_header_1_0(stream, max_header_size=_HEADER_LIMIT)
    if version == (2, 0):
        return npy_format.read_array_header_2_0(stream, max_header_size=_HEADER_LIMIT)
    raise ValueError(f"format version {version[0]}.{version[1]}")


def scan_ids(paths: Sequence[Path], count: int) -> NpyRows:
    """Files of external ids, one for each of ``count`` rows.

    Raises:
        FileNotFoundError: a file is not there.
        ValueError: not whole numbers in one dimension, or not ``count`` of them.
    """
    rows = NpyRows.scan(paths)
    if rows.row_shape or rows.dtype.kind not in "iu":
        raise ValueError(f"ids in {paths[0]} must be whole numbers of shape (rows,), got {rows.dtype} {rows.row_shape}")
    if rows.count != count:
        raise ValueError(f"{paths[0]} has {rows.count} ids, the input has {count} rows: one id for each row is needed")
    return rows


class NpySource(SourceBase):
    """Codes in ``.npy`` files: uint64 of shape (N, W), or their bytes, uint8 of shape (N, 8 W).

    Args:
        codes: the files of the codes.
        ids: the files of the external ids, None if a row's number is its id.

    Raises:
        ValueError: the files hold no codes.
    """

    def __init__(self, codes: NpyRows, ids: NpyRows | None = None) -> None:
        where, dtype, shape = codes.files[0].path, codes.dtype, codes.row_shape
        if dtype not in (np.dtype(np.uint8), np.dtype("<u8"), np.dtype(">u8")):
            raise refuse_values(where, dtype.name)
        if len(shape) != 1:
            raise ValueError(f"{where} has rows of shape {shape}; codes have the shape (rows, words)")
        self.words, rest = divmod(shape[0], 8 // dtype.itemsize)
        if rest or not 1 <= self.words <= MAX_WORDS:
            raise ValueError(
                f"{where} has rows of {shape[0] * dtype.itemsize} bytes; a code has a multiple of 8, at most "
                f"{8 * MAX_WORDS}; pad with zeros"
            )
        self._codes, self._ids = codes, ids
        self.count = codes.count
        self.has_ids = ids is not None

    @classmethod
    def scan(cls, paths: Sequence[Path], ids: Sequence[Path] | None = None) -> NpySource:
        """Open files of codes, and of ids.

        Raises:
            FileNotFoundError: a file is not there.
            ValueError: files that do not fit.
        """
        codes = NpyRows.scan(paths)
        return cls(codes, None if ids is None else scan_ids(ids, codes.count))

    def read(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Codes of the rows [start, stop): a copy of shape (stop - start, W)."""
        self._check_range(start, stop)
        raw = self._codes.read(start, stop)
        if raw.dtype == np.uint8:
            raw = raw.view("<u8")
        return raw.astype(np.uint64, copy=False)

    def ids(self, start: int, stop: int) -> NDArray[np.int64] | None:
        """External ids of the rows [start, stop), or None."""
        self._check_range(start, stop)
        return None if self._ids is None else check_ids("ids", self._ids.read(start, stop), start)

    def describe(self, folder: Path | None = None) -> dict[str, Any]:
        """What ``open_source`` needs, as JSON; nothing is written."""
        ids = None if self._ids is None else self._ids.describe()
        return {"kind": "npy", "codes": self._codes.describe(), "ids": ids}

    @classmethod
    def from_description(cls, description: dict[str, Any]) -> NpySource:
        """The source that ``describe`` described."""
        ids = description["ids"]
        return cls(NpyRows(**description["codes"]), None if ids is None else NpyRows(**ids))
