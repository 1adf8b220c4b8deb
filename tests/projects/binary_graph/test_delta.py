"""The delta: any order of additions and removals, and snapshots that never change; merging of results."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph import delta as delta_module
from alimm.projects.binary_graph.delta import Delta, merge, scan
from alimm.projects.binary_graph.filters import Filter
from alimm_ops.graph.hamming_cpu import hamming_matrix
from tests.projects.binary_graph.brute_force import brute_force, random_codes

STEPS = st.lists(
    st.tuples(st.sampled_from(["add", "branch", "remove"]), st.lists(st.integers(0, 99), max_size=9, unique=True)),
    max_size=25,
)


@settings(deadline=None, max_examples=150)
@given(STEPS)
def test_snapshots_are_dictionaries_that_never_change(steps):
    """Every delta is kept; a branch goes on from an older one, whose memory a newer one may have filled."""
    snapshots: list[tuple[Delta, dict[int, int]]] = [(Delta.empty(1), {})]
    for number, (kind, ids) in enumerate(steps):
        delta, model = snapshots[len(snapshots) // 2 if kind == "branch" else -1]
        if kind == "remove":
            snapshots.append(
                (delta.without(np.array(sorted(ids), np.int64)), {i: c for i, c in model.items() if i not in ids})
            )
            continue
        ids = [id_ for id_ in ids if id_ not in model]
        codes = np.array([[100 * number + id_] for id_ in ids], np.uint64).reshape(-1, 1)
        added = delta.with_added(codes, np.array(ids, np.int64))
        snapshots.append((added, model | dict(zip(ids, codes[:, 0].tolist(), strict=True))))
    everything = np.arange(100)
    for delta, model in snapshots:
        assert delta.ids.tolist() == sorted(model)
        assert delta.codes[:, 0].tolist() == [model[id_] for id_ in sorted(model)]
        np.testing.assert_array_equal(delta.find(everything), np.isin(everything, list(model)))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 12), max_size=5), st.integers(1, 12), st.integers(0, 2**16))
def test_merged_scans_of_pieces_are_the_scan_of_the_whole(sizes, k, seed):
    generator = np.random.default_rng(seed)
    total = sum(sizes)
    codes, ids = generator.integers(0, 8, (total, 1)).astype(np.uint64), generator.permutation(10 * total)[:total]
    queries = generator.integers(0, 8, (3, 1)).astype(np.uint64)
    pieces = []
    for piece in np.split(np.arange(total), np.cumsum(sizes)[:-1]) if sizes else []:
        piece = piece[np.argsort(ids[piece])]
        pieces.append(scan(queries, codes[piece], ids[piece], k))
    for own, true in zip(merge(pieces, 3, k), brute_force(queries, codes, ids, k), strict=True):
        np.testing.assert_array_equal(own, true)


def test_additions_in_order_share_memory():
    delta = Delta.empty(2).with_added(random_codes(3), np.arange(3))
    grown = delta.with_added(random_codes(2), np.arange(3, 5))
    assert np.shares_memory(grown.codes, delta.codes)
    assert not np.shares_memory(delta.with_added(random_codes(1), np.array([9])).codes, grown.codes[3:])


def test_padding_goes_last():
    short = np.array([[4, -1]], np.int32), np.array([[8, -1]])
    full = np.array([[4, 6]], np.int32), np.array([[3, 1]])
    distances, ids = merge([short, full], 1, 4)
    assert distances.tolist() == [[4, 4, 6, -1]]
    assert ids.tolist() == [[3, 8, 1, -1]]


@settings(deadline=None, max_examples=100)
@given(st.sets(st.integers(0, 30)), st.sets(st.integers(-3, 33)))
def test_the_rows_of_some_ids_and_the_others(held, named):
    held, named = np.array(sorted(held), np.int64), np.array(sorted(named), np.int64)
    delta = Delta.empty(1).with_added(held[:, None].astype(np.uint64) * np.uint64(7), held)
    for part, ids in (
        (delta.only(named), np.intersect1d(held, named)),
        (delta.without(named), np.setdiff1d(held, named)),
    ):
        np.testing.assert_array_equal(part.ids, ids)
        np.testing.assert_array_equal(part.codes[:, 0], ids * 7)
        assert (part is delta) == (len(ids) == len(held))


@pytest.mark.parametrize("rows", [0, 3])
def test_many_ids_are_not_sorted_for_each_search(rows, monkeypatch):
    allowed = Filter(np.arange(1000))
    delta = Delta.empty(2).with_added(random_codes(rows), np.arange(rows))
    for name in ("isin", "unique", "sort", "argsort", "concatenate"):
        monkeypatch.setattr(np, name, lambda *_, **__: pytest.fail("all ids are gone through"))
    assert allowed.within_delta(delta) is delta
    assert len(delta.without(allowed.ids)) == 0


@pytest.mark.parametrize("k", [50, 51, 52, 53, 60, 399, 400, 500])
def test_many_neighbours_are_sorted_and_few_selected(k, monkeypatch):
    """Either way the same, whatever the block."""
    codes, ids, queries = random_codes(400), np.arange(400) * 3, random_codes(5, seed=3)
    sorted_ones = []
    monkeypatch.setattr(
        delta_module, "hamming_matrix", lambda *given: sorted_ones.append(len(given[0])) or hamming_matrix(*given)
    )
    monkeypatch.setattr(delta_module, "_SORTED_BYTES", 2 * 10 * 400)
    monkeypatch.setattr(delta_module, "SORT_NS", 51**2 * delta_module.SELECT_NS / 400 * 1.0001)
    for own, true in zip(scan(queries, codes, ids, k), brute_force(queries, codes, ids, min(k, 400)), strict=True):
        np.testing.assert_array_equal(own, true, strict=True)
    assert sorted_ones == ([2, 2, 1] if k > 51 else [])
