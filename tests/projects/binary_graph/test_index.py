"""BinaryGraphIndex: the contract of an index, against ExactIndex; its folder."""

from __future__ import annotations

import json
import shutil
import threading
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from alimm.projects.binary_graph import index_files
from alimm.projects.binary_graph.array_files import write_array
from alimm.projects.binary_graph.hashers import make_hasher
from alimm.projects.binary_graph.index import BinaryGraphIndex
from alimm.registry import INDEXES
from alimm.search import ExactIndex, Index, recall_at_k

pytestmark = pytest.mark.filterwarnings("ignore:the hash is learned from:UserWarning")
METRICS = ("cosine", "ip", "l2")
# Small whole numbers: many exact ties, and every sum is exact in any order.
grid = st.integers(-2, 2).map(float)


def vectors(count=2000, dim=32, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((40, dim))
    return (centres[rng.integers(40, size=count)] + 0.4 * rng.standard_normal((count, dim))).astype(np.float32)


def same(first, second) -> None:
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def built(count=400, **options) -> BinaryGraphIndex:
    index = BinaryGraphIndex(**{"bits": 64, **options})
    index.add(vectors(count), np.random.default_rng(1).permutation(count) * 3)
    return index


def test_it_is_an_index_of_the_registry():
    index = INDEXES.build(dict(type="alimm.BinaryGraphIndex", dim=8, hasher="srp", bits=64))
    assert isinstance(index, BinaryGraphIndex)
    assert isinstance(index, Index)
    assert len(index) == 0


@settings(max_examples=25)
@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 60), st.just(3)), elements=grid),
    npst.arrays(np.float64, st.tuples(st.integers(0, 9), st.just(3)), elements=grid),
    st.integers(1, 70),
    st.sampled_from(METRICS),
    st.randoms(use_true_random=False),
)
def test_with_all_as_candidates_it_equals_the_exact_index(data, queries, k, metric, random):
    ids = np.array(random.sample(range(1000), len(data)))
    index = BinaryGraphIndex(metric=metric, hasher="srp", bits=64, candidates=60)
    exact = ExactIndex(metric=metric)
    cut = random.randint(0, len(data))
    for part in (slice(0, cut), slice(cut, None)):
        index.add(data[part], ids[part])
        exact.add(data[part], ids[part])
    same(index.search(queries, k), exact.search(queries, k))
    assert len(index) == len(data)
    np.testing.assert_array_equal(index.ids, np.sort(ids))


@pytest.mark.parametrize("metric", METRICS)
def test_real_numbers_equal_the_exact_index_too(metric):
    data = vectors(700)
    index, exact = BinaryGraphIndex(metric=metric, bits=64, candidates=700), ExactIndex(metric=metric)
    index.add(data)
    exact.add(data)
    same(index.search(data[:50] + 0.1, 20), exact.search(data[:50] + 0.1, 20))


@pytest.mark.parametrize("hasher", ["srp", "pca", "itq", "lph"])
@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_few_candidates_find_most(metric, hasher):
    data = vectors(3000)
    index, exact = BinaryGraphIndex(metric=metric, hasher=hasher, bits=128), ExactIndex(metric=metric)
    index.add(data[100:], np.arange(2900)[::-1])
    exact.add(data[100:], np.arange(2900)[::-1])
    scores, ids = index.search(data[:100], 10)
    true_scores, true_ids = exact.search(data[:100], 20)
    assert recall_at_k(ids, true_ids, true_scores, 10) > 0.9
    assert (np.diff(scores, axis=1) <= 0).all()
    # What it returns has the exact scores.
    for row in range(100):
        for score, number in zip(scores[row], ids[row], strict=True):
            at = np.flatnonzero(true_ids[row] == number)
            assert not len(at) or true_scores[row, at[0]] == score
    index.candidates = 10
    fewer = recall_at_k(index.search(data[:100], 10)[1], true_ids, true_scores, 10)
    assert fewer < recall_at_k(ids, true_ids, true_scores, 10)


def test_k_beyond_the_candidates_and_the_index():
    index = built(50, candidates=5)
    scores, ids = index.search(vectors(3, seed=9), 60)
    assert (np.sort(ids[:, :50], axis=1) == index.ids).all()
    assert (ids[:, 50:] == -1).all()
    assert (scores[:, 50:] == -np.inf).all()
    assert (index.search(vectors(3, seed=9), 20)[1] >= 0).all()


def test_an_empty_index_answers():
    index = BinaryGraphIndex(dim=4)
    scores, ids = index.search(np.zeros((2, 4)), 3)
    assert (ids == -1).all()
    assert (scores == -np.inf).all()
    index.add(np.zeros((0, 4)))
    assert len(index) == 0
    index = BinaryGraphIndex()
    index.add(np.zeros((0, 7), np.float32))
    assert index.dim == 7


def test_ids_are_numbered_on():
    index = BinaryGraphIndex(bits=64)
    index.add(vectors(5))
    index.add(vectors(2), np.array([100, 50]))
    index.add(vectors(3))
    assert index.ids.tolist() == [0, 1, 2, 3, 4, 50, 100, 101, 102, 103]
    index.add(vectors(1), np.array([2**63 - 1], np.uint64))
    with pytest.raises(ValueError, match="there are no 1 numbers after id 9223372036854775807"):
        index.add(vectors(1))
    near = index.search(vectors(1), 11)[1][0]
    assert 2**63 - 1 in near


@pytest.mark.parametrize("metric", METRICS)
def test_half_precision_rounds_the_features_alone(metric):
    data = vectors(300)
    index = BinaryGraphIndex(metric=metric, bits=64, candidates=300, feature_dtype="float16")
    index.add(data)
    kept = index._table.rows()[0]
    assert kept.dtype == np.float16
    exact = ExactIndex(metric=metric)
    exact.add(kept.astype(np.float32))
    found, expected = index.search(data[:20], 10), exact.search(data[:20], 10)
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-6)
    assert (found[1] == expected[1]).mean() > 0.98
    with pytest.raises(ValueError, match="row 1 holds a value beyond float16"):
        BinaryGraphIndex(metric="l2", feature_dtype="float16").add(np.array([[1.0], [7e4]]))


@pytest.mark.parametrize(
    ("data", "ids", "message"),
    [
        (np.zeros((2, 31)), None, "vectors have 31 dimensions, the index has 32"),
        (np.zeros(32), None, r"one vector is vector\[None\]"),
        (np.zeros((2, 32), int), None, "floating type"),
        (np.full((2, 32), np.nan), None, "vectors row 0 holds NaN"),
        (np.zeros((2, 32)), [1], "ids must be 2 whole numbers"),
        (np.zeros((2, 32)), [1.0, 2.0], "ids must be 2 whole numbers"),
        (np.zeros((2, 32)), [-1, 2], "from 0 to"),
        (np.zeros((2, 32)), [7, 7], "given more than once"),
        (np.zeros((2, 32)), [7, 3], "1 are in the index already, e.g. 3"),
    ],
)
def test_a_mistake_leaves_the_index_as_it_was(data, ids, message):
    index = built()
    queries = vectors(5, seed=9)
    before = index.search(queries, 10)
    with pytest.raises(ValueError, match=message):
        index.add(data, None if ids is None else np.array(ids))
    assert len(index) == 400
    same(index.search(queries, 10), before)


def test_a_first_add_that_fails_leaves_nothing(monkeypatch):
    given_hasher = make_hasher("itq", 64)
    index = BinaryGraphIndex(hasher=given_hasher)

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(index, "_build", broken)
    with pytest.raises(OSError, match="no space"):
        index.add(vectors(50))
    assert (len(index), index.dim, index.hasher.dim) == (0, None, None)
    monkeypatch.undo()
    index.add(vectors(50, dim=9))
    assert index.search(vectors(1, dim=9), 1)[1].shape == (1, 1)
    assert given_hasher.dim is None  # what the caller holds is not changed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(metric="hamming"), "metric must be one of cosine, ip, l2, got 'hamming'"),
        (dict(hasher="lsh"), "hasher must be one of srp, pca, itq, lph, got 'lsh'"),
        (dict(hasher=3), "a path or a Hasher, got 3"),
        (dict(bits=100), "multiple of 64 bits"),
        (dict(candidates=0), "candidates must be a whole number of at least 1, got 0"),
        (dict(dim=0), "dim must be"),
        (dict(threads=1.5), "threads must be"),
        (dict(feature_dtype="int8"), "feature_dtype must be one of float32, float16"),
        (dict(hasher="/none/there.npz"), "there is no file of a hasher"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BinaryGraphIndex(**options)


@pytest.mark.parametrize(("queries", "k"), [(np.zeros((1, 32)), 0), (np.zeros((1, 32)), 1.0), (np.zeros((1, 31)), 1),
                                            (np.zeros(32), 1), (np.full((1, 32), np.inf), 1)])  # fmt: skip
def test_impossible_searches_are_refused(queries, k):
    with pytest.raises(ValueError, match=r"must|dimensions|holds"):
        built(20).search(queries, k)


def test_a_hash_of_few_vectors_is_warned_of_and_fit_is_the_mend(recwarn):
    with pytest.warns(UserWarning, match="learned from 10 vectors only; call fit"):
        BinaryGraphIndex(bits=64).add(vectors(10))
    index = BinaryGraphIndex(bits=64)
    recwarn.clear()
    index.fit(vectors(2000))
    index.add(vectors(10))
    assert not [w for w in recwarn if "the hash is learned" in str(w.message)]
    expected = make_hasher("itq", 64).fit(index._prepared("x", vectors(2000)))
    np.testing.assert_array_equal(index.hasher.encode(vectors(9)), expected.encode(vectors(9)))
    with pytest.raises(ValueError, match="the hash cannot change once vectors are in the index"):
        index.fit(vectors(2000))


def test_a_hasher_may_be_given(tmp_path):
    hasher = make_hasher("srp", 128, seed=5).fit(vectors())
    hasher.save(tmp_path / "hasher.npz")
    for given_hasher in (hasher, str(tmp_path / "hasher.npz")):
        index = BinaryGraphIndex(hasher=given_hasher)
        assert (index.dim, index.hasher.bits) == (32, 128)
        index.add(vectors(20))
        np.testing.assert_array_equal(index.hasher.encode(vectors(5)), hasher.encode(vectors(5)))
    with pytest.raises(ValueError, match="fitted on 32 dimensions, the index is to have 31"):
        BinaryGraphIndex(dim=31, hasher=hasher)


def entries(path) -> int:
    """How many files and folders an index has; the lock file stays once it was saved."""
    return sum(entry.name != ".lock" for entry in path.iterdir())


@pytest.mark.parametrize("feature_dtype", ["float32", "float16"])
@pytest.mark.parametrize("verify", ["full", "header"])
def test_a_folder_gives_the_same_index(tmp_path, feature_dtype, verify):
    queries = vectors(20, seed=9)
    index = built(metric="l2", candidates=30, ef=40, feature_dtype=feature_dtype, seed=3)
    path = tmp_path / "Bücher 书"
    index.save(path)
    assert entries(path) == 2
    opened = BinaryGraphIndex.open(str(path), verify=verify)
    same(opened.search(queries, 10), index.search(queries, 10))
    assert (opened.metric, opened.candidates, opened.ef, opened.dim) == ("l2", 30, 40, 32)
    # What is added to the opened one stays out of the folder until it is saved.
    for one in (opened, index):
        one.add(queries, np.arange(5000, 5020))
    same(opened.search(queries, 10), index.search(queries, 10))
    assert len(BinaryGraphIndex.open(path)) == 400
    opened.save(path)
    assert entries(path) == 2
    same(opened.search(queries, 10), index.search(queries, 10))  # its former files are gone
    again = BinaryGraphIndex.open(path)
    assert len(again) == 420
    same(again.search(queries, 10), index.search(queries, 10))
    again.save(tmp_path / "copy")
    same(BinaryGraphIndex.open(tmp_path / "copy").search(queries, 10), index.search(queries, 10))


def test_an_empty_and_a_fitted_index_are_kept(tmp_path):
    BinaryGraphIndex(metric="ip", hasher="lph", bits=128, seed=4).save(tmp_path / "a")
    opened = BinaryGraphIndex.open(tmp_path / "a")
    assert (len(opened), opened.dim, opened.metric) == (0, None, "ip")
    assert (opened.hasher.name, opened.hasher.bits, opened.hasher.seed) == ("lph", 128, 4)
    opened.fit(vectors(50))
    opened.save(tmp_path / "b")
    assert BinaryGraphIndex.open(tmp_path / "b").hasher.dim == 32


def test_other_folders_are_left_alone(tmp_path):
    index = built(20)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all I have")
    with pytest.raises(ValueError, match=r"holds 'thesis.txt', which is not of an index"):
        index.save(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file"):
        index.save(tmp_path / "mine" / "thesis.txt")
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    with pytest.raises(FileNotFoundError):
        index.save(tmp_path / "none" / "index")
    (tmp_path / "empty").mkdir()
    index.save(tmp_path / "empty")
    assert len(BinaryGraphIndex.open(tmp_path / "empty")) == 20


def test_a_save_that_fails_leaves_the_former_index(tmp_path, monkeypatch):
    index = built(20)
    index.save(tmp_path / "index")
    index.add(vectors(3))

    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr(index_files, "write_array", broken)
    for name in ("index", "fresh"):
        with pytest.raises(OSError, match="no space left"):
            index.save(tmp_path / name)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["index"]
    assert entries(tmp_path / "index") == 2
    assert len(BinaryGraphIndex.open(tmp_path / "index")) == 20


def rewrite(path, change) -> None:
    """Change the JSON file as somebody would who knows its checksum."""
    body = json.loads((path / "index.json").read_text())["body"]
    change(body)
    text = json.dumps(body, sort_keys=True)
    (path / "index.json").write_text(json.dumps({"crc32": zlib.crc32(text.encode()), "body": body}))


def test_damaged_folders_are_named(tmp_path):
    path = tmp_path / "index"
    with pytest.raises(ValueError, match="there is no index folder"):
        BinaryGraphIndex.open(path)
    path.mkdir()
    with pytest.raises(ValueError, match=r"index\.json is missing"):
        BinaryGraphIndex.open(path)
    index = built(40)
    index.save(path)
    queries = vectors(3, seed=9)
    expected = index.search(queries, 5)
    rng = np.random.default_rng(0)
    files = sorted(entry for entry in path.rglob("*") if entry.is_file() and entry.stat().st_size)
    refused = 0
    for file in files:
        whole = file.read_bytes()
        for attempt in range(12):
            spoilt = bytearray(whole)
            if attempt < 2:
                del spoilt[rng.integers(len(whole)) :]
            else:
                spoilt[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
            file.write_bytes(spoilt)
            try:
                opened = BinaryGraphIndex.open(path)
            except ValueError as error:
                refused += str(path) in str(error)
                continue
            same(opened.search(queries, 5), expected)
        file.write_bytes(whole)
    assert refused > 10 * len(files)
    for file in (entry for entry in files if entry.name in ("hasher.npz", "features.npy", "ids.npy")):
        whole = file.read_bytes()
        file.unlink()
        with pytest.raises(ValueError, match=file.name):
            BinaryGraphIndex.open(path)
        file.write_bytes(whole)
    same(BinaryGraphIndex.open(path).search(queries, 5), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body.update(version=2), "written by a newer alimm"),
        (lambda body: body.update(format="x"), "its format is 'x'"),
        (lambda body: body.update(data="../index"), "the name of its data folder"),
        (lambda body: body.update(data=7), "is damaged"),
        (lambda body: body["options"].update(bits=100), "multiple of 64"),
        (lambda body: body["options"].update(dim=31), "31"),
        (lambda body: body["options"].update(evil=1), "evil"),
        (lambda body: body["options"].update(metric=None), "metric must be"),
        (lambda body: body["options"].update(feature_dtype="float16"), "do not fit"),
        (lambda body: body["files"].update(ids=3), "ids.npy"),
        (lambda body: body.pop("files"), "files"),
    ],
)
def test_hostile_folders_are_refused(tmp_path, change, message):
    built(20).save(tmp_path / "index")
    rewrite(tmp_path / "index", change)
    with pytest.raises(ValueError, match=message):
        BinaryGraphIndex.open(tmp_path / "index")
    with pytest.raises(ValueError, match="verify must be"):
        BinaryGraphIndex.open(tmp_path / "index", verify="yes")


def test_files_that_were_exchanged_are_refused(tmp_path):
    path = tmp_path / "index"
    built(20).save(path)
    data = next(path.glob("data-*"))
    whole = (path / "index.json").read_bytes()
    assert b'"candidates": 100' in whole
    (path / "index.json").write_bytes(whole.replace(b'"candidates": 100', b'"candidates": 101'))
    with pytest.raises(ValueError, match="its checksum does not match"):
        BinaryGraphIndex.open(path)
    (path / "index.json").write_bytes(whole)
    former = (data / "hasher.npz").read_bytes()
    make_hasher("srp", 64).fit(vectors()).save(data / "hasher.npz")
    with pytest.raises(ValueError, match=r"hasher\.npz does not match its checksum"):
        BinaryGraphIndex.open(path)
    (data / "hasher.npz").write_bytes(former)
    for ids in (np.arange(20)[::-1].copy(), np.arange(20) - 1, np.zeros(20, np.int64)):
        entry = write_array(data / "ids.npy", ids).to_json()
        rewrite(path, lambda body, entry=entry: body["files"].update(ids=entry))
        with pytest.raises(ValueError, match="the ids are not unique and ascending"):
            BinaryGraphIndex.open(path)


def test_rows_that_the_graph_has_before_the_table_are_left_out():
    index = built(200, candidates=20)
    queries = vectors(5, seed=8)
    before = index.search(queries, 10)[1]
    index._graph.add(index.hasher.encode(index._prepared("x", queries)), np.array([1, 4, 7, 10, 10**6]))
    ids = index.search(queries, 10)[1]
    assert all(len(set(row)) == 10 for row in ids.tolist())
    assert np.isin(ids, index.ids).all()
    assert np.mean([np.isin(a, b).mean() for a, b in zip(ids, before, strict=True)]) > 0.7


def test_a_reader_goes_on_when_the_folder_is_saved_anew(tmp_path, monkeypatch):
    index = built(20)
    path = tmp_path / "index"
    index.save(path)
    former = index_files.read_features
    calls = []

    def late(data, *arguments):
        if not calls:
            calls.append(data)
            index.save(path)  # removes what is about to be read
        return former(data, *arguments)

    monkeypatch.setattr(index_files, "read_features", late)
    assert len(BinaryGraphIndex.open(path)) == 20


def test_a_read_only_folder_opens(tmp_path):
    path = tmp_path / "index"
    built(20).save(path)
    shutil.copytree(path, tmp_path / "copy")
    for entry in [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]:
        entry.chmod(0o555 if entry.is_dir() else 0o444)
    try:
        opened = BinaryGraphIndex.open(tmp_path / "copy")
        opened.add(vectors(3))
        assert len(opened) == 23
    finally:
        for entry in [tmp_path / "copy", *(tmp_path / "copy").rglob("*")]:
            entry.chmod(0o755)


def test_searches_beside_additions_see_whole_results():
    index = built(200, candidates=50)
    stop, failures = threading.Event(), []

    def search():
        while not stop.is_set():
            scores, ids = index.search(vectors(4, seed=8), 10)
            if not ((ids >= 0).all() and (np.diff(scores, axis=1) <= 0).all()):
                failures.append(ids)

    readers = [threading.Thread(target=search) for _ in range(2)]
    for reader in readers:
        reader.start()
    for number in range(30):
        index.add(vectors(3, seed=number))
    stop.set()
    for reader in readers:
        reader.join()
    assert not failures
    assert len(index) == 290
