"""What an append returned from is in the log, whatever happens next; and one process appends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest

from alimm.projects.binary_graph import wal
from alimm.projects.binary_graph.wal import ADD, WriteAheadLog, replay, scan, writer_lock
from tests.projects.binary_graph.small_index import HEADER, TINY, check_records, random_rows, small_log


def test_nothing_to_append_is_no_record(tmp_path):
    with WriteAheadLog.create(tmp_path, 2, 1) as log:
        assert log.append_delete(np.empty(0, np.int64)) == 0
        assert log.append_add(np.empty(0, np.int64), np.empty((0, 2), np.uint64)) == 0
        assert (log.size, replay(log.path, 2)) == (HEADER, [])


def test_opening_again_goes_on(tmp_path):
    path, sent, _ = small_log(tmp_path)
    with WriteAheadLog(path, 2) as log:
        assert log.append_add(*TINY) == 6
    check_records(replay(path, 2), [*sent, (ADD, *TINY)])


def test_arguments(tmp_path):
    with WriteAheadLog.create(tmp_path, 2, 1) as log:
        for ids, codes in [
            (np.array([-1]), TINY[1]), (np.array([1.0]), TINY[1]), (np.array([1], np.int32), TINY[1]),
            (np.array([[1]]), TINY[1]), (TINY[0], TINY[1].astype(np.int64)),
            (TINY[0], TINY[1][:, :1]), (TINY[0], TINY[1][0]),
        ]:  # fmt: skip
            with pytest.raises(ValueError, match="must be"):
                log.append_add(ids, codes)
        strided = np.arange(40, dtype=np.uint64).reshape(5, 8)[:, ::4]
        log.append_add(np.arange(10)[::2], strided)
        assert (replay(log.path, 2)[0].codes == strided).all()
    with pytest.raises(ValueError, match="is closed"):
        log.append_add(*TINY)


def test_a_change_that_is_too_large_is_refused_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(wal, "MOST_BYTES", 24 * 10)
    with WriteAheadLog.create(tmp_path, 2, 1) as log:
        log.append_add(*random_rows(10, 0))
        with pytest.raises(ValueError, match="at most 10 rows, got 11"):
            log.append_add(*random_rows(11, 0))
        log.append_delete(random_rows(30, 0)[0])
        with pytest.raises(ValueError, match="at most 30 rows"):
            log.append_delete(random_rows(31, 0)[0])
        assert log.sequence == 2


@pytest.mark.parametrize("place", ["pwrite", "fsync"])
def test_a_full_disk_leaves_the_log_as_it_was(tmp_path, monkeypatch, place):
    real = getattr(os, place)
    fail = []

    def full(descriptor: int, *rest):
        if not fail:
            return real(descriptor, *rest)
        if place == "pwrite":
            real(descriptor, bytes(rest[0])[:30], rest[1])
        if fail.pop() == "once more":
            fail.append("last")
        raise OSError(28, "No space left on device")

    with WriteAheadLog.create(tmp_path, 2, 1) as log:
        log.append_add(*TINY)
        size, before = log.size, log.path.read_bytes()
        monkeypatch.setattr(wal.os, place, full)
        fail.append("last")
        with pytest.raises(OSError, match="No space"):
            log.append_add(*random_rows(3, 1))
        assert (log.path.read_bytes(), log.size) == (before, size)
        assert log.append_add(*random_rows(2, 2)) == 2
        assert len(replay(log.path, 2)) == 2
        if place == "fsync":  # nor can the cut be flushed
            fail.append("once more")
            with pytest.raises(OSError, match="No space"):
                log.append_add(*random_rows(3, 1))
            with pytest.raises(ValueError, match=r"could not be mended.*open the index again"):
                log.append_add(*TINY)
            assert len(replay(log.path, 2)) == 2


def test_short_writes_go_on(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(wal.os, "pwrite", lambda fd, data, at: real(fd, data[:7], at))
    path, sent, _ = small_log(tmp_path)
    check_records(replay(path, 2), sent)


def test_every_durable_append_is_flushed(tmp_path, monkeypatch):
    calls = []
    real = os.fsync
    for durable, expected in ((True, 2), (False, 0)):
        with WriteAheadLog.create(tmp_path, 2, 1, durable) as log, monkeypatch.context() as patch:
            patch.setattr(wal.os, "fsync", lambda fd: (calls.append(fd), real(fd)))
            calls.clear()
            log.append_add(*TINY)
            log.append_delete(TINY[0])
            assert len(calls) == expected


def test_a_reader_beside_a_writer_sees_whole_records(tmp_path):
    log = WriteAheadLog.create(tmp_path, 2, 1, durable=False)
    stop, seen, errors = threading.Event(), [], []
    empty = scan(log.path, 2)

    def read() -> None:
        last = empty
        try:
            while not stop.is_set() or last.sequence < 300:
                found = scan(log.path, 2, last)
                for record in found.records:
                    seen.append(record.sequence)
                    ids, codes = random_rows(1 + record.sequence % 50, record.sequence)
                    assert (record.ids == ids).all()
                    assert (record.codes == codes).all()
                last = found
        except Exception as error:
            errors.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(1, 301):
        log.append_add(*random_rows(1 + number % 50, number))
    stop.set()
    reader.join(30)
    log.close()
    assert not errors
    assert seen == list(range(1, 301))


WRITER = """
import sys
from pathlib import Path
import numpy as np
from alimm.projects.binary_graph.wal import WriteAheadLog
with WriteAheadLog.create(Path(sys.argv[1]), 2, 1) as log:
    number = 0
    while True:
        number += 1
        log.append_add(np.full(20, number), np.full((20, 2), number, np.uint64))
        print(number, flush=True)
"""


def test_a_killed_writer_loses_nothing_that_it_acknowledged(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(40):
        last = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    last = max([last, *(int(line) for line in process.stdout.read().split())])
    process.wait()
    (path,) = tmp_path.glob("wal-*.log")
    records = replay(path, 2)
    assert last <= len(records) <= last + 1
    for number, record in enumerate(records, 1):
        assert record.ids.tolist() == [number] * 20
    with WriteAheadLog(path, 2) as log:
        assert log.append_add(*TINY) == len(records) + 1


LOCKER = """
import sys
from pathlib import Path
from alimm.projects.binary_graph.wal import writer_lock
lock = writer_lock(Path(sys.argv[1]))
print("locked", flush=True)
sys.stdin.read()
"""


def test_one_writer(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", LOCKER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    with pytest.raises(ValueError, match=r"another writer has .*read_only=True"):
        writer_lock(tmp_path)
    process.kill()
    process.wait()
    with writer_lock(tmp_path, 5.0), pytest.raises(ValueError, match="another writer"):
        writer_lock(tmp_path)
    writer_lock(tmp_path).release()


def test_a_folder_that_cannot_be_locked(tmp_path, monkeypatch):
    import filelock

    def denied(self: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(filelock.FileLock, "_acquire", denied)
    with pytest.raises(ValueError, match=r"cannot be written to .*read_only=True"):
        writer_lock(tmp_path)
