"""Beam search: the kernels against the NumPy reference, and both against plain facts."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from numpy.typing import NDArray

from alimm_ops.graph import beam_cpu
from alimm_ops.graph import beam_reference as reference
from alimm_ops.graph.hamming_reference import hamming_matrix, nearest

Graph = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int32]]


def make_codes(seed: int, num: int, words: int, ones: float = 0.5) -> NDArray[np.uint64]:
    """Few ``ones`` give many equal distances and equal codes."""
    bits = np.random.default_rng(seed).random((num, words * 64)) < ones
    return np.packbits(bits, axis=1).view(np.uint64)


def make_graph(seed: int, num: int, words: int, degree: int, ones: float = 0.5) -> Graph:
    """Random edges, with repetitions and loops; some nodes have none."""
    rng = np.random.default_rng(seed)
    indptr = np.append(0, np.cumsum(rng.integers(0, degree + 1, num))).astype(np.int64)
    return make_codes(seed, num, words, ones), indptr, rng.integers(0, max(num, 1), indptr[-1]).astype(np.int32)


def ring(codes: NDArray[np.uint64]) -> Graph:
    """Each node leads to the next one only."""
    nodes = np.arange(len(codes))
    return codes, np.arange(len(codes) + 1), ((nodes + 1) % len(codes)).astype(np.int32)


def same(found: tuple[NDArray[Any], ...], expected: tuple[NDArray[Any], ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)


def compare(
    queries: NDArray[np.uint64],
    graph: Graph,
    starts: NDArray[np.int32],
    ef: int,
    allowed: NDArray[Any] | None = None,
) -> tuple[NDArray[np.int32], NDArray[np.uint16], NDArray[np.int64]]:
    """The kernel and the oracle."""
    expected = reference.beam_search(queries, *graph, starts, ef, allowed)
    same(beam_cpu.beam_search(queries, *graph, starts, ef, allowed), expected)
    same(beam_cpu.beam_search(queries, *graph, starts, ef, allowed, True), expected)
    return expected


@settings(max_examples=100)
@given(
    seed=st.integers(0, 9999),
    num=st.integers(1, 120),
    words=st.sampled_from([1, 2, 5]),
    degree=st.sampled_from([0, 3, 9, 70]),
    ef=st.integers(1, 40),
    ones=st.sampled_from([0.02, 0.1, 0.5]),
    allowed_part=st.sampled_from([None, 0.0, 0.2, 0.9, 1.0]),
)
@example(seed=0, num=1, words=1, degree=3, ef=1, ones=0.5, allowed_part=None)
@example(seed=1, num=120, words=1, degree=70, ef=1, ones=0.02, allowed_part=0.2)
def test_walks(seed: int, num: int, words: int, degree: int, ef: int, ones: float, allowed_part: float | None) -> None:
    rng, graph = np.random.default_rng(seed), make_graph(seed, num, words, degree, ones)
    queries, starts = make_codes(seed + 1, 4, words, ones), rng.integers(-1, num, (4, 5)).astype(np.int32)
    allowed = None if allowed_part is None else (rng.random(num) < allowed_part).astype(np.uint8)
    ids, dists, counts = compare(queries, graph, starts, ef, allowed)
    matrix = hamming_matrix(queries, graph[0])
    for row in range(4):
        entries = [entry for entry in zip(dists[row].tolist(), ids[row].tolist(), strict=True) if entry[1] >= 0]
        assert entries == sorted(set(entries))
        assert all(matrix[row, node] == distance for distance, node in entries)
        assert allowed is None or all(allowed[node] for _, node in entries)
        assert len(entries) <= counts[row] <= num
        if allowed is None:
            assert len(entries) == min(ef, counts[row])


@pytest.mark.parametrize("words", range(1, 17))
def test_all_widths(words: int) -> None:
    graph = make_graph(words, 80, words, 6)
    starts = np.arange(9, dtype=np.int32).reshape(3, 3)
    compare(make_codes(words + 99, 3, words), graph, starts, 8)
    compare(~graph[0][:3], graph, starts, 8, np.ones(80, np.uint8))


@pytest.mark.parametrize("ones", [0.03, 0.5])
def test_a_beam_of_all_nodes_is_exact_where_they_are_connected(ones: float) -> None:
    graph = ring(make_codes(1, 90, 1, ones))
    queries, starts = make_codes(2, 3, 1, ones), np.array([[0, -1], [41, 41], [89, 3]], np.int32)
    for ef in (90, 97):
        ids, dists, counts = compare(queries, graph, starts, ef)
        assert counts.tolist() == [90, 90, 90]
        same((ids, dists), nearest(queries, graph[0], ef))
    allowed = (np.arange(90) % 7 == 0).astype(np.uint8)
    chosen = np.flatnonzero(allowed)
    ids, dists, _ = compare(queries, graph, starts, 90, allowed)
    exact_ids, exact_dists = nearest(queries, graph[0][chosen], 90)
    same((ids, dists), (np.where(exact_ids >= 0, chosen[exact_ids], -1).astype(np.int32), exact_dists))


def test_the_walk_goes_on_through_what_is_not_allowed() -> None:
    """Each node of a chain is nearer to the query; the mask must not stop the walk, nor fill the beam."""
    codes = np.array([[(1 << (20 - i)) - 1] for i in range(20)], np.uint64)
    graph = codes, np.minimum(np.arange(21), 19), np.arange(1, 20, dtype=np.int32)
    allowed = np.zeros(20, np.uint8)
    allowed[[0, 17]] = 1
    query, starts = np.zeros((1, 1), np.uint64), np.zeros((1, 1), np.int32)
    ids, dists, counts = compare(query, graph, starts, 3, allowed)
    assert (ids.tolist(), dists.tolist(), counts.tolist()) == ([[17, 0, -1]], [[3, 20, 65535]], [20])
    assert compare(query, graph, starts, 1, allowed)[0].tolist() == [[17]]
    assert compare(query, graph, starts, 1)[0].tolist() == [[19]]


def test_any_mask_that_is_not_zero_allows() -> None:
    graph = ring(make_codes(3, 20, 1))
    starts = np.zeros((1, 1), np.int32)
    flags = np.arange(20) % 3 > 0
    expected = compare(graph[0][:1], graph, starts, 20, flags.astype(np.uint8))
    same(beam_cpu.beam_search(graph[0][:1], *graph, starts, 20, flags), expected)
    same(beam_cpu.beam_search(graph[0][:1], *graph, starts, 20, flags * np.uint8(128)), expected)


def test_what_no_edge_leads_to_is_not_found() -> None:
    """Two rings: the query is a code of the other one. And a start without edges ends at once."""
    codes = make_codes(4, 20, 1)
    nodes = np.arange(20)
    edges = np.where(nodes < 10, (nodes + 1) % 10, 10 + (nodes + 1) % 10).astype(np.int32)
    graph = codes, np.arange(21), edges
    ids, _, counts = compare(codes[15:16], graph, np.array([[3]], np.int32), 30)
    assert counts.tolist() == [10]
    assert sorted(ids[0].tolist()) == [-1] * 20 + list(range(10))
    assert compare(codes[15:16], graph, np.array([[3, 12]], np.int32), 30)[0][0, 0] == 15
    lonely = codes, np.zeros(21, np.int64), edges[:0]
    assert compare(codes[:1], lonely, np.array([[7, -1, 7]], np.int32), 2)[0].tolist() == [[7, -1]]


def test_a_repeated_start_is_one_start() -> None:
    graph = make_graph(5, 60, 2, 5)
    queries = graph[0][:2]
    once = compare(queries, graph, np.array([[9, 30], [9, 30]], np.int32), 6)
    same(compare(queries, graph, np.array([[9, -1, 30, 9, 30, -1]] * 2, np.int32), 6), once)


def test_equal_distances_go_by_node() -> None:
    """Two distances only: what is kept and looked at is decided by the node number nearly everywhere."""
    graph = make_graph(6, 200, 1, 8)
    graph[0][:] = (np.arange(200) % 2)[:, None]
    ids, dists, _ = compare(np.zeros((3, 1), np.uint64), graph, np.array([[0], [77], [199]], np.int32), 12)
    assert (np.diff(dists.astype(int)) == 0).sum() > 20
    assert (np.diff(ids)[np.diff(dists.astype(int)) == 0] > 0).all()


def test_queries_leave_nothing_behind_for_the_next() -> None:
    """More than 1024 nodes seen by one query: the memory of what was seen grows, and is cleaned all the same."""
    graph = make_graph(7, 2400, 1, 12, 0.3)
    queries = np.repeat(make_codes(8, 1, 1, 0.3), 2, axis=0)
    starts = np.tile(np.arange(0, 2400, 2, dtype=np.int32), (2, 1))
    ids, _, counts = compare(queries, graph, starts, 10)
    assert counts[0] == counts[1] > 1200
    assert np.array_equal(ids[0], ids[1])
    ids, _, counts = compare(queries, graph, starts[:, ::300], 250, np.ones(2400, np.uint8))
    assert counts[0] == counts[1] > 1024
    assert np.array_equal(ids[0], ids[1])


def test_nothing_to_walk() -> None:
    graph = make_graph(0, 9, 2, 3)
    empty = graph[0][:0], np.zeros(1, np.int64), graph[2][:0]
    for allowed in (None, np.ones(9, np.uint8)):
        for starts in (np.zeros((3, 0), np.int32), np.full((3, 2), -1, np.int32)):
            ids, dists, counts = compare(graph[0][:3], graph, starts, 4, allowed)
            assert (ids == -1).all()
            assert (dists == 65535).all()
            assert not counts.any()
            compare(graph[0][:0], graph, starts[:0], 4, allowed)
            compare(graph[0][:3], empty, starts, 4, None if allowed is None else allowed[:0])


def test_read_only_arguments_stay_as_they_are(tmp_path: Any) -> None:
    """A segment is mapped into memory: the kernels take such arrays."""
    arrays = []
    for index, array in enumerate(make_graph(9, 50, 2, 5)):
        np.save(tmp_path / f"{index}.npy", array)
        arrays.append(np.load(tmp_path / f"{index}.npy", mmap_mode="r"))
    graph = (arrays[0], arrays[1], arrays[2])
    compare(graph[0][:2], graph, np.array([[3], [4]], np.int32), 5)
    compare(graph[0][:2], graph, np.array([[3], [4]], np.int32), 5, np.ones(50, np.uint8))
    compare(make_codes(1, 2, 4)[:, ::2], graph, np.array([[3, 0], [4, 0]], np.int32)[:, ::2], 5)


def test_arguments_of_a_search() -> None:
    codes, indptr, edges = make_graph(2, 20, 1, 5)
    starts, allowed = np.zeros((20, 1), np.int32), np.ones(20, np.uint8)

    def search(queries: Any, codes: Any, indptr: Any, edges: Any, starts: Any, ef: int, allowed: Any) -> Any:
        return beam_cpu.beam_search(queries, codes, indptr, edges, starts, ef, allowed)

    good = (codes, codes, indptr, edges, starts, 3, allowed)
    search(*good)
    outside, falling = edges.copy(), indptr.copy()
    outside[-1], falling[3] = 20, falling[-1]
    for place, value, message in (
        (0, make_codes(0, 20, 2), "queries have 2 words"),
        (0, codes.astype(np.int64), "queries must be uint64"),
        (2, indptr[:-1], "indptr must rise from 0"),
        (2, indptr + 1, "indptr must rise from 0"),
        (2, falling, "indptr must rise from 0"),
        (3, edges[:-1], "indptr must rise from 0"),
        (3, outside, "edges must be from 0 to 19"),
        (3, -1 - edges, "edges must be from 0 to 19"),
        (4, starts + 20, "starts must be from 0 to 19"),
        (4, starts - 2, "starts must be from 0 to 19"),
        (4, starts[1:], "expected starts of 20 queries"),
        (5, 0, "ef must be at least 1, got 0"),
        (6, allowed[1:], "allowed must be bool or uint8 of shape"),
    ):
        with pytest.raises(ValueError, match=message):
            search(*good[:place], value, *good[place + 1 :])
