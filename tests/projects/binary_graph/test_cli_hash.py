from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import cli, cli_hash
from alimm.projects.binary_graph.hashers import load_hasher


def vectors_of(rows: int = 500, dim: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32)


def save(path: Path, array: np.ndarray) -> str:
    np.save(path, array)
    return str(path)


def test_codes_are_those_of_the_saved_hash_in_any_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_hash, "_BLOCK_BYTES", 7 * 24 * 4)
    names = [save(tmp_path / "a.npy", vectors_of()[:200]), save(tmp_path / "b.npy", vectors_of()[200:])]
    out, state = tmp_path / "codes.npy", tmp_path / "hash.npz"
    words = ["--hasher", "pca", "--bits", "64", "--seed", "3", "--fit-on", "300", "--state", str(state)]
    assert cli.main(["hash", *names, "--out", str(out), *words]) == 0
    text = capsys.readouterr().out
    assert "fitted on 300 rows" in text
    assert "verdict" in text
    hasher = load_hasher(state)
    assert (hasher.name, hasher.bits, hasher.seed) == ("pca", 64, 3)
    codes = np.load(out)
    assert codes.dtype == np.uint64
    np.testing.assert_array_equal(codes, hasher.encode(vectors_of()))

    queries = vectors_of(5, seed=1)
    more = tmp_path / "queries.npy"
    assert cli.main(["hash", save(tmp_path / "q.npy", queries), "--out", str(more), "--state", str(state)]) == 0
    assert f"from {state}" in capsys.readouterr().out
    np.testing.assert_array_equal(np.load(more), hasher.encode(queries))
    with pytest.raises(ValueError, match="--bits would have no effect"):
        cli.main(["hash", names[0], "--out", str(out), "--state", str(state), "--bits", "64"])


def test_the_report_is_of_a_sample_of_many_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_hash, "_REPORT_ROWS", 100)
    monkeypatch.setattr(cli_hash, "_BLOCK_BYTES", 7 * 24 * 4)
    words = ["--out", str(tmp_path / "codes.npy"), "--hasher", "srp", "--bits", "64"]
    assert cli.main(["hash", save(tmp_path / "a.npy", vectors_of(455)), *words]) == 0
    text = capsys.readouterr().out
    assert "state: not kept" in text
    assert "of 91 rows, evenly spaced" in text


def test_the_sample_of_a_fit(tmp_path: Path) -> None:
    rows = np.arange(10_000, dtype=np.float32)[:, None]
    vectors = cli_hash._vectors([save(tmp_path / "a.npy", rows)])
    for count in (7, 1600, 2000):
        drawn = cli_hash._sample(vectors, count, 0)[:, 0]
        assert len(drawn) == count
        assert (np.diff(drawn) > 0).all()
        assert abs(drawn.mean() - 5000) < 4 * 2900 / np.sqrt(count / 16)
    assert len(cli_hash._sample(vectors, 20_000, 0)) == 10_000


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 2), np.uint64), "expected floats"),
        (np.zeros(4, np.float32), "expected floats"),
        (np.zeros((0, 4), np.float32), "no rows"),
    ],
)
def test_inputs_that_are_no_vectors(tmp_path: Path, array: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cli.main(["hash", save(tmp_path / "x.npy", array), "--out", str(tmp_path / "codes.npy")])


def test_nan_is_named_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_hash, "_BLOCK_BYTES", 100 * 24 * 4)
    state = tmp_path / "hash.npz"
    words = ["--out", str(tmp_path / "codes.npy"), "--state", str(state)]
    assert cli.main(["hash", save(tmp_path / "a.npy", vectors_of()), *words, "--bits", "64", "--hasher", "srp"]) == 0
    (tmp_path / "codes.npy").unlink()
    bad = vectors_of()
    bad[123, 4] = np.nan
    with pytest.raises(ValueError, match=r"rows 100 to 199 of the input: .*row 23 "):
        cli.main(["hash", save(tmp_path / "a.npy", bad), *words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npy", "hash.npz"]
    for extra, message in [(["--fit-on", "20001"], "at most 20000"), (["--out", "codes.npz"], "names a .npy file")]:
        with pytest.raises(ValueError, match=message):
            cli.main(["hash", str(tmp_path / "a.npy"), "--out", "x.npy", *extra])
