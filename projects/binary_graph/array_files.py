"""Files of arrays that are written once, checked before they are mapped, and never trusted.

A file is what ``numpy.save`` writes (format 1.0, little-endian, C order, no pickle). Its ``ArrayEntry`` stands in the
manifest of the index: size, dtype, shape and the crc32 of every block of 1 MiB. Reading compares size, magic and header
with the entry before anything is mapped, so that no file can ask for memory or hand over an array of another kind.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

BLOCK = 1 << 20
"""Bytes that share a checksum."""

DTYPES = ("<u8", "<i8", "<i4", "<u2", "|u1")
VERIFY = ("header", "full")
"""How much an opening reads: what protects the search, or every byte."""

MEND = "Restore the folder from a copy, or remove it and build the index again"

_MOST_BYTES = 1 << 60
_HEADER_LIMIT = 4096
_MOST_COLUMNS = 1 << 16
_HEADER = re.compile(
    rb"\{'descr': '([^']{1,32})', 'fortran_order': (True|False), 'shape': \((\d{1,19}(?:,|, \d{1,19}))\), \} *\n"
)


class DamagedIndexError(ValueError):
    """A file of an index is not what it must be; the message names the file, the damage and the mend."""

    def __init__(self, path: str | os.PathLike[str], what: str, mend: str = MEND) -> None:
        super().__init__(f"{os.fspath(path)} {what}. {mend}")


class MissingFileError(DamagedIndexError):
    """A file that the manifest names is not there: lost, or removed by a writer since the manifest was read."""


@dataclass(frozen=True)
class ArrayEntry:
    """What the manifest knows of one file.

    Attributes:
        bytes: size of the file.
        dtype: NumPy's name, little-endian, e.g. ``<u8``.
        shape: of the array.
        crc32: of each block of 1 MiB of the file, header included.
    """

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    crc32: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """The entry as JSON takes it."""
        return dict(bytes=self.bytes, dtype=self.dtype, shape=list(self.shape), crc32=list(self.crc32))

    @classmethod
    def from_json(cls, value: Any, what: str) -> ArrayEntry:
        """Parse an entry that anybody may have written.

        Raises:
            ValueError: a wrong type, or sizes that contradict each other; ``what`` names the entry.
        """
        if not isinstance(value, dict) or set(value) != {"bytes", "dtype", "shape", "crc32"}:
            raise ValueError(f"the entry of {what} must have bytes, dtype, shape and crc32, got {str(value)[:80]!r}")
        size = whole(value["bytes"], f"bytes of {what}", 0, _MOST_BYTES)
        if not isinstance(value["dtype"], str) or value["dtype"] not in DTYPES:
            raise ValueError(f"dtype of {what} must be one of {', '.join(DTYPES)}, got {str(value['dtype'])[:80]!r}")
        if not isinstance(value["shape"], list) or not 1 <= len(value["shape"]) <= 2:
            raise ValueError(f"shape of {what} must be a list of 1 or 2 sizes, got {str(value['shape'])[:80]!r}")
        limits = (_MOST_BYTES, _MOST_COLUMNS)
        shape = tuple(whole(n, f"shape of {what}", 0, most) for n, most in zip(value["shape"], limits, strict=False))
        header = size - prod(shape) * np.dtype(value["dtype"]).itemsize
        if not 0 < header <= _HEADER_LIMIT:
            raise ValueError(f"{what} of shape {shape} cannot lie in a file of {size} bytes")
        blocks = -(-size // BLOCK)
        if not isinstance(value["crc32"], list) or len(value["crc32"]) != blocks:
            raise ValueError(f"crc32 of {what} must be a list of {blocks} checksums, one per {BLOCK} bytes")
        crc32 = tuple(whole(crc, f"crc32 of {what}", 0, (1 << 32) - 1) for crc in value["crc32"])
        return cls(size, value["dtype"], shape, crc32)


def whole(value: Any, what: str, least: int, most: int) -> int:
    """An int of JSON in [least, most]; True, floats and everything else are refused with a ValueError."""
    if type(value) is not int or not least <= value <= most:
        # Only the start: a number of JSON may have thousands of digits.
        shown = "a number that is too large" if type(value) is int and value.bit_length() > 64 else str(value)[:80]
        raise ValueError(f"{what} must be a whole number from {least} to {most}, got {shown!r}")
    return value


def check_verify(verify: str) -> None:
    """Refuse an unknown way of verification."""
    if verify not in VERIFY:
        raise ValueError(f"verify must be one of {', '.join(map(repr, VERIFY))}, got {verify!r}")


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(
    path: Path, chunks: Iterable[Any], durable: bool = True, step: Callable[[str], None] | None = None
) -> None:
    """Write a file under another name, flush it to the disk, then give it its own; readers see the old or the new.

    Args:
        path: where to; the folder must be there.
        chunks: its content, in order.
        durable: wait until file and name are on the disk.
        step: called with ``'written'``, ``'flushed'`` and ``'renamed'`` when that is done.

    Raises:
        OSError: as the system says, e.g. the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f"{path.name}.part-{os.urandom(4).hex()}")
    try:
        with temporary.open("xb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            if step:
                step("written")
            if durable:
                os.fsync(file.fileno())
        if step:
            step("flushed")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if step:
        step("renamed")
    if durable:
        sync_folder(path.parent)


def fresh_name(folder: Path, kind: str, generation: int, suffix: str = "") -> str:
    """A name that no published generation has used: kind, generation, and a number that is free in the folder.

    A name must never come back: a reader that still holds an older manifest would open another array under it.
    """
    number = 0
    while (folder / (name := f"{kind}-{generation:08d}-{number:03d}{suffix}")).exists():
        number += 1
    return name


def write_array(path: Path, array: NDArray[Any], durable: bool = True) -> ArrayEntry:
    """Write an array of one or two axes; the same array gives the same bytes.

    Args:
        path: of the file, ``*.npy``; replaced at once if it is there.
        array: of a dtype in ``DTYPES``, in any byte order.
        durable: wait until it is on the disk.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    assert array.dtype.str in DTYPES, array.dtype
    assert 1 <= array.ndim <= 2, array.shape
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, np.lib.format.header_data_from_array_1_0(array))
    header, data, crc32 = buffer.getvalue(), array.reshape(-1).view(np.uint8), []

    def blocks() -> Iterator[Any]:
        first = BLOCK - len(header)
        yield header + data[:first].tobytes()
        for start in range(first, len(data), BLOCK):
            yield data[start : start + BLOCK].data

    def summed() -> Iterator[Any]:
        for block in blocks():
            crc32.append(zlib.crc32(block))
            yield block

    replace_file(path, summed(), durable)
    return ArrayEntry(len(header) + len(data), array.dtype.str, tuple(array.shape), tuple(crc32))


def open_regular(path: Path) -> BinaryIO:
    """Open a file to read it; links, folders and pipes are refused, since no index has any.

    Raises:
        DamagedIndexError: it is no regular file.
        MissingFileError: it is not there.
    """
    try:
        # Not blocking: a pipe in place of the file must not hang the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        raise MissingFileError(path, "is missing") from None
    except OSError as error:
        if path.is_symlink() or not path.is_file():
            raise DamagedIndexError(path, "is a link or no regular file: an index has none") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DamagedIndexError(path, "is no regular file: an index has none")
    return open(descriptor, "rb")


def _check_header(file: BinaryIO, entry: ArrayEntry) -> int:
    """Compare magic and header with the entry; the size of both together. ValueError: they differ."""
    start = file.read(12)
    if start[:6] != b"\x93NUMPY" or start[6:8] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError("is no .npy file of format 1.0 or 2.0")
    prefix = 10 if start[6] == 1 else 12
    length = int.from_bytes(start[8:prefix], "little")
    if length + prefix > _HEADER_LIMIT:
        raise ValueError(f"has a header of {length} bytes, expected at most {_HEADER_LIMIT}")
    # Not NumPy's own parser: ours knows one way to write each array, and evaluates nothing.
    file.seek(prefix)
    match = _HEADER.fullmatch(file.read(length))
    if match is None:
        raise ValueError("has a header that no index writes")
    dtype, order = match[1].decode("latin-1"), match[2].decode()
    shape = tuple(int(size) for size in match[3].split(b",") if size.strip())
    if (dtype, order, shape) != (entry.dtype, "False", entry.shape):
        raise ValueError(
            f"holds {dtype!r} of shape {shape}, fortran_order={order}, and the manifest says {entry.dtype!r} of shape "
            f"{entry.shape} in C order"
        )
    return prefix + length


def open_array(path: Path, entry: ArrayEntry, verify: str = "header") -> NDArray[Any]:
    """Map an array read-only.

    Args:
        path: of the file.
        entry: what the manifest says of it.
        verify: ``'header'`` compares size and header; ``'full'`` also the checksum of every block.

    Raises:
        DamagedIndexError: the file differs from its entry; the message says where.
        MissingFileError: there is no file.
    """
    check_verify(verify)
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size != entry.bytes:
            raise DamagedIndexError(path, f"has {size} bytes, the manifest says {entry.bytes}")
        try:
            offset = _check_header(file, entry)
        except ValueError as error:
            raise DamagedIndexError(path, str(error)) from None
        itemsize = np.dtype(entry.dtype).itemsize
        if offset + prod(entry.shape) * itemsize != size:
            raise DamagedIndexError(path, f"has a header of {offset} bytes, which leaves other than the array's bytes")
        if verify == "full":
            file.seek(0)
            for number, crc in enumerate(entry.crc32):
                block = file.read(BLOCK)
                if zlib.crc32(block) != crc:
                    first = number * BLOCK
                    where = f"block {number} (bytes {first} to {first + len(block)})"
                    raise DamagedIndexError(path, f"does not match its checksum in {where}")
        if not prod(entry.shape):
            empty = np.empty(entry.shape, entry.dtype)
            empty.flags.writeable = False
            return empty
        # The descriptor, not the path: what was checked is what is mapped.
        return np.memmap(file, entry.dtype, "r", offset, entry.shape).view(np.ndarray)
