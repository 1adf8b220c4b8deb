"""Re-ranking with float features: the kernel against the NumPy reference, and both against exact sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from alimm_ops.graph import beam_reference as reference
from alimm_ops.graph import rerank_cpu

Rerank = Callable[..., tuple[NDArray[np.float32], NDArray[np.int64]]]


def same(found: tuple[NDArray[Any], ...], expected: tuple[NDArray[Any], ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)


def slow_scores(query: NDArray[Any], features: NDArray[Any], metric: str) -> list[float]:
    """By the definition, with exact sums."""
    q, result = [float(value) for value in query], []
    for feature in features:
        f = [float(value) for value in feature]
        if metric == "l2":
            result.append(-math.fsum((a - b) ** 2 for a, b in zip(q, f, strict=True)))
            continue
        dot = math.fsum(a * b for a, b in zip(q, f, strict=True))
        lengths = math.sqrt(math.fsum(a * a for a in q)) * math.sqrt(math.fsum(b * b for b in f))
        result.append(dot if metric == "ip" else dot / lengths if lengths else 0.0)
    return result


@pytest.mark.parametrize("function", [reference.rerank, rerank_cpu.rerank])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
@pytest.mark.parametrize("metric", reference.METRICS)
@pytest.mark.parametrize("dim", [1, 3, 64])
def test_rerank(function: Rerank, metric: str, kind: type, dim: int) -> None:
    """Zero vectors on both sides, equal features, holes, a query without candidates."""
    rng = np.random.default_rng(dim)
    features = rng.standard_normal((40, dim)).astype(kind)
    features[[4, 9]], features[[5, 6, 7]] = 0, features[8]
    queries = rng.standard_normal((5, dim)).astype(np.float32)
    queries[3] = 0
    rows = np.array([rng.permutation(40)[:25] for _ in range(5)])
    rows[0, :5], rows[1, ::4], rows[2] = [9, 8, 6, 4, 5], -1, -1
    rows[0, 5:] = -1
    for k in (1, 8, 25):
        scores, chosen = function(queries, features, rows, k, metric)
        assert (scores.dtype, chosen.dtype, scores.shape, chosen.shape) == (np.float32, np.int64, (5, k), (5, k))
        for row in range(5):
            own = rows[row][rows[row] >= 0]
            exact = np.array(slow_scores(queries[row], features[own], metric), np.float32)
            order = np.lexsort((own, -exact))[:k]
            assert chosen[row].tolist() == own[order].tolist() + [-1] * (k - len(order))
            np.testing.assert_array_max_ulp(scores[row, : len(order)], exact[order], 1)
            assert (scores[row, len(order) :] == -np.inf).all()
    same(function(queries, features, rows, 8, metric)[1:], reference.rerank(queries, features, rows, 8, metric)[1:])


@settings(max_examples=40)
@given(seed=st.integers(0, 9999), metric=st.sampled_from(reference.METRICS), half=st.booleans(), data=st.data())
def test_rerank_with_many_equal_scores(seed: int, metric: str, half: bool, data: st.DataObject) -> None:
    """Small whole numbers: every sum is exact in any order, so scores are the oracle's to the bit."""
    rng = np.random.default_rng(seed)
    features = rng.integers(-1, 2, (30, 3)).astype(np.float16 if half else np.float32)
    queries = rng.integers(-2, 3, (3, 3)).astype(np.float32)
    width = data.draw(st.integers(1, 30))
    rows = np.array([rng.permutation(30)[:width] for _ in range(3)])
    rows[rng.random(rows.shape) < 0.2] = -1
    arguments = (queries, features, rows, data.draw(st.integers(1, width)), metric)
    same(rerank_cpu.rerank(*arguments), reference.rerank(*arguments))


def test_scores_are_summed_in_double_precision() -> None:
    """In float32 the one would be lost beside 2**30."""
    queries, features = np.ones((1, 3), np.float32), np.array([[2**30, 1, -(2**30)], [0.5, 0, 0]], np.float32)
    assert rerank_cpu.rerank(queries, features, np.array([[1, 0]]), 2, "ip")[0].tolist() == [[1.0, 0.5]]


def test_halves_are_widened_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    features, queries = rng.standard_normal((50, 4)).astype(np.float16), rng.standard_normal((9, 4)).astype(np.float32)
    rows = rng.integers(0, 2**62, (9, 6)) % 50
    rows = np.array([np.unique(np.append(row, np.arange(6)))[:6] for row in rows])
    rows[:, 2] = -1
    whole = rerank_cpu.rerank(queries, features, rows, 5, "cosine")
    monkeypatch.setattr(rerank_cpu, "_BLOCK", 2 * 6 * 4)  # two queries at a time, and one at the end
    same(rerank_cpu.rerank(queries, features, rows, 5, "cosine"), whole)
    same(rerank_cpu.rerank(queries, features.astype(np.float32), rows, 5, "cosine"), whole)


def test_arguments_of_rerank() -> None:
    queries, features, rows = np.ones((2, 3), np.float32), np.ones((5, 3), np.float32), np.zeros((2, 4), np.int64)
    for arguments, message in (
        ((queries, features, rows, 2, "dot"), "metric must be one of cosine, ip, l2, got 'dot'"),
        ((queries, features.astype(np.float64), rows, 2, "ip"), "features must be float32 or float16"),
        ((queries, features[:, :2], rows, 2, "ip"), "differ in width"),
        ((queries, features, rows[1:], 2, "ip"), "expected candidates of 2 queries"),
        ((queries, features, rows + 5, 2, "ip"), "rows must be from 0 to 4"),
        ((queries, features, rows - 2, 2, "ip"), "rows must be from 0 to 4"),
        ((queries, features, rows, 0, "ip"), "k must be from 1 to the 4 candidates, got 0"),
        ((queries, features, rows, 5, "ip"), "k must be from 1 to the 4 candidates, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            rerank_cpu.rerank(*arguments)
