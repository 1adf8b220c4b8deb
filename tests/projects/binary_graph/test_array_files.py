"""An array comes back as it was, or the error says what is wrong with its file."""

from __future__ import annotations

import io
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alimm.projects.binary_graph import array_files
from alimm.projects.binary_graph.array_files import (
    BLOCK,
    DTYPES,
    ArrayEntry,
    DamagedIndexError,
    MissingFileError,
    fresh_name,
    open_array,
    write_array,
)

ARRAY = np.arange(12, dtype=np.int32).reshape(6, 2)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "array.npy"


@given(
    dtype=st.sampled_from([*DTYPES, ">u8", ">i4"]),
    shape=st.one_of(st.tuples(st.integers(0, 300)), st.tuples(st.integers(0, 300), st.integers(0, 16))),
    seed=st.integers(0, 9),
)
def test_what_is_written_comes_back(tmp_path_factory, dtype, shape, seed):
    path = tmp_path_factory.mktemp("array") / "a.npy"
    array = np.random.default_rng(seed).integers(0, 127, shape).astype(dtype)
    entry = write_array(path, array, durable=False)
    for verify in ("header", "full"):
        found = open_array(path, ArrayEntry.from_json(entry.to_json(), "a"), verify)
        np.testing.assert_array_equal(found, array, strict=False)
        assert found.shape == shape
        assert found.dtype == np.dtype(dtype).newbyteorder("<")
        assert not found.flags.writeable
        assert type(found) is np.ndarray
    # NumPy itself reads the file, and other words than ours for it are not needed.
    np.testing.assert_array_equal(np.load(path, allow_pickle=False), array)


def test_checksums_are_those_of_blocks_of_the_file(path):
    array = np.random.default_rng(0).integers(0, 255, 3 * BLOCK - 100, dtype=np.uint8)
    entry = write_array(path, array)
    raw = path.read_bytes()
    assert entry.bytes == len(raw) == os.path.getsize(path)
    assert entry.crc32 == tuple(zlib.crc32(raw[start : start + BLOCK]) for start in range(0, len(raw), BLOCK))
    assert len(entry.crc32) == 4
    assert np.array_equal(open_array(path, entry, "full"), array)


def test_a_strided_view_is_written_as_it_reads(path):
    array = np.arange(40, dtype=np.int64).reshape(8, 5)[::2, ::-1]
    assert np.array_equal(open_array(path, write_array(path, array), "full"), array)
    assert np.array_equal(open_array(path, write_array(path, array.T), "full"), array.T)


def test_the_error_names_file_block_and_bytes(path):
    entry = write_array(path, np.zeros(3 * BLOCK, np.uint8))
    with path.open("r+b") as file:
        file.seek(2 * BLOCK + 17)
        file.write(b"\1")
    assert open_array(path, entry, "header").any()
    with pytest.raises(DamagedIndexError, match=rf"array\.npy .*block 2 \(bytes {2 * BLOCK} to {3 * BLOCK}\).*Restore"):
        open_array(path, entry, "full")


def test_wrong_size_and_missing_file(path):
    entry = write_array(path, ARRAY)
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(DamagedIndexError, match=f"has {entry.bytes + 1} bytes, the manifest says {entry.bytes}"):
        open_array(path, entry)
    path.unlink()
    with pytest.raises(MissingFileError, match="is missing"):
        open_array(path, entry)
    with pytest.raises(MissingFileError):
        open_array(path / "below", entry)


@pytest.mark.parametrize("make", ["link", "folder", "pipe"])
def test_what_is_no_regular_file_is_refused(path, tmp_path, make):
    entry = write_array(tmp_path / "real.npy", ARRAY)
    if make == "link":
        path.symlink_to(tmp_path / "real.npy")
    elif make == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(DamagedIndexError, match="no regular file"):
        open_array(path, entry)


def _npy(array: np.ndarray, version: tuple[int, int] = (1, 0)) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, array, version, allow_pickle=True)
    return buffer.getvalue()


def _with_header(text: str) -> bytes:
    data = text.encode("latin-1")
    return b"\x93NUMPY\x01\x00" + len(data).to_bytes(2, "little") + data + ARRAY.tobytes()


HOSTILE = {
    "object": _npy(np.array([["a", {}]] * 6, dtype=object)),
    "other dtype": _npy(ARRAY.view(np.uint32)),
    "other shape": _npy(ARRAY.reshape(2, 6)),
    "other axes": _npy(ARRAY.reshape(-1)),
    "huge": _with_header("{'descr': '<i4', 'fortran_order': False, 'shape': (999999999999999999, 2), }\n"),
    "beyond 64 bits": _with_header(f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({'9' * 19}, 2), }}\n"),
    "negative": _with_header("{'descr': '<i4', 'fortran_order': False, 'shape': (-6, -2), }\n"),
    "Fortran order": _npy(np.asfortranarray(ARRAY)),
    "big-endian": _npy(ARRAY.astype(">i4")),
    "code": _with_header("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (6, 2), }\n"),
    "nested": _with_header("(" * 3000 + ")" * 900),
    "long": _with_header("{'descr': '<i4', 'fortran_order': False, 'shape': (6, 2), }" + " " * 5000 + "\n"),
    "spaces": _with_header("{'descr': '<i4', 'fortran_order': False, 'shape': (6, 2), }" + " " * 9 + "\n" + "\0" * 60),
    "more data": _npy(ARRAY) + b"\0" * 64,
    "wrong first byte": b"\x92" + _npy(ARRAY)[1:],
    "format 3": _npy(ARRAY, (3, 0)),
    "no magic": b"\0" * 176,
    "empty": b"",
}


@pytest.mark.parametrize("verify", ["header", "full"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused_with_right_size_and_checksums(path, name, verify):
    raw = HOSTILE[name]
    path.write_bytes(raw)
    entry = ArrayEntry(len(raw), "<i4", (6, 2), (zlib.crc32(raw),))
    with pytest.raises(DamagedIndexError, match=r"array\.npy"):
        open_array(path, entry, verify)


def test_format_2_is_read(path):
    raw = _npy(ARRAY, (2, 0))
    path.write_bytes(raw)
    assert np.array_equal(open_array(path, ArrayEntry(len(raw), "<i4", (6, 2), (zlib.crc32(raw),)), "full"), ARRAY)


GOOD = ArrayEntry(176, "<i4", (6, 2), (5,)).to_json()


@pytest.mark.parametrize(
    "change",
    [
        dict(bytes=-1), dict(bytes=176.0), dict(bytes=True), dict(bytes="176"), dict(bytes=10**30), dict(bytes=48),
        dict(bytes=10**5), dict(dtype="|O"), dict(dtype=">i4"), dict(dtype=["<i4"]), dict(dtype=None),
        dict(shape=[60]), dict(shape=[6, -2]), dict(shape=[]), dict(shape=[6, 2, 1]), dict(shape=6),
        dict(shape=[6.0, 2]), dict(shape=[0, 10**18]), dict(shape=[10**5000, 2]), dict(crc32=[]), dict(crc32=[5, 5]),
        dict(crc32=[-5]), dict(crc32=[1 << 32]), dict(crc32=["5"]), dict(crc32=5), dict(path="../x"),
    ],
)  # fmt: skip
def test_hostile_entries_are_refused(change):
    assert ArrayEntry.from_json(GOOD, "a").shape == (6, 2)
    with pytest.raises(ValueError, match="a "):
        ArrayEntry.from_json({**GOOD, **change}, "a array")


def test_a_failed_write_leaves_the_old_file_and_no_other(path, monkeypatch):
    entry = write_array(path, ARRAY)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(array_files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_array(path, ARRAY + 1)
    assert list(path.parent.iterdir()) == [path]
    assert np.array_equal(open_array(path, entry, "full"), ARRAY)


def test_durable_writes_flush_file_and_folder(path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(
        array_files.os, "fsync", lambda fd: (flushed.append(os.readlink(f"/proc/self/fd/{fd}")), real(fd))
    )
    write_array(path, ARRAY, durable=False)
    assert not flushed
    write_array(path, ARRAY)
    assert [Path(name).name.split(".part")[0] for name in flushed] == ["array.npy", path.parent.name]


def test_mapped_files_live_on_after_they_are_removed(path):
    found = open_array(path, write_array(path, ARRAY))
    path.unlink()
    assert np.array_equal(found, ARRAY)


def test_fresh_names(tmp_path):
    assert fresh_name(tmp_path, "wal", 7, ".log") == "wal-00000007-000.log"
    (tmp_path / "wal-00000007-000.log").touch()
    assert fresh_name(tmp_path, "wal", 7, ".log") == "wal-00000007-001.log"
    with pytest.raises(ValueError, match="'header', 'full', got 'quick'"):
        open_array(tmp_path / "x.npy", ArrayEntry(176, "<i4", (6, 2), (5,)), "quick")
