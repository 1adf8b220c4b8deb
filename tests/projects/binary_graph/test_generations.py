"""The records of a log, put together."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from alimm.projects.binary_graph import BinaryGraph, updates
from alimm.projects.binary_graph.generations import replayed
from alimm.projects.binary_graph.parts import Part
from alimm.projects.binary_graph.wal_records import ADD, DELETE, WalRecord
from tests.projects.binary_graph.brute_force import exact_segment, random_codes


def test_deletions_in_a_row_copy_a_mask_once(tmp_path, monkeypatch):
    with BinaryGraph.build(random_codes(50), path=tmp_path / "a") as index:
        for id_ in range(0, 40, 2):
            index.delete([id_])
        index.add(random_codes(2, seed=1), [0, 100])
        for id_ in (0, 1, 100):
            index.delete([id_])
        expected = index.stats(), index.ids.tolist()
    calls, without = [], Part.without
    monkeypatch.setattr(Part, "without", lambda part, rows: calls.append(len(rows)) or without(part, rows))
    opened = BinaryGraph.open(tmp_path / "a")
    assert [count for count in calls if count] == [20, 1]
    assert (opened.stats(), opened.ids.tolist()) == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.lists(st.integers(0, 15), min_size=1, max_size=4, unique=True), max_size=12), st.data())
def test_joined_records_are_those_one_by_one(changes, data):
    segment = exact_segment(random_codes(10))
    view = one_by_one = BinaryGraph.build(np.empty((0, 2), np.uint64))._view
    view = one_by_one = updates.replace(view, parts=(Part.of(segment),), next_id=10)
    records = []
    for number, ids in enumerate(changes, 1):
        ids = np.array(ids, np.int64)
        new = ids[~one_by_one.is_live(ids)]
        kind = data.draw(st.sampled_from([ADD, DELETE])) if len(new) else DELETE
        codes = random_codes(len(new), seed=number) if kind == ADD else None
        records.append(WalRecord(kind, number, new if kind == ADD else ids, codes))
        one_by_one = replayed(one_by_one, records[-1:])
    together = replayed(view, records)
    for name in ("next_id", "applied", "logged"):
        assert getattr(together, name) == getattr(one_by_one, name)
    np.testing.assert_array_equal(together.live_ids(), one_by_one.live_ids())
    np.testing.assert_array_equal(together.delta.ids, one_by_one.delta.ids)
    np.testing.assert_array_equal(together.delta.codes, one_by_one.delta.codes)
    np.testing.assert_array_equal(np.sort(together.parts[0].dead_ids()), np.sort(one_by_one.parts[0].dead_ids()))
