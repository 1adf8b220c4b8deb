"""Writing row blocks from a sharded state: every rank streams the blocks that begin in its shard.

A block may span several ranks, some of them empty. It is written by the rank that holds its first row, which receives
the other rows piece by piece. Blocks of one rank alone come first and need no communication. Of the blocks that several
ranks share, a rank takes part in two at most, and these are neighbours in their list; so the even ones are written
first and the odd ones then, and nobody waits for a chain of others.

A rank that fails (a full disk) takes and sends rows as before, and tells the others at the end. The folder has a hidden
name until all is there, so its final name never stands for a part.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from alimm.distributed.blocks import (
    BLOCK_ROWS,
    DTYPES,
    INDEX,
    BlockArray,
    BlockFile,
    BlockIndex,
    check_name,
    dtype_name,
)
from alimm.distributed.collectives import rank_and_size
from alimm.distributed.shards import Sharding

PIECE_BYTES = 1 << 24
"""Bytes that a rank holds at a time beside its shard."""


def communication_device(group: Any = None) -> torch.device:
    """Where tensors must lie that a process group sends: the current CUDA device for NCCL, else the CPU."""
    _, size = rank_and_size(group)
    if size > 1 and dist.get_backend(group) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """A small picklable object of every rank, by rank."""
    _, size = rank_and_size(group)
    if size == 1:
        return [value]
    values: list[Any] = [None] * size
    dist.all_gather_object(values, value, group=group)
    return values


def agree(error: Exception | None, group: Any = None) -> None:
    """Fail on every rank if one has failed; every rank must call.

    Raises:
        OSError: some rank could not write; ValueError: it was given what cannot be written. The message names the rank.
    """
    kinds = (ValueError,) if isinstance(error, ValueError) else (OSError,)
    told = None if error is None else (kinds[0], str(error) or type(error).__name__)
    _, size = rank_and_size(group)
    for rank, failure in enumerate(gather_objects(told, group)):
        if failure is not None:
            kind, text = failure
            raise kind(text if size == 1 else f"{text} (on rank {rank} of {size})") from error


class _Output:
    """One file on its way to the disk. Errors are kept, not raised, since other ranks count on our going on."""

    def __init__(self, path: Path, header: bytes) -> None:
        self.error: Exception | None = None
        self._digest, self._size = hashlib.sha256(), 0
        self._path, self._file = path, None
        try:
            self._file = open(path, "xb")  # noqa: SIM115  (closed in close)
        except OSError as error:
            self.error = error
        self.write(header)

    def write(self, data: bytes | memoryview) -> None:
        if self.error is not None or self._file is None:
            return
        try:
            self._file.write(data)
            self._digest.update(data)
            self._size += len(data)
        except OSError as error:
            self.error = error

    def close(self) -> BlockFile:
        if self._file is not None:
            try:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            except OSError as error:
                self.error = self.error or error
        return BlockFile(self._size, self._digest.hexdigest())


def _bytes(rows: torch.Tensor) -> torch.Tensor:
    return rows.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)


class _Writer:
    """The part of one rank in one folder."""

    def __init__(self, folder: Path, index: BlockIndex, arrays: Mapping[str, torch.Tensor], sharding: Sharding) -> None:
        self.folder, self.index, self.arrays, self.sharding = folder, index, arrays, sharding
        self.error: Exception | None = None
        self.files: dict[tuple[str, int], BlockFile] = {}
        self._device = communication_device(sharding.group)
        self._ranks = [
            [rank for rank in range(sharding.world_size) if self._overlap(rank, block)[2]]
            for block in range(index.num_blocks)
        ]

    def _overlap(self, rank: int, block: int) -> tuple[int, int, int]:
        """Rows of a block that a rank holds: the first, the one after the last, their number."""
        start, stop = self.index.rows_of(block)
        start, stop = max(start, self.sharding.shards.start(rank)), min(stop, self.sharding.shards.stop(rank))
        return start, stop, max(0, stop - start)

    def write_array(self, name: str) -> None:
        shared = []
        for block, ranks in enumerate(self._ranks):
            if len(ranks) > 1:
                shared.append(block)
            elif ranks[0] == self.sharding.rank:
                self._write_block(name, block)
        for parity in (0, 1):
            for block in shared[parity::2]:
                if self.sharding.rank == self._ranks[block][0]:
                    self._write_block(name, block)
                elif self.sharding.rank in self._ranks[block]:
                    self._send_rows(name, block)

    def _pieces(self, name: str, rank: int, block: int) -> Iterator[tuple[int, int]]:
        array = self.index.arrays[name]
        step = max(1, PIECE_BYTES // max(1, prod(array.row_shape) * DTYPES[array.dtype].itemsize))
        start, stop, _ = self._overlap(rank, block)
        for first in range(start, stop, step):
            yield first, min(first + step, stop)

    def _own(self, name: str, first: int, last: int) -> torch.Tensor:
        """Bytes of own rows; zeros where they cannot be had, so that the receiver gets as many as it waits for."""
        try:
            return _bytes(self.arrays[name][first - self.sharding.start : last - self.sharding.start])
        except RuntimeError as error:
            self.error = self.error or error
            return self._buffer(name, first, last)

    def _buffer(self, name: str, first: int, last: int) -> torch.Tensor:
        array = self.index.arrays[name]
        return torch.zeros((last - first) * prod(array.row_shape) * DTYPES[array.dtype].itemsize, dtype=torch.uint8)

    def _peer(self, rank: int) -> int:
        group = self.sharding.group
        return rank if group is None else dist.get_global_rank(group, rank)

    def _write_block(self, name: str, block: int) -> None:
        output = _Output(self.folder / self.index.file_name(name, block), self.index.header(name, block))
        for rank in self._ranks[block]:
            for first, last in self._pieces(name, rank, block):
                if rank == self.sharding.rank:
                    data = self._own(name, first, last)
                else:
                    received = self._buffer(name, first, last).to(self._device)
                    if received.numel():
                        dist.recv(received, self._peer(rank), group=self.sharding.group)
                    data = received.cpu()
                output.write(data.numpy().data)
        self.files[name, block] = output.close()
        self.error = self.error or output.error

    def _send_rows(self, name: str, block: int) -> None:
        for first, last in self._pieces(name, self.sharding.rank, block):
            data = self._own(name, first, last).to(self._device)
            if data.numel():
                dist.send(data, self._peer(self._ranks[block][0]), group=self.sharding.group)


def partial_name(folder: Path) -> Path:
    """The hidden name of a folder while this process writes it; ``remove_leftovers`` knows the form."""
    host = socket.gethostname().replace(".", "_")
    return folder.with_name(f".{folder.name}.{host}-{os.getpid()}.partial")


def _describe(arrays: Mapping[str, torch.Tensor], sharding: Sharding) -> dict[str, BlockArray]:
    described = {}
    for name, array in arrays.items():
        check_name(name)
        if array.ndim < 1 or len(array) != sharding.size:
            raise ValueError(
                f"the array {name!r} must have one row for each of the {sharding.size} rows of this rank, got the "
                f"shape {tuple(array.shape)}"
            )
        described[name] = BlockArray(dtype_name(array.dtype), tuple(array.shape[1:]))
    return described


def write_blocks(
    folder: str | os.PathLike[str],
    arrays: Mapping[str, torch.Tensor],
    sharding: Sharding,
    scalars: Mapping[str, Any] | None = None,
    block_rows: int = BLOCK_ROWS,
) -> BlockIndex:
    """Write a folder of row blocks. Every rank of the sharding must call, with arrays of the same names.

    Args:
        folder: must not exist; its parent must, on a file system that all ranks see.
        arrays: name -> this rank's rows, (sharding.size, ...), on any device.
        sharding: how the rows are cut over the ranks.
        scalars: plain values for the index, taken from the first rank.
        block_rows: rows of a block.

    Returns:
        The index.

    Raises:
        ValueError: the folder exists, or the arrays cannot be stored or differ between ranks.
        OSError: some rank could not write. Nothing is left but, after a kill, the hidden folder.
    """
    assert sys.byteorder == "little", "safetensors holds numbers in little-endian order"
    target, group = Path(os.path.realpath(folder)), sharding.group
    rank, _ = rank_and_size(group)
    described, hidden, error = {}, target, None
    try:
        if block_rows < 1:
            raise ValueError(f"block_rows must be at least 1, got {block_rows}")
        described = _describe(arrays, sharding)
        if rank == 0:
            if target.exists():
                raise ValueError(f"{target} exists: name another folder, or remove it")
            BlockIndex(sharding.shards.num_rows, block_rows, {}, dict(scalars or {})).dumps()
            hidden = partial_name(target)
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
    except (OSError, ValueError) as problem:
        error = problem
    except TypeError as problem:
        error = ValueError(f"scalars must be plain values that JSON can hold: {problem}")
    plans = gather_objects((described, block_rows, str(hidden)), group)
    hidden = Path(plans[0][2])
    try:
        for other, plan in enumerate(plans):
            if error is None and plan[:2] != plans[0][:2]:
                raise ValueError(f"ranks 0 and {other} disagree on the arrays: {plans[0][:2]} and {plan[:2]}")
        if error is None and not hidden.is_dir():
            raise OSError(f"rank {rank} does not see {hidden}: shards are saved to a folder that all ranks share")
    except (OSError, ValueError) as problem:
        error = problem
    try:
        agree(error, group)
        index = BlockIndex(sharding.shards.num_rows, block_rows, described)
        writer = _Writer(hidden, index, arrays, sharding)
        for name in sorted(described):
            writer.write_array(name)
        agree(writer.error, group)
        files: dict[tuple[str, int], BlockFile] = {}
        for part in gather_objects(writer.files, group):
            files.update(part)
        complete = {
            name: replace(array, files=tuple(files[name, block] for block in range(index.num_blocks)))
            for name, array in described.items()
        }
        index = replace(index, arrays=complete, scalars=gather_objects(dict(scalars or {}), group)[0])
        error = None
        if rank == 0:
            try:
                _publish(hidden, target, index)
            except OSError as problem:
                error = problem
        agree(error, group)
    except BaseException:
        if rank == 0 and hidden != target:
            shutil.rmtree(hidden, ignore_errors=True)
        raise
    return index


def _publish(hidden: Path, target: Path, index: BlockIndex) -> None:
    with open(hidden / INDEX, "x", encoding="utf-8") as file:
        file.write(index.dumps())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(hidden)
    hidden.rename(target)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
