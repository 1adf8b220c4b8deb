"""An index through any sequence of changes, against a dictionary and brute force; exact to the last id."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from alimm.projects.binary_graph import BinaryGraph
from tests.projects.binary_graph.brute_force import brute_force, use_stand_ins

IDS = st.integers(0, 40)
WORDS = st.integers(0, 15)
ROWS = st.dictionaries(IDS, WORDS, max_size=8)


def codes_of(rows: dict[int, int]) -> np.ndarray:
    return np.array(list(rows.values()), np.uint64).reshape(-1, 1)


class Machine(RuleBasedStateMachine):
    on_disk = False

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / "index" if self.on_disk else None
        self.model: dict[int, int] = {}
        self.reader: BinaryGraph | None = None

    @initialize(rows=ROWS)
    def build(self, rows):
        ids = np.array(list(rows), np.int64)
        self.index = BinaryGraph.build(codes_of(rows), ids, path=self.path, delta_limit=6, max_segments=2)
        self.model = dict(rows)
        self.largest = max(rows, default=-1)
        if self.on_disk:
            self.reader = BinaryGraph.open(self.path, read_only=True)

    @rule(rows=ROWS)
    def add(self, rows):
        if set(rows) & set(self.model):
            with pytest.raises(ValueError, match="already"):
                self.index.add(codes_of(rows), list(rows))
        else:
            self.index.add(codes_of(rows), np.array(list(rows), np.int64))
            self.model |= rows
            self.largest = max([self.largest, *rows])

    @rule(words=st.lists(WORDS, max_size=3))
    def add_numbered(self, words):
        ids = self.index.add(np.array(words, np.uint64).reshape(-1, 1))
        assert ids.tolist() == [self.largest + 1 + number for number in range(len(words))]
        self.model |= dict(zip(ids.tolist(), words, strict=True))
        self.largest += len(words)

    @rule(ids=st.sets(IDS, max_size=6))
    def delete(self, ids):
        missing = ids - set(self.model)
        if missing:
            with pytest.raises(ValueError, match="not in the index"):
                self.index.delete(list(ids))
        assert self.index.delete(list(ids), missing="ignore") == len(ids) - len(missing)
        for id_ in ids - missing:
            del self.model[id_]

    @rule()
    def flush(self):
        self.index.flush()
        assert self.index.stats()["delta"] == 0
        assert self.index.stats()["segments"] <= 2

    @rule()
    def compact(self):
        self.index.compact()
        assert self.index.stats()["deleted"] == 0
        assert self.index.stats()["segments"] == bool(self.model)

    @rule(rows=ROWS, dead=st.sets(IDS, max_size=4))
    def merge(self, rows, dead):
        other = BinaryGraph.build(codes_of(rows), np.array(list(rows), np.int64))
        other.delete(list(dead), missing="ignore")
        rows = {id_: word for id_, word in rows.items() if id_ not in dead}
        if set(rows) & set(self.model):
            with pytest.raises(ValueError, match="in common"):
                self.index.merge(other)
        else:
            self.index.merge(other)
            self.model |= rows
            self.largest = self.index.stats()["next_id"] - 1

    @precondition(lambda self: self.on_disk)
    @rule()
    def reopen(self):
        self.index.close()
        self.index = BinaryGraph.open(self.path, verify="full")

    @precondition(lambda self: self.on_disk)
    @rule()
    def save_and_move(self):
        copy = self.folder / "copy"
        self.index.save(copy)
        with BinaryGraph.open(copy, verify="full") as opened:
            self.check(opened)
        shutil.rmtree(copy)

    @rule(allowed=st.sets(IDS), k=st.integers(1, 12))
    def filtered(self, allowed, k):
        self.check(self.index, k, allowed)

    @invariant()
    def agrees(self):
        if hasattr(self, "index"):
            self.check(self.index)
            if self.reader is not None:
                self.reader.refresh()
                assert not self.reader.refresh()
                self.check(self.reader)

    def check(self, index, k=5, allowed=None):
        assert len(index) == len(self.model)
        assert index.ids.tolist() == sorted(self.model)
        rows = {id_: word for id_, word in self.model.items() if allowed is None or id_ in allowed}
        queries = np.array([[0], [5], [15]], np.uint64)
        given = None if allowed is None else np.array(sorted(allowed), np.int64)
        found = index.search(queries, k, ef=1, allowed=given)
        for own, true in zip(found, brute_force(queries, codes_of(rows), np.array(list(rows)), k), strict=True):
            np.testing.assert_array_equal(own, true)

    def teardown(self):
        for index in (getattr(self, "index", None), self.reader):
            if index is not None:
                index.close()
        shutil.rmtree(self.folder)


@pytest.mark.parametrize(("on_disk", "examples"), [(False, 60), (True, 20)])
def test_any_sequence_of_changes(on_disk, examples, monkeypatch):
    use_stand_ins(monkeypatch)
    if on_disk:
        monkeypatch.setattr("os.fsync", lambda descriptor: None)
    run_state_machine_as_test(
        type("Machine", (Machine,), {"on_disk": on_disk}),
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        ),
    )
