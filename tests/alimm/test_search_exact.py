"""ExactIndex against NumPy in double precision, with ties, padding and damaged files."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from alimm.registry import INDEXES
from alimm.search import ExactIndex, Index

METRICS = ("cosine", "ip", "l2")


def oracle(vectors: np.ndarray, ids: np.ndarray, queries: np.ndarray, k: int, metric: str):
    """Sort everything by (score, id), one query at a time."""

    def unit(x):
        length = np.sqrt((x * x).sum())
        return (x / length if length else x).astype(np.float32).astype(np.float64)

    all_scores, all_ids = [], []
    for query in queries.astype(np.float32).astype(np.float64):
        rows = []
        for vector, number in zip(vectors.astype(np.float32).astype(np.float64), ids.tolist(), strict=True):
            if metric == "l2":
                score = -((query - vector) ** 2).sum()
            elif metric == "ip":
                score = (query * vector).sum()
            else:
                score = (unit(query) * unit(vector)).sum()
            rows.append((-np.float32(score), number))
        rows = [*sorted(rows), *[(np.inf, -1)] * k][:k]
        all_scores.append([-score for score, _ in rows])
        all_ids.append([number for _, number in rows])
    return np.array(all_scores, dtype=np.float32).reshape(-1, k), np.array(all_ids, dtype=np.int64).reshape(-1, k)


# Small whole numbers: many exact ties, and every sum is exact in any order.
grid = st.integers(-2, 2).map(float)


@given(
    npst.arrays(np.float32, st.tuples(st.integers(1, 60), st.just(3)), elements=grid),
    npst.arrays(np.float64, st.tuples(st.integers(0, 25), st.just(3)), elements=grid),
    st.integers(1, 70),
    st.sampled_from(METRICS),
    st.randoms(use_true_random=False),
)
def test_ties_and_padding_equal_the_oracle(vectors, queries, k, metric, random):
    ids = np.array(random.sample(range(1000), len(vectors)))
    index = ExactIndex(metric=metric)
    index.add(vectors, ids)
    scores, found = index.search(queries, k)
    true_scores, true_ids = oracle(vectors, ids, queries, k, metric)
    assert (scores.dtype, found.dtype) == (np.float32, np.int64)
    assert scores.shape == found.shape == (len(queries), k)
    np.testing.assert_array_equal(found, true_ids)
    np.testing.assert_array_equal(scores, true_scores)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_random_vectors_equal_the_oracle(metric, dtype):
    rng = np.random.default_rng(5)
    vectors, queries = rng.normal(size=(300, 33)).astype(dtype), rng.normal(size=(25, 33)).astype(dtype)
    index = ExactIndex(metric=metric)
    index.add(vectors)
    scores, found = index.search(queries, 7)
    true_scores, true_ids = oracle(vectors, np.arange(300), queries, 7, metric)
    np.testing.assert_array_equal(found, true_ids)
    np.testing.assert_allclose(scores, true_scores, rtol=3e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_neighbours_closer_than_the_error_of_float32_are_told_apart(metric):
    """A far offset eats the digits of float32: faiss alone gets this order wrong."""
    rng = np.random.default_rng(2)
    vectors = (1000.0 + rng.normal(size=(400, 16))).astype(np.float32)
    queries = vectors[:30] + rng.normal(size=(30, 16)).astype(np.float32) * 0.01
    index = ExactIndex(metric=metric)
    index.add(vectors)
    scores, found = index.search(queries, 5)
    true_scores, true_ids = oracle(vectors, np.arange(400), queries, 5, metric)
    np.testing.assert_array_equal(found, true_ids)
    np.testing.assert_allclose(scores, true_scores, rtol=3e-7)


@pytest.mark.parametrize("metric", METRICS)
def test_many_copies_come_in_order_of_their_ids_whatever_the_batch(metric):
    rng = np.random.default_rng(0)
    copies = np.repeat(rng.normal(size=(3, 19)), 100, axis=0).astype(np.float32)
    ids = rng.permutation(300)
    index = ExactIndex(metric=metric, block_bytes=1 << 14)
    index.add(copies, ids)
    queries = copies[[0, 100, 200] * 9]
    scores, found = index.search(queries, 10)
    for row, group in zip(found, [0, 1, 2] * 9, strict=True):
        assert row.tolist() == sorted(ids[100 * group : 100 * group + 100].tolist())[:10]
    for i in range(3):  # one query at a time goes through another path of faiss
        one_scores, one_ids = index.search(queries[i : i + 1], 10)
        np.testing.assert_array_equal(one_ids[0], found[i])
        np.testing.assert_array_equal(one_scores[0], scores[i])


@pytest.mark.parametrize("metric", METRICS)
def test_the_order_of_adding_does_not_matter(metric):
    rng = np.random.default_rng(1)
    vectors, order = rng.integers(-2, 3, (90, 4)).astype(np.float32), rng.permutation(90)
    one, other = ExactIndex(metric=metric), ExactIndex(dim=4, metric=metric)
    one.add(vectors)
    for part in np.array_split(order, 4):
        other.add(vectors[part], part)
    for a, b in zip(one.search(vectors, 6), other.search(vectors, 6), strict=True):
        np.testing.assert_array_equal(a, b)


def test_extreme_values():
    index = ExactIndex(metric="ip")
    index.add(np.array([[1e-25, 0], [2e-25, 0], [3e25, 0], [1e19, 0]]))
    scores, ids = index.search(np.array([[1e-25, 0.0], [1e10, 0.0]]), 2)
    assert ids.tolist() == [[2, 3], [2, 3]]
    assert scores[1].tolist() == pytest.approx([3e35, 1e29], rel=1e-6)


def test_products_that_vanish_in_float32_still_rank():
    """Each product is below the smallest float32, their sum is not: faiss sees nothing but zeros."""
    index = ExactIndex(metric="ip")
    index.add(np.where(np.arange(200) == 150, 1.0, 0.5)[:, None] * np.full((1, 64), 5e-23))
    scores, ids = index.search(np.full((1, 64), 1e-23), 1)
    assert ids.tolist() == [[150]]
    assert scores[0, 0] == np.float32(64 * 5e-46)


def test_products_that_overflow_in_float32_still_rank():
    """Two infinite products of opposite sign make NaN, which faiss leaves out; the true sum is 0."""
    index = ExactIndex(metric="ip")
    index.add(np.array([[1.0, 0.0], [1e20, -1e20], [0.0, 1.0]]))
    scores, ids = index.search(np.array([[1e20, 1e20]]), 3)
    assert ids.tolist() == [[0, 2, 1]]
    assert scores.tolist() == [[pytest.approx(1e20), pytest.approx(1e20), 0.0]]


def test_ids_run_on_from_the_largest():
    index = ExactIndex()
    index.add(np.eye(2))
    index.add(np.eye(2), np.array([10, 5], dtype=np.uint8))
    index.add(np.empty((0, 2)))
    index.add(np.eye(2))
    assert index.ids.tolist() == [0, 1, 10, 5, 11, 12]
    assert len(index) == 6
    assert index.search(np.array([[1.0, 0.0]]), 4)[1].tolist() == [[0, 10, 11, 1]]


def test_an_empty_index_answers_with_padding():
    for index in (ExactIndex(), ExactIndex(dim=3)):
        scores, ids = index.search(np.ones((2, 3)), 2)
        assert ids.tolist() == [[-1, -1]] * 2
        assert np.isneginf(scores).all()


def test_zero_vectors_under_the_cosine():
    index = ExactIndex()
    index.add(np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    scores, ids = index.search(np.array([[0.0, 0.0], [2.0, 0.0]]), 3)
    assert scores.tolist() == [[0, 0, 0], [1, 0, -1]]
    assert ids.tolist() == [[0, 1, 2], [1, 0, 2]]


def test_the_caller_may_change_his_arrays_afterwards():
    vectors = np.eye(2, dtype=np.float32)
    index = ExactIndex(metric="ip")
    index.add(vectors)
    vectors[:] = 7
    index.vectors[:] = 7
    index.ids[:] = 7
    assert index.vectors.tolist() == [[1, 0], [0, 1]]
    assert index.ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("vectors", "ids", "message"),
    [
        (np.ones((1, 3)), None, "vectors have 3 dimensions, the index has 2"),
        (np.ones(2), None, r"shape \(count, dim\), got \(2,\)"),
        (np.ones((1, 2), dtype=np.int32), None, "floating type, got int32"),
        (np.array([["a", "b"]]), None, "floating type"),
        (np.array([[1, 2], [np.nan, 0]]), None, r"vectors row 1 holds NaN.*1 of 2"),
        (np.array([[1, np.inf]]), None, "vectors row 0 holds NaN"),
        (np.array([[1e300, 0]]), None, "beyond float32"),
        (np.ones((2, 2)), np.array([5]), "ids must be 2 whole numbers"),
        (np.ones((1, 2)), np.array([0.5]), "ids must be 1 whole numbers"),
        (np.ones((1, 2)), np.array([-1]), "ids must be from 0"),
        (np.ones((1, 2)), np.array([2**63], dtype=np.uint64), "ids must be from 0"),
        (np.ones((2, 2)), np.array([9, 9]), r"unique; 1 are given twice.*e\.g\. 9"),
        (np.ones((1, 2)), np.array([1]), r"in the index already, e\.g\. 1"),
    ],
)
def test_what_does_not_fit_is_named_and_not_added(vectors, ids, message):
    index = ExactIndex()
    index.add(np.eye(2))
    with pytest.raises(ValueError, match=message):
        index.add(vectors, ids)
    assert len(index) == 2
    if ids is None:
        with pytest.raises(ValueError, match=message.replace("vectors", "queries")):
            index.search(vectors, 1)


@pytest.mark.parametrize("k", [0, -1, 1.5])
def test_k_must_be_a_positive_whole_number(k):
    with pytest.raises(ValueError, match="k must be a whole number"):
        ExactIndex().search(np.ones((1, 2)), k)


def test_settings_are_checked_and_the_registry_builds_it():
    with pytest.raises(ValueError, match="metric must be one of cosine, ip, l2, got 'dot'"):
        ExactIndex(metric="dot")
    with pytest.raises(ValueError, match="dim must be at least 1"):
        ExactIndex(dim=0)
    index = INDEXES.build({"type": "alimm.ExactIndex", "metric": "l2"})
    assert isinstance(index, ExactIndex)
    assert isinstance(index, Index)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [0, 9])
def test_a_saved_index_is_the_same_index(tmp_path, metric, count):
    rng = np.random.default_rng(0)
    index = ExactIndex(metric=metric)
    if count:
        index.add(rng.normal(size=(count, 4)), rng.permutation(100)[:count])
    path = tmp_path / "\u540d\u524d index"
    path.write_text("an older file")
    index.save(path)
    again = ExactIndex.open(str(path))
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert (again.metric, again.dim, len(again)) == (metric, index.dim, count)
    queries = rng.normal(size=(3, 4))
    for a, b in zip(index.search(queries, 4), again.search(queries, 4), strict=True):
        np.testing.assert_array_equal(a, b)
    again.add(rng.normal(size=(2, 4)))
    assert len(again) == count + 2
    assert len(set(again.ids.tolist())) == count + 2


def test_every_damage_names_the_file(tmp_path):
    index = ExactIndex(metric="l2")
    index.add(np.arange(12.0).reshape(4, 3))
    path = tmp_path / "shop.index"
    index.save(path)
    good = path.read_bytes()
    first_line, header, _ = good.split(b"\n", 2)
    body = good[len(first_line) + len(header) + 2 :]

    def headed(**change):
        return first_line + b"\n" + json.dumps({**json.loads(header), **change}).encode() + b"\n" + body

    damaged = [good[:n] for n in range(0, len(good), 7)]
    damaged += [good + b"x", b"PK" + good, headed(dim=5), headed(dim=[3]), headed(metric="dot"), headed(count=-1)]
    damaged += [headed(count="many"), headed(count=10**12), headed(width=None), good.replace(header, b"[]")]
    damaged += [good[: -n - 1] + bytes([good[-n - 1] ^ 1]) + good[len(good) - n :] for n in range(len(body))]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"shop\.index"):
            ExactIndex.open(path)
    path.write_bytes(headed())
    assert len(ExactIndex.open(path)) == 4
    with pytest.raises(ValueError, match=r"there is no index file .*none"):
        ExactIndex.open(tmp_path / "none")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    index = ExactIndex()
    index.add(np.eye(2))
    path = tmp_path / "index"
    index.save(path)
    index.add(np.eye(2))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        index.save(path)
    assert len(ExactIndex.open(path)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_faiss_is_not_imported_before_a_search():
    code = "import alimm.search, sys; assert 'faiss' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
