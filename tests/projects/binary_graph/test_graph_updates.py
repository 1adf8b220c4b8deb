"""Adding, deleting, flushing, compacting and merging: what is found, what is on the disk, and what a failure leaves."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import BinaryGraph, BuildConfig, manifest, updates
from alimm.projects.binary_graph.delta import Delta
from alimm.projects.binary_graph.parts import Part
from alimm.projects.binary_graph.segment import ARRAYS
from alimm.projects.binary_graph.view import View
from alimm.search import recall_at_k
from tests.projects.binary_graph.brute_force import all_bytes, brute_force, exact_segment, random_codes


@pytest.fixture(params=["memory", "disk"])
def path(request, tmp_path) -> Path | None:
    return None if request.param == "memory" else tmp_path / "index"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def state(index: BinaryGraph) -> tuple:
    stats = index.stats()
    stats.pop("bytes")
    return stats, index.ids.tolist(), index.search(random_codes(4, seed=8), 9)[1].tolist()


def test_ids_are_numbered_on_and_never_come_back(path):
    index = BinaryGraph.build(random_codes(3), [4, 9, 2], path=path)
    assert index.add(random_codes(2)).tolist() == [10, 11]
    index.delete([11])
    index.flush()
    assert index.add(random_codes(1)).tolist() == [12]
    index.delete([12])
    index.compact()
    assert index.add(random_codes(1)).tolist() == [13]


def test_a_deleted_id_comes_back_with_another_code(path):
    codes = random_codes(30)
    index = BinaryGraph.build(codes, path=path)
    for number in range(3):
        index.delete([7])
        index.add(codes[[20 + number]], [7])
        found = index.search(codes[[20 + number]], 30)[1][0].tolist()
        assert found.count(7) == 1
        index.flush()
        assert index.search(codes[[20 + number]], 30)[1][0].tolist() == found
        if path is not None:
            index.close()
            index = BinaryGraph.open(path, verify="full")
            assert index.search(codes[[20 + number]], 30)[1][0].tolist() == found
    assert len(index) == 30
    assert index.stats()["deleted"] == 1  # of the first segment; the others went when they were built anew
    if path is not None:
        assert index._folder._manifest.deleted_in


@pytest.mark.parametrize(
    ("codes", "ids", "message"),
    [
        (random_codes(2), [1, 1], "more than once"),
        (random_codes(2), [100, 5], "in the index already, e.g. 5: delete"),
        (random_codes(2), [100, 21], "in the index already, e.g. 21"),
        (random_codes(2), [-1, 100], "from 0"),
        (random_codes(2), [100], "2 whole numbers"),
        (random_codes(2, 3), None, "192 bits, the index has 128"),
        (np.zeros((2, 2)), None, "float64"),
        (np.zeros(2, np.uint64), None, r"codes\[None\]"),
    ],
)
def test_a_refused_addition_changes_nothing(path, codes, ids, message):
    index = BinaryGraph.build(random_codes(20), path=path)
    index.add(random_codes(3))
    before = state(index), path and contents(path)
    with pytest.raises(ValueError, match=message):
        index.add(codes, ids)
    assert (state(index), path and contents(path)) == before


def test_a_refused_deletion_changes_nothing(path):
    index = BinaryGraph.build(random_codes(20), path=path)
    index.add(random_codes(3))
    before = state(index), path and contents(path)
    with pytest.raises(ValueError, match=r"1 ids are not in the index, e.g. 99: .*missing='ignore'"):
        index.delete([3, 21, 99])
    with pytest.raises(ValueError, match="missing must be"):
        index.delete([3], missing="maybe")
    assert (state(index), path and contents(path)) == before
    assert index.delete([3, 21, 99, 3], missing="ignore") == 2
    assert index.delete([3], missing="ignore") == 0
    with pytest.raises(ValueError, match=r"e\.g\. 3"):
        index.delete([3])


def test_one_of_several_copies_is_deleted_alone(path):
    codes = np.repeat(random_codes(4), 5, axis=0)
    index = BinaryGraph.build(codes, path=path)
    index.delete([6])
    assert index.search(codes[[6]], 4)[1].tolist() == [[5, 7, 8, 9]]
    index.compact()
    assert index.search(codes[[6]], 4)[1].tolist() == [[5, 7, 8, 9]]


def test_delete_everything_and_begin_again(path):
    index = BinaryGraph.build(random_codes(10), path=path)
    index.add(random_codes(3))
    index.delete(index.ids)
    assert len(index) == 0
    assert (index.search(random_codes(2), 3)[1] == -1).all()
    index.flush()
    assert index.stats()["segments"] == 0
    index.add(random_codes(2), [0, 3])
    index.compact()
    assert index.search(random_codes(1), 3)[1].tolist() in ([[0, 3, -1]], [[3, 0, -1]])


def test_k_live_rows_come_though_most_are_deleted():
    codes = random_codes(800)
    index = BinaryGraph.build(codes, config=BuildConfig(exact_below=10, cluster_size=100, max_cluster=400))
    assert index.stats()["edges"] > 0
    index.delete(np.arange(790))
    live = np.arange(790, 800)
    expected = brute_force(codes[:20], codes[live], live, 12)
    distances, ids = index.search(codes[:20], 12, ef=12)
    np.testing.assert_array_equal(distances, expected[0])
    np.testing.assert_array_equal(ids, expected[1])


def test_the_delta_becomes_a_segment_when_it_is_full(path):
    index = BinaryGraph.build(random_codes(50), path=path, delta_limit=10)
    index.add(random_codes(10))
    assert (index.stats()["segments"], index.stats()["delta"]) == (1, 10)
    index.add(random_codes(1))
    assert (index.stats()["segments"], index.stats()["delta"], len(index)) == (2, 0, 61)
    index.add(random_codes(500))
    assert index.stats()["segment_rows"] == [50, 11, 500]


def test_segments_stay_few_and_rows_are_seldom_built_anew():
    built = []

    def build(codes, ids):
        built.append(len(ids))
        return exact_segment(codes, ids)

    view = View(2, (), Delta.empty(2))
    codes = random_codes(1200)
    for start in range(0, 1200, 4):
        view = updates.added(view, codes[start : start + 4], np.arange(start, start + 4))
        view = updates.flushed(view, build, 4)
        assert len(view.parts) <= 4
    assert len(view) == 1200
    assert sum(built) < 1200 * 12  # 300 flushes; all anew each time would be 180,600


def test_segments_with_many_deleted_rows_are_built_anew():
    def part(first: int, count: int) -> Part:
        return Part.of(exact_segment(random_codes(count), np.arange(first, first + count)))

    view = View(2, (part(0, 100), part(100, 100)), Delta.empty(2))
    assert updates.flushed(view, exact_segment, 8) is view
    view, _ = updates.deleted(view, np.concatenate([np.arange(20), np.arange(100, 121)]), False)
    after = updates.flushed(view, exact_segment, 8)
    assert [found.segment.num_rows for found in after.parts] == [100, 79]
    assert after.parts[0] is view.parts[0]


def test_compact_is_a_fresh_build_in_order_of_the_ids(path):
    codes = random_codes(260)
    ids = np.random.default_rng(0).permutation(260)
    config = BuildConfig(exact_below=50, cluster_size=60, max_cluster=240)
    index = BinaryGraph.build(codes[:200], ids[:200], path=path, config=config)
    index.add(codes[200:230], ids[200:230])
    index.flush()
    index.add(codes[230:], ids[230:])
    index.delete(ids[::3])
    index.compact()
    live = np.setdiff1d(ids, ids[::3])
    fresh = BinaryGraph.build(codes[np.argsort(ids)][live], live, config=config)
    one, other = index._view.parts[0].segment, fresh._view.parts[0].segment
    for name in ARRAYS:
        assert getattr(one, name).tobytes() == getattr(other, name).tobytes(), name
    assert (index.stats()["segments"], index.stats()["deleted"]) == (1, 0)


def test_after_compact_nothing_deleted_is_on_the_disk(tmp_path):
    codes = random_codes(60, 4)
    ids = np.random.default_rng(3).integers(2**40, 2**60, 60)
    secret = np.array([0x5EC2E7DA7A5EC2E7 + number for number in range(4)], np.uint64)[None]
    index = BinaryGraph.build(codes, ids, path=tmp_path / "a")
    index.add(secret, [0x1122334455667788])
    index.flush()
    index.add(secret, [0x1122334455667799])
    index.delete([0x1122334455667788, 0x1122334455667799, ids[0]])
    patterns = [secret.tobytes(), np.int64(0x1122334455667788).tobytes(), ids[:1].tobytes(), codes[0].tobytes()]
    assert all(pattern in all_bytes(tmp_path) for pattern in patterns)
    index.compact()
    assert not any(pattern in all_bytes(tmp_path) for pattern in patterns)
    assert ids[1:2].tobytes() in all_bytes(tmp_path)


def test_merge_takes_live_rows_and_copies_segments(path, tmp_path):
    codes = random_codes(120)
    index = BinaryGraph.build(codes[:50], path=path)
    index.add(codes[50:55])
    index.delete([3, 52])
    other = BinaryGraph.build(codes[60:110], np.arange(60, 110), path=tmp_path / "other")
    other.add(codes[110:], np.arange(110, 120))
    other.delete([70, 111])
    other.add(codes[[3]], [3])  # dead here, live there
    other.delete([60])
    index.add(codes[[60]], [60])  # dead there, live here
    before = state(other)
    index.merge(other)
    assert state(other) == before
    other.close()
    live = np.array([number for number in [*range(55), *range(60, 120)] if number not in (52, 70, 111)])
    for _ in range(2):
        np.testing.assert_array_equal(index.ids, live)
        np.testing.assert_array_equal(
            index.search(codes[::7], 20)[0], brute_force(codes[::7], codes[live], live, 20)[0]
        )
        if path is not None:
            index.close()
            index = BinaryGraph.open(path, verify="full")
    assert index.stats()["segments"] == 3


def test_merge_refuses_common_ids_other_widths_and_itself(path):
    index = BinaryGraph.build(random_codes(10), path=path)
    before = state(index)
    for other, message in (
        (BinaryGraph.build(random_codes(10), np.arange(9, 19)), "in common, e.g. 9"),
        (BinaryGraph.build(random_codes(3, 4), np.arange(20, 23)), "256 bits, this one of 128"),
        (index, "itself"),
    ):
        with pytest.raises(ValueError, match=message):
            index.merge(other)
    assert state(index) == before


def test_recall_of_merged_and_of_churned_indexes_is_that_of_a_fresh_build():
    codes = random_codes(4000, 4, spread=16)
    queries = random_codes(4000, 4, spread=16)[::40]
    config = BuildConfig(exact_below=100, cluster_size=300, max_cluster=1200)
    ids = np.arange(4000)
    fresh = BinaryGraph.build(codes, config=config)
    merged = BinaryGraph.build(codes[:2000], ids[:2000], config=config)
    merged.merge(BinaryGraph.build(codes[2000:], ids[2000:], config=config))
    churned = BinaryGraph.build(codes, config=config, delta_limit=400)
    churned.delete(ids[::3])
    for start in range(0, 4000, 900):
        back = ids[::3][start // 3 : (start + 900) // 3]
        churned.add(codes[back], back)
    distances, true = brute_force(queries, codes, ids, 30)
    recalls = [recall_at_k(index.search(queries, 10)[1], true, -distances) for index in (fresh, merged, churned)]
    assert recalls[0] > 0.95
    assert recalls[1] >= recalls[0] - 0.005
    assert recalls[2] >= recalls[0] - 0.01


@pytest.mark.parametrize("operation", ["add", "delete", "big add", "flush", "compact", "merge", "save"])
def test_a_full_disk_leaves_the_index_as_it_was(operation, tmp_path, monkeypatch):
    path = tmp_path / "a"
    index = BinaryGraph.build(random_codes(40), path=path, delta_limit=20)
    index.add(random_codes(5))
    index.delete([3])
    other = BinaryGraph.build(random_codes(5), np.arange(500, 505))
    before, files = state(index), contents(path)
    calls = {
        "add": lambda: index.add(random_codes(2)),
        "delete": lambda: index.delete([1]),
        "big add": lambda: index.add(random_codes(30)),
        "flush": index.flush,
        "compact": index.compact,
        "merge": lambda: index.merge(other),
        "save": lambda: index.save(tmp_path / "copy"),
    }
    real, reached = os.fsync, 0
    for allowed in [*range(0, 40, 3), *range(40, 60)]:
        left = allowed

        def fsync(descriptor):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fsync)
            try:
                calls[operation]()
            except OSError:
                reached += 1
            else:
                break
        named = manifest.load(path).generation
        if named == before[0]["generation"]:  # else the name was not on the disk for sure, but it is there
            assert contents(path) == files, allowed
            assert state(index) == before, allowed
            with BinaryGraph.open(path, verify="full", read_only=True) as opened:
                assert state(opened) == before
        assert not (tmp_path / "copy").exists() or operation == "save"
        if operation == "save":
            assert reached
        elif named != before[0]["generation"]:
            index.refresh()
            break
    assert reached >= 1
    with BinaryGraph.open(path, verify="full", read_only=True) as opened:
        assert opened.ids.tolist() == index.ids.tolist()


def test_a_long_log_is_published(tmp_path, monkeypatch):
    monkeypatch.setattr("alimm.projects.binary_graph.graph.LOG_ROWS", 30)
    index = BinaryGraph.build(random_codes(10), path=tmp_path / "a", delta_limit=5)
    for _ in range(40):
        index.delete(index.add(random_codes(1)))
    assert index._view.logged <= 30
    assert index.stats()["generation"] > 1
    assert len(index) == 10
    assert len(BinaryGraph.open(tmp_path / "a")) == 10
