from __future__ import annotations

import json
import pickle
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alimm.projects.binary_graph.sources import ArraySource, CodeSource, open_source, source_from


def codes_of(rows: int, words: int = 2, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (rows, words), dtype=np.uint64)


def save(path: Path, array: np.ndarray) -> Path:
    np.save(path, array)
    return path


def whole(source: CodeSource, block: int = 7) -> np.ndarray:
    return np.concatenate([codes for _, codes, _ in source.chunks(block)])


def column_of(pa: Any, codes: np.ndarray, form: str) -> Any:
    raw = [row.tobytes() for row in codes.astype("<u8")]
    bytes_ = codes.astype("<u8").view(np.uint8)
    width = codes.shape[1]
    return {
        "fixed": lambda: pa.array(raw, pa.binary(8 * width)),
        "binary": lambda: pa.array(raw, pa.binary()),
        "large": lambda: pa.array(raw, pa.large_binary()),
        "dictionary": lambda: pa.array(raw, pa.binary()).dictionary_encode(),
        "list8": lambda: pa.array(bytes_.tolist(), pa.list_(pa.uint8())),
        "large_list8": lambda: pa.array(bytes_.tolist(), pa.large_list(pa.uint8())),
        "fixed8": lambda: pa.array(bytes_.tolist(), pa.list_(pa.uint8(), 8 * width)),
        "list64": lambda: pa.array(codes.tolist(), pa.list_(pa.uint64())),
        "fixed64": lambda: pa.array(codes.tolist(), pa.list_(pa.uint64(), width)),
    }[form]()


FORMS = ["fixed", "binary", "large", "dictionary", "list8", "large_list8", "fixed8", "list64", "fixed64"]


def write(path: Path, row_group: int = 1000, **columns: Any) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), path, row_group_size=row_group)
    return path


@pytest.fixture
def pa() -> Any:
    return pytest.importorskip("pyarrow")


@pytest.mark.parametrize("form", FORMS)
def test_parquet_columns(tmp_path: Path, pa: Any, form: str) -> None:
    codes, ids = codes_of(53, 3), np.arange(53) * 7
    names = []
    for number, (start, stop) in enumerate([(0, 20), (20, 20), (20, 53)]):
        column = column_of(pa, codes[start:stop], form)
        names.append(write(tmp_path / f"p{number}.parquet", 8, key=pa.array(ids[start:stop]), code=column))
    source = source_from(tmp_path, id_column="key", block=5)
    assert (source.count, source.words, source.has_ids) == (53, 3, True)
    assert source.fingerprint() == ArraySource(codes, ids).fingerprint()
    for start, stop in [(0, 53), (7, 9), (50, 53), (19, 21), (3, 3), (9, 30), (0, 1), (53, 53)]:
        np.testing.assert_array_equal(source.read(start, stop), codes[start:stop])
        np.testing.assert_array_equal(source.ids(start, stop), ids[start:stop])
    for other in (open_source(json.loads(json.dumps(source.describe()))), pickle.loads(pickle.dumps(source))):
        np.testing.assert_array_equal(whole(other), codes)


def test_parquet_decodes_forward_once_and_a_block_at_a_time(tmp_path: Path, pa: Any) -> None:
    from alimm.projects.binary_graph import source_parquet

    codes = codes_of(400)
    path = write(tmp_path / "x.parquet", 150, code=column_of(pa, codes, "fixed"))
    source = source_from(path, block=16)
    decoded: list[int] = []
    original = source_parquet._open

    class Spy:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def iter_batches(self, **options: Any) -> Any:
            for batch in self._file.iter_batches(**options):
                decoded.append(len(batch))
                yield batch

    source_parquet._open = lambda path: Spy(original(path))
    try:
        np.testing.assert_array_equal(whole(source, 23), codes)
    finally:
        source_parquet._open = original
    assert max(decoded) <= 16
    assert sum(decoded) == 400


def test_parquet_in_threads(tmp_path: Path, pa: Any) -> None:
    codes = codes_of(500)
    source = source_from(write(tmp_path / "x.parquet", 64, code=column_of(pa, codes, "binary")), block=10)
    right: list[int] = []

    def check(seed: int) -> None:
        rng = np.random.default_rng(seed)
        for _ in range(30):
            start, stop = np.sort(rng.integers(0, 501, 2))
            np.testing.assert_array_equal(source.read(int(start), int(stop)), codes[start:stop])
        right.append(seed)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=check, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert sorted(right) == [0, 1, 2, 3]


def test_parquet_with_ids_in_a_file(tmp_path: Path, pa: Any) -> None:
    path = write(tmp_path / "x.parquet", code=column_of(pa, codes_of(6), "fixed"))
    ids = save(tmp_path / "ids.npy", np.arange(6) + 3)
    source = open_source(source_from(path, ids=ids).describe())
    assert source.ids(2, 4).tolist() == [5, 6]
    with pytest.raises(ValueError, match="not from both"):
        source_from(path, id_column="code", ids=ids)
    with pytest.raises(ValueError, match=r"must be in \.npy"):
        source_from(path, ids=path)
    with pytest.raises(ValueError, match="got both"):
        source_from([path, save(tmp_path / "y.npy", codes_of(2))])


def refused(tmp_path: Path, match: str, **columns: Any) -> None:
    path = write(tmp_path / "x.parquet", 2, **columns)
    with pytest.raises(ValueError, match=match):
        whole(source_from(path, column="code" if "code" in columns else None))


def test_parquet_columns_that_hold_no_codes(tmp_path: Path, pa: Any) -> None:
    raw = [b"12345678", b"abcdefgh", b"ABCDEFGH", b"--------"]
    refused(tmp_path, "row 3 of column 'code'.* is null", code=pa.array([*raw[:3], None]))
    refused(tmp_path, "row 0 of column 'code'.* is null", code=pa.array([None, *raw], pa.binary(8)))
    refused(tmp_path, "row 2 of column 'code'.* 7 bytes, others have 8", code=pa.array([*raw[:2], b"1234567", raw[3]]))
    refused(tmp_path, "codes of 7 bytes", code=pa.array([b"1234567"]))
    refused(tmp_path, "codes of 0 bytes", code=pa.array([b""]))
    refused(tmp_path, "codes of 136 bytes", code=pa.array([bytes(136)]))
    refused(tmp_path, "row 3 of .* holds a null", code=pa.array([[1], [2], [3], [None]], pa.list_(pa.uint64())))
    refused(tmp_path, "row 1 of .* holds a null", code=pa.array([[1], [None], [3]], pa.list_(pa.uint64(), 1)))
    refused(tmp_path, "row 1 of .* has a code of 16 bytes", code=pa.array([[1], [1, 2]], pa.list_(pa.uint64())))
    refused(tmp_path, "alimm index hash", code=pa.array([[0.5, float("nan")]]))
    refused(tmp_path, "alimm index hash", code=pa.array([0.5]))
    refused(tmp_path, "alimm index hash", vector=pa.array([[0.5]], pa.list_(pa.float32(), 1)))
    refused(tmp_path, "holds string", code=pa.array(["12345678"]))
    refused(tmp_path, r"view\(numpy\.uint64\)", code=pa.array([[1]], pa.list_(pa.int64())))
    refused(tmp_path, "has no rows", code=pa.array([], pa.binary(8)))
    refused(tmp_path, "more than one column.* a, b", a=pa.array(raw), b=pa.array(raw))
    refused(tmp_path, "no column that holds codes", a=pa.array([1]), b=pa.array(["x"]))


def test_parquet_ids_and_names(tmp_path: Path, pa: Any) -> None:
    code = pa.array([b"12345678", b"abcdefgh"])
    path = write(
        tmp_path / "x.parquet", code=code, void=pa.array([1, None]), low=pa.array([1, -2]), real=pa.array([0.5, 1])
    )
    for column, match in [("void", "row 1 of .* is null"), ("low", "row 1 is -2"), ("real", "whole numbers")]:
        with pytest.raises(ValueError, match=match):
            source_from(path, id_column=column).ids(0, 2)
    for names in ({"column": "nothing"}, {"id_column": "nothing"}):
        with pytest.raises(ValueError, match=r"no column 'nothing'; it has code, void"):
            source_from(path, **names)
    wide = write(tmp_path / "wide.parquet", code=pa.array([bytes(16)]))
    with pytest.raises(ValueError, match="16 bytes, others have 8"):
        whole(source_from([path, wide], column="code"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ValueError, match="no Parquet file"):
        source_from(tmp_path / "bad.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, pa: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x.parquet", code=pa.array([b"12345678"]))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match="reading Parquet files needs pyarrow"):
        source_from(path)
