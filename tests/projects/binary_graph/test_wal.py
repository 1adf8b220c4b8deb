"""A log gives back its records; what is cut off is no record, and what is wrong is never one."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph import wal_records
from alimm.projects.binary_graph.array_files import DamagedIndexError, MissingFileError
from alimm.projects.binary_graph.wal import ADD, DELETE, WriteAheadLog, repair, replay, scan
from tests.projects.binary_graph.small_index import HEADER, TINY, check_records, random_rows, small_log


@pytest.mark.parametrize("words", [1, 2, 16])
def test_records_come_back(tmp_path, words):
    path, sent, ends = small_log(tmp_path, words=words)
    check_records(replay(path, words), sent)
    assert path.stat().st_size == ends[-1]
    found = scan(path)
    assert (found.end, found.sequence, found.generation, found.torn) == (ends[-1], 5, 3, False)


def test_a_cut_at_any_byte_gives_the_whole_records_before(tmp_path):
    path, sent, ends = small_log(tmp_path, 4)
    raw = path.read_bytes()
    for size in range(len(raw)):
        path.write_bytes(raw[:size])
        if size < HEADER:
            with pytest.raises(DamagedIndexError, match="header of a log"):
                replay(path, 2)
            continue
        whole = sum(end <= size for end in ends[1:])
        check_records(replay(path, 2), sent[:whole])
        assert scan(path).torn == (size not in ends)
    for size in (HEADER + 3, ends[2] + 5, ends[3] - 1):
        path.write_bytes(raw[:size])
        whole = sum(end <= size for end in ends[1:])
        with WriteAheadLog(path, 2) as log:
            assert path.stat().st_size == ends[whole]
            log.append_add(*TINY)
        check_records(replay(path, 2), [*sent[:whole], (ADD, *TINY)])


@pytest.mark.parametrize("zeros", [1, 23, 24, 25, 5000])
def test_zeros_at_the_end_are_cut_off(tmp_path, zeros):
    path, sent, ends = small_log(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(zeros))
    check_records(replay(path, 2), sent)
    with WriteAheadLog(path, 2):
        assert path.stat().st_size == ends[-1]


def test_zeros_that_no_append_makes_are_damage(tmp_path, monkeypatch):
    path, _, ends = small_log(tmp_path)
    with path.open("ab") as file:
        file.write(bytes(4000) + b"\1")
    with pytest.raises(DamagedIndexError, match=f"byte {ends[-1]}, after 5 records.*--repair"):
        replay(path, 2)
    monkeypatch.setattr(wal_records, "MOST_BYTES", 1000)
    os.truncate(path, ends[-1] + 4000)
    with pytest.raises(DamagedIndexError, match="does not match"):
        replay(path, 2)


def test_every_flipped_byte_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(wal_records.time, "sleep", lambda seconds: None)
    path, sent, ends = small_log(tmp_path, 3)
    raw = path.read_bytes()
    for where in range(len(raw)):
        path.write_bytes(raw[:where] + bytes([raw[where] ^ (1 << where % 8)]) + raw[where + 1 :])
        with pytest.raises(DamagedIndexError, match=r"wal-.*--repair"):
            replay(path, 2)
        if where >= HEADER:
            before = sum(end <= where for end in ends[1:])
            assert repair(path) == before
            check_records(replay(path, 2), sent[:before])
            assert path.stat().st_size == ends[before]


def test_repair_of_a_damaged_header(tmp_path):
    path, sent, _ = small_log(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(b"\0" * HEADER + raw[HEADER:])
    with pytest.raises(DamagedIndexError, match="header"):
        repair(path)
    assert repair(path, 2, 3) == 5
    assert path.read_bytes() == raw
    path.write_bytes(raw[:10])
    assert repair(path, 2, 3) == 0
    assert path.read_bytes() == raw[:HEADER]
    for tail in (b"", b"torn"):
        path.write_bytes(raw + tail)
        assert repair(path) == 5
        assert path.read_bytes() == raw
    check_records(replay(path, 2), sent)


def test_records_of_another_log_or_out_of_order_are_damage(tmp_path):
    path, _, ends = small_log(tmp_path)
    raw = path.read_bytes()
    first, second = raw[ends[0] : ends[1]], raw[ends[1] : ends[2]]
    for wrong in (second, first + first, first + second + second, first + raw[ends[2] : ends[3]]):
        path.write_bytes(raw[:HEADER] + wrong)
        with pytest.raises(DamagedIndexError, match="the number"):
            replay(path, 2)
    other = WriteAheadLog.create(tmp_path, 2, 4).path
    with other.open("ab") as file:
        file.write(first)
    with pytest.raises(DamagedIndexError, match="does not match"):
        replay(other, 2)


def forged(path: Path, *records: tuple[int, int, bytes]) -> None:
    head = wal_records.encode_header(2, 1)
    seed = int.from_bytes(head[-4:], "little")
    path.write_bytes(head + b"".join(wal_records.encode_record(kind, n, seed, data) for kind, n, data in records))


def test_hostile_records_with_right_checksums(tmp_path):
    path = tmp_path / "wal-00000001-000.log"
    forged(path, (1, 1, bytes(24)))
    assert replay(path, 2)[0].ids.tolist() == [0]
    minus = np.array([-1], "<i8").tobytes()
    for kind, number, data, message in [
        (0, 1, bytes(8), "unknown kind 0"), (3, 1, bytes(8), "unknown kind 3"),
        (2**32 - 1, 1, bytes(8), "unknown kind"), (1, 1, b"", "0 bytes"),
        (2, 1, b"", "0 bytes"), (1, 1, bytes(25), "25 bytes"), (2, 1, bytes(9), "9 bytes"),
        (1, 1, bytes(8), "8 bytes"), (2, 1, minus, "the id -1"), (1, 1, minus + bytes(16), "the id -1"),
        (2, 0, bytes(8), "number 0"), (2, 2**64 - 1, bytes(8), "number 18"),
    ]:  # fmt: skip
        forged(path, (kind, number, data))
        with pytest.raises(DamagedIndexError, match=message):
            replay(path, 2)
    head = wal_records.encode_header(2, 1)
    seed = int.from_bytes(head[-4:], "little")
    record = wal_records.RECORD.pack(2**32 - 1, 2, 1, 0, 0)[:-4]
    path.write_bytes(head + record + wal_records.zlib.crc32(record, seed).to_bytes(4, "little"))
    with pytest.raises(DamagedIndexError, match="4294967295 bytes"):
        replay(path, 2)


def test_headers_of_other_logs(tmp_path):
    path, _, _ = small_log(tmp_path)
    with pytest.raises(DamagedIndexError, match="codes of 128 bits, the index has 64"):
        replay(path, 1)
    with pytest.raises(MissingFileError):
        replay(tmp_path / "wal-00000009-000.log", 2)
    for version, words, expected, message in [
        (2, 2, ValueError, "newer alimm"), (0, 2, DamagedIndexError, "version 0"),
        (1, 0, DamagedIndexError, "0 words"), (1, 17, DamagedIndexError, "17 words"),
    ]:  # fmt: skip
        head = wal_records.HEADER.pack(wal_records.MAGIC, version, words, 1, 0, 0)[:-4]
        path.write_bytes(head + wal_records.zlib.crc32(head).to_bytes(4, "little"))
        with pytest.raises(expected, match=message):
            scan(path)


def test_reading_on(tmp_path):
    with WriteAheadLog.create(tmp_path, 2, 1, durable=False) as log:
        first = scan(log.path, 2)
        log.append_add(*TINY)
        second = scan(log.path, 2, first)
        assert [record.sequence for record in second.records] == [1]
        log.append_delete(TINY[0])
        log.append_delete(TINY[0])
        third = scan(log.path, 2, second)
        assert [record.sequence for record in third.records] == [2, 3]
        assert scan(log.path, 2, third).records == []
    with log.path.open("ab") as file:
        file.write(b"torn")
    assert scan(log.path, 2, third).torn
    os.truncate(log.path, second.end)
    with pytest.raises(DamagedIndexError, match=r"has .* bytes and had"):
        scan(log.path, 2, third)
    # Another log under the same name is read from its start.
    log.path.write_bytes(wal_records.encode_header(2, 9))
    assert scan(log.path, 2, third).sequence == 0


@settings(max_examples=60)
@given(
    changes=st.lists(st.tuples(st.booleans(), st.integers(1, 6), st.integers(0, 99)), max_size=8),
    cut=st.integers(0, 3000),
    tail=st.binary(max_size=60),
)
def test_any_tail_gives_a_prefix_or_an_error(tmp_path_factory, changes, cut, tail):
    root = tmp_path_factory.mktemp("wal")
    sent, ends = [], [HEADER]
    with WriteAheadLog.create(root, 2, 1, durable=False) as log:
        for add, count, seed in changes:
            ids, codes = random_rows(count, seed)
            log.append_add(ids, codes) if add else log.append_delete(ids)
            sent.append((ADD, ids, codes) if add else (DELETE, ids, None))
            ends.append(log.size)
    size = max(HEADER, min(cut, log.size))
    log.path.write_bytes(log.path.read_bytes()[:size] + tail)
    whole = sum(end <= size for end in ends[1:])
    try:
        check_records(replay(log.path, 2)[:whole], sent[:whole])
    except DamagedIndexError:
        assert tail
        assert repair(log.path) >= whole
        check_records(replay(log.path, 2)[:whole], sent[:whole])
