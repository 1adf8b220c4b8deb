# mypy: allow-untyped-defs
"""Random numbers by counter for the selection of classes: a permutation of [0, N) without a table, and a hash of ids.

The permutation is a Feistel network of four rounds on b bits, 2**b being the next power of two, at least 1024::

    x = (left, right), of ceil(b / 2) and floor(b / 2) bits
    left  ^= f(right, word_0);  right ^= f(left, word_1);  left ^= f(right, word_2);  right ^= f(left, word_3)
    f(v, word) = the upper bits of  h * C2,   h = g ^ (g >> 15),   g = (v ^ word) * C1        (all of 32 bits)

and a value outside [0, N) is sent through again until it falls inside (cycle walking; Black and Rogaway, Ciphers with
Arbitrary Finite Domains, CT-RSA 2002). The two parts may differ in width, so that from 513 ids on the domain is at most
twice as large and a value takes two rounds on average or fewer; a walk of all N takes at most 2**b of them in any case.
Four rounds on fewer than 10 bits are uneven: over 100,000 keys, ids and pairs of them are then drawn more or less
often than chance explains. From 10 bits on no such deviation was found. Enough for drawing classes, not for secrets.

`position` and `id_hash` work on one number, inside Numba kernels for the CPU and for CUDA alike; `positions` and
`id_hashes` are the same in NumPy. Everything is a pure function of a 64-bit key: no state, no order of calls.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint32
from numpy.typing import NDArray

Words = tuple[np.uint32, np.uint32, np.uint32, np.uint32, np.uint32, np.uint32]
"""Four words for the rounds of the permutation, two for the hash."""

MAX_SIZE = 2**31 - 1
"""Largest N: ids are int32."""

MIN_BITS = 10
"""Of the network, whatever N."""

C1 = 0x9E3779B1
C2 = 0x85EBCA77
_MASK = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF


def key_words(key: int) -> Words:
    """Mix a key into the words that the other functions take (splitmix64); keys may be consecutive numbers.

    Args:
        key: in [0, 2**64).

    Raises:
        ValueError: the key is negative or wider than 64 bits.
    """
    key = int(key)
    if not 0 <= key <= _MASK64:
        raise ValueError(f"the key of a selection must be from 0 to 2**64 - 1, got {key}: mask it with 2**64 - 1")
    words = []
    for count in range(1, 4):
        z = (key + count * 0x9E3779B97F4A7C15) & _MASK64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK64
        z ^= z >> 31
        words += [np.uint32(z & _MASK), np.uint32(z >> 32)]
    return (words[0], words[1], words[2], words[3], words[4], words[5])


def domain_bits(size: int) -> int:
    """b, the width of the network for N = ``size``."""
    assert 0 <= size <= MAX_SIZE
    return max(MIN_BITS, (size - 1).bit_length())


@njit(inline="always")
def round_bits(value, word, width):
    """``width`` (1 to 16) pseudo-random bits of a value."""
    x = uint32(uint32(value ^ word) * uint32(C1))
    x = uint32(x ^ uint32(x >> uint32(15)))
    x = uint32(x * uint32(C2))
    return uint32(x >> uint32(uint32(32) - width))


@njit(inline="always")
def position(index, size, bits, words):
    """Where the permutation sends ``index``; both lie in [0, size).

    Args:
        index: a number in [0, size).
        size: N.
        bits: of `domain_bits`.
        words: of `key_words`.
    """
    low = uint32(uint32(bits) >> uint32(1))
    high = uint32(uint32(bits) - low)
    mask = uint32(uint32(uint32(1) << low) - uint32(1))
    x = uint32(index)
    while True:
        left = uint32(x >> low)
        right = uint32(x & mask)
        left = uint32(left ^ round_bits(right, uint32(words[0]), high))
        right = uint32(right ^ round_bits(left, uint32(words[1]), low))
        left = uint32(left ^ round_bits(right, uint32(words[2]), high))
        right = uint32(right ^ round_bits(left, uint32(words[3]), low))
        x = uint32(uint32(left << low) | right)
        if x < uint32(size):
            break
    return x


@njit(inline="always")
def id_hash(value, words):
    """32 bits that order ids at random. Different ids have different ones: under one key it is a bijection.

    Args:
        value: an id, in [0, 2**32).
        words: of `key_words`.
    """
    x = uint32(uint32(value) ^ uint32(words[4]))
    x = uint32(x ^ uint32(x >> uint32(16)))
    x = uint32(x * uint32(0x7FEB352D))
    x = uint32(x ^ uint32(words[5]))
    x = uint32(x ^ uint32(x >> uint32(15)))
    x = uint32(x * uint32(0x846CA68B))
    return uint32(x ^ uint32(x >> uint32(16)))


def positions(indices: NDArray[np.integer], size: int, key: int) -> NDArray[np.int64]:
    """`position` of each of an array of indices, in NumPy.

    Args:
        indices: any shape, in [0, size).
        size: N, at most ``MAX_SIZE``.
        key: in [0, 2**64).
    """
    words, bits = key_words(key), domain_bits(size)
    low, high = np.uint32(bits // 2), np.uint32(bits - bits // 2)
    result = np.array(indices, np.uint32)
    outside = np.ones(result.shape, bool)
    while outside.any():
        x = result[outside]
        left, right = x >> low, x & ((np.uint32(1) << low) - np.uint32(1))
        left = left ^ _round_bits(right, words[0], high)
        right = right ^ _round_bits(left, words[1], low)
        left = left ^ _round_bits(right, words[2], high)
        right = right ^ _round_bits(left, words[3], low)
        result[outside] = (left << low) | right
        outside = result >= np.uint32(size)
    return result.astype(np.int64)


def _round_bits(value: NDArray[np.uint32], word: np.uint32, width: np.uint32) -> NDArray[np.uint32]:
    x = (value ^ word) * np.uint32(C1)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(C2)
    return x >> (np.uint32(32) - width)


def id_hashes(ids: NDArray[np.integer], key: int) -> NDArray[np.uint32]:
    """`id_hash` of each of an array of ids, in NumPy.

    Args:
        ids: any shape, in [0, 2**32).
        key: in [0, 2**64).
    """
    words = key_words(key)
    x = np.array(ids, np.uint32) ^ words[4]
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = x ^ words[5]
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
