"""Hamming distances, nearest codes and majorities: the kernels against the NumPy reference, both against slow loops."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import example, given, settings
from numba import njit
from numpy.typing import NDArray

from alimm_ops.graph import hamming_cpu
from alimm_ops.graph import hamming_reference as reference

ALL_ONES = 2**64 - 1


def make_codes(seed: int, num: int, words: int, ones: float = 0.5) -> NDArray[np.uint64]:
    """With all bits of a word in use; few ``ones`` give many equal distances and equal codes."""
    bits = np.random.default_rng(seed).random((num, words * 64)) < ones
    return np.packbits(bits, axis=1).view(np.uint64)


def distance(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> int:
    return sum((int(x) ^ int(y)).bit_count() for x, y in zip(a, b, strict=True))


def same(found: tuple[NDArray[Any], ...], expected: tuple[NDArray[Any], ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)


@njit
def counted(words: NDArray[np.uint64]) -> NDArray[np.uint64]:
    result = np.empty_like(words)
    for index in range(words.size):
        result[index] = hamming_cpu.popcount(words[index])
    return result


@njit
def kind_of_popcount(word: np.uint64) -> np.uint64:
    return hamming_cpu.popcount(word)


def test_popcount() -> None:
    edges = [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**63 - 1, ALL_ONES, ALL_ONES - 1, 0x5555555555555555]
    singles = [1 << bit for bit in range(64)]
    random = np.random.default_rng(0).integers(0, 2**64, 500, np.uint64).tolist()
    words = np.array(edges + singles + random, np.uint64)
    assert counted(words).tolist() == [word.bit_count() for word in words.tolist()]


def test_popcount_stays_a_whole_number() -> None:
    """Signed and unsigned words together would be float64: every distance would be rounded at 53 bits, and slow."""
    kind_of_popcount(np.uint64(7))
    (signature,) = kind_of_popcount.nopython_signatures
    assert str(signature.return_type) == "uint64"


@pytest.mark.parametrize("words", range(1, 17))
def test_matrix(words: int) -> None:
    """More codes than two tiles, and not a multiple of the vector length."""
    queries, base = make_codes(words, 3, words), make_codes(words + 50, 2 * hamming_cpu.TILE + 21, words)
    base[-1] = ~queries[0]
    base[5] = queries[1]
    found = hamming_cpu.hamming_matrix(queries, base)
    same((found,), (reference.hamming_matrix(queries, base),))
    assert found[0, -1] == 64 * words
    assert found[1, 5] == 0
    for column in (0, 1, 511, 512, 1023, 1024, len(base) - 2):
        assert found[2, column] == distance(queries[2], base[column])


def test_matrix_of_strided_readonly_and_empty_codes() -> None:
    base = make_codes(1, 40, 6)
    base.setflags(write=False)
    for queries, others in ((base[::3, ::2], base[1::2, ::2]), (base[:0], base), (base, base[:0]), (base.T[:6].T,) * 2):
        same((hamming_cpu.hamming_matrix(queries, others),), (reference.hamming_matrix(queries, others),))


@settings(max_examples=60)
@given(st.lists(st.lists(st.sampled_from([0, 1, 3, 2**63, ALL_ONES, 0xF0F0]), min_size=2, max_size=2), min_size=1))
def test_it_is_a_metric(rows: list[list[int]]) -> None:
    codes = np.array(rows, np.uint64)
    matrix = hamming_cpu.hamming_matrix(codes, codes).astype(int)
    assert np.array_equal(matrix, matrix.T)
    assert np.array_equal(matrix == 0, (codes[:, None] == codes[None]).all(axis=2))
    assert (matrix[:, None, :] <= matrix[:, :, None] + matrix[None]).all()  # h(i, j) <= h(i, m) + h(m, j)


@settings(max_examples=80)
@given(
    seed=st.integers(0, 999),
    num=st.integers(0, 120),
    words=st.integers(1, 3),
    k=st.integers(1, 140),
    ones=st.sampled_from([0.01, 0.05, 0.5]),
    own=st.booleans(),
)
@example(seed=0, num=1, words=1, k=1, ones=0.5, own=True)
@example(seed=0, num=32, words=1, k=32, ones=0.01, own=False)
@example(seed=0, num=33, words=1, k=33, ones=0.01, own=True)
def test_nearest_is_a_full_sort(seed: int, num: int, words: int, k: int, ones: float, own: bool) -> None:
    base = make_codes(seed, num, words, ones)
    first_own = num // 3 if own else -1
    queries = base[num // 3 : num // 3 + 4] if own else make_codes(seed + 1, 4, words, ones)
    ids, dists = hamming_cpu.nearest(queries, base, k, first_own)
    same((ids, dists), reference.nearest(queries, base, k, first_own))
    for row, query in enumerate(queries):
        others = [node for node in range(num) if not own or node != first_own + row]
        entries = sorted((distance(query, base[node]), node) for node in others)[:k]
        assert list(zip(dists[row].tolist(), ids[row].tolist(), strict=True)) == entries + [(65535, -1)] * (
            k - len(entries)
        )


@pytest.mark.parametrize("k", [1, 7, 20, 600])
def test_nearest_of_many_codes(k: int) -> None:
    """The bound is guessed from a part of the row; here that part is the far one, then the near one, then all alike."""
    base = make_codes(3, 3000, 2)
    queries = make_codes(4, 3, 2, 0.3)
    order = np.argsort(reference.hamming_matrix(queries[:1], base)[0], kind="stable")
    for codes in (base[order], base[order[::-1]], np.repeat(base[:1], 3000, axis=0), np.repeat(base[:60], 50, axis=0)):
        same(hamming_cpu.nearest(queries, codes, k), reference.nearest(queries, codes, k))


def test_nearest_in_blocks_of_queries() -> None:
    """Each block writes over the rows of the one before, in which the own columns of other queries were struck out."""
    codes = make_codes(5, 2500, 1)
    block = (1 << 18) // (2 * 2528)
    assert 2 * block < 150
    same(hamming_cpu.nearest(codes[7:157], codes, 3, 7), reference.nearest(codes[7:157], codes, 3, 7))


def test_nearest_into_keeps_to_the_bounds_and_numbers_from_the_first_id() -> None:
    queries, base = make_codes(6, 5, 1), make_codes(7, 200, 1)
    expected_ids, expected_dists = reference.nearest(queries, base, 9)
    bounds = expected_dists[:, 4].copy()  # inclusive: ties at the bound come in
    ids, dists = np.full((5, 9), -1, np.int32), np.full((5, 9), 65535, np.uint16)
    hamming_cpu.nearest_into(queries, hamming_cpu.word_major(base), 1000, -1, bounds, ids, dists)
    within = expected_dists <= bounds[:, None]
    assert not within.all()
    assert np.array_equal(ids, np.where(within, expected_ids + 1000, -1))
    assert np.array_equal(dists, np.where(within, expected_dists, 65535))


def test_arguments() -> None:
    good = make_codes(0, 3, 2)
    for call in (hamming_cpu.hamming_matrix, lambda a, b: hamming_cpu.nearest(a, b, 1)):
        for queries, base, message in (
            (good, good[:, :1], "queries have 2 words, base has 1"),
            (good, good.astype(np.int64), "base must be uint64"),
            (good[0], good, "queries must be uint64"),
            (np.zeros((2, 17), np.uint64), np.zeros((2, 17), np.uint64), "1 to 16 words"),
            (good[:, :0], good[:, :0], "1 to 16 words"),
        ):
            with pytest.raises(ValueError, match=message):
                call(queries, base)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        hamming_cpu.nearest(good, good, 0)
    labels = np.zeros(3, np.int32)
    for wrong in (labels - 2, labels + 3):
        with pytest.raises(ValueError, match="labels must be from -1 to 2"):
            hamming_cpu.majority(good, wrong, good)
    with pytest.raises(ValueError, match="expected 3 labels, got 2"):
        hamming_cpu.majority(good, labels[1:], good)


@pytest.mark.parametrize("words", [1, 2, 16])
@pytest.mark.parametrize("seed", range(4))
def test_majority(words: int, seed: int) -> None:
    """Few codes a centre: ties at most bits of some, none of others, codes of no centre, and a centre without any."""
    rng = np.random.default_rng(seed)
    codes, old = make_codes(seed, 30, words, 0.4), make_codes(seed + 9, 7, words)
    labels = rng.choice(np.array([-1, 0, 1, 2, 4, 5, 6], np.int32), 30)
    labels[:2], labels[labels == 6] = 5, 0
    labels[2:4] = 6  # exactly two codes: a tie wherever they differ
    centres, counts = hamming_cpu.majority(codes, labels, old)
    same((centres, counts), reference.majority(codes, labels, old))
    assert counts[3] == 0
    assert counts[6] == 2
    assert np.array_equal(centres[3], old[3])
    assert np.array_equal(centres[6], (codes[2] & codes[3]) | ((codes[2] ^ codes[3]) & old[6]))
    for centre, word, bit in rng.integers(0, (7, words, 64), (60, 3)).tolist():
        votes = [int(codes[row, word]) >> bit & 1 for row in range(30) if labels[row] == centre]
        kept = int(old[centre, word]) >> bit & 1
        wanted = kept if 2 * sum(votes) == len(votes) else int(2 * sum(votes) > len(votes))
        assert int(centres[centre, word]) >> bit & 1 == wanted


def test_majority_of_nothing() -> None:
    old = make_codes(0, 3, 2)
    for codes, centres in ((old[:0], old), (old, old[:0])):
        labels = np.full(len(codes), -1, np.int32)
        same(hamming_cpu.majority(codes, labels, centres), reference.majority(codes, labels, centres))


def test_majority_leaves_its_arguments_alone() -> None:
    codes, old = make_codes(0, 9, 1), make_codes(1, 2, 1)
    before = old.copy()
    hamming_cpu.majority(codes, np.zeros(9, np.int32), old)
    assert np.array_equal(old, before)


@settings(max_examples=25)
@given(st.integers(0, 999), st.sampled_from([0.05, 0.5]), st.integers(1, 9))
def test_steps_of_k_means_never_make_it_worse(seed: int, ones: float, num_centres: int) -> None:
    codes = make_codes(seed, 60, 1, ones)
    centres = codes[:num_centres]
    objective = []
    for _ in range(6):
        ids, dists = hamming_cpu.nearest(codes, centres, 1)
        objective.append(int(dists.sum()))
        centres, counts = hamming_cpu.majority(codes, ids[:, 0], centres)
        assert counts.sum() == 60
        moved = reference.hamming_matrix(codes, centres)[np.arange(60), ids[:, 0]]
        objective.append(int(moved.sum()))
    assert objective == sorted(objective, reverse=True)
