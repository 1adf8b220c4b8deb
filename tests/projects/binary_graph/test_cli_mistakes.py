"""What a command leaves behind when its input is bad, and how it says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alimm.projects.binary_graph import BinaryGraph, cli, cli_build, cli_change


def codes_of(rows: int, words: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (rows, words), dtype=np.uint64)


def save(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def make(folder: Path, ids: Any, words: int = 1) -> str:
    ids = np.asarray(ids)
    BinaryGraph.build(codes_of(len(ids), words), ids, path=folder, workers=1).close()
    return str(folder)


def ids_of(folder: str) -> list[int]:
    with BinaryGraph.open(folder, read_only=True) as index:
        return index.ids.tolist()


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return make(tmp_path / "index", np.arange(30))


def test_a_null_in_a_later_block_adds_nothing(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(cli_change, "_BLOCK", 4)
    rows: list[bytes | None] = [code.tobytes() for code in codes_of(20, seed=1)]
    for bad, count in ((17, 30), (None, 50)):
        values = [None if row == bad else code for row, code in enumerate(rows)]
        table = pa.table({"code": pa.array(values, pa.binary(8))})
        parquet.write_table(table, tmp_path / "more.parquet", row_group_size=4)
        words = ["add", folder, str(tmp_path / "more.parquet")]
        if bad is None:
            assert cli.main(words) == 0
        else:
            with pytest.raises(ValueError, match="17"):
                cli.main(words)
        assert ids_of(folder) == list(range(count))


def test_numbers_that_run_out_add_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_change, "_BLOCK", 4)
    folder = make(tmp_path / "index", [2**63 - 7])
    with pytest.raises(ValueError, match="no 7 numbers after id"):
        cli.main(["add", folder, save(tmp_path / "m.npy", codes_of(7, seed=1))])
    assert ids_of(folder) == [2**63 - 7]
    assert cli.main(["add", folder, save(tmp_path / "m.npy", codes_of(6, seed=1))]) == 0
    assert ids_of(folder) == [2**63 - 7 + step for step in range(7)]


def test_what_is_checked_is_locked(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make(tmp_path / "other", np.arange(5) + 100)
    more = save(tmp_path / "m.npy", codes_of(3, seed=1))
    checks = [("add", cli_change, "_check", more), ("merge", cli_build, "_check_disjoint", other)]
    for command, module, name, source in checks:
        original = getattr(module, name)

        def check(*arguments: Any, original: Any = original) -> None:
            original(*arguments)
            with BinaryGraph.open(folder) as second, pytest.raises(ValueError, match="another writer"):
                second.add(codes_of(1), [200])

        monkeypatch.setattr(module, name, check)
        assert cli.main([command, folder, source]) == 0
    assert ids_of(folder) == [*range(33), *range(100, 105)]


def test_a_merge_looks_at_all_before_it_takes_one(folder: str, tmp_path: Path) -> None:
    first = make(tmp_path / "first", np.arange(5) + 100)
    wide = make(tmp_path / "wide", np.arange(5) + 200, words=2)
    same = make(tmp_path / "same", [29, 300])
    twin = make(tmp_path / "twin", [300, 104])
    empty = tmp_path / "empty"
    empty.mkdir()
    for last, message in (
        (wide, "codes of 128 bits, .* of 64"), (same, f"1 ids that {folder} .* as 29"),
        (twin, f"1 ids that {first} .* as 104"), (first, f"5 ids that {first} "), (folder, "the index itself"),
        (str(tmp_path / "none"), "no index folder"), (str(empty), "is no index"),
    ):  # fmt: skip
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            cli.main(["merge", folder, first, last])
        assert ids_of(folder) == list(range(30))
    third = make(tmp_path / "third", [7000])
    assert cli.main(["merge", folder, first, third]) == 0
    assert ids_of(folder) == [*range(30), *range(100, 105), 7000]


def test_k_is_at_most_the_live_rows(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["delete", folder, "--ids", "3"])
    queries = save(tmp_path / "q.npy", codes_of(2, seed=5))
    out = tmp_path / "found.npz"
    words = [folder, "--queries", queries, "-k", "100000000000"]
    assert cli.main(["search", *words, "--out", str(out)]) == 0
    assert "-k 100,000,000,000 is lowered to 29, as the index has 29 live rows" in capsys.readouterr().err
    with np.load(out) as file:
        assert file["ids"].shape == file["distances"].shape == (2, 29)
        assert (np.sort(file["ids"], axis=1) == np.delete(np.arange(30), 3)).all()
    assert cli.main(["search", *words]) == 0
    assert cli.main(["search", *words[:-1], "29"]) == 0
    assert "lowered" in capsys.readouterr().err
    assert cli.main(["search", *words[:-1], "29"]) == 0
    assert capsys.readouterr().err == ""
    assert cli.main(["serve-bench", *words, "--ef", "8", "--threads", "1"]) == 0
    assert "recall@29" in capsys.readouterr().out
    cli.main(["delete", folder, "--ids", "0-29", "--missing", "ignore"])
    assert cli.main(["search", *words]) == 0  # an index without rows


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise MemoryError("Unable to allocate 4 TiB")

    monkeypatch.setattr("alimm.projects.binary_graph.cli_search.search", refuse)
    with pytest.raises(ValueError, match=r"not enough memory .*4 TiB"):
        cli.main(["search", "x"])


def test_a_repair_of_no_index_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no index"):
        cli.main(["verify", str(tmp_path), "--repair"])
    assert list(tmp_path.iterdir()) == []


def test_advice_is_in_words_of_the_command(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"nothing was deleted; --missing ignore deletes the others$"):
        cli.main(["delete", folder, "--ids", "77"])
    with BinaryGraph.open(folder) as writer:
        writer.delete([0])
        with pytest.raises(ValueError, match=r"another writer .*close it there, or wait for its end$"):
            cli.main(["delete", folder, "--ids", "7"])

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("filelock.FileLock.acquire", refuse)
    with pytest.raises(ValueError, match=r"cannot be written to .*: only search, serve-bench, info and verify work"):
        cli.main(["delete", folder, "--ids", "7"])


def test_a_folder_named_like_an_id(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "8").write_text("9\n")
    assert cli.main(["delete", folder, "--ids", "7", "8"]) == 0
    assert ids_of(folder) == [*range(7), 8, *range(10, 30)]


def test_no_index_is_built_inside_another(folder: str, tmp_path: Path) -> None:
    codes = save(tmp_path / "c.npy", codes_of(5))
    (tmp_path / "link").symlink_to(folder)
    before = sorted(Path(folder).rglob("*"))
    for inside in (f"{folder}/sub", f"{folder}/sub/dir", f"{folder}/a/b/c", f"{tmp_path}/link/sub"):
        with pytest.raises(ValueError, match=f"inside the index {folder}: name a folder outside"):
            cli.main(["build", codes, "--out", inside, "--quiet"])
    assert sorted(Path(folder).rglob("*")) == before
    manifest = Path(folder, "MANIFEST.json")
    manifest.write_bytes(manifest.read_bytes()[:-40])  # damaged, and an index all the same
    with pytest.raises(ValueError, match="inside the index"):
        cli.main(["build", codes, "--out", f"{folder}/sub", "--quiet"])
    (tmp_path / "MANIFEST.json").write_text('{"format": "of another tool"}')
    assert cli.main(["build", codes, "--out", str(tmp_path / "n"), "--quiet", "--workers", "1"]) == 0


def test_a_truth_of_floats_names_the_mend(folder: str, tmp_path: Path) -> None:
    queries = save(tmp_path / "q.npy", codes_of(2, seed=5))
    words = ["serve-bench", folder, "--queries", queries, "-k", "3", "--truth", str(tmp_path / "t.npz")]
    np.savez(tmp_path / "t.npz", distances=np.full((2, 3), 9.0))
    with pytest.raises(ValueError, match=r"got float64: save them as distances\.astype\(numpy\.int32\)"):
        cli.main(words)
    np.savez(tmp_path / "t.npz", distances=np.full((2, 3), 9.5))
    with pytest.raises(ValueError, match=r"at least 3 each; got float64 \(2, 3\)"):
        cli.main(words)


def test_a_bad_target_of_codes_leaves_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((100, 8)).astype(np.float32)
    names, state = save(tmp_path / "v.npy", vectors), tmp_path / "hash.npz"
    (tmp_path / "folder.npy").mkdir()
    words = ["hash", names, "--bits", "64", "--hasher", "srp", "--state", str(state), "--out"]
    for out, message in ((tmp_path / "none" / "c.npy", "there is no folder"), (tmp_path / "folder.npy", "is a folder")):
        with pytest.raises((ValueError, FileNotFoundError), match=f"--out .*{message}"):
            cli.main([*words, str(out)])
        assert not state.exists()
    with pytest.raises(FileNotFoundError, match=r"--state .*there is no folder"):
        cli.main([*words[:-2], str(tmp_path / "none" / "s.npz"), "--out", str(tmp_path / "c.npy")])
    assert not (tmp_path / "c.npy").exists()
    vectors[70, 2] = np.nan  # not among the rows that are fitted on
    save(tmp_path / "v.npy", vectors)
    monkeypatch.setattr("alimm.projects.binary_graph.cli_hash._sample", lambda *_: vectors[:50])
    with pytest.raises(ValueError, match="rows 0 to 99 of the input"):
        cli.main([*words, str(tmp_path / "c.npy")])
    assert not state.exists()
    vectors[70, 2] = 0
    save(tmp_path / "v.npy", vectors)
    assert cli.main([*words, str(tmp_path / "c.npy")]) == 0
    assert state.exists()
