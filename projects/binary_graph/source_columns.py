"""From Arrow columns to NumPy: the bytes of codes, and ids."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from alimm.extras import require
from alimm.projects.binary_graph.source_base import refuse_values


def holds_codes(kind: Any, where: str) -> None:
    """Refuse a column that holds no codes.

    Args:
        kind: its Arrow type.
        where: which column, for the message.

    Raises:
        ValueError: neither bytes nor lists of uint8 or uint64.
    """
    types = require("pyarrow", "reading Parquet files").types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_fixed_size_binary(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        return
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        if types.is_uint8(kind.value_type) or types.is_uint64(kind.value_type):
            return
        raise refuse_values(where, f"lists of {kind.value_type}")
    raise refuse_values(where, str(kind))


def code_bytes(part: Any, where: str, first_row: int, width: int | None) -> NDArray[np.uint8]:
    """Bytes of the codes of an Arrow array, shape (rows, bytes of a code).

    Args:
        part: the array, of a type that ``holds_codes`` lets pass.
        where: which column, for the message.
        first_row: number of the first row in its file, for the message.
        width: bytes that each code must have; None: as many as the first.

    Raises:
        ValueError: a row is null, or holds a null, or has another width; it is named.
    """
    pyarrow = require("pyarrow", "reading Parquet files")
    types = pyarrow.types
    if types.is_dictionary(part.type):
        part = part.dictionary_decode()
    refuse_nulls(part, where, first_row)
    kind, rows = part.type, len(part)
    if types.is_fixed_size_binary(kind):
        widths: Any = kind.byte_width
        start = part.offset * widths
        data = np.frombuffer(part.buffers()[1], np.uint8)[start : start + rows * widths]
    elif types.is_binary(kind) or types.is_large_binary(kind):
        wide = np.int64 if types.is_large_binary(kind) else np.int32
        offsets = np.frombuffer(part.buffers()[1], wide)[part.offset : part.offset + rows + 1]
        widths = np.diff(offsets)
        buffer = part.buffers()[2]
        data = np.frombuffer(buffer, np.uint8)[offsets[0] : offsets[-1]] if buffer else np.empty(0, np.uint8)
    else:
        values = part.flatten()
        if values.null_count:
            inside = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            before = _list_ends(part)
            row = first_row + int(np.searchsorted(before, inside, side="right"))
            raise ValueError(f"row {row} of {where} holds a null; leave such rows out")
        flat = values.to_numpy(zero_copy_only=False)
        widths = np.diff(_list_ends(part), prepend=0) * flat.itemsize
        data = np.ascontiguousarray(flat, flat.dtype.newbyteorder("<")).view(np.uint8)
    if width is None:
        width = int(np.ravel(widths)[0])
    bad = np.flatnonzero(np.broadcast_to(widths, rows) != width)
    if len(bad):
        raise ValueError(
            f"row {first_row + bad[0]} of {where} has a code of {np.broadcast_to(widths, rows)[bad[0]]} bytes, others "
            f"have {width}: all codes of an input must have the same width"
        )
    return data.reshape(rows, width)


def _list_ends(part: Any) -> NDArray[np.int64]:
    """Where each list of an Arrow array ends in its flattened values."""
    types = require("pyarrow", "reading Parquet files").types
    if types.is_fixed_size_list(part.type):
        return np.arange(1, len(part) + 1) * part.type.list_size
    offsets = part.offsets.to_numpy()
    ends: NDArray[np.int64] = (offsets[1:] - offsets[0]).astype(np.int64)
    return ends


def id_values(part: Any, where: str, first_row: int) -> NDArray[Any]:
    """External ids of an Arrow array, shape (rows,).

    Raises:
        ValueError: no whole numbers, or a row is null; it is named.
    """
    types = require("pyarrow", "reading Parquet files").types
    if not types.is_integer(part.type):
        raise ValueError(f"{where} holds {part.type}; ids are whole numbers (int64)")
    refuse_nulls(part, where, first_row)
    values: NDArray[Any] = part.to_numpy(zero_copy_only=False)
    return values


def refuse_nulls(part: Any, where: str, first_row: int) -> None:
    """Name the first null row of an Arrow array.

    Raises:
        ValueError: there is one.
    """
    if part.null_count:
        row = first_row + int(np.flatnonzero(part.is_null().to_numpy(zero_copy_only=False))[0])
        raise ValueError(f"row {row} of {where} is null; leave such rows out")
