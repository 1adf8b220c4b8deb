"""The delta: any order of additions and removals, and snapshots that never change; merging of results."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph.delta import Delta, merge, scan
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
            snapshots.append((delta.without(np.array(ids, np.int64)), {i: c for i, c in model.items() if i not in ids}))
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
