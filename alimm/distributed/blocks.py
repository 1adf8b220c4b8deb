"""Arrays with one row a class on the disk, in blocks of a fixed number of rows that do not depend on the ranks.

A folder holds, for every array, files of ``block_rows`` consecutive rows (the last one is shorter) in the safetensors
format, and ``index.json``::

    weight-000000000000.safetensors    rows [0, block_rows) of the array ``weight``
    weight-000000262144.safetensors    rows [block_rows, 2 * block_rows)
    index.json                         rows, block size, dtype and shape of each array, scalars, size and sha256 a file

The same state gives the same bytes, however many ranks wrote it, and any rank reads the rows that it needs
(``alimm.distributed.block_writer`` writes, this module reads and checks). File names follow from the array and the row,
so an index cannot name a file outside its folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from alimm.distributed.collectives import raise_together, rank_and_size

FORMAT, VERSION = "alimm.row_blocks", 1
INDEX = "index.json"
BLOCK_ROWS = 1 << 18
"""Rows of a block unless told otherwise: 512 MB of a float32 weight with 512 columns."""

DTYPES: dict[str, torch.dtype] = dict(
    F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16,
    I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool,
)  # fmt: skip
"""The name of a dtype in safetensors -> the dtype."""

_NAME = re.compile(r"[A-Za-z0-9_]{1,80}(\.[A-Za-z0-9_]{1,80}){0,8}")
_MOST_ROWS = 1 << 60


@dataclass(frozen=True)
class BlockFile:
    """Size in bytes and digest of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class BlockArray:
    """One array: its dtype by safetensors' name, the shape of a row, and its files by block."""

    dtype: str
    row_shape: tuple[int, ...]
    files: tuple[BlockFile, ...] = ()


@dataclass(frozen=True)
class BlockIndex:
    """What ``index.json`` says."""

    num_rows: int
    block_rows: int
    arrays: dict[str, BlockArray]
    scalars: dict[str, Any] = field(default_factory=dict)

    @property
    def num_blocks(self) -> int:
        """Blocks of an array."""
        return -(-self.num_rows // self.block_rows)

    def rows_of(self, block: int) -> tuple[int, int]:
        """First row of a block and the row after its last."""
        return block * self.block_rows, min((block + 1) * self.block_rows, self.num_rows)

    def file_name(self, name: str, block: int) -> str:
        """The file of a block."""
        return f"{name}-{block * self.block_rows:012d}.safetensors"

    def header(self, name: str, block: int) -> bytes:
        """What stands before the rows in a file: the length of the header, and the header."""
        start, stop = self.rows_of(block)
        array = self.arrays[name]
        shape = [stop - start, *array.row_shape]
        size = prod(shape) * DTYPES[array.dtype].itemsize
        content = {name: dict(dtype=array.dtype, shape=shape, data_offsets=[0, size])}
        text = json.dumps(content, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def size_of(self, name: str, block: int) -> int:
        """Bytes of the file of a block."""
        start, stop = self.rows_of(block)
        array = self.arrays[name]
        rows = (stop - start) * prod(array.row_shape) * DTYPES[array.dtype].itemsize
        return len(self.header(name, block)) + rows

    def files(self) -> Iterator[tuple[str, BlockFile]]:
        """Name and properties of every file, in the same order everywhere."""
        for name in sorted(self.arrays):
            for block, file in enumerate(self.arrays[name].files):
                yield self.file_name(name, block), file

    def dumps(self) -> str:
        """The content of ``index.json``; the same index gives the same text."""
        arrays = {
            name: dict(
                dtype=array.dtype,
                row_shape=list(array.row_shape),
                files=[dict(size=file.size, sha256=file.sha256) for file in array.files],
            )
            for name, array in self.arrays.items()
        }
        content = dict(
            format=FORMAT,
            version=VERSION,
            num_rows=self.num_rows,
            block_rows=self.block_rows,
            arrays=arrays,
            scalars=self.scalars,
        )
        return json.dumps(content, indent=1, sort_keys=True) + "\n"


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in safetensors.

    Raises:
        ValueError: it cannot be stored.
    """
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"arrays of {dtype} cannot be stored: use one of {', '.join(map(str, DTYPES.values()))}")


def check_name(name: Any) -> None:
    """Refuse a name of an array that is not words of letters, digits and ``_`` joined by dots, with a ValueError."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"an array is named by words of letters, digits and '_' joined by '.', got {str(name)[:80]!r}")


def read_index(folder: str | os.PathLike[str]) -> BlockIndex:
    """Read ``index.json`` of a folder. Nothing in it is taken on trust.

    Raises:
        ValueError: there is none, or it is damaged or of another format. The message names it.
    """
    path = Path(folder, INDEX)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {INDEX}: it is no folder of row blocks, or the save was cut off") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {str(error) or type(error).__name__}") from error
    try:
        return _parse(content)
    except ValueError as error:
        raise ValueError(f"{path} is not an index of row blocks: {error}") from error


def _whole(value: Any, what: str, least: int, most: int = _MOST_ROWS) -> int:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{what} must be a whole number from {least} to {most}, got {str(value)[:80]!r}")
    return value


def _typed(value: Any, kind: type, what: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{what} must be a {kind.__name__}, got {str(value)[:80]!r}")
    return value


def _parse(content: Any) -> BlockIndex:
    content = _typed(content, dict, "the content")
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise ValueError(f"expected format {FORMAT!r} version {VERSION}, got {str(content.get('format'))[:80]!r}")
    index = BlockIndex(
        _whole(content.get("num_rows"), "num_rows", 0),
        _whole(content.get("block_rows"), "block_rows", 1),
        {},
        _typed(content.get("scalars"), dict, "scalars"),
    )
    for name, array in _typed(content.get("arrays"), dict, "arrays").items():
        check_name(name)
        array = _typed(array, dict, name)
        dtype = _typed(array.get("dtype"), str, f"dtype of {name}")
        if dtype not in DTYPES:
            raise ValueError(f"{name} has the unknown dtype {dtype[:80]!r}")
        shape = tuple(
            _whole(size, f"row_shape of {name}", 0, 1 << 31)
            for size in _typed(array.get("row_shape"), list, f"row_shape of {name}")
        )
        files = _typed(array.get("files"), list, f"files of {name}")
        if len(files) != index.num_blocks:
            raise ValueError(f"{name} has {len(files)} files, its rows need {index.num_blocks}")
        index.arrays[name] = BlockArray(dtype, shape)
        checked = []
        for block, file in enumerate(files):
            file = _typed(file, dict, f"files of {name}")
            sha256 = _typed(file.get("sha256"), str, f"sha256 of {name}")
            if not re.fullmatch(r"[0-9a-f]{64}", sha256):
                raise ValueError(f"sha256 of {name} must be 64 hex digits, got {sha256[:80]!r}")
            size = index.size_of(name, block)
            if file.get("size") != size:
                raise ValueError(f"{index.file_name(name, block)} must have {size} bytes, got {file.get('size')!r}")
            checked.append(BlockFile(size, sha256))
        index.arrays[name] = BlockArray(dtype, shape, tuple(checked))
    return index


def read_rows(
    folder: str | os.PathLike[str],
    name: str,
    start: int,
    stop: int,
    out: torch.Tensor | None = None,
    index: BlockIndex | None = None,
) -> torch.Tensor:
    """Rows [start, stop) of an array. The files are mapped, so that only these rows are read.

    Args:
        folder: the folder of the blocks.
        name: the array.
        start: first row.
        stop: the row after the last one; ``start == stop`` gives no rows.
        out: where the rows go, (stop - start, ...), of any dtype and device; None makes a tensor on the CPU.
        index: of ``read_index``, where the caller has it.

    Raises:
        ValueError: no such array or rows, or a file that is missing or damaged.
    """
    index = read_index(folder) if index is None else index
    if name not in index.arrays:
        raise ValueError(f"{folder} holds no array {name!r}; it holds {', '.join(sorted(index.arrays))}")
    if not 0 <= start <= stop <= index.num_rows:
        raise ValueError(f"rows must lie in [0, {index.num_rows}), got [{start}, {stop})")
    array = index.arrays[name]
    if out is None:
        out = torch.empty((stop - start, *array.row_shape), dtype=DTYPES[array.dtype])
    assert tuple(out.shape) == (stop - start, *array.row_shape)
    row = start
    while row < stop:
        block = row // index.block_rows
        first, last = index.rows_of(block)
        end = min(stop, last)
        path = Path(folder, index.file_name(name, block))
        try:
            with safe_open(path, framework="pt") as file:
                rows = file.get_slice(name)
                if (shape := tuple(rows.get_shape())) != (last - first, *array.row_shape):
                    raise ValueError(f"{path} holds an array {shape}, expected {(last - first, *array.row_shape)}")
                out[row - start : end - start].copy_(rows[row - first : end - first])
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}. The checkpoint is damaged; take another one") from error
        row = end
    return out


@lru_cache(maxsize=1 << 16)
def _sha256_of(path: str, identity: tuple[int, int, int]) -> str:
    """The digest of a file. A file that did not change since it was read is not read again."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def why_broken(folder: str | os.PathLike[str], full: bool = True, part: tuple[int, int] = (0, 1)) -> str | None:
    """Why the blocks of a folder cannot be trusted, or None.

    Args:
        folder: the folder of the blocks.
        full: also compare the digests; without it the index, and presence and size of every file.
        part: (number, parts): compare the digests of every ``parts``-th file only, so that ranks share the reading.
    """
    try:
        index = read_index(folder)
    except ValueError as error:
        return str(error)
    number, parts = part
    for position, (name, file) in enumerate(index.files()):
        path = Path(folder, name)
        try:
            status = path.stat()
            if status.st_size != file.size:
                return f"{path} has {status.st_size} bytes, its index says {file.size}"
            identity = (status.st_ino, status.st_size, status.st_mtime_ns)
            if full and position % parts == number and _sha256_of(str(path.resolve()), identity) != file.sha256:
                return f"{path} does not match its sha256"
        except FileNotFoundError:
            return f"{path} is missing"
        except OSError as error:
            return f"{path} cannot be read: {error}"
    return None


def verify(
    folder: str | os.PathLike[str], full: bool = True, group: Any = None, device: torch.device | None = None
) -> None:
    """Check a folder on all ranks of a group, which share the reading; every rank must call.

    Args:
        folder: the folder of the blocks.
        full: as for ``why_broken``.
        group: the process group.
        device: where the group communicates; the CPU for gloo.

    Raises:
        ValueError: on every rank, with the file that is missing or damaged.
    """
    reason = why_broken(folder, full, rank_and_size(group))
    raise_together(None if reason is None else f"{reason}. Take another checkpoint", group, device)
