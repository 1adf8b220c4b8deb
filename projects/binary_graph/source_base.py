"""What a build reads its codes from: the protocol, and what every kind of source has in common."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

BLOCK_ROWS = 65536
"""Rows that are read at a time unless the caller asks for another number."""

FULL_BYTES = 1 << 28
SAMPLE_BLOCKS = 64
SAMPLE_ROWS = 4096


@runtime_checkable
class CodeSource(Protocol):
    """Rows of codes, and perhaps of ids, that can be read by range and opened again by another process.

    A source is picklable; ``describe()`` is the same as plain JSON, for workers that get nothing but text.
    """

    @property
    def count(self) -> int:
        """Number of rows, N."""

    @property
    def words(self) -> int:
        """64-bit words of a code, W."""

    @property
    def has_ids(self) -> bool:
        """Whether ``ids`` returns external ids."""

    def read(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Codes of the rows [start, stop): a copy of shape (stop - start, W)."""

    def ids(self, start: int, stop: int) -> NDArray[np.int64] | None:
        """External ids of the rows [start, stop), None where the source has none: a row's number is its id."""

    def chunks(self, block: int = BLOCK_ROWS) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.int64] | None]]:
        """First row, codes and ids of one block of rows after the other; at most ``block`` rows at a time."""

    def fingerprint(self) -> str:
        """Text that differs, as good as surely, when the rows differ; see ``SourceBase.fingerprint``."""

    def describe(self, folder: Path | None = None) -> dict[str, Any]:
        """What ``open_source`` needs, as JSON; an array in memory is written into ``folder`` for that."""


class SourceBase:
    """Blocks and fingerprint, by ``read`` and ``ids`` of the kinds derived from it."""

    count: int
    words: int
    has_ids: bool

    def read(self, start: int, stop: int) -> NDArray[np.uint64]:
        """Codes of the rows [start, stop): a copy of shape (stop - start, W)."""
        raise NotImplementedError

    def ids(self, start: int, stop: int) -> NDArray[np.int64] | None:
        """External ids of the rows [start, stop), or None."""
        raise NotImplementedError

    def chunks(self, block: int = BLOCK_ROWS) -> Iterator[tuple[int, NDArray[np.uint64], NDArray[np.int64] | None]]:
        """First row, codes and ids of one block of rows after the other.

        Raises:
            ValueError: ``block`` is below 1.
        """
        if block < 1:
            raise ValueError(f"a block must have at least one row, got {block}")
        for start in range(0, self.count, block):
            stop = min(start + block, self.count)
            yield start, self.read(start, stop), self.ids(start, stop)

    def fingerprint(self) -> str:
        """Shape, and CRC-32 of the codes and of the ids: of all rows, or of a fixed sample of them.

        Up to 256 MiB of codes are read whole. Of more, ``SAMPLE_BLOCKS`` blocks of ``SAMPLE_ROWS`` rows are read,
        spread evenly from the first row to the last: a change between them is not seen. Neither names nor times of
        files enter, so the same rows have the same fingerprint in memory, in one file or in many, and when copied.
        """
        codes_crc, ids_crc = 0, 0
        for start, stop in self._sampled():
            codes_crc = zlib.crc32(self.read(start, stop).astype("<u8", copy=False).data, codes_crc)
            ids = self.ids(start, stop)
            if ids is not None:
                ids_crc = zlib.crc32(ids.astype("<i8", copy=False).data, ids_crc)
        return f"{self.count}x{self.words}-{codes_crc:08x}-{f'{ids_crc:08x}' if self.has_ids else 'rows'}"

    def _sampled(self) -> Iterator[tuple[int, int]]:
        if self.count * self.words * 8 <= FULL_BYTES or self.count <= SAMPLE_BLOCKS * SAMPLE_ROWS:
            # Larger blocks here: the sum does not depend on them, and there are fewer calls.
            yield from ((start, min(start + BLOCK_ROWS, self.count)) for start in range(0, self.count, BLOCK_ROWS))
            return
        last = self.count - SAMPLE_ROWS
        for number in range(SAMPLE_BLOCKS):
            start = number * last // (SAMPLE_BLOCKS - 1)
            yield start, start + SAMPLE_ROWS

    def _check_range(self, start: int, stop: int) -> None:
        assert 0 <= start <= stop <= self.count, f"rows [{start}, {stop}) of a source of {self.count}"


def refuse_values(what: str, kind: str) -> ValueError:
    """The error for codes of a type that holds none.

    Args:
        what: where they are, for the message.
        kind: the type found, as a NumPy or Arrow name.
    """
    lowered = kind.lower()
    if "float" in lowered or "double" in lowered or "decimal" in lowered:
        mend = "these are vectors, not codes: hash them first with `alimm index hash`"
    elif "bool" in lowered:
        mend = "pack the bits first with binary_graph.packing.pack_bits"
    elif "int64" in lowered:
        mend = "signed words: save them as array.view(numpy.uint64) if they are codes"
    else:
        mend = "save the codes as uint64 of shape (rows, words), or as bytes"
    return ValueError(f"{what} holds {kind}; {mend}")


def check_ids(what: str, ids: NDArray[Any], first_row: int = 0) -> NDArray[np.int64]:
    """Return external ids as int64.

    Args:
        what: where they are, for the message.
        ids: shape (rows,), whole numbers from 0 to 2^63 - 1.
        first_row: number of the first row, for the message.

    Raises:
        ValueError: another type or shape, or a number out of range.
    """
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"{what} must be whole numbers of shape (rows,), got {ids.dtype} of shape {ids.shape}")
    bad = np.flatnonzero(ids < 0) if ids.dtype.kind == "i" else np.flatnonzero(ids > np.iinfo(np.int64).max)
    if len(bad):
        raise ValueError(f"{what} must lie from 0 to 2**63 - 1, row {first_row + bad[0]} is {ids[bad[0]]}")
    return ids.astype(np.int64, copy=False)
