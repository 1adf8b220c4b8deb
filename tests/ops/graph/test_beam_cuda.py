"""The CUDA kernels of the search and of re-ranking in Numba's simulator: exactly what the oracle gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda
from numpy.typing import NDArray

from alimm_ops.graph import beam_cuda, beam_cuda_kernels, beam_reference

pytestmark = pytest.mark.cudasim


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated thread is one of the system: small blocks are quick, and small arrays span several of them."""
    monkeypatch.setattr(beam_cuda_kernels, "THREADS", 4)
    monkeypatch.setattr(beam_cuda_kernels, "TILE", 3)
    monkeypatch.setattr(beam_cuda_kernels, "LOG", 3)


def make_graph(seed: int, num: int, words: int, degree: int, ones: float = 0.5) -> tuple[NDArray[Any], ...]:
    """Codes with all bits in use (few ``ones``: many equal distances), and edges with repetitions and loops."""
    rng = np.random.default_rng(seed)
    codes = np.packbits(rng.random((num, words * 64)) < ones, axis=1).view(np.uint64)
    degrees = rng.integers(0, degree + 1, num)
    indptr = np.concatenate([[0], np.cumsum(degrees)]).astype(np.int64)
    return codes, indptr, rng.integers(0, max(num, 1), indptr[-1]).astype(np.int32)


def search(
    queries: NDArray[Any],
    graph: tuple[NDArray[Any], ...],
    starts: NDArray[np.int32],
    ef: int,
    allowed: NDArray[np.uint8] | None,
    max_blocks: int,
) -> tuple[NDArray[Any], ...]:
    """With rubbish in scratch memory and outputs, and more scratch memory than may be touched."""
    plan = beam_cuda.beam_plan(len(queries), len(graph[0]), max_blocks)
    work = np.full(plan.work + 3, 77, np.int32)
    ids, dists = np.full((len(queries), ef), 77, np.int32), np.full((len(queries), ef), 77, np.uint16)
    counts = np.full(len(queries), 77, np.int64)
    beam_cuda.beam_search(queries, *graph, starts, ef, allowed, work, ids, dists, counts, max_blocks)
    assert (work[plan.work :] == 77).all()
    assert plan.blocks <= max_blocks
    return ids, dists, counts


def compare(
    queries: NDArray[Any],
    graph: tuple[NDArray[Any], ...],
    starts: NDArray[np.int32],
    ef: int,
    allowed: NDArray[np.uint8] | None = None,
    max_blocks: int = 2,
) -> tuple[NDArray[Any], ...]:
    found = search(queries, graph, starts, ef, allowed, max_blocks)
    expected = beam_reference.beam_search(queries, *graph, starts, ef, allowed)
    for name, a, b in zip(("ids", "dists", "counts"), found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist(), name
    return found


def test_this_process_simulates() -> None:
    assert "simulator" in cuda.jit.__module__


@pytest.mark.parametrize(("words", "ef"), [(1, 7), (3, 5), (16, 2)])
def test_walks(words: int, ef: int) -> None:
    graph = make_graph(words, 70, words, 7)
    rng = np.random.default_rng(ef)
    starts = rng.integers(-1, 70, (3, 3)).astype(np.int32)
    found = compare(graph[0][rng.integers(0, 70, 3)] ^ np.uint64(5), graph, starts, ef)
    assert found[2].max() > 5  # it has walked on from its first node


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("filtered", [False, True])
def test_equal_distances_go_by_node(seed: int, filtered: bool) -> None:
    """Nearly all bits are zero: most distances are 0 to 3, and the smaller node must go first at every bound."""
    graph = make_graph(seed, 60, 1, 7, ones=0.02)
    rng = np.random.default_rng(seed)
    allowed = (rng.random(60) < 0.4).astype(np.uint8) if filtered else None
    found = compare(graph[0][:2], graph, rng.integers(0, 60, (2, 2)).astype(np.int32), 4, allowed)
    assert (np.diff(found[1].astype(int)) == 0).any()


def test_only_allowed_nodes_are_results_but_all_are_walked_through() -> None:
    """A chain whose nodes come nearer to the query: only the first and a late one are allowed."""
    codes = np.array([[(1 << (10 - i)) - 1] for i in range(10)], np.uint64)
    indptr, edges = np.minimum(np.arange(11), 9).astype(np.int64), np.arange(1, 10, dtype=np.int32)
    allowed = np.zeros(10, np.uint8)
    allowed[[0, 7]] = 1
    starts, query = np.zeros((1, 1), np.int32), np.zeros((1, 1), np.uint64)
    ids, dists, counts = compare(query, (codes, indptr, edges), starts, 4, allowed)
    assert ids.tolist() == [[7, 0, -1, -1]]
    assert dists.tolist() == [[3, 10, 65535, 65535]]
    assert counts.tolist() == [10]
    compare(query, (codes, indptr, edges), starts, 4, np.zeros(10, np.uint8))
    compare(query, (codes, indptr, edges), starts, 1, np.full(10, 255, np.uint8))


@pytest.mark.parametrize("log", [1, 100])
def test_blocks_and_the_log_change_nothing(log: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One block for all walks: what the first has seen is new to the second, even if not all of it was logged."""
    monkeypatch.setattr(beam_cuda_kernels, "LOG", log)
    graph = make_graph(7, 200, 1, 6)
    queries = np.repeat(graph[0][3:4], 2, axis=0)
    starts = np.tile(np.array([[11, 150]], np.int32), (2, 1))
    ids, _, counts = compare(queries, graph, starts, 5, max_blocks=1)
    assert ids[0].tolist() == ids[1].tolist()
    assert counts[0] > 20
    compare(queries, graph, starts, 5, max_blocks=3)


def test_a_block_with_all_its_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beam_cuda_kernels, "THREADS", 64)
    """Chunks of up to 64 starts and neighbours, more than one of them, and more results than threads."""
    rng = np.random.default_rng(3)
    codes = make_graph(3, 110, 2, 0)[0]
    edges = rng.permutation(110)[:80].astype(np.int32)
    graph = codes, np.append(0, np.full(110, 80)), edges  # the first node has all edges
    starts = np.arange(66, dtype=np.int32)[None]
    allowed = (np.arange(110) % 3 > 0).astype(np.uint8)
    found = compare(codes[:1], graph, starts, 70, allowed)
    assert found[2] > 90


def test_a_beam_of_all_nodes_is_exact_where_they_are_connected() -> None:
    codes = make_graph(5, 25, 1, 5)[0]
    ring = np.arange(1, 26, dtype=np.int32) % 25
    ids, _, counts = compare(codes[:1], (codes, np.arange(26), ring), np.array([[7]], np.int32), 30)
    assert counts.tolist() == [25]
    distances = np.unpackbits((codes ^ codes[0]).view(np.uint8), axis=1).sum(axis=1)
    assert ids[0, :25].tolist() == np.lexsort((np.arange(25), distances)).tolist()


@pytest.mark.parametrize("num_starts", [0, 2])
@pytest.mark.parametrize("filtered", [False, True])
def test_nothing_to_walk(num_starts: int, filtered: bool) -> None:
    graph = make_graph(0, 9, 2, 3)
    allowed = np.ones(9, np.uint8) if filtered else None
    starts = np.full((3, num_starts), -1, np.int32)
    compare(graph[0][:3], graph, starts, 4, allowed)
    compare(graph[0][:0], graph, starts[:0], 4, allowed)
    lonely = (graph[0], np.zeros(10, np.int64), graph[2][:0])
    compare(graph[0][:3], lonely, np.where(starts < 0, 8, starts).astype(np.int32), 4, allowed)
    empty = (graph[0][:0], np.zeros(1, np.int64), graph[2][:0])
    none = None if allowed is None else allowed[:0]
    compare(graph[0][:3], empty, starts, 4, none)


def test_ids_out_of_range_touch_no_memory() -> None:
    codes, indptr, edges = make_graph(2, 20, 1, 5)
    wrong = edges.copy()
    wrong[::3] = 20
    starts = np.array([[0, 20, -9, 2**31 - 1]], np.int32)
    without = [[node for node in wrong[indptr[i] : indptr[i + 1]] if node < 20] for i in range(20)]
    good = np.concatenate([[0], np.cumsum([len(row) for row in without])]).astype(np.int64)
    expected = beam_reference.beam_search(
        codes[:1],
        codes,
        good,
        np.array([node for row in without for node in row], np.int32),
        np.zeros((1, 1), np.int32),
        9,
    )
    found = search(codes[:1], (codes, indptr, wrong), starts, 9, None, 1)
    assert all(a.tolist() == b.tolist() for a, b in zip(found, expected, strict=True))


def test_arguments_of_a_search() -> None:
    codes, indptr, edges = make_graph(2, 20, 1, 5)
    starts = np.full((20, 1), -1, np.int32)
    work = np.zeros(beam_cuda.beam_plan(20, 20).work, np.int32)
    outputs = np.zeros((20, 3), np.int32), np.zeros((20, 3), np.uint16), np.zeros(20, np.int64)
    good = dict(
        zip(
            ("queries", "codes", "indptr", "edges", "starts", "ef", "allowed", "work", "ids", "dists", "counts"),
            (codes, codes, indptr, edges, starts, 3, None, work, *outputs),
            strict=True,
        )
    )
    for name, value, message in (
        ("ef", 0, "ef must be from 1 to 1024"),
        ("ef", 1025, "use the CPU kernels"),
        ("codes", codes.view(np.int64), "codes must be uint64"),
        ("codes", np.zeros((20, 2), np.uint64), "encode both alike"),
        ("indptr", indptr[1:], r"indptr must be int64 of shape \(21\), got int64"),
        ("starts", starts[1:], "starts must be int32"),
        ("allowed", np.ones(20, bool), "allowed must be uint8"),
        ("work", work[1:], "work must have at least"),
        ("dists", outputs[0], "dists must be uint16"),
        ("max_blocks", 0, "max_blocks must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            beam_cuda.beam_search(**(good | {name: value}))
    with pytest.raises(ValueError, match="use shards"):
        beam_cuda.beam_plan(1, 2**31)
    assert beam_cuda.beam_plan(0, 0).blocks == 1


def rerank(queries: Any, features: Any, rows: Any, k: int, metric: str) -> tuple[NDArray[Any], NDArray[Any]]:
    scores, chosen = np.full((len(queries), k), 77, np.float32), np.full((len(queries), k), 77, np.int64)
    beam_cuda.rerank(queries, features, rows, k, metric, scores, chosen)
    return scores, chosen


def ordered_scores(query: Any, features: Any, metric: str) -> NDArray[np.float32]:
    """In double precision in the order of the coordinates: the simulator fuses nothing."""
    result = []
    for feature in features.astype(np.float64):
        value = length = query_length = 0.0
        for a, b in zip(query.astype(np.float64).tolist(), feature.tolist(), strict=True):
            value += (b - a) * (b - a) if metric == "l2" else a * b
            length, query_length = length + b * b, query_length + a * a
        lengths = np.sqrt(length) * np.sqrt(query_length)
        cosine = value / lengths if lengths > 0 else 0.0
        result.append({"l2": -value, "ip": value, "cosine": cosine}[metric])
    return np.array(result, np.float32)


@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("metric", beam_reference.METRICS)
@pytest.mark.parametrize("dim", [1, 7])
def test_rerank(metric: str, kind: type, dim: int) -> None:
    """Candidates of several blocks of threads with holes, repeated features, and zero vectors on both sides."""
    rng = np.random.default_rng(dim)
    features = rng.standard_normal((30, dim)).astype(kind)
    features[[4, 9]], features[[5, 6, 7]] = 0, features[8]
    queries = rng.standard_normal((4, dim)).astype(np.float32)
    queries[3] = 0
    rows = np.array([rng.permutation(30)[:11] for _ in range(4)])
    rows[1, [0, 5]], rows[2] = -1, -1
    for k in (2, 14):
        scores, chosen = rerank(queries, features, rows, k, metric)
        expected = beam_reference.rerank(queries, features, rows, k, metric)
        assert chosen.tolist() == expected[1].tolist()
        assert (np.isfinite(scores) == (chosen >= 0)).all()
        np.testing.assert_array_max_ulp(scores[chosen >= 0], expected[0][chosen >= 0], 1)
        for row in range(4):
            own = chosen[row][chosen[row] >= 0]
            assert scores[row, : len(own)].tolist() == ordered_scores(queries[row], features[own], metric).tolist()


def test_a_half_is_what_it_is_in_double_precision() -> None:
    """Subnormals, the largest and the smallest normal one, as exact products with powers of two."""
    features = np.array([[2.0**-24], [3 * 2.0**-24], [2.0**-14], [65504], [-1.5]], np.float16)
    scores, chosen = rerank(np.array([[2.0**20]], np.float32), features, np.arange(5)[None], 5, "ip")
    assert chosen.tolist() == [[3, 2, 1, 0, 4]]
    assert scores.tolist() == [[65504 * 2.0**20, 64, 3 / 16, 1 / 16, -1.5 * 2**20]]


def test_scores_that_are_no_numbers_go_last_and_nothing_is_lost() -> None:
    features = np.array([[1], [np.nan], [3], [-np.inf], [np.nan], [3]], np.float32)
    rows = np.array([[4, 3, 5, 2, -1, 1, 0, 99, -7]])
    scores, chosen = rerank(np.ones((1, 1), np.float32), features, rows, 8, "ip")
    assert chosen.tolist() == [[2, 5, 0, 3, 1, 4, -1, -1]]
    assert np.array_equal(scores, [[3, 3, 1, -np.inf, np.nan, np.nan, -np.inf, -np.inf]], equal_nan=True)
    assert rerank(np.ones((1, 1), np.float32), features, np.array([[2, 2, 0]]), 3, "ip")[1].tolist() == [[2, 2, 0]]


def test_nothing_to_rerank() -> None:
    queries, features = np.ones((2, 3), np.float32), np.ones((5, 3), np.float16)
    nothing = ([[-np.inf] * 2] * 2, [[-1] * 2] * 2)
    for some, rows in (
        (features, np.zeros((2, 0), np.int64)),
        (features[:0], np.zeros((2, 1), np.int64)),
        (features[:0], np.zeros((2, 0), np.int64)),
    ):
        assert tuple(part.tolist() for part in rerank(queries, some, rows, 2, "l2")) == nothing
    assert rerank(queries[:0], features, np.zeros((0, 4), np.int64), 2, "l2")[0].shape == (0, 2)


def test_arguments_of_rerank() -> None:
    queries, features, rows = np.ones((2, 3), np.float32), np.ones((5, 3), np.float32), np.zeros((2, 4), np.int64)
    for arguments, message in (
        ((queries, features, rows, 2, "dot"), "metric must be one of cosine, ip, l2, got 'dot'"),
        ((queries, features, rows, 0, "ip"), "k must be at least 1"),
        ((queries.astype(np.float64), features, rows, 2, "ip"), "queries must be float32"),
        ((queries, features.astype(np.float64), rows, 2, "ip"), "features must be float32"),
        ((queries, features[:, :2], rows, 2, "ip"), r"features must be float32 of shape \(any, 3\)"),
        ((queries, features, rows[1:], 2, "ip"), "rows must be int64"),
        ((queries, features, rows.astype(np.int32), 2, "ip"), "rows must be int64"),
        ((queries, features, np.zeros((2, 8193), np.int64), 2, "ip"), "at most 8192 candidates"),
        ((queries[:, :0], features[:, :0], rows, 2, "ip"), "at least one coordinate"),
    ):
        with pytest.raises(ValueError, match=message):
            rerank(*arguments)
