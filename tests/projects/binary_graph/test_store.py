"""Parts appear whole or not at all, and what is not whole is computed again."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load_file

from alimm.projects.binary_graph import part_files
from alimm.projects.binary_graph.store import RunFolder, peak_rss

DTYPES = ["?", "u1", "i1", "<u2", ">u2", "<i2", "<u4", "<i4", "<u8", ">u8", "<i8", "<f2", "<f4", "<f8"]
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)
ARRAYS = st.dictionaries(
    st.text(max_size=8).filter(lambda name: name != "__metadata__"),
    st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, SHAPES)),
    max_size=4,
)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run", {"data": {"crc": 1, "rows": 9}, "config": {"k": 5}}, durable=False)


def part(run: RunFolder, number: int = 0, stage: str = "a") -> Path:
    return run.path / stage / f"part-{number:05d}.safetensors"


def equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape
        assert found[name].dtype == array.dtype.newbyteorder("=")
        np.testing.assert_array_equal(found[name], array)


@settings(max_examples=150)
@given(arrays=ARRAYS)
def test_written_arrays_are_read_by_us_and_by_the_package(tmp_path_factory, arrays):
    run = RunFolder(tmp_path_factory.mktemp("run"), durable=False)
    receipt = run.write("a", 3, arrays)
    equal(run.read("a", 3), arrays)
    equal(load_file(part(run, 3)), arrays)
    data = part(run, 3).read_bytes()
    assert (receipt["bytes"], receipt["crc32"]) == (len(data), zlib.crc32(data))
    for name, array in arrays.items():
        mapped = run.map("a", 3, name)
        np.testing.assert_array_equal(mapped, array)
        assert not mapped.flags.writeable


@given(rows=st.integers(0, 9), width=st.integers(0, 3), ends=st.tuples(st.integers(0, 9), st.integers(0, 9)))
def test_rows_are_a_slice(tmp_path_factory, rows, width, ends):
    run = RunFolder(tmp_path_factory.mktemp("run"), durable=False)
    array = np.arange(rows * width, dtype=np.uint16).reshape(rows, width)
    run.write("a", 0, {"before": np.ones(5), "x": array, "z": np.ones(3, np.int8)})
    start, stop = sorted(min(end, rows) for end in ends)
    found = run.rows("a", 0, "x", start, stop)
    np.testing.assert_array_equal(found, array[start:stop])
    found[...] = 0  # a copy
    np.testing.assert_array_equal(run.read("a", 0, ["x"])["x"], array)


def test_rows_do_not_read_the_rest(run):
    run.write("a", 0, {"x": np.arange(64 << 20, dtype=np.uint8)})
    script = (
        "from alimm.projects.binary_graph.store import RunFolder, peak_rss; import sys; "
        "run = RunFolder.attach(sys.argv[1]); before = peak_rss(); "
        "assert list(run.rows('a', 0, 'x', 1000, 1002)) == [232, 233]; print(peak_rss() - before)"
    )
    assert int(in_process(script, str(run.path))) < 8 << 20


def test_strided_arrays(run):
    array = np.arange(24, dtype=np.int32).reshape(4, 6)
    arrays = {
        "fortran": np.asfortranarray(array),
        "strided": array[::2, ::3],
        "reversed": array[::-1],
        "scalar": array[1, 1],
    }
    run.write("a", 0, arrays)
    equal(run.read("a", 0), arrays)


def test_bytes_do_not_depend_on_the_order_of_arrays_nor_on_time(run):
    arrays = {"b": np.arange(3, dtype=np.uint8), "a": np.arange(3, dtype=np.uint64), "c": np.ones(2, bool)}
    run.write("a", 0, arrays)
    first = part(run).read_bytes()
    run.write("a", 1, dict(reversed(arrays.items())))
    assert part(run, 1).read_bytes() == first


def test_arrays_are_aligned(run):
    run.write("a", 0, {"z": np.arange(5, dtype=np.uint64), "a": np.arange(3, dtype=np.uint8)})
    assert run.map("a", 0, "z").ctypes.data % 64 == 0


def test_the_receipt_tells_what_it_cost(run):
    receipt = run.write("a", 12, {"x": np.zeros((2, 3), ">u8")}, {"rows": np.int64(2)}, clock=lambda: (1.5, 2.5))
    assert (receipt["cpu_seconds"], receipt["wall_seconds"], receipt["meta"]) == (1.5, 2.5, {"rows": 2})
    assert receipt["arrays"] == {"x": {"dtype": "uint64", "shape": [2, 3]}}
    assert 1 << 20 < receipt["peak_rss_bytes"] <= peak_rss()
    assert run.done("a", 12) == receipt
    assert json.loads((run.path / "a" / "part-00012.json").read_text()) == receipt


def test_receipts_come_by_part_beyond_the_digits(run):
    for number in (100_000, 99_999, 3):
        run.write("a", number, {})
    assert [receipt["part"] for receipt in run.receipts("a")] == [3, 99_999, 100_000]
    assert run.receipts("b") == []


@pytest.mark.parametrize("cut", [0, 1, 8, 60, -1])
def test_a_truncated_part_is_not_done_and_not_read(run, cut):
    run.write("a", 0, {"x": np.arange(100)})
    part(run).write_bytes(part(run).read_bytes()[:cut])
    assert run.done("a", 0) is None
    assert run.receipts("a") == []
    with pytest.raises(ValueError, match=r"part-00000\.safetensors is damaged.*Run the build again"):
        run.read("a", 0)


def test_every_flipped_bit_is_found_by_verification(run):
    run.write("a", 0, {"x": np.arange(5)})
    whole = part(run).read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        part(run).write_bytes(damaged)
        assert run.done("a", 0) is not None  # its size is right, and nothing else is looked at
        assert run.done("a", 0, verify=True) is None
        with suppress(ValueError):  # a flip in the header is refused or gives other names, and does no worse
            run.read("a", 0)


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"x": 3}',
        b'{"x": {"dtype": "I64", "shape": [1], "data_offsets": [0, 4]}}',
        b'{"x": {"dtype": "I64", "shape": [-1, -1], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "I64", "shape": [1], "data_offsets": [-8, 0]}}',
        b'{"x": {"dtype": "I64", "shape": [9], "data_offsets": [0, 72]}}',
        b'{"x": {"dtype": "O", "shape": [1], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "I64", "shape": [1e400], "data_offsets": [0, 8]}}',
        b'{"x": {"dtype": "I64", "shape": [0, 1000000000000000000000000000000], "data_offsets": [0, 0]}}',
        b'{"x": {"dtype": "I64", "shape": [0' + b", 1" * 99 + b'], "data_offsets": [0, 0]}}',
        b"[" * 100_000,
    ],
)
def test_a_hostile_header_is_refused(run, header):
    run.write("a", 0, {})
    part(run).write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="damaged"):
        run.read("a", 0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", "\x00", '{"stage": "a", "part": 0}', "[" * 100_000], ids=lambda text: text[:5]
)
def test_an_unreadable_receipt_means_not_done(run, text):
    run.write("a", 0, {"x": np.arange(3)})
    part(run).with_suffix(".json").write_text(text)
    assert run.done("a", 0) is None


def test_a_receipt_of_another_part_does_not_count(run):
    run.write("a", 0, {"x": np.arange(3)})
    for suffix in (".json", ".safetensors"):
        part(run).with_suffix(suffix).rename(part(run, 1).with_suffix(suffix))
    assert run.done("a", 1) is None


@pytest.mark.parametrize("key", ["bytes", "crc32", "cpu_seconds", "wall_seconds", "peak_rss_bytes", "meta", "arrays"])
def test_a_receipt_with_a_wrong_entry_does_not_count(run, key):
    receipt = run.write("a", 0, {"x": np.arange(3)})
    part(run).with_suffix(".json").write_text(json.dumps({**receipt, key: "much"}))
    assert run.done("a", 0) is None


def test_a_missing_array_or_part_is_named(run):
    run.write("a", 0, {"x": np.arange(3), "y": np.arange(3)})
    with pytest.raises(ValueError, match="has no array 'z'; it has x, y"):
        run.rows("a", 0, "z", 0, 1)
    with pytest.raises(ValueError, match=r"part-00001\.safetensors is damaged: it is not there"):
        run.map("a", 1, "x")


def test_an_existing_folder_is_resumed_only_with_its_fingerprint(run):
    assert not run.resumed
    again = RunFolder(run.path, {"config": {"k": 5}, "data": {"rows": 9, "crc": 1}})
    assert again.resumed
    other = {"data": {"crc": 2, "rows": 9}, "config": {"k": 5, "ef": 3}}
    with pytest.raises(ValueError, match="another build") as caught:
        RunFolder(run.path, other)
    assert "data.crc is 1 there, 2 here" in str(caught.value)
    assert "config.ef is 'nothing' there, 3 here" in str(caught.value)
    assert "rows" not in str(caught.value)
    with pytest.raises(ValueError, match="another build"):
        RunFolder.attach(run.path, other)
    assert RunFolder.attach(run.path).fingerprint == run.fingerprint


def test_fingerprints_compare_as_json_gives_them_back(tmp_path):
    fingerprint = {"shape": (3, np.int64(4)), "empty": {}, "name": "\u00e9\U0001f600"}
    assert not RunFolder(tmp_path, fingerprint).resumed
    assert RunFolder(tmp_path, fingerprint).resumed


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"format": 1, "fingerprint": 3}', "\xff", '{"format": 9, "fingerprint": {}}']
)
def test_a_damaged_run_json_is_refused_with_the_mend(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"(damaged|layout 9).*delete"):
        RunFolder(tmp_path)


def test_parts_without_run_json_are_refused(run):
    run.write("a", 0, {})
    (run.path / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no run\.json"):
        RunFolder(run.path, run.fingerprint)


def test_a_worker_without_the_folder_says_what_must_be_mounted(tmp_path):
    with pytest.raises(ValueError, match="every node mounts"):
        RunFolder.attach(tmp_path / "elsewhere")


def test_unicode_paths(tmp_path):
    run = RunFolder(tmp_path / "b\u00e4ume \U0001f333 \u6811", {"a": 1})
    run.write("a", 0, {"\u540d": np.arange(3)})
    assert RunFolder(run.path, {"a": 1}).done("a", 0, verify=True)
    assert run.map("a", 0, "\u540d").tolist() == [0, 1, 2]


def temporary(folder: Path, host: str, pid: int, age: float = 0.0) -> Path:
    file = folder / f".part-00000.safetensors.{host}.{pid}.{'0' * 32}.tmp"
    file.write_bytes(b"half")
    os.utime(file, (time.time() - age,) * 2)
    return file


def test_a_driver_removes_what_dead_workers_left(run):
    run.write("a", 0, {})
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    host = part_files.host_name()
    mine = run.path / "a" / ".part-notes.tmp"
    mine.write_bytes(b"")
    left = [temporary(run.path / "a", host, gone.pid), temporary(run.path / "a", "far-away", 1, 1e5)]
    kept = [temporary(run.path / "a", host, os.getpid()), temporary(run.path, "far-away", gone.pid), mine, part(run)]
    RunFolder.attach(run.path)
    assert all(file.exists() for file in left)
    RunFolder(run.path, run.fingerprint)
    assert not any(file.exists() for file in left)
    assert all(file.exists() for file in kept)


def test_the_writer_and_the_cleaner_agree_on_names(run, monkeypatch):
    names = []
    monkeypatch.setattr(part_files.os, "fsync", lambda descriptor: names.extend(f.name for f in run.path.glob("*/.*")))
    for host in ("plain", "a.b.example", "b\u00e4r"):
        monkeypatch.setattr(socket, "gethostname", lambda host=host: host)
        RunFolder.attach(run.path, durable=True).write("a", 0, {})
    assert len(set(names)) >= 6
    assert all(part_files.TEMPORARY.fullmatch(name) for name in names if name.endswith(".tmp"))


def test_durable_runs_flush_files_and_folder_before_the_receipt(tmp_path, monkeypatch):
    flushed = []
    real = os.fsync
    monkeypatch.setattr(
        part_files.os, "fsync", lambda fd: (flushed.append(Path(os.readlink(f"/proc/self/fd/{fd}"))), real(fd))
    )
    RunFolder(tmp_path / "fast", durable=False).write("a", 0, {})
    assert flushed == []
    RunFolder(tmp_path / "safe").write("a", 0, {})
    kinds = [path.name if path.is_dir() else path.name.split(".")[2] for path in flushed]
    assert kinds == ["json", "safe", "safetensors", "a", "json", "a"]


def in_process(script: str, *arguments: str) -> str:
    """Output of Python with the modules that we have."""
    start = "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
    command = [sys.executable, "-c", start + script, json.dumps(sys.path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_leaves_no_part_and_no_receipt(run):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    run.write("a", 0, {"x": np.arange(10)})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            run.write("a", 1, {"x": np.zeros(1 << 20)})
        with pytest.raises(OSError, match="File too large"):
            run.write("a", 2, {"x": np.arange(10)}, {"note": "n" * (1 << 17)})  # the receipt is what does not fit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert run.done("a", 1) is None
    assert run.done("a", 2) is None
    names = sorted(file.name for file in (run.path / "a").iterdir())
    assert names == ["part-00000.json", "part-00000.safetensors", "part-00002.safetensors"]


def test_writers_of_the_same_part_do_no_harm(run):
    arrays = {"x": np.arange(20_000)}
    expected = run.write("a", 0, arrays)["crc32"]
    stop, seen = threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            receipt = run.done("a", 0, verify=True)
            seen.append(receipt is not None and receipt["crc32"] == expected)

    threads = [threading.Thread(target=look)]
    threads += [threading.Thread(target=lambda: [run.write("a", 0, arrays) for _ in range(30)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    assert all(seen)
    assert sorted(file.name for file in (run.path / "a").iterdir()) == ["part-00000.json", "part-00000.safetensors"]


def test_a_read_only_folder_is_read(run):
    run.write("a", 0, {"x": np.arange(3)})
    files = [run.path / "a", run.path, *(run.path / "a").iterdir()]
    try:
        for file in files:
            file.chmod(0o555)
        assert RunFolder.attach(run.path).map("a", 0, "x").tolist() == [0, 1, 2]
    finally:
        for file in files:
            file.chmod(0o755)


def test_importing_the_engine_brings_no_framework():
    heavy = "[m for m in ('torch', 'mmengine', 'numba', 'ray') if m in sys.modules]"
    assert in_process(f"import alimm.projects.binary_graph.engine; print({heavy})").strip() == "[]"
