from __future__ import annotations

import itertools
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph import source_base
from alimm.projects.binary_graph.source_npy import NpyRows
from alimm.projects.binary_graph.sources import ArraySource, CodeSource, NpySource, open_source, source_from


def codes_of(rows: int, words: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (rows, words), dtype=np.uint64)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def whole(source: CodeSource, block: int = 7) -> np.ndarray:
    return np.concatenate([codes for _, codes, _ in source.chunks(block)])


@pytest.mark.parametrize("form", ["native", "big-endian", "bytes"])
def test_npy_forms_are_the_same_codes(tmp_path: Path, form: str) -> None:
    codes = codes_of(20)
    stored = {"native": codes, "big-endian": codes.astype(">u8"), "bytes": codes.astype("<u8").view(np.uint8)}[form]
    source = source_from(save(tmp_path / "c\u00f6des \u6f22.npy", stored))
    assert isinstance(source, NpySource)
    assert isinstance(source, CodeSource)
    assert (source.count, source.words, source.has_ids) == (20, 2, False)
    assert source.ids(0, 3) is None
    read = source.read(3, 11)
    assert read.dtype == np.uint64
    assert read.dtype.isnative
    np.testing.assert_array_equal(read, codes[3:11])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(sum), st.data())
def test_a_range_over_several_files_is_that_of_one(tmp_path_factory: Any, lengths: list[int], data: Any) -> None:
    folder = tmp_path_factory.mktemp("parts")
    codes, ids = codes_of(sum(lengths)), np.arange(sum(lengths))[::-1] * 5
    bounds = np.cumsum([0, *lengths])
    names = [save(folder / f"part-{n}.npy", codes[a:b]) for n, (a, b) in enumerate(itertools.pairwise(bounds))]
    source = source_from(names, ids=save(folder / "ids.npy", ids))
    start = data.draw(st.integers(0, source.count))
    stop = data.draw(st.integers(start, source.count))
    np.testing.assert_array_equal(source.read(start, stop), codes[start:stop])
    np.testing.assert_array_equal(source.ids(start, stop), ids[start:stop])
    assert source.fingerprint() == ArraySource(codes, ids).fingerprint()


def test_folder_and_pattern_come_in_natural_order(tmp_path: Path) -> None:
    codes = codes_of(11)
    for number in (10, 2, 9, 1, 0, 3, 4, 5, 6, 7, 8):
        save(tmp_path / f"part-{number}.npy", codes[number : number + 1])
    save(tmp_path / ".hidden.npy", codes)
    (tmp_path / "README.txt").write_text("not an input")
    for origin in (tmp_path, str(tmp_path / "part-*.npy"), [str(tmp_path / "**" / "part*.npy")]):
        np.testing.assert_array_equal(whole(source_from(origin)), codes)
    given_order = source_from([tmp_path / "part-10.npy", tmp_path / "part-2.npy"])
    np.testing.assert_array_equal(whole(given_order), codes[[10, 2]])


def test_a_name_with_brackets_is_a_file_first(tmp_path: Path) -> None:
    path = save(tmp_path / "a[1].npy", codes_of(3))
    assert source_from(path).count == 3


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2), np.float32), "alimm index hash"),
        (np.full((4, 2), np.nan), "alimm index hash"),
        (np.zeros((4, 2), np.int64), r"view\(numpy\.uint64\)"),
        (np.zeros((4, 128), np.bool_), "pack_bits"),
        (np.zeros((4, 2), np.int32), "save the codes as uint64"),
        (np.zeros((4, 2, 2), np.uint64), r"shape \(rows, words\)"),
        (np.zeros(4, np.uint64), r"shape \(rows, words\)"),
        (np.zeros((4, 9), np.uint8), "rows of 9 bytes"),
        (np.zeros((4, 17), np.uint64), "at most 128"),
        (np.zeros((4, 0), np.uint64), "rows of 0 bytes"),
        (np.zeros((0, 2), np.uint64), "has no rows"),
        (np.asfortranarray(codes_of(4)), "ascontiguousarray"),
        (np.array(3, np.uint64), "single number"),
        (np.zeros(3, [("a", "u8")]), "records"),
    ],
)
def test_files_that_hold_no_codes(tmp_path: Path, array: np.ndarray, message: str) -> None:
    path = save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=message) as caught:
        source_from(path)
    assert "x.npy" in str(caught.value)


def test_an_object_file_is_refused_without_unpickling(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "exploded").touch, ())

    np.save(tmp_path / "x.npy", np.array([Bomb()], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        source_from(tmp_path / "x.npy")
    assert not (tmp_path / "exploded").exists()


def test_missing_empty_and_odd_inputs(tmp_path: Path) -> None:
    one = save(tmp_path / "one.npy", codes_of(3))
    (tmp_path / "empty").mkdir()
    for origin in (tmp_path / "none.npy", str(tmp_path / "no*.npy"), tmp_path / "empty"):
        with pytest.raises(FileNotFoundError, match=r"no file|holds neither"):
            source_from(origin)
    with pytest.raises(ValueError, match="no input"):
        source_from([])
    with pytest.raises(ValueError, match="named twice"):
        source_from([one, str(tmp_path / "*.npy")])
    with pytest.raises(ValueError, match="all files of an input must be alike"):
        source_from([one, save(tmp_path / "wide.npy", codes_of(3, 4))])
    with pytest.raises(ValueError, match="have no columns"):
        source_from(one, column="code")
    np.savez(tmp_path / "x.npz", codes_of(3))
    with pytest.raises(ValueError, match=r"numpy\.save"):
        source_from(tmp_path / "x.npz")
    with pytest.raises(ValueError, match="got int"):
        source_from([3])  # type: ignore[list-item]


@pytest.mark.parametrize("cut", [0, 5, 60, 200])
def test_a_cut_file_is_refused(tmp_path: Path, cut: int) -> None:
    path = save(tmp_path / "x.npy", codes_of(30))
    os.truncate(path, cut)
    with pytest.raises(ValueError, match=r"no \.npy file|damaged"):
        source_from(path)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "x.npy", codes_of(30))
    source = source_from(path)
    save(path, codes_of(31))
    with pytest.raises(ValueError, match="has changed"):
        source.read(0, 3)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(4), "4 ids"),
        (np.arange(5.0), "whole numbers"),
        (np.array([0, 1, 2, -3, 4]), r"row 3 is -3"),
        (np.array([0, 1, 2, 3, 2**63], np.uint64), r"row 4 is 9223372036854775808"),
        (np.zeros((5, 1), np.int64), "whole numbers"),
    ],
)
def test_ids_that_do_not_fit(tmp_path: Path, ids: np.ndarray, message: str) -> None:
    codes = codes_of(5)
    path = save(tmp_path / "x.npy", codes)
    id_path = save(tmp_path / "ids.npy", ids)
    with pytest.raises(ValueError, match=message):
        list(source_from(path, ids=id_path).chunks(2))
    with pytest.raises(ValueError, match=message):
        source_from(codes, ids=ids)


def test_ids_near_the_limit(tmp_path: Path) -> None:
    ids = np.array([2**63 - 1, 0], np.uint64)
    source = source_from(save(tmp_path / "x.npy", codes_of(2)), ids=save(tmp_path / "i.npy", ids))
    assert source.ids(0, 2).tolist() == [2**63 - 1, 0]


def test_an_array_travels_through_a_file(tmp_path: Path) -> None:
    codes, ids = codes_of(9), np.arange(9) + 100
    source = source_from(codes, ids=ids)
    with pytest.raises(ValueError, match="name a folder"):
        source.describe()
    text = json.dumps(source.describe(tmp_path / "new" / "folder"))
    files = sorted((tmp_path / "new" / "folder").iterdir())
    stamps = [file.stat().st_mtime_ns for file in files]
    assert source.describe(tmp_path / "new" / "folder") == json.loads(text)
    assert [file.stat().st_mtime_ns for file in files] == stamps
    assert len(files) == 2
    other = open_source(json.loads(text))
    np.testing.assert_array_equal(whole(other), codes)
    np.testing.assert_array_equal(other.ids(0, 9), ids)
    assert other.fingerprint() == source.fingerprint()


def test_an_array_may_be_empty_and_is_copied() -> None:
    empty = source_from(np.zeros((0, 3), np.uint64))
    assert (empty.count, empty.words, list(empty.chunks())) == (0, 3, [])
    assert empty.fingerprint().startswith("0x3-")
    codes = codes_of(4)
    source = source_from(codes)
    source.read(0, 4)[:] = 0
    assert codes.any()
    assert source_from(source) is source
    with pytest.raises(ValueError, match="its own ids"):
        source_from(source, ids=np.arange(4))


def test_relative_names_open_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "x.npy", codes_of(4))
    monkeypatch.chdir(tmp_path)
    description = source_from("x.npy").describe()
    monkeypatch.chdir("/")
    assert open_source(description).count == 4
    np.testing.assert_array_equal(open_source(description).read(0, 4), codes_of(4))


def test_unknown_description() -> None:
    with pytest.raises(ValueError, match="kind npy or parquet"):
        open_source({"kind": "csv"})


def test_pickle(tmp_path: Path) -> None:
    for source in (source_from(codes_of(4)), source_from(save(tmp_path / "x.npy", codes_of(4)))):
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).read(1, 3), codes_of(4)[1:3])


def test_fingerprint_sees_every_bit_of_a_small_input() -> None:
    codes, ids = codes_of(50), np.arange(50)
    seen = {ArraySource(codes).fingerprint(), ArraySource(codes, ids).fingerprint()}
    for row in (0, 17, 49):
        changed = codes.copy()
        changed[row, 1] ^= np.uint64(1)
        seen.add(ArraySource(changed).fingerprint())
    seen.add(ArraySource(codes, ids + 1).fingerprint())
    seen.add(ArraySource(codes.reshape(100, 1)).fingerprint())
    assert len(seen) == 7


def test_fingerprint_of_a_large_input_reads_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_base, "FULL_BYTES", 100)
    monkeypatch.setattr(source_base, "SAMPLE_BLOCKS", 4)
    monkeypatch.setattr(source_base, "SAMPLE_ROWS", 5)
    ranges: list[tuple[int, int]] = []

    class Counting(ArraySource):
        def read(self, start: int, stop: int) -> np.ndarray:
            ranges.append((start, stop))
            return super().read(start, stop)

    codes = codes_of(1000)
    before = Counting(codes).fingerprint()
    assert ranges == [(0, 5), (331, 336), (663, 668), (995, 1000)]
    for row in (0, 333, 999):
        changed = codes.copy()
        changed[row] += np.uint64(1)
        assert Counting(changed).fingerprint() != before


def test_no_more_than_a_block_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_from(save(tmp_path / "x.npy", codes_of(1000)))
    taken: list[int] = []
    original = NpyRows._read_file
    monkeypatch.setattr(
        NpyRows, "_read_file", lambda self, f, s, out: (taken.append(len(out)), original(self, f, s, out))
    )
    assert whole(source, 64).shape == (1000, 2)
    assert max(taken) <= 64
    assert sum(taken) == 1000
    with pytest.raises(ValueError, match="at least one row"):
        next(iter(source.chunks(0)))


def test_a_large_file_needs_little_memory(tmp_path: Path) -> None:
    rows = 3_000_000
    np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.uint64, (rows, 16))  # 384 MB of nothing, sparse
    code = (
        "import sys, re; from alimm.projects.binary_graph.sources import source_from\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "source = source_from(sys.argv[1]); list(source.read(0, 1)); before = peak()\n"
        "rows = sum(len(codes) for _, codes, _ in source.chunks(8192))\n"
        "print(rows, peak() - before, *(m for m in ('torch', 'mmengine', 'pyarrow', 'numba') if m in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "big.npy"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    count, kilobytes, *heavy = done.stdout.split() or [done.stderr]
    assert int(count) == rows
    assert int(kilobytes) < 16_000
    assert heavy == []
