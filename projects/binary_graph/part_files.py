"""Files of arrays that appear whole or not at all: safetensors, with a checksum taken while writing.

Written here rather than by the package of that name: so the file is read once less for its checksum, arrays start at
multiples of 64 bytes, and a range of rows is read without the rest. The package reads these files.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import socket
import time
import uuid
import zlib
from collections.abc import Iterable, Mapping
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 64
"""Arrays begin at multiples of it."""

PIECE_BYTES = 1 << 22
"""Bytes of one write or read while a checksum is taken."""

HEADER_LIMIT = 1 << 24
"""Longest header that is believed."""

STALE_SECONDS = 3600.0
"""A temporary file of another host that was not written to for so long is nobody's any more."""

TABLES = 4096
"""Headers that a process remembers."""

_Table = dict[str, tuple[np.dtype[Any], tuple[int, ...], int]]
_tables: dict[tuple[int, int, int, int], _Table] = {}

_DTYPES = {
    "BOOL": "|b1", "U8": "|u1", "I8": "|i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8",
}  # fmt: skip
_NAMES = {code: name for name, code in _DTYPES.items()}
TEMPORARY = re.compile(r"\..+\.(?P<host>[\w-]*)\.(?P<pid>\d+)\.[0-9a-f]{32}\.tmp", re.ASCII)
"""Names of files that are being written."""


def encode(arrays: Mapping[str, NDArray[Any]]) -> list[bytes | memoryview]:
    """The pieces of the file that holds the arrays: its header, then their bytes, little-endian in C order.

    Args:
        arrays: of bool, integers or floats, in any layout. The bytes of the file do not depend on their order.
    """
    entries: dict[str, Any] = {}
    pieces: list[bytes | memoryview] = []
    offset = 0
    # By width, then name, as the package does: every array is aligned for its dtype without holes between them.
    for name in sorted(arrays, key=lambda name: (-np.asarray(arrays[name]).dtype.itemsize, name)):
        array = np.asarray(arrays[name])
        code = array.dtype.newbyteorder("<").str
        assert code in _NAMES, (name, array.dtype)
        assert name != "__metadata__"
        array = np.asarray(array, dtype=code, order="C")
        end = offset + array.nbytes
        entries[name] = {"dtype": _NAMES[code], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
        if array.size:
            pieces.append(array.reshape(-1).view(np.uint8).data)
    header = json.dumps(entries).encode("ascii")
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    return [len(header).to_bytes(8, "little") + header, *pieces]


def publish(path: Path, pieces: Iterable[bytes | memoryview], *, durable: bool = True) -> tuple[int, int]:
    """Write a file under another name, then give it its own in one step.

    Args:
        path: its name; an earlier file of that name is replaced. The folder must be there.
        pieces: its bytes.
        durable: whether they and the name are flushed to the disk.

    Returns:
        Size in bytes, and CRC-32.

    Raises:
        OSError: it could not be written (a full disk); nothing of it is left.
    """
    temporary = path.with_name(f".{path.name}.{host_name()}.{os.getpid()}.{uuid.uuid4().hex}.tmp")
    size = crc = 0
    try:
        # Without a buffer, which would try once more to write what did not go in when it is closed.
        with open(temporary, "xb", buffering=0) as file:
            for piece in pieces:
                for start in range(0, len(piece), PIECE_BYTES):
                    block = memoryview(piece)[start : start + PIECE_BYTES]
                    crc = zlib.crc32(block, crc)
                    size += len(block)
                    while len(block):
                        block = block[file.write(block) :]
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    return size, crc


def host_name() -> str:
    """The name of this machine as it stands in the names of temporary files."""
    return re.sub(r"[^\w-]", "_", socket.gethostname(), flags=re.ASCII)


def clean(folder: Path) -> int:
    """Remove the temporary files of processes that are gone, in a folder and those in it; gives their number.

    Files of a live process stay, and those of another host that were written to within an hour: some worker of an
    earlier run may still be at it, and does no harm.
    """
    host, removed = host_name(), 0
    for file in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        name = TEMPORARY.fullmatch(file.name)
        if name is None:
            continue
        try:
            dead = name["host"] == host and not is_alive(int(name["pid"]))
            if dead or time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink()
                removed += 1
        except FileNotFoundError:
            continue
    return removed


def is_alive(pid: int) -> bool:
    """Whether a process of that number runs on this machine."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def file_crc(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            crc = zlib.crc32(piece, crc)
    return crc


class PartReader:
    """The arrays of one file, which stays open; a context manager.

    Raises:
        ValueError: there is no such file, or its header does not fit it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self._pages: mmap.mmap | None = None
        try:
            self._file = FileIO(path)
        except FileNotFoundError as error:
            raise self._damaged("it is not there") from error
        try:
            self._table = self._header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return list(self._table)

    def read(self, name: str, start: int | None = None, stop: int | None = None) -> NDArray[Any]:
        """Copy of an array, or of its rows [start, stop); nothing else is read."""
        dtype, shape, begin = self._entry(name)
        if start is not None or stop is not None:
            start, stop = start or 0, shape[0] if stop is None else stop
            assert 0 <= start <= stop <= shape[0], (name, shape, start, stop)
            begin += start * prod(shape[1:]) * dtype.itemsize
            shape = (stop - start, *shape[1:])
        array = np.empty(shape, dtype)
        self._file.seek(begin)
        rest = array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")
        while len(rest):
            count = self._file.readinto(rest)
            if not count:
                raise self._damaged(f"array {name!r} is cut short")
            rest = rest[count:]
        return array

    def map(self, name: str) -> NDArray[Any]:
        """An array mapped from the file, read-only."""
        dtype, shape, begin = self._entry(name)
        if prod(shape) == 0:  # nothing cannot be mapped
            array: NDArray[Any] = np.zeros(shape, dtype)
            array.flags.writeable = False
            return array
        # Not numpy.memmap: that takes ten times as long, and a build maps thousands of small arrays.
        if self._pages is None:
            self._pages = mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ)
        return np.frombuffer(self._pages, dtype, prod(shape), begin).reshape(shape)

    def _entry(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...], int]:
        if name not in self._table:
            raise ValueError(f"{self.path} has no array {name!r}; it has {', '.join(self._table) or 'none'}")
        return self._table[name]

    def _header(self) -> _Table:
        status = os.fstat(self._file.fileno())
        size = status.st_size
        # Parts are replaced whole or not at all, so a file that is the same has the same header.
        key = (status.st_dev, status.st_ino, size, status.st_mtime_ns)
        if key in _tables:
            return _tables[key]
        length = int.from_bytes(self._file.read(8), "little")
        if not 0 < length <= min(HEADER_LIMIT, size - 8):
            raise self._damaged(f"its header claims {length} bytes, the file has {size}")
        table: _Table = {}
        try:
            for name, entry in json.loads(self._file.read(length)).items():
                dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(int(n) for n in entry["shape"])
                begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
                fits = 8 + length <= begin <= end <= size and end - begin == prod(shape) * dtype.itemsize
                # What NumPy can make: lengths that a zero beside them hides are looked at too.
                sane = min(shape, default=0) >= 0 and len(shape) <= 32 and prod(max(1, n) for n in shape) < 1 << 59
                if not (fits and sane):
                    raise ValueError(f"array {name!r} of {entry['dtype']} {shape} lies at [{begin}, {end}) of {size}")
                table[name] = (dtype, shape, begin)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise self._damaged(f"its header cannot be used: {error!r}") from error
        if len(_tables) >= TABLES:
            _tables.clear()
        _tables[key] = table
        return table

    def _damaged(self, what: str) -> ValueError:
        return ValueError(
            f"{self.path} is damaged: {what}. Run the build again in the same folder: damaged parts are computed anew"
        )
