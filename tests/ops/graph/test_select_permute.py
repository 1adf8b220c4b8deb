"""The permutation without a table and the hash of ids: bijections, equal in NumPy and Numba, even over keys."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from scipy import stats

from alimm_ops.graph import permute

MASK = 0xFFFFFFFF
keys = st.integers(0, 2**64 - 1)


def slow_position(index: int, size: int, key: int) -> int:
    """From the formula, in whole numbers without a width."""
    words = [int(word) for word in permute.key_words(key)]
    bits = 10
    while 1 << bits < size:
        bits += 1
    low, high = bits // 2, bits - bits // 2

    def f(value: int, word: int, width: int) -> int:
        g = (value ^ word) * 0x9E3779B1 & MASK
        h = (g ^ (g >> 15)) * 0x85EBCA77 & MASK
        return h >> (32 - width)

    while True:
        left, right = index >> low, index % (1 << low)
        left ^= f(right, words[0], high)
        right ^= f(left, words[1], low)
        left ^= f(right, words[2], high)
        right ^= f(left, words[3], low)
        index = (left << low) + right
        if index < size:
            return index


@njit
def in_numba(indices, size, bits, words, out, hashes):
    for place in range(indices.size):
        out[place] = permute.position(indices[place], size, bits, words)
        hashes[place] = permute.id_hash(indices[place], words)


@njit
def count_pairs(count, size, bits, words, together):
    drawn = np.empty(count, np.int64)
    for index in range(count):
        drawn[index] = permute.position(index, size, bits, words)
    for one in drawn:
        for other in drawn:
            together[one, other] += 1


@given(st.integers(1, 1500), keys)
def test_a_bijection_that_equals_the_formula(size: int, key: int) -> None:
    found = permute.positions(np.arange(size), size, key)
    assert np.array_equal(np.sort(found), np.arange(size))
    assert found[:20].tolist() == [slow_position(index, size, key) for index in range(min(size, 20))]


@given(st.sampled_from([1, 2, 3, 5, 64, 65, 10**6, 2**30 + 1, 2**31 - 1]), keys, st.data())
def test_numba_equals_numpy(size: int, key: int, data: st.DataObject) -> None:
    indices = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20)))
    out, hashes = np.empty(len(indices), np.int64), np.empty(len(indices), np.uint32)
    in_numba(indices, size, permute.domain_bits(size), permute.key_words(key), out, hashes)
    assert out.tolist() == permute.positions(indices, size, key).tolist()
    assert out.tolist() == [slow_position(int(index), size, key) for index in indices]
    assert hashes.tolist() == permute.id_hashes(indices, key).tolist()


@given(keys)
def test_hashes_of_different_ids_differ(key: int) -> None:
    assert len(np.unique(permute.id_hashes(np.arange(5000), key))) == 5000


def test_every_order_of_few_ids_is_as_likely() -> None:
    """The first two places of a permutation of five, over keys that are consecutive numbers."""
    count = dict.fromkeys(permutations(range(5), 2), 0)
    for key in range(20_000):
        words = permute.key_words(key)
        first, second = (int(permute.position(index, 5, permute.domain_bits(5), words)) for index in range(2))
        count[first, second] += 1
    assert 0.0001 < stats.chisquare(list(count.values())).pvalue < 0.9999


@pytest.mark.parametrize("size", [7, 100, 1000])
def test_where_an_id_goes_is_even_over_keys(size: int) -> None:
    rounds, bits = 20_000, permute.domain_bits(size)
    for index in (0, size - 1):
        count = np.zeros(size)
        for key in range(rounds):
            count[permute.position(index, size, bits, permute.key_words(key))] += 1
        assert 0.0001 < stats.chisquare(count).pvalue < 0.9999


def test_pairs_are_drawn_together_as_often_as_in_a_fair_draw() -> None:
    """The first 10 of 30: each pair in a share 10 * 9 / (30 * 29) of the draws. On 8 bits the deviation is 1.3."""
    rounds, together, bits = 60_000, np.zeros((30, 30)), permute.domain_bits(30)
    for key in range(rounds):
        count_pairs(10, 30, bits, permute.key_words(key), together)
    share = 10 * 9 / (30 * 29)
    z = (together[np.triu_indices(30, 1)] - rounds * share) / np.sqrt(rounds * share * (1 - share))
    assert abs(z).max() < 4.5
    assert 0.85 < z.std() < 1.15


def test_keys_out_of_range() -> None:
    for key in (-1, 2**64):
        with pytest.raises(ValueError, match="from 0 to"):
            permute.key_words(key)
    assert permute.key_words(np.uint64(2**64 - 1)) != permute.key_words(0)
