"""Hamming distances between binary codes, in NumPy: the oracle of ``hamming_cpu.py`` and ``hamming_cuda.py``.

Codes are uint64 arrays (N, W); a distance is the number of bits in which two codes differ, uint16. Everything is
ordered by (distance, index): the smaller index goes first where distances are equal, so a result has no second form.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_WORDS = 16
"""64-bit words of the longest code: 1,024 bits."""
NO_ID = -1
NO_DISTANCE = 65535
"""What pads a row that has fewer neighbours than columns."""


def check_pair(queries_QW: NDArray[np.uint64], base_NW: NDArray[np.uint64]) -> None:
    """Raise ValueError unless both are codes of one width."""
    for name, codes in (("queries", queries_QW), ("base", base_NW)):
        if codes.ndim != 2 or codes.dtype != np.uint64:
            raise ValueError(f"{name} must be uint64 of shape (count, words), got {codes.dtype} of shape {codes.shape}")
    if queries_QW.shape[1] != base_NW.shape[1]:
        raise ValueError(f"queries have {queries_QW.shape[1]} words, base has {base_NW.shape[1]}")
    if not 1 <= base_NW.shape[1] <= MAX_WORDS:
        raise ValueError(f"codes must have 1 to {MAX_WORDS} words of 64 bits, got {base_NW.shape[1]}")
    if len(base_NW) >= 2**31:
        raise ValueError(f"base holds {len(base_NW)} codes, at most 2**31 - 1 fit an index: use shards")


def hamming_matrix(queries_QW: NDArray[np.uint64], base_NW: NDArray[np.uint64]) -> NDArray[np.uint16]:
    """All distances, (Q, N)."""
    check_pair(queries_QW, base_NW)
    query_bits = np.unpackbits(np.ascontiguousarray(queries_QW).view(np.uint8), axis=1)
    base_bits = np.unpackbits(np.ascontiguousarray(base_NW).view(np.uint8), axis=1)
    return (query_bits[:, None, :] != base_bits[None, :, :]).sum(axis=2).astype(np.uint16)


def nearest(
    queries_QW: NDArray[np.uint64], base_NW: NDArray[np.uint64], k: int, first_own: int = -1
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """The k nearest codes of each query, exactly.

    Args:
        queries_QW: codes.
        base_NW: codes; ids are their indices.
        k: at least 1; more than N pads with (-1, 65535).
        first_own: where not -1, query q is code ``first_own + q`` of the base and is left out of its own row.

    Returns:
        ids int32 and distances uint16, both (Q, k), sorted by (distance, id).
    """
    distances_QN = hamming_matrix(queries_QW, base_NW)
    ids = np.full((len(queries_QW), k), NO_ID, np.int32)
    distances = np.full((len(queries_QW), k), NO_DISTANCE, np.uint16)
    for row, all_distances in enumerate(distances_QN):
        order = np.lexsort((np.arange(len(base_NW)), all_distances))
        if first_own >= 0:
            order = order[order != first_own + row]
        order = order[:k]
        ids[row, : len(order)] = order
        distances[row, : len(order)] = all_distances[order]
    return ids, distances


def majority(
    codes_NW: NDArray[np.uint64], labels_N: NDArray[np.int32], old_centres_MW: NDArray[np.uint64]
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """One step of binary k-means: each centre's bit becomes that of most of its codes.

    Args:
        codes_NW: codes.
        labels_N: centre of each, in [0, M); -1 belongs to none.
        old_centres_MW: centres so far; a tie keeps the old bit, an empty centre all of them.

    Returns:
        New centres (M, W) and how many codes each has, int64 (M,).
    """
    check_pair(codes_NW, old_centres_MW)
    old = np.unpackbits(np.ascontiguousarray(old_centres_MW).view(np.uint8), axis=1)
    bits = np.unpackbits(np.ascontiguousarray(codes_NW).view(np.uint8), axis=1).astype(np.int64)
    new, counts = old.copy(), np.zeros(len(old), np.int64)
    for centre in range(len(old)):
        own = bits[labels_N == centre]
        counts[centre] = len(own)
        ones = own.sum(axis=0)
        new[centre] = np.where(2 * ones == len(own), old[centre], 2 * ones > len(own))
    return np.packbits(new, axis=1).view(np.uint64), counts
