from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alimm.projects.binary_graph import BinaryGraph, cli
from alimm.projects.binary_graph.cli_serve import cold_start, recall_by_distance, true_distances
from alimm.search import recall_at_k


def codes_of(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, (rows, 1), dtype=np.uint64)


def exact(codes: np.ndarray, queries: np.ndarray) -> np.ndarray:
    return np.sort(np.bitwise_count(queries[:, None] ^ codes[None]).sum(axis=2, dtype=np.int32), axis=1)


@given(st.integers(0, 2**32), st.integers(1, 6))
def test_recall_is_that_of_the_house(seed: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    distances = rng.integers(0, 5, (3, 12)).astype(np.int32)  # many ties
    order = np.argsort(distances, axis=1, kind="stable")
    true = np.take_along_axis(distances, order, axis=1)
    ids = np.sort(rng.permuted(np.tile(np.arange(12), (3, 1)), axis=1)[:, :k], axis=1)
    found = np.take_along_axis(distances, ids, axis=1)
    by = np.argsort(found, axis=1, kind="stable")
    ids, found = np.take_along_axis(ids, by, axis=1), np.take_along_axis(found, by, axis=1)
    expected = recall_at_k(ids, order, -true.astype(float), k)
    assert recall_by_distance(found, true[:, :k]) == pytest.approx(expected)


def test_recall_past_the_end() -> None:
    truth = np.array([[1, 2, -1], [-1, -1, -1]], np.int32)
    assert recall_by_distance(np.array([[2, -1, -1], [-1, -1, -1]], np.int32), truth) == pytest.approx(0.75)
    assert recall_by_distance(np.array([[-1, -1, -1], [-1, -1, -1]], np.int32), truth) == pytest.approx(0.5)


def test_the_truth_sees_live_rows_of_all_kinds(tmp_path: Path) -> None:
    codes, queries = codes_of(60), codes_of(4, seed=5)
    index = BinaryGraph.build(codes[:40], np.arange(40), path=tmp_path / "index", workers=1)
    index.add(codes[40:], np.arange(20) + 40)
    index.delete([3, 45])
    live = np.delete(codes, [3, 45], axis=0)
    np.testing.assert_array_equal(true_distances(index, queries, 7), exact(live, queries)[:, :7])
    assert (true_distances(index, queries, 70)[:, 58:] == -1).all()


def test_serve_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(tmp_path / "index")
    BinaryGraph.build(codes_of(200), path=folder, workers=1).close()
    queries = codes_of(30, seed=1)
    np.save(tmp_path / "q.npy", queries)
    words = [
        "serve-bench",
        folder,
        "--queries",
        str(tmp_path / "q.npy"),
        "-k",
        "5",
        "--ef",
        "8,300",
        "--threads",
        "1,2",
    ]
    assert cli.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "200 rows of 64 bits in 1 segments; 30 queries"
    assert lines[1].startswith("cold start: ")
    assert lines[2].split("  ")[-1] == "recall@5"
    assert [line.split()[:2] for line in lines[3:7]] == [["8", "1"], ["8", "2"], ["300", "1"], ["300", "2"]]
    assert all(line.split()[-1] == "1.0000" for line in lines[5:7])

    # A truth of nearer neighbours than there are lowers the recall: the file is what counts.
    truth = exact(codes_of(200), queries)[:, :6]
    truth[:, 4] = truth[:, 1]
    truth[:, 2:4] = truth[:, 1:2]
    np.savez(tmp_path / "truth.npz", distances=truth)
    assert cli.main([*words, "--truth", str(tmp_path / "truth.npz"), "--json", "--sample", "30"]) == 0
    body = json.loads(capsys.readouterr().out)
    expected = np.minimum((exact(codes_of(200), queries)[:, :5] <= truth[:, 1:2]).sum(axis=1), 5).mean() / 5
    assert body["measured"][-1]["recall"] == pytest.approx(expected)
    assert expected < 0.9
    first = body["measured"][0]
    assert 0 < first["p50_us"] <= first["p95_us"] <= first["p99_us"]
    assert body["cold_start_seconds"] > 0

    np.save(tmp_path / "wide.npy", codes_of(4).reshape(2, 2))
    with pytest.raises(ValueError, match="queries have 128 bits, the index has 64"):
        cli.main(["serve-bench", folder, "--queries", str(tmp_path / "wide.npy")])
    np.savez(tmp_path / "truth.npz", distances=truth[:, :4])
    with pytest.raises(ValueError, match="at least 5 each"):
        cli.main([*words, "--truth", str(tmp_path / "truth.npz")])
    with pytest.raises(ValueError, match=r"no \.npz file"):
        cli.main([*words, "--truth", str(tmp_path / "q.npy")])


def test_cold_start_says_what_failed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a search in a new process failed: .*none"):
        cold_start(str(tmp_path / "none"), codes_of(1)[0])
