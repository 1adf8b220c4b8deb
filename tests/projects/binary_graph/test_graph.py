"""BinaryGraph: build, search, save and open, against brute force."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from alimm.projects.binary_graph import BinaryGraph, BuildConfig
from alimm.projects.binary_graph.array_files import DamagedIndexError
from alimm.projects.binary_graph.filters import Choice
from alimm.projects.binary_graph.sources import source_from
from tests.projects.binary_graph.brute_force import brute_force, distances_between, random_codes

ROOT = Path(__file__).parents[3]
SMALL_GRAPH = BuildConfig(exact_below=50, cluster_size=100, max_cluster=400)


def check_exact(found, queries, codes, ids, k) -> None:
    """The distances of brute force, with ids that have them: which of equally far rows come last is left open."""
    distances, found_ids = found
    assert distances.dtype == np.int32
    assert found_ids.dtype == np.int64
    assert distances.shape == found_ids.shape == (len(queries), k)
    true, _ = brute_force(queries, codes, ids, k)
    np.testing.assert_array_equal(distances, true)
    place = {int(id_): row for row, id_ in enumerate(ids)}
    for query, row, own in zip(queries, found_ids, distances, strict=True):
        real = row[row >= 0]
        assert len(set(real.tolist())) == len(real) == (own >= 0).sum()
        if len(real):
            at = [place[int(id_)] for id_ in real]
            np.testing.assert_array_equal(distances_between(query[None], codes[at])[0], own[: len(real)])
            pairs = list(zip(own.tolist(), real.tolist(), strict=False))
            assert pairs == sorted(pairs)


@pytest.mark.parametrize("words", [1, 4, 5])
@pytest.mark.parametrize("k", [1, 7, 300])
def test_search_is_brute_force_in_a_small_index(words, k):
    codes = random_codes(250, words)
    ids = np.random.default_rng(1).permutation(1000)[:250] * 7
    index = BinaryGraph.build(codes, ids)
    queries = random_codes(20, words, seed=5)
    check_exact(index.search(queries, k), queries, codes, ids, k)
    assert len(index) == 250
    assert index.bits == 64 * words
    np.testing.assert_array_equal(index.ids, np.sort(ids))


def test_a_graph_finds_nearly_all_and_with_a_beam_of_all_nodes_everything(monkeypatch):
    # So few nodes are scanned sooner than walked through.
    monkeypatch.setattr("alimm.projects.binary_graph.view.choose", lambda part, allowed, k, ef: Choice("graph", ef))
    codes = random_codes(1500, 4)
    index = BinaryGraph.build(codes, config=SMALL_GRAPH)
    assert index.stats()["edges"] > 0
    queries = random_codes(30, 4, seed=0)[:30]
    true, _ = brute_force(queries, codes, np.arange(1500), 10)
    assert (index.search(queries, 10, ef=64)[0] == true).mean() > 0.95
    check_exact(index.search(queries, 10, ef=1500), queries, codes, np.arange(1500), 10)


def test_threads_change_nothing():
    index = BinaryGraph.build(random_codes(400))
    queries = random_codes(37, seed=3)
    for one, many in zip(index.search(queries, 5), index.search(queries, 5, threads=4), strict=True):
        np.testing.assert_array_equal(one, many)


def test_duplicates_are_all_found():
    codes = np.repeat(random_codes(5), 20, axis=0)
    index = BinaryGraph.build(codes)
    assert index.stats()["nodes"] == 5
    distances, ids = index.search(codes[:1], 20)
    assert (distances == 0).all()
    np.testing.assert_array_equal(ids[0], np.arange(20))


@pytest.mark.parametrize("path", [None, "folder"])
def test_an_empty_index_works_and_grows(path, tmp_path):
    path = None if path is None else tmp_path / path
    index = BinaryGraph.build(np.empty((0, 3), np.uint64), path=path)
    assert (len(index), index.bits, len(index.ids)) == (0, 192, 0)
    distances, ids = index.search(random_codes(2, 3), 4)
    assert (distances == -1).all()
    assert (ids == -1).all()
    assert index.delete([], missing="error") == 0
    index.flush()
    index.compact()
    np.testing.assert_array_equal(index.add(random_codes(3, 3)), [0, 1, 2])
    assert len(index) == 3


def test_no_queries_and_one_row():
    index = BinaryGraph.build(random_codes(1), [9])
    assert index.search(np.empty((0, 2), np.uint64), 3)[1].shape == (0, 3)
    np.testing.assert_array_equal(index.search(random_codes(1), 3)[1], [[9, -1, -1]])


def test_ids_reach_to_the_largest_int64(tmp_path):
    ids = [2**63 - 1, 0, 2**63 - 2]
    index = BinaryGraph.build(random_codes(3), ids, path=tmp_path / "a")
    assert set(index.search(random_codes(1), 3)[1][0].tolist()) == set(ids)
    with pytest.raises(ValueError, match="give ids of your own"):
        index.add(random_codes(1))
    index.add(random_codes(1), [5])
    assert index.delete([2**63 - 1]) == 1
    index.close()
    assert BinaryGraph.open(tmp_path / "a").ids.tolist() == [0, 5, 2**63 - 2]


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        (np.zeros(2, np.uint64), r"queries\[None\]"),
        (np.zeros((1, 3), np.uint64), "192 bits, the index has 128"),
        (np.zeros((1, 2), np.int64), r"int64; .*queries\.view\(np\.uint64\)"),
        (np.zeros((1, 2)), "float64"),
        (np.zeros((1, 15), np.uint8), "multiple of 8"),
    ],
)
def test_wrong_queries_are_named(queries, message):
    with pytest.raises(ValueError, match=message):
        BinaryGraph.build(random_codes(5)).search(queries)


@pytest.mark.parametrize("options", [{"k": 0}, {"ef": 0}, {"threads": 0}, {"k": 2.0}, {"k": True}, {"ef": -1}])
def test_numbers_below_one_are_refused(options):
    with pytest.raises(ValueError, match=rf"{next(iter(options))} must be a whole number of at least 1"):
        BinaryGraph.build(random_codes(5)).search(random_codes(1), **options)


def test_other_layouts_of_queries_give_the_same():
    index = BinaryGraph.build(random_codes(50))
    queries = random_codes(4, seed=2)
    expected = index.search(queries, 5)[1]
    wide = np.zeros((8, 4), np.uint64)
    wide[::2, ::2] = queries
    for same in (queries.astype(">u8"), np.asfortranarray(queries), wide[::2, ::2], queries.view(np.uint8)):
        np.testing.assert_array_equal(index.search(same, 5)[1], expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 1, 2], "more than once, e.g. 1"),
        ([1, 2], "3 whole numbers"),
        ([-1, 0, 1], "from 0"),
        ([0.5, 1, 2], "float64"),
    ],
)
def test_wrong_ids_are_named_and_nothing_is_written(ids, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        BinaryGraph.build(random_codes(3), ids, path=tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_source_is_built_like_its_array(tmp_path):
    codes = random_codes(300)
    np.save(tmp_path / "codes.npy", codes)
    index = BinaryGraph.build(source_from(tmp_path / "codes.npy"), path=tmp_path / "index", progress=True)
    queries = random_codes(5, seed=1)
    np.testing.assert_array_equal(index.search(queries, 5)[1], BinaryGraph.build(codes).search(queries, 5)[1])


@pytest.mark.parametrize("verify", ["header", "full"])
def test_open_gives_the_saved_index(verify, tmp_path):
    codes, path = random_codes(300), tmp_path / "index \u00e9\u4e2d"
    with BinaryGraph.build(codes, path=path, config=SMALL_GRAPH, delta_limit=11, max_segments=3) as index:
        index.add(random_codes(10, seed=9))
        index.delete([5, 305])
        expected = index.search(codes[:9], 6)
    with BinaryGraph.open(path, verify=verify, read_only=True) as opened:
        assert opened.config == SMALL_GRAPH
        assert opened._settings == index._settings
        assert (len(opened), opened.stats()["deleted"], opened.stats()["delta"]) == (308, 1, 9)
        for one, other in zip(opened.search(codes[:9], 6), expected, strict=True):
            np.testing.assert_array_equal(one, other)
        with pytest.raises(ValueError, match="read-only"):
            opened.add(codes[:1])


def test_save_copies_everything_and_changes_nothing(tmp_path):
    index = BinaryGraph.build(random_codes(200))
    index.add(random_codes(5, seed=1))
    index.delete([3, 201])
    index.save(tmp_path / "deep" / "copy")
    copy = BinaryGraph.open(tmp_path / "deep" / "copy", verify="full")
    np.testing.assert_array_equal(copy.ids, index.ids)
    assert copy.add(random_codes(1)).tolist() == [205]
    copy.save(tmp_path / "second")
    index.save(tmp_path / "second")  # an index is replaced, by a newer generation
    second = BinaryGraph.open(tmp_path / "second", verify="full")
    np.testing.assert_array_equal(second.ids, index.ids)
    assert second.stats()["generation"] == 2
    assert not list(tmp_path.glob(".*part*"))


def test_save_to_the_own_folder_publishes(tmp_path):
    index = BinaryGraph.build(random_codes(20), path=tmp_path / "a")
    index.add(random_codes(2))
    index.save(tmp_path / "x" / ".." / "a")
    assert (index.stats()["generation"], index.stats()["delta"], len(index)) == (2, 0, 22)


@pytest.mark.parametrize("call", ["build", "save"])
def test_foreign_folders_are_left_alone(call, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    (tmp_path / "file").write_bytes(b"x")
    for name in ("photos", "file"):
        index = BinaryGraph.build(random_codes(5))
        calls = {"build": partial(BinaryGraph.build, random_codes(5), path=tmp_path / name), "save": index.save}
        with pytest.raises(ValueError, match="is no index"):
            calls[call](**({} if call == "build" else {"path": tmp_path / name}))
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["cat.jpg", "file", "photos"]


def test_missing_and_damaged_indexes_are_named(tmp_path):
    with pytest.raises(ValueError, match="no index"):
        BinaryGraph.open(tmp_path / "none")
    BinaryGraph.build(random_codes(30), path=tmp_path / "a").close()
    file = next((tmp_path / "a").rglob("ids.npy"))
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(DamagedIndexError, match=re.escape("ids.npy")):
        BinaryGraph.open(tmp_path / "a")


def test_a_closed_index_says_so(tmp_path):
    index = BinaryGraph.build(random_codes(5), path=tmp_path / "a")
    index.close()
    index.close()
    for call in (lambda: index.search(random_codes(1)), lambda: len(index), lambda: index.add(random_codes(1))):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_a_folder_that_cannot_be_written_to_is_searched(tmp_path):
    path = tmp_path / "a"
    BinaryGraph.build(random_codes(30), path=path).close()
    folders = [path, *(folder for folder in path.rglob("*") if folder.is_dir())]
    for folder in folders:
        folder.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        index = BinaryGraph.open(path)
        assert index.search(random_codes(1), 2)[1].shape == (1, 2)
        if os.geteuid():  # root writes anywhere
            with pytest.raises(ValueError, match="read_only=True"):
                index.add(random_codes(1))
    finally:
        for folder in folders:
            folder.chmod(stat.S_IRWXU)


def test_a_first_search_needs_no_framework(tmp_path):
    BinaryGraph.build(random_codes(30), path=tmp_path / "a").close()
    code = (
        "import sys, numpy; from alimm.projects.binary_graph import BinaryGraph\n"
        f"index = BinaryGraph.open({str(tmp_path / 'a')!r})\n"
        "index.search(numpy.zeros((1, 2), numpy.uint64), 3)\n"
        "print(sorted({'torch', 'mmengine', 'ray', 'rich', 'pyarrow'} & set(sys.modules)))"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "ops")])
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert ran.stdout.strip() == "[]"
