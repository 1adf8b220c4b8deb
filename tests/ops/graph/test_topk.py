"""From tiles of scores to exact lists: the kernels against the NumPy reference, the reference against a slow loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import permutations

import hypothesis.strategies as st
import numba
import numpy as np
import pytest
from hypothesis import given, settings

from alimm_ops.graph import topk_cpu
from alimm_ops.graph import topk_reference as reference


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


def unit(rows: int, dim: int, seed: int = 0) -> np.ndarray:
    return reference.unit_rows(np.random.default_rng(seed).standard_normal((rows, dim)).astype(np.float32))


@pytest.mark.parametrize("dim", [1, 3, 8, 21])
def test_reference_against_a_loop(dim: int) -> None:
    rows = np.random.default_rng(dim).standard_normal((40, dim)).astype(np.float32)
    rows[3] = 0
    rows[9] = rows[8]
    units = reference.unit_rows(rows)
    assert units.shape == (40, reference.padded_width(dim))
    assert not units[3].any()
    assert not units[:, dim:].any()
    ids, similarity = reference.nearest_rows(units, np.arange(40), units, 6)
    for i in range(40):
        length = [math.sqrt(math.fsum(float(v) ** 2 for v in row)) for row in rows]
        cosines = {
            j: math.fsum(float(a) * float(b) for a, b in zip(rows[i], rows[j], strict=True))
            / ((length[i] * length[j]) or 1.0)
            for j in range(40)
            if j != i
        }
        best = sorted(cosines.values(), reverse=True)[:6]
        assert np.allclose(similarity[i], best, atol=3e-7)
        assert np.allclose([cosines[j] for j in ids[i]], best, atol=3e-7)
        for n in range(5):
            assert (-similarity[i, n], ids[i, n]) < (-similarity[i, n + 1], ids[i, n + 1])


def test_reference_pads() -> None:
    units = unit(3, 4)
    ids, similarity = reference.nearest_rows(units, np.arange(3), units, 4)
    assert (ids[:, 2:] == -1).all()
    assert (similarity[:, 2:] == -np.inf).all()
    assert (ids[:, :2] >= 0).all()


@pytest.mark.parametrize("dim", [1, 8, 13, 128])
def test_similarity_is_the_reference_bit_for_bit(dim: int) -> None:
    units = unit(60, dim)
    units[5], units[6] = 0, units[7]
    true = reference.similarity(units[:, None], units[None])
    got = np.array([[topk_cpu.similarity(x, y) for y in units] for x in units], np.float32)
    assert np.array_equal(got.view(np.int32), true.view(np.int32))
    assert np.array_equal(true, true.T)
    assert np.abs(true).max() <= 1
    assert not np.signbit(true[true == 0]).any()


def test_sum_is_in_lanes() -> None:
    """An order of its own: summed from left to right these give another value."""
    x = np.zeros((1, 16))
    x[0, [0, 1, 8]] = 1.0, 1e-16, -1.0
    assert reference.lane_sum(x)[0] == 1e-16
    assert ((x[0, 0] + x[0, 1]) + x[0, 8]) == 0.0


def test_the_kernel_sums_in_the_same_lanes() -> None:
    """One, minus one and a trifle in any three places: what is left of the trifle tells the order of the sum."""
    one, trifle = np.float32(1), np.float32(2.0**-30)
    seen = set()
    for places in permutations(range(16), 3):
        x, y = np.zeros((2, 16), np.float32)
        x[list(places)], y[list(places)] = (one, -one, trifle), (one, one, trifle)
        assert topk_cpu.similarity(x, y) == reference.similarity(x, y)
        seen.add(float(reference.similarity(x, y)))
    assert seen == {0.0, 2.0**-60}


@pytest.mark.parametrize("kind", [np.int16, np.int32])
def test_keys_sort_as_the_floats_do(kind: type) -> None:
    floats = np.sort(np.random.default_rng(0).standard_normal(1000).astype(np.float32))
    floats = np.concatenate([[-np.inf], floats, [np.inf]]).astype(np.float32)
    bits = (floats.view(np.int32) >> 16).astype(np.int16) if kind is np.int16 else floats.view(np.int32)
    keys = topk_cpu.key_bits(bits)
    assert (np.diff(keys.astype(np.int64)) >= 0).all()
    assert keys.dtype == kind
    assert np.array_equal(topk_cpu.key_bits(keys), bits)


@settings(max_examples=40)
@given(
    rows=st.integers(1, 20),
    columns=st.integers(1, 300),
    width=st.integers(1, 40),
    spread=st.sampled_from([3, 300, 30000]),
    cut=st.integers(1, 300),
    wide=st.booleans(),
    seed=st.integers(0, 99),
)
def test_reservoir_turns_away_nothing_above_its_threshold(
    rows: int, columns: int, width: int, spread: int, cut: int, wide: bool, seed: int
) -> None:
    kind = np.int32 if wide else np.int16
    keys = np.random.default_rng(seed).integers(-spread, spread, (rows, columns)).astype(kind)
    bits = topk_cpu.key_bits(keys)
    own = np.arange(rows) * 7  # some are columns of the tile
    by_row, by_column = (topk_cpu.Reservoir.empty(rows, width, kind, np.int64) for _ in range(2))
    for start in range(0, columns, cut):
        part = bits[:, start : start + cut]
        by_row.scan_rows(np.ascontiguousarray(part), 0, own, start)
        by_column.scan_columns(np.ascontiguousarray(part.T), 0, own, start)
    for held in (by_row, by_column):
        for row in range(rows):
            count = held.counts[row]
            ids = held.ids[row, :count]
            others = np.flatnonzero(np.arange(columns) != own[row])
            assert len(set(ids)) == count >= min(width, len(others))
            assert own[row] not in ids
            assert np.array_equal(keys[row, ids], held.keys[row, :count])
            missing = keys[row, np.setdiff1d(others, ids)]
            assert (missing <= held.thresholds[row]).all()
            assert len(missing) == 0 or held.thresholds[row] <= np.sort(keys[row, others])[-min(width, len(others))]


def scored(units: np.ndarray, noise: float, seed: int = 1) -> np.ndarray:
    exact = units.astype(np.float64) @ units.T.astype(np.float64)
    wrong = np.random.default_rng(seed).uniform(-noise, noise, exact.shape)
    return (exact + wrong).astype(np.float32)


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.2])
def test_rank_equals_the_reference(noise: float, threads: int) -> None:
    units = unit(200, 5)
    units[50:60] = units[50]
    k, half = 6, 90
    scores = scored(units, noise)
    ids = np.full((200, k), -1, np.int64)
    similarity = np.full((200, k), -np.inf, np.float32)
    broken = np.zeros(200, bool)
    everyone = np.tile(np.arange(200, dtype=np.int32), (200, 1))
    np.fill_diagonal(everyone, -1)
    slack = np.full_like(scores, noise / 2)
    for first, rows in ((half, units[half:]), (0, units[:half])):
        count, bound = np.full(200, 200), np.full(200, noise / 2 + 1e-6)
        topk_cpu.rank(scores, slack, everyone, count, units, rows, first, bound, ids, similarity, broken)
    true_ids, true_similarity = reference.nearest_rows(units, np.arange(200), units, k)
    assert np.array_equal(ids, true_ids)
    assert np.array_equal(similarity, true_similarity)
    assert not broken.any()


def test_rank_tells_of_a_score_beyond_its_bound() -> None:
    units = unit(50, 8)
    scores = scored(units, 0.0)
    scores[17] += 0.01
    ids, similarity = np.full((50, 3), -1, np.int64), np.full((50, 3), -np.inf, np.float32)
    broken = np.zeros(50, bool)
    everyone = np.tile(np.arange(50), (50, 1))
    bound, nothing = np.full(50, 1e-3), np.zeros_like(scores)
    topk_cpu.rank(scores, nothing, everyone, np.full(50, 50), units, units, 0, bound, ids, similarity, broken)
    assert broken.nonzero()[0].tolist() == [17]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("floor", ["none", "exact"])
def test_collect_equals_the_reference(dtype: type, floor: str, threads: int) -> None:
    units = unit(230, 6)
    units[100:140] = units[100]  # more copies than a list holds
    k, noise = 5, 1e-3
    true_ids, true_similarity = reference.nearest_rows(units, np.arange(230), units, k)
    ids, similarity = np.full((230, k), -1, np.int64), np.full((230, k), -np.inf, np.float32)
    floors = true_similarity[:, -1].copy() if floor == "exact" else similarity[:, 0].copy()
    select = np.arange(0, 230, 2)
    scores = scored(units, noise)[select].astype(dtype)
    broken = np.zeros(230, bool)
    for start in (150, 0, 70):  # in any order
        stop = {150: 230, 0: 70, 70: 150}[start]
        tile = np.ascontiguousarray(scores[:, start:stop])
        rows = units[start:stop]
        topk_cpu.collect(
            tile, select, units, np.arange(230), rows, start, noise + 1e-6, floors, ids, similarity, broken
        )
    assert np.array_equal(ids[select], true_ids[select])
    assert np.array_equal(similarity[select], true_similarity[select])
    assert (ids[1::2] == -1).all()
    assert not broken.any()
    scores[4, 100] += 3.0
    topk_cpu.collect(scores, select, units, np.arange(230), units, 0, noise + 1e-6, floors, ids, similarity, broken)
    assert broken.nonzero()[0].tolist() == [8]
