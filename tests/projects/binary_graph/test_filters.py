"""Searches restricted to some ids, on both paths, and the choice between them."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph import BinaryGraph, BuildConfig, filters, view
from alimm.projects.binary_graph.filters import Choice, Filter, choose
from alimm.search import recall_at_k
from tests.projects.binary_graph.brute_force import brute_force, random_codes

COUNT = 3000
CODES = random_codes(COUNT, 2, spread=10)
QUERIES = random_codes(COUNT, 2, spread=10)[::100]


@pytest.fixture(scope="module")
def index() -> BinaryGraph:
    index = BinaryGraph.build(CODES[:2800], config=BuildConfig(exact_below=50, cluster_size=200, max_cluster=800))
    index.add(CODES[2800:])
    index.delete(np.arange(0, COUNT, 50))
    assert index.stats()["edges"] > 0
    assert index.stats()["delta"] == 196
    return index


def recall(found: np.ndarray, allowed: np.ndarray) -> float:
    live = np.setdiff1d(allowed, np.arange(0, COUNT, 50))
    live = live[(live >= 0) & (live < COUNT)]
    distances, ids = brute_force(QUERIES, CODES[live], live, 40)
    scores = np.where(ids < 0, -np.inf, -distances.astype(float))
    return recall_at_k(found, ids, scores, 10)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("path", [None, "graph", "exact"])
def test_recall_at_any_selectivity(index, share, path, monkeypatch):
    if path is not None:

        def forced(part, allowed, k, ef):
            nodes = part.segment.num_nodes
            return Choice("exact", 0) if path == "exact" else Choice("graph", min(-(-ef * nodes // allowed), nodes))

        monkeypatch.setattr("alimm.projects.binary_graph.view.choose", forced)
    allowed = np.random.default_rng(0).permutation(COUNT)[: int(COUNT * share)]
    _, ids, report = index.search_filtered(QUERIES, 10, allowed=allowed)
    assert set(ids[ids >= 0].tolist()) <= set(allowed.tolist()) - set(range(0, COUNT, 50))
    assert recall(ids, allowed) >= (1.0 if path == "exact" else 0.95)
    assert report.allowed == len(np.setdiff1d(allowed, np.arange(0, COUNT, 50)))
    assert ((ids >= 0).sum(axis=1) == min(10, report.allowed)).all()
    if path == "exact":
        assert report.path == "exact"


def test_allowed_rows_far_from_the_query_are_found_all_the_same(index, monkeypatch):
    """The rows farthest from the query: a narrow walk meets none of them."""
    monkeypatch.setattr("alimm.projects.binary_graph.view.choose", lambda part, allowed, k, ef: Choice("graph", ef))
    query = QUERIES[:1]
    order = brute_force(query, CODES, np.arange(COUNT), COUNT)[1][0]
    allowed = np.sort(order[-30:])
    distances, _, report = index.search_filtered(query, 5, ef=5, allowed=allowed)
    assert report.rescanned == 1
    live = allowed[allowed % 50 != 0]
    np.testing.assert_array_equal(distances, brute_force(query, CODES[live], live, 5)[0])


def test_the_cheaper_path_is_chosen(index):
    assert index.search_filtered(QUERIES, 10, allowed=np.arange(1, 20)).report.path == "exact"
    part = index._view.parts[0]
    rows, nodes = part.segment.num_rows, part.segment.num_nodes
    assert choose(part, rows, 1, 5) == Choice("graph", 5)
    assert choose(part, rows // 2, 1, 5) == Choice("exact", 0)
    assert choose(part, rows - 1, 1, 1) == Choice("graph", 2)
    # Also where every row is allowed: a wide beam is a slow way to look at all of them.
    for k, ef in ((1, 10**4), (nodes, 1), (10, 10**30)):
        assert choose(part, rows, k, ef) == Choice("exact", 0)


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 10**8), st.floats(1e-6, 1), st.integers(1, 16), st.integers(1, 10**5), st.integers(1, 10**5))
def test_nothing_is_scanned_whose_walk_is_cheaper(count, share, words, k, ef):
    segment = SimpleNamespace(codes=np.empty((0, words)), num_rows=count, num_nodes=count)
    allowed = max(1, int(count * share))
    k = min(k, allowed)
    found = choose(SimpleNamespace(segment=segment, is_exact=False), allowed, k, max(ef, k))
    beam = max(k, min(-(-max(ef, k) * count // allowed), count))
    walk = beam * (300 + 0.5 * beam)
    scan = 1000 + 0.15 * words * allowed + min(0.15 * k * k, 4 * allowed)
    if allowed * 8 * (words + 1) > 64 << 20:
        scan += 10 * allowed
    assert found == (Choice("exact", 0) if scan < walk else Choice("graph", beam))


def test_a_small_graph_is_walked_and_a_wide_beam_is_not():
    """The figures that the costs stand for: 40,000 codes of 256 bits."""
    segment = SimpleNamespace(codes=np.empty((0, 4)), num_rows=40_000, num_nodes=40_000)
    part = SimpleNamespace(segment=segment, is_exact=False)
    paths = [choose(part, 40_000, 10, ef).path for ef in (10, 64, 256, 1000, 40_000)]
    assert paths == ["graph", "graph", "exact", "exact", "exact"]


@pytest.mark.parametrize("allowed", [None, Filter(np.arange(COUNT))])
def test_live_nodes_are_found_once(index, allowed, monkeypatch):
    calls, given = [], []
    walk, reduce = view.search_segment, filters.nodes_of
    monkeypatch.setattr("alimm.projects.binary_graph.view.choose", lambda part, allowed, k, ef: Choice("graph", ef))
    monkeypatch.setattr(filters, "nodes_of", lambda *arrays: calls.append(1) or reduce(*arrays))
    monkeypatch.setattr(view, "search_segment", lambda *given_: given.append(given_[5]) or walk(*given_))
    index._view = replace(index._view, parts=tuple(replace(part) for part in index._view.parts))  # nothing remembered
    for threads in (1, 2):
        _, ids, report = index.search_filtered(QUERIES, 10, allowed=allowed, threads=threads)
        assert report.path == "mixed"  # the delta is scanned
        assert recall(ids, np.arange(COUNT)) >= 0.95
    assert calls == [1]
    part = index._view.parts[0]
    np.testing.assert_array_equal(given[0], np.logical_or.reduceat(part.live, part.segment.row_indptr[:-1]))
    assert all(nodes is given[0] for nodes in given)


def test_an_empty_filter_finds_nothing(index):
    found = index.search_filtered(QUERIES, 3, allowed=[])
    assert found.report.path == "empty"
    assert (found.ids == -1).all()
    assert (found.distances == -1).all()


def test_ids_that_are_unknown_or_deleted_are_ignored(index):
    allowed = np.array([10**12, -5, 0, 50, 7, 2999], np.int64)
    _, ids = index.search(QUERIES, 4, allowed=allowed)
    assert (np.sort(ids, axis=1) == [-1, -1, 7, 2999]).all()
    _, ids = index.search(QUERIES, 1, allowed=np.array([2**64 - 1, 7], np.uint64))
    assert (ids == 7).all()


def test_a_filter_is_used_again_and_sees_changes():
    index, allowed = BinaryGraph.build(random_codes(100)), Filter([1, 2, 3, 200])
    assert set(index.search(QUERIES, 4, allowed=allowed)[1][0].tolist()) == {1, 2, 3, -1}
    index.delete([2])
    index.add(random_codes(1), [200])
    assert set(index.search(QUERIES, 4, allowed=allowed)[1][0].tolist()) == {1, 3, 200, -1}
    index.compact()
    assert set(index.search(QUERIES, 4, allowed=allowed)[1][0].tolist()) == {1, 3, 200, -1}


def test_a_filter_keeps_no_old_segment():
    index, allowed = BinaryGraph.build(random_codes(100)), Filter([1, 2])
    index.search(QUERIES, 4, allowed=allowed)
    index.search(QUERIES, 4)
    old = weakref.ref(index._view.parts[0].segment)
    index.delete([5])
    index.search(QUERIES, 4)
    index.compact()
    gc.collect()
    assert old() is None


@pytest.mark.parametrize(("allowed", "message"), [([[1]], "shape"), ([0.5], "float64"), ([True], r"index.ids\[mask\]")])
def test_wrong_filters_are_named(index, allowed, message):
    with pytest.raises(ValueError, match=message):
        index.search(QUERIES, allowed=allowed)
