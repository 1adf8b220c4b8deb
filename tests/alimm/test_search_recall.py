"""Recall of an approximate search, with ties, padding and repeated ids."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alimm.search import ExactIndex, recall_at_k


def test_recall_without_ties_is_the_size_of_the_overlap():
    true, scores = np.array([[4, 7, 1, 9]]), np.array([[0.9, 0.8, 0.7, 0.6]])
    assert recall_at_k(np.array([[7, 4, 2]]), true, scores) == pytest.approx(2 / 3)
    assert recall_at_k(np.array([[7, 4, 2]]), true, scores, k=2) == 1.0
    assert recall_at_k(np.array([[2, 9, 4]]), true, scores, k=1) == 0.0
    assert recall_at_k(np.array([[7, 4, 9]]), true, scores) == pytest.approx(2 / 3)  # 9 is the fourth


def test_items_tied_with_the_last_place_count():
    true, scores = np.array([[0, 1, 2, 3, 4]]), np.array([[1.0, 0.5, 0.5, 0.5, 0.4]])
    assert recall_at_k(np.array([[0, 3]]), true, scores) == 1.0
    assert recall_at_k(np.array([[2, 3]]), true, scores) == 1.0  # 0 is missed, but two as near as the second are there
    assert recall_at_k(np.array([[0, 4]]), true, scores) == 0.5


def test_padding_and_repeated_ids():
    true = np.array([[3, 5, -1], [-1, -1, -1]])
    scores = np.array([[0.2, 0.1, -np.inf], [-np.inf] * 3])
    assert recall_at_k(np.array([[5, 5, -1], [-1, -1, -1]]), true, scores) == pytest.approx((0.5 + 1.0) / 2)
    assert recall_at_k(np.array([[5, 3, -1], [8, 9, 7]]), true, scores) == 1.0


@given(st.integers(0, 10**6), st.integers(1, 8))
def test_an_exact_search_has_recall_one_under_any_order_of_ties(seed, k):
    rng = np.random.default_rng(seed)
    vectors = rng.integers(0, 2, (20, 3)).astype(np.float32)
    index = ExactIndex(metric="l2")
    index.add(vectors)
    scores, true = index.search(vectors[:5], 20)
    shuffled = rng.permutation(20)  # the same vectors under other ids break ties otherwise
    other = ExactIndex(metric="l2")
    other.add(vectors[shuffled])
    found = shuffled[other.search(vectors[:5], k)[1]]
    assert recall_at_k(found, true, scores) == 1.0
    assert recall_at_k(np.full_like(found, -1), true, scores) == 0.0


@pytest.mark.parametrize(
    ("found", "true", "scores", "k", "message"),
    [
        (np.zeros(3), np.zeros((1, 3)), np.zeros((1, 3)), None, "expected ids of shape"),
        (np.zeros((2, 3)), np.zeros((1, 3)), np.zeros((1, 3)), None, "expected ids of shape"),
        (np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 2)), None, "differ in shape"),
        (np.zeros((1, 3)), np.zeros((1, 2)), np.zeros((1, 2)), None, "at least k columns"),
        (np.zeros((1, 3)), np.zeros((1, 3)), np.zeros((1, 3)), 0, "at least k columns"),
        (np.zeros((1, 2)), np.zeros((1, 2)), np.array([[0.1, 0.2]]), None, "sorted"),
        (np.zeros((1, 2)), np.zeros((1, 2)), np.array([[np.nan, 0.2]]), None, "sorted"),
    ],
)
def test_bad_input_is_named(found, true, scores, k, message):
    with pytest.raises(ValueError, match=message):
        recall_at_k(found, true, scores, k)
