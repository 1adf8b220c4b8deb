"""The log of adds and deletes since the last published segment: what an index acknowledged, and nothing half.

Layout, little-endian::

    header   magic (8), version (4), words of a code (4), generation (8), zeros (4), crc32 of these 28 bytes (4)
    record   bytes of the payload (4), kind (4), sequence (8), crc32 of the payload (4), crc32 of these 20 bytes (4),
             then the payload
    payload  kind 1, add: n int64 ids, n codes; kind 2, delete: n int64 ids

Checksums of a record start from the header's, so that a record of another log is not taken for one of this. A log that
ends inside its last record, or in zeros, was cut off in an append that nobody acknowledged: that tail is no record.
Anything else that is wrong is damage. Head and payload have a checksum each, so that a flipped length is not taken for
a record that was cut off.
"""

from __future__ import annotations

import os
import struct
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from alimm.projects.binary_graph.array_files import (
    DamagedIndexError,
    open_regular,
    replace_file,
)

ADD, DELETE = 1, 2
MAGIC, VERSION = b"ALIMMWAL", 1
MOST_BYTES = 256 << 20
"""Bytes of a record's payload at most: a reader holds one in memory."""

HEADER, RECORD = struct.Struct("<8sIIQII"), struct.Struct("<IIQII")
_MEND = "`alimm index verify --repair` keeps the records before that place and cuts off the rest"
MOST_WORDS = 16
_CHUNK = 1 << 20


@dataclass(frozen=True, eq=False)
class WalRecord:
    """One change.

    Attributes:
        kind: ``ADD`` or ``DELETE``.
        sequence: 1, 2, ... in the log.
        ids: (n,) int64, n >= 1.
        codes: (n, W) uint64 of an add, None of a delete.
    """

    kind: int
    sequence: int
    ids: NDArray[np.int64]
    codes: NDArray[np.uint64] | None


@dataclass(frozen=True, eq=False)
class Scan:
    """What a log holds from some place on.

    Attributes:
        records: whole ones, in order.
        end: offset after the last of them.
        sequence: of the last of them.
        generation: which manifest the log was made for.
        seed: the header's checksum: another log under the same name has another one.
        torn: bytes follow that are no record.
        damage: why the bytes that follow are wrong; None where they were just cut off.
    """

    records: list[WalRecord] = field(repr=False)
    end: int
    sequence: int
    generation: int
    seed: int
    torn: bool
    damage: str | None


def encode_header(words: int, generation: int) -> bytes:
    """The bytes at the start of a log."""
    head = HEADER.pack(MAGIC, VERSION, words, generation, 0, 0)[:-4]
    return head + zlib.crc32(head).to_bytes(4, "little")


def encode_record(kind: int, sequence: int, seed: int, payload: bytes) -> bytes:
    """The bytes of one record; ``seed`` is the header's checksum."""
    head = RECORD.pack(len(payload), kind, sequence, zlib.crc32(payload, seed), 0)[:-4]
    return head + zlib.crc32(head, seed).to_bytes(4, "little") + payload


def _decode(kind: int, sequence: int, payload: bytes, words: int) -> WalRecord:
    """ValueError: the payload holds no such record."""
    row = {ADD: 8 + 8 * words, DELETE: 8}.get(kind)
    if row is None:
        raise ValueError(f"has the unknown kind {kind}")
    count, rest = divmod(len(payload), row)
    if rest or not count:
        raise ValueError(f"has {len(payload)} bytes, no whole number of rows of {row} bytes")
    # Copies: aligned, writable, and of this machine's byte order.
    ids = np.frombuffer(payload, "<i8", count).astype(np.int64)
    if ids.min() < 0:
        raise ValueError(f"holds the id {ids.min()}")
    if kind == DELETE:
        return WalRecord(kind, sequence, ids, None)
    codes = np.frombuffer(payload, "<u8", count * words, 8 * count).reshape(count, words).astype(np.uint64)
    return WalRecord(kind, sequence, ids, codes)


def _only_zeros(file: BinaryIO, size: int) -> bool:
    # An append makes at most one record; a longer hole is no tail of one and is not read.
    if size > MOST_BYTES + RECORD.size:
        return False
    while chunk := file.read(_CHUNK):
        if chunk.count(0) < len(chunk):
            return False
    return True


def _read_header(path: Path, file: BinaryIO, words: int | None) -> tuple[int, int, int]:
    head = file.read(HEADER.size)
    if len(head) < HEADER.size or head[:8] != MAGIC:
        raise DamagedIndexError(path, "does not start with the header of a log", _MEND)
    _, version, found, generation, zeros, crc = HEADER.unpack(head)
    if crc != zlib.crc32(head[:-4]):
        raise DamagedIndexError(path, "has a header that does not match its checksum", _MEND)
    if version > VERSION:
        raise ValueError(f"{path} was written by a newer alimm (log format {version}, known: {VERSION}): upgrade alimm")
    if version != VERSION or zeros or not 1 <= found <= MOST_WORDS:
        raise DamagedIndexError(path, f"has a header with version {version} and {found} words", _MEND)
    if words is not None and found != words:
        raise DamagedIndexError(path, f"is a log of codes of {64 * found} bits, the index has {64 * words}")
    return found, generation, crc


def _scan_once(path: Path, words: int | None, since: Scan | None) -> Scan:
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        words, generation, seed = _read_header(path, file, words)
        end, sequence = HEADER.size, 0
        if since is not None and since.seed == seed:
            end, sequence = since.end, since.sequence
        records: list[WalRecord] = []
        torn, damage = False, None
        while end < size:
            torn = True
            file.seek(end)
            head = file.read(RECORD.size)
            if len(head) < RECORD.size:
                break
            length, kind, number, crc, head_crc = RECORD.unpack(head)
            where = f"is damaged at byte {end}, after {sequence} records: the next one"
            if head_crc != zlib.crc32(head[:-4], seed):
                file.seek(end)
                if not _only_zeros(file, size - end):
                    damage = f"{where} has a head that does not match its checksum"
                break
            if length > MOST_BYTES or number != sequence + 1:
                damage = f"{where} has the number {number} and {length} bytes"
                break
            payload = file.read(length)
            if len(payload) < length:
                break
            if crc != zlib.crc32(payload, seed):
                damage = f"{where} does not match its checksum"
                break
            try:
                records.append(_decode(kind, number, payload, words))
            except ValueError as error:
                damage = f"{where} {error}"
                break
            end, sequence, torn = end + RECORD.size + length, number, False
        if since is not None and since.seed == seed and size < since.end:
            damage = f"has {size} bytes and had {since.end}"
        return Scan(records, end, sequence, generation, seed, torn, damage)


def scan(path: Path, words: int | None = None, since: Scan | None = None) -> Scan:
    """Read the records of a log, all or those after an earlier scan; also while a writer appends.

    Args:
        path: of the log.
        words: of a code; None takes it from the log.
        since: an earlier scan of the same file. A log that was replaced in between is read from its start.

    Raises:
        DamagedIndexError: something other than a tail that was cut off is wrong.
        MissingFileError: there is no such file.
        ValueError: a newer alimm wrote it.
    """
    found = _scan_once(path, words, since)
    if found.damage is not None:
        # A writer that cuts off a torn tail and appends may have changed the bytes while they were read.
        time.sleep(0.02)
        found = _scan_once(path, words, since)
    if found.damage is not None:
        raise DamagedIndexError(path, found.damage, _MEND)
    return found


def replay(path: Path, words: int) -> list[WalRecord]:
    """All whole records of a log; errors as of ``scan``."""
    return scan(path, words).records


def repair(path: Path, words: int | None = None, generation: int = 0) -> int:
    """Keep the records before the first damage and cut off the rest; the caller holds the ``writer_lock``.

    Args:
        path: of the log.
        words: of a code, for a log whose header is damaged too.
        generation: that the log was made for, likewise.

    Returns:
        How many records were kept.

    Raises:
        DamagedIndexError: the header is damaged, and ``words`` is None.
    """
    try:
        found = _scan_once(path, None, None)
    except DamagedIndexError:
        if words is None:
            raise
        # The right header brings the records back: their checksums start from its own.
        with open_regular(path) as file:
            file.seek(HEADER.size)
            rest = file.read()
        replace_file(path, [encode_header(words, generation), rest])
        found = _scan_once(path, words, None)
    if found.torn or found.damage is not None:
        with open_regular(path) as file:
            replace_file(path, [file.read(found.end)])
    return found.sequence
