"""Neighbour lists: the kernels against the NumPy reference, and what must hold of merging and propagating."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from alimm_ops.graph import hamming_cpu, lists_cpu
from alimm_ops.graph import lists_reference as reference
from alimm_ops.graph.hamming_reference import hamming_matrix
from alimm_ops.graph.hamming_reference import nearest as exact_lists

Lists = reference.Lists
seeds = st.integers(0, 9999)
few_ones = st.sampled_from([0.02, 0.1, 0.5])


def make_codes(seed: int, num: int, words: int = 1, ones: float = 0.5) -> NDArray[np.uint64]:
    """Few ``ones`` give many equal distances and equal codes."""
    bits = np.random.default_rng(seed).random((num, words * 64)) < ones
    return np.packbits(bits, axis=1).view(np.uint64)


def same(found: tuple[NDArray[Any], ...], expected: tuple[NDArray[Any], ...]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.array_equal(a, b)


def check_lists(ids: NDArray[np.int32], dists: NDArray[np.uint16], owners: NDArray[Any] | None = None) -> None:
    """Sorted, distinct, without the owner, padded at the end."""
    for row in range(len(ids)):
        entries = list(zip(dists[row].tolist(), ids[row].tolist(), strict=True))
        real = [entry for entry in entries if entry[1] >= 0]
        assert entries == sorted(set(real)) + [(65535, -1)] * (len(entries) - len(real))
        assert owners is None or owners[row] not in ids[row]


def random_lists(seed: int, codes: NDArray[np.uint64], k: int) -> Lists:
    """Each node knows up to k random others, at their true distances."""
    rng, num = np.random.default_rng(seed), len(codes)
    matrix = hamming_matrix(codes, codes)
    ids = np.array([rng.choice(np.delete(np.arange(num), node), k, replace=k >= num) for node in range(num)], np.int32)
    ids[rng.random(ids.shape) < 0.2] = -1
    dists = np.where(ids >= 0, np.take_along_axis(matrix, np.maximum(ids, 0), axis=1), 65535).astype(np.uint16)
    return reference.merge_lists(ids, dists, k)


def random_entries(seed: int, rows: int, columns: int, nodes: int) -> Lists:
    """In any order, repeated, with holes; one node is always equally far."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(-1, nodes, (rows, columns)).astype(np.int32)
    dists = np.where(ids >= 0, ids * 7 % 4, 65535).astype(np.uint16)
    return ids, dists


def joined(*lists: Lists) -> Lists:
    return np.concatenate([ids for ids, _ in lists], axis=1), np.concatenate([dists for _, dists in lists], axis=1)


@settings(max_examples=60)
@given(seed=seeds, columns=st.integers(0, 14), nodes=st.integers(1, 30), k=st.integers(1, 16))
def test_merge(seed: int, columns: int, nodes: int, k: int) -> None:
    given_lists = random_entries(seed, 5, columns, nodes)
    found = lists_cpu.merge_lists(*given_lists, k)
    same(found, reference.merge_lists(*given_lists, k))
    check_lists(*found)


@settings(max_examples=40)
@given(seed=seeds, k=st.integers(1, 6))
def test_merging_is_commutative_associative_and_idempotent(seed: int, k: int) -> None:
    merge = lambda *lists: lists_cpu.merge_lists(*joined(*lists), k)
    a, b, c = (merge(random_entries(seed + part, 4, 5, 12)) for part in range(3))
    same(merge(a, b), merge(b, a))
    same(merge(merge(a, b), c), merge(a, merge(b, c)))
    same(merge(a, a), a)
    same(merge(merge(a, b), b), merge(a, b))
    same(merge(merge(a, b), c), merge(a, b, c))  # no place is lost to one that is turned away later


@settings(max_examples=60)
@given(
    seed=seeds,
    num=st.integers(2, 40),
    words=st.sampled_from([1, 3]),
    k=st.integers(1, 9),
    width=st.integers(0, 11),
    ones=few_ones,
    fresh_part=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_propagate(seed: int, num: int, words: int, k: int, width: int, ones: float, fresh_part: float) -> None:
    """Hops may be any nodes, with holes at any place; rows come in any order."""
    rng, codes = np.random.default_rng(seed), make_codes(seed, num, words, ones)
    ids, dists = random_lists(seed, codes, k)
    fresh = ((rng.random(ids.shape) < fresh_part) & (ids >= 0)).astype(np.uint8)
    rows = rng.permutation(num)[: rng.integers(0, num + 1)].astype(np.int32)
    hops = rng.integers(-1, num, (len(rows), 7)).astype(np.int32)
    hop_fresh = (rng.random(hops.shape) < fresh_part).astype(np.uint8)
    arguments = (codes, ids, dists, fresh, rows, hops, hop_fresh, width)
    before = [array.copy() for array in arguments[:-1]]
    found = lists_cpu.propagate(*arguments)
    same(found, reference.propagate(*arguments))
    same(tuple(arguments[:-1]), tuple(before))
    check_lists(found[0], found[1], rows)
    assert (found[1] <= dists[rows]).all()  # no distance at any place increases, so the k-th one does not
    if not fresh_part:
        same(found, (ids[rows], dists[rows], np.zeros((len(rows), k), np.uint8)))
    for row, node in enumerate(rows):
        assert np.array_equal(found[2][row], (found[0][row] >= 0) & ~np.isin(found[0][row], ids[node]))


@settings(max_examples=20)
@given(seed=seeds, ones=few_ones, k=st.integers(1, 8))
def test_the_exact_graph_is_a_fixed_point(seed: int, ones: float, k: int) -> None:
    codes = make_codes(seed, 30, 1, ones)
    ids, dists = exact_lists(codes, codes, k, 0)
    all_fresh = np.ones_like(ids, np.uint8)
    hops = np.tile(np.arange(30, dtype=np.int32), (30, 1))
    everyone = np.arange(30, dtype=np.int32)
    found = lists_cpu.propagate(codes, ids, dists, all_fresh, everyone, hops, np.ones_like(hops, np.uint8), k)
    same(found, (ids, dists, np.zeros_like(all_fresh)))


def test_fresh_flags_change_no_result_over_rounds() -> None:
    """Looking only at pairs with a fresh edge gives, round after round, what looking at all pairs gives."""
    codes = make_codes(8, 60, 2)
    everyone, k = np.arange(60, dtype=np.int32), 5
    ids, dists = random_lists(8, codes, k)
    lazy = (ids, dists, (ids >= 0).astype(np.uint8))
    eager = lazy
    changes = []
    for _ in range(6):
        ones = np.ones_like(lazy[2])
        thorough = lists_cpu.propagate(codes, *eager[:2], ones, everyone, eager[0], ones, k)
        lazy = lists_cpu.propagate(codes, *lazy, everyone, lazy[0], lazy[2], k)
        same(lazy, thorough)
        eager = thorough
        changes.append(int(lazy[2].sum()))
    assert changes[0] > 30
    assert changes[-1] < changes[0]


def test_propagate_passes_on_a_chain() -> None:
    """0 knows 1, 1 knows 2 and 3: 0 learns of both, in the order of distance, and 1 stays."""
    codes = np.array([[0], [1], [3], [2]], np.uint64)
    ids = np.array([[1, -1, -1], [2, 3, -1], [-1] * 3, [-1] * 3], np.int32)
    dists = np.array([[1, 65535, 65535], [1, 2, 65535], [65535] * 3, [65535] * 3], np.uint16)
    hops, flags = np.array([[-1, 1]], np.int32), np.array([[1, 1]], np.uint8)
    found = lists_cpu.propagate(codes, ids, dists, np.zeros_like(ids, np.uint8), np.zeros(1, np.int32), hops, flags, 3)
    assert [part.tolist() for part in found] == [[[1, 3, 2]], [[1, 1, 2]], [[0, 1, 1]]]


@settings(max_examples=60)
@given(
    seed=seeds,
    num=st.integers(2, 40),
    k=st.integers(1, 8),
    width=st.integers(0, 9),
    keep=st.integers(1, 6),
    first_node=st.sampled_from([0, 3, 2**31 - 41]),
)
def test_reverse_lists(seed: int, num: int, k: int, width: int, keep: int, first_node: int) -> None:
    ids, dists = random_lists(seed, make_codes(seed, num, 1, 0.05), k)
    found = lists_cpu.reverse_lists(ids, dists, num, width, keep, first_node)
    same(found, reference.reverse_lists(ids, dists, num, width, keep, first_node))
    check_lists(*found)
    for node in range(num):
        owners = {row + first_node for row in range(num) if node in ids[row, :width]}
        assert set(found[0][node].tolist()) - {-1} <= owners
        assert (found[0][node] >= 0).sum() == min(len(owners), keep)


def test_reverse_lists_of_parts_merge_to_those_of_the_whole() -> None:
    ids, dists = random_lists(3, make_codes(3, 40, 1, 0.1), 6)
    parts = [lists_cpu.reverse_lists(ids[s : s + 10], dists[s : s + 10], 40, 5, 4, s) for s in range(0, 40, 10)]
    same(lists_cpu.merge_lists(*joined(*parts), 4), lists_cpu.reverse_lists(ids, dists, 40, 5, 4))


@settings(max_examples=60)
@given(
    seed=seeds,
    num=st.integers(2, 40),
    words=st.sampled_from([1, 2]),
    ones=few_ones,
    max_degree=st.integers(1, 12),
    alpha=st.sampled_from([(1, 1), (6, 5), (2, 1), (1, 0), (0, 1)]),
    min_near=st.integers(0, 5),
)
def test_diversify(
    seed: int, num: int, words: int, ones: float, max_degree: int, alpha: tuple[int, int], min_near: int
) -> None:
    rng, codes = np.random.default_rng(seed), make_codes(seed, num, words, ones)
    ids, dists = random_lists(seed, codes, 12)
    rows = rng.permutation(num)[: rng.integers(0, num + 1)].astype(np.int32)
    arguments = (codes, rows, ids[rows], dists[rows], max_degree, *alpha, min_near)
    found = lists_cpu.diversify(*arguments)
    same(found, reference.diversify(*arguments))
    check_lists(*found, rows)
    for row, node in enumerate(rows):
        assert set(found[0][row].tolist()) - {-1} <= set(ids[node].tolist())
        near = min(min_near, max_degree, int((ids[node] >= 0).sum()))
        assert np.array_equal(found[0][row, :near], ids[node, :near])


@pytest.mark.parametrize("min_near", [1, 2, 4])
def test_of_codes_all_equally_far_only_the_nearest_few_stay(min_near: int) -> None:
    """A clique: code i has only bit i set, so all are 2 apart. No edge is nearer than another, but one is enough."""
    codes = (np.uint64(1) << np.arange(9, dtype=np.uint64))[:, None]
    ids, dists = exact_lists(codes, codes, 8, 0)
    assert set(dists.ravel().tolist()) == {2}
    arguments = (codes, np.arange(9, dtype=np.int32), ids, dists, 8, 1, 1, min_near)
    found = lists_cpu.diversify(*arguments)
    same(found, reference.diversify(*arguments))
    assert np.array_equal(found[0][:, :min_near], ids[:, :min_near])
    assert (found[0][:, min_near:] == -1).all()


def test_diversify_drops_what_is_behind_a_nearer_one() -> None:
    """From node 0, 2 lies behind 1, and 3 elsewhere. h(1, 2) = 2 and h(0, 2) = 3: an alpha of 3 / 2 keeps 2."""
    codes = np.array([[0], [0b1], [0b111], [0b1111 << 20]], np.uint64)
    rows, ids, dists = np.zeros(1, np.int32), np.array([[1, 2, 3]], np.int32), np.array([[1, 3, 4]], np.uint16)
    for alpha, min_near, expected in (
        ((1, 1), 1, [1, 3, -1]),
        ((7, 5), 1, [1, 3, -1]),
        ((3, 2), 1, [1, 2, 3]),
        ((1, 1), 2, [1, 2, 3]),
    ):
        assert lists_cpu.diversify(codes, rows, ids, dists, 3, *alpha, min_near)[0].tolist() == [expected]


@pytest.mark.parametrize("function", ["distance_between", "insert"])
def test_distances_stay_whole_numbers(function: str) -> None:
    """A signed and an unsigned word together would be float64, right but rounded and slow."""
    codes = np.array([[0], [2**64 - 1]], np.uint64)
    assert lists_cpu.distance_between(codes, 0, 1) == 64
    ids, dists = np.full(2, -1, np.int32), np.full(2, 65535, np.uint16)
    assert lists_cpu.insert(ids, dists, 0, np.int32(3), 7) == 1
    for signature in getattr(lists_cpu, function).nopython_signatures:
        assert str(signature.return_type) == "int64"


def test_nothing() -> None:
    codes, no_rows = make_codes(0, 4), np.zeros(0, np.int32)
    ids, dists = np.full((4, 3), -1, np.int32), np.full((4, 3), 65535, np.uint16)
    flags = np.zeros((4, 3), np.uint8)
    everyone = np.arange(4, dtype=np.int32)
    assert lists_cpu.merge_lists(ids[:0], dists[:0], 2)[0].shape == (0, 2)
    same(lists_cpu.propagate(codes, ids, dists, flags, everyone, ids, flags, 3), (ids, dists, flags))
    empty = lists_cpu.propagate(codes, ids, dists, flags, no_rows, ids[:0], flags[:0], 3)
    assert [part.shape for part in empty] == [(0, 3)] * 3
    same(lists_cpu.reverse_lists(ids[:0], dists[:0], 4, 3, 3), (ids, dists))
    same(lists_cpu.diversify(codes, everyone, ids, dists, 3, 1, 1, 1), (ids, dists))


def test_read_only_and_strided_arguments() -> None:
    """Arrays of a file that is mapped into memory, and columns of wider ones."""
    wide = make_codes(1, 20, 4)
    ids, dists = random_lists(1, wide[:, ::2], 6)
    rows, flags = np.arange(20, dtype=np.int32), np.ones((20, 6), np.uint8)
    for array in (wide, ids, dists, rows, flags):
        array.setflags(write=False)
    arguments = (wide[:, ::2], ids, dists, flags, rows, ids[:, ::2], flags[:, ::2], 6)
    same(lists_cpu.propagate(*arguments), reference.propagate(*arguments))
    same(lists_cpu.merge_lists(ids[:, ::2], dists[:, ::2], 4), reference.merge_lists(ids[:, ::2], dists[:, ::2], 4))
    same(lists_cpu.reverse_lists(ids, dists, 20, 4, 5), reference.reverse_lists(ids, dists, 20, 4, 5))
    arguments = (wide[:, ::2], rows, ids, dists, 4, 6, 5, 1)
    same(lists_cpu.diversify(*arguments), reference.diversify(*arguments))


def test_ids_out_of_range_never_reach_a_kernel() -> None:
    codes = make_codes(0, 5)
    ids, dists = random_lists(0, codes, 3)
    flags, rows = np.ones((5, 3), np.uint8), np.arange(5, dtype=np.int32)
    for bad in (5, -2, 2**31 - 1):
        wrong = ids.copy()
        wrong[2, 1] = bad
        for call in (
            lambda x: lists_cpu.propagate(codes, x, dists, flags, rows, ids, flags, 3),
            lambda x: lists_cpu.propagate(codes, ids, dists, flags, rows, x, flags, 3),
            lambda x: lists_cpu.propagate(codes, ids, dists, flags, x[:, 1].copy(), ids, flags, 3),
            lambda x: lists_cpu.reverse_lists(x, dists, 5, 3, 3),
            lambda x: lists_cpu.diversify(codes, rows, x, dists, 3, 1, 1, 1),
            lambda x: lists_cpu.diversify(codes, x[:, 1].copy(), ids, dists, 3, 1, 1, 1),
        ):
            with pytest.raises(ValueError, match=f"from 0 to 4, or -1; got .*{bad}"):
                call(wrong)


def test_shapes_that_do_not_fit() -> None:
    codes = make_codes(0, 5)
    ids, dists = random_lists(0, codes, 3)
    flags, rows = np.ones((5, 3), np.uint8), np.arange(5, dtype=np.int32)
    with pytest.raises(ValueError, match="expected ids and distances of 5 rows"):
        lists_cpu.merge_lists(ids, dists[:, 1:], 2)
    with pytest.raises(ValueError, match="k must be at least 1"):
        lists_cpu.merge_lists(ids, dists, 0)
    with pytest.raises(ValueError, match="keep must be at least 1"):
        lists_cpu.reverse_lists(ids, dists, 5, 3, 0)
    with pytest.raises(ValueError, match="rows must be nodes, got -1"):
        lists_cpu.propagate(codes, ids, dists, flags, rows - 1, ids, flags, 3)
    with pytest.raises(ValueError, match="expected ids and distances of 4 rows"):
        lists_cpu.diversify(codes, rows[1:], ids, dists, 3, 1, 1, 1)
    for arguments in (
        (ids[1:], dists[1:], flags[1:], rows, ids, flags),
        (ids, dists[:, 1:], flags, rows, ids, flags),
        (ids, dists, flags[:, 1:], rows, ids, flags),
        (ids, dists, flags, rows[1:], ids, flags),
        (ids, dists, flags, rows, ids, flags[:, 1:]),
    ):
        with pytest.raises(ValueError, match="expected"):
            lists_cpu.propagate(codes, *arguments, 3)


def test_the_kernels_agree_with_exact_search() -> None:
    """With every node for a hop, one round gives the exact graph."""
    codes = make_codes(2, 50, 2)
    everyone = np.arange(50, dtype=np.int32)
    start = np.roll(everyone, 1)[:, None]
    ids = np.concatenate([start, np.full((50, 6), -1, np.int32)], axis=1)
    dists = np.full(ids.shape, 65535, np.uint16)
    dists[:, 0] = hamming_matrix(codes, codes)[everyone, start[:, 0]]
    hops, ones = np.tile(everyone, (50, 1)), np.ones((50, 50), np.uint8)
    found = lists_cpu.propagate(codes, ids, dists, ones[:, :7], everyone, hops, ones, 7)
    same(found[:2], hamming_cpu.nearest(codes, codes, 7, 0))
