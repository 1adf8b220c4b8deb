"""Both ways to store the graph over ranks: equal to a plain loop over the whole graph, at 1, 2 and 4 ranks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from alimm.distributed.shards import RowShards, Sharding
from alimm.projects.knn_softmax import adjacency
from alimm.projects.knn_softmax.adjacency import LocalEdges, OwnerLists, edge_bytes
from tests.gloo_pool import GlooPool

SIZES = [(7,), (5, 4), (0, 6), (600, 300), (2, 0, 3, 1), (0, 0, 1, 0), (1, 1, 0, 0), (90, 89, 89, 89)]


def random_lists(num_rows: int, length: int, seed: int = 0, kind: Any = np.int32) -> np.ndarray:
    """Distinct neighbours other than the row itself, -1 behind them; some lists end early, some are empty."""
    generator = np.random.default_rng(seed)
    lists = np.full((num_rows, length), -1, kind)
    for row in range(num_rows):
        others = np.delete(np.arange(num_rows), row)
        count = generator.integers(0, length + 1) if row % 3 == 0 else length
        chosen = generator.permutation(others)[:count]
        lists[row, : len(chosen)] = chosen
    return lists


def oracle(lists: np.ndarray, labels: Any, start: int, stop: int) -> list[list[tuple[int, int]]]:
    """For each label, (local id, rank) of its neighbours in [start, stop)."""
    return [
        [(int(t) - start, rank) for rank, t in enumerate(lists[label]) if t >= 0 and start <= t < stop]
        for label in labels
    ]


def as_pairs(edges: adjacency.Edges) -> list[list[tuple[int, int]]]:
    assert (edges.indptr.dtype, edges.local_ids.dtype, edges.ranks.dtype) == (np.int64, np.int32, np.uint16)
    pairs = [(int(i), int(rank)) for i, rank in zip(edges.local_ids, edges.ranks, strict=True)]
    assert edges.indptr[0] == 0
    assert edges.indptr[-1] == len(pairs)
    return [pairs[start:end] for start, end in zip(edges.indptr, edges.indptr[1:], strict=False)]


def compare(sizes: tuple[int, ...], length: int, chunk_ids: int, wide: bool) -> None:
    rank = dist.get_rank() if dist.is_initialized() else 0
    sharding = Sharding(RowShards(sizes), rank)
    lists = random_lists(sum(sizes), length, kind=np.int64 if wide else np.int32)
    own = torch.from_numpy(lists[sharding.start : sharding.stop])
    graphs = [LocalEdges(own, sharding, chunk_ids), OwnerLists(own, sharding)]
    generator = np.random.default_rng(1)
    everything = np.arange(sum(sizes))
    for labels in (everything, generator.permutation(everything)[:9], everything[:0], everything[-1:].repeat(2)):
        expected = oracle(lists, labels, sharding.start, sharding.stop)
        for graph in graphs:
            assert as_pairs(graph.neighbours(torch.from_numpy(labels))) == expected
            assert as_pairs(graph.neighbours(labels)) == expected
    for graph in graphs:
        again = graph.lists()
        assert again.dtype == own.dtype
        assert torch.equal(again, own)
    num_edges = int(((lists >= sharding.start) & (lists < sharding.stop)).sum())
    assert graphs[0].num_edges == num_edges
    assert graphs[0].nbytes == edge_bytes(sum(sizes), num_edges, length, len(sizes))
    assert graphs[1].nbytes == own.numel() * own.element_size()


@pytest.mark.parametrize("sizes", [sizes for sizes in SIZES if len(sizes) > 1])
def test_ranks_equal_a_plain_loop(sizes: tuple[int, ...], gloo: GlooPool) -> None:
    gloo.run(len(sizes), compare, sizes, 5, 35, False)  # seven lists an exchange: several, the last ones shorter


def test_ranks_in_one_exchange_with_wide_ids(gloo: GlooPool) -> None:
    gloo.run(2, compare, (5, 4), 3, 1 << 20, True)


def test_ranks_of_lists_beyond_a_byte(gloo: GlooPool) -> None:
    gloo.run(2, compare, (160, 150), 257, 1 << 20, False)


@pytest.mark.parametrize("num_rows", [1, 2, 255, 256, 257, 513])
def test_one_process_needs_no_group(num_rows: int) -> None:
    compare((num_rows,), 4, 100, False)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any), st.integers(1, 4), st.integers(0, 99))
def test_shards_divide_the_edges_among_them(sizes: list[int], length: int, seed: int) -> None:
    """What the kernels count and pack for each shard, over all shards, is the graph."""
    lists = random_lists(sum(sizes), length, seed)
    bounds = np.array(RowShards(tuple(sizes)).bounds)
    degree = adjacency.kernels.count_edges(lists, bounds)
    ids, ranks = np.empty(lists.size, np.int32), np.empty(lists.size, np.uint8)
    counts = adjacency.kernels.pack_edges(lists, bounds, ids, ranks)
    assert degree.sum(axis=1).tolist() == counts.tolist()
    rebuilt, first = np.full_like(lists, -1), 0
    for shard, count in enumerate(counts):
        pairs = [pair for row in oracle(lists, range(sum(sizes)), bounds[shard], bounds[shard + 1]) for pair in row]
        part = slice(first, first + count)
        assert list(zip(ids[part].tolist(), ranks[part].tolist(), strict=True)) == pairs
        adjacency.kernels.place_edges(rebuilt, degree[shard], ids[part], ranks[part], bounds[shard])
        first += count
    assert np.array_equal(rebuilt, lists)


def test_the_size_formula_spelled_out() -> None:
    assert edge_bytes(1000, 5000, 16, 1) == 2 * 1000 + 8 * 5 + 4 * 5000
    assert edge_bytes(1024, 5000, 256, 4) == 2 * 1024 + 8 * 5 + 5 * 5000
    assert edge_bytes(1025, 5000, 257, 4) == 2 * 1025 + 8 * 6 + 6 * 5000


def test_half_a_million_labels_take_seconds() -> None:
    """A loop in Python would take minutes; the bound is wide, for this is no measurement."""
    num_rows, length = 500_000, 16
    lists = np.random.default_rng(0).integers(0, num_rows, (num_rows, length)).astype(np.int32)
    begin = time.perf_counter()
    graph = LocalEdges(torch.from_numpy(lists), Sharding(RowShards((num_rows,))))
    assert time.perf_counter() - begin < 20
    labels = np.array([0, 255, 256, 499_999])
    assert np.array_equal(graph.neighbours(labels).local_ids.reshape(4, length), lists[labels])


def test_ids_above_2_to_the_31() -> None:
    """Two shards of which the second begins above int32: its edges are local ids, and come back whole."""
    start = 2**31 - 3
    bounds = np.array([0, start, start + 10])
    lists = np.array([[start + 9, 0, start], [start - 1, -1, -1]])
    assert adjacency.kernels.first_bad_list(lists, start + 10) == -1
    assert adjacency.kernels.count_edges(lists, bounds).tolist() == [[1, 1], [2, 0]]
    ids, ranks = np.empty(4, np.int32), np.empty(4, np.uint8)
    assert adjacency.kernels.pack_edges(lists, bounds, ids, ranks).tolist() == [2, 2]
    assert ids.tolist() == [0, start - 1, 9, 0]
    again = np.full_like(lists, -1)
    for shard, degree in enumerate(([1, 1], [2, 0])):
        part = slice(2 * shard, 2 * shard + 2)
        adjacency.kernels.place_edges(again, np.array(degree, np.uint16), ids[part], ranks[part], bounds[shard])
    assert np.array_equal(again, lists)


def malformed(kind: str) -> None:
    rank = dist.get_rank()
    sharding = Sharding(RowShards((3, 2)), rank)
    lists = torch.from_numpy(random_lists(5, 3)[sharding.start : sharding.stop])
    if rank == 1:
        if kind == "hole":
            lists[1] = torch.tensor([2, -1, 0])
        elif kind == "range":
            lists[0, 0] = 5
        elif kind == "length":
            lists = lists[:, :2]
        elif kind == "rows":
            lists = lists[:1]
        else:
            lists = lists.float()
    messages = dict(
        hole=r"got \[2, -1, 0\] for row 4",
        range=r"rows in \[0, 5\).*for row 3",
        length=r"same length K on every rank, got \[3, 2\]",
        rows="a list for each of the 2 own rows, got 1",
        float="must be int32 or int64",
    )
    for store in (LocalEdges, OwnerLists):
        with pytest.raises(ValueError, match=messages[kind]):
            store(lists, sharding)


@pytest.mark.parametrize("kind", ["hole", "range", "length", "rows", "float"])
def test_every_rank_refuses_what_one_gives(kind: str, gloo: GlooPool) -> None:
    gloo.run(2, malformed, kind)


@pytest.mark.parametrize("store", [LocalEdges, OwnerLists])
@pytest.mark.parametrize("labels", [np.array([0, 5]), np.array([-1]), np.array([0.0]), np.array([[0]])])
def test_label_rows_out_of_range(labels: np.ndarray, store: Any) -> None:
    graph = store(torch.from_numpy(random_lists(5, 2)), Sharding(RowShards((5,))))
    with pytest.raises(ValueError, match="label_rows must"):
        graph.neighbours(labels)
