"""The CUDA kernels of neighbour lists in Numba's simulator: exactly what the oracle gives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numba import cuda
from numpy.typing import NDArray

from alimm_ops.graph import hamming_cuda, hamming_cuda_kernels, lists_cuda, lists_cuda_kernels, lists_reference
from alimm_ops.graph.hamming_reference import hamming_matrix, nearest

pytestmark = pytest.mark.cudasim

Lists = tuple[NDArray[np.int32], NDArray[np.uint16]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated thread is one of the system: small blocks are quick, and small arrays span several of them."""
    set_sizes(monkeypatch, threads=4, queue=8, seen=4)
    monkeypatch.setattr(lists_cuda, "NARROW", 3)


def set_sizes(monkeypatch: pytest.MonkeyPatch, threads: int, queue: int, seen: int) -> None:
    monkeypatch.setattr(hamming_cuda_kernels, "THREADS", threads)
    monkeypatch.setattr(lists_cuda_kernels, "QUEUE", queue)
    monkeypatch.setattr(lists_cuda_kernels, "SEEN", seen)


def make_codes(seed: int, num: int, words: int = 1, ones: float = 0.1) -> NDArray[np.uint64]:
    """Few ones give many equal distances."""
    bits = np.random.default_rng(seed).random((num, words * 64)) < ones
    return np.packbits(bits, axis=1).view(np.uint64)


def make_lists(seed: int, codes: NDArray[np.uint64], k: int, filled: float = 1.0) -> Lists:
    """Random lists with true distances; from 0 to k entries each where ``filled`` is below 1."""
    rng, num = np.random.default_rng(seed), len(codes)
    ids, dists = np.full((num, k), -1, np.int32), np.full((num, k), 65535, np.uint16)
    distances = hamming_matrix(codes, codes)
    for node in range(num):
        others = rng.permutation(np.delete(np.arange(num), node))[: k if rng.random() < filled else rng.integers(k + 1)]
        others = others[np.lexsort((others, distances[node, others]))]
        ids[node, : len(others)], dists[node, : len(others)] = others, distances[node, others]
    return ids, dists


def outputs(rows: int, k: int) -> Lists:
    """Full of rubbish."""
    return np.full((rows, k), 77, np.int32), np.full((rows, k), 77, np.uint16)


def assert_equal(found: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_this_process_simulates() -> None:
    assert "simulator" in cuda.jit.__module__


def compare_merge(ids: NDArray[np.int32], dists: NDArray[np.uint16], k: int) -> Lists:
    found = outputs(len(ids), k)
    lists_cuda.merge_lists(ids, dists, k, *found)
    assert_equal(found, lists_reference.merge_lists(ids, dists, k))
    return found


@pytest.mark.parametrize("k", [1, 4, 12])
@pytest.mark.parametrize("columns", [1, 23])
def test_merge(columns: int, k: int) -> None:
    """Few different values, so that most repeat, among them one id at two distances; some are none."""
    rng = np.random.default_rng(columns)
    ids = rng.integers(-2, 8, (4, columns)).astype(np.int32)
    dists = (ids % 3 + rng.integers(0, 2, ids.shape)).astype(np.uint16)
    compare_merge(ids, dists, k)


def test_merge_of_the_largest_values_and_of_nothing() -> None:
    ids = np.array([[2**31 - 1, 0, -1, 5, 2**31 - 1, 2**31 - 2], [-1, -(2**31), -5, -1, -1, -1]], np.int32)
    dists = np.array([[65535, 65535, 3, 65534, 65535, 65535], [0, 1, 2, 3, 4, 5]], np.uint16)
    ids_, dists_ = compare_merge(ids, dists, 5)
    assert ids_[0].tolist() == [5, 0, 2**31 - 2, 2**31 - 1, -1]
    assert dists_[0].tolist() == [65534] + [65535] * 4
    compare_merge(ids[:, :0], dists[:, :0], 3)
    compare_merge(ids[:0], dists[:0], 3)


def test_merging_the_parts_of_an_exact_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming_cuda, "MAX_BLOCKS", 2)
    codes = make_codes(0, 12)
    whole = nearest(codes, codes, 5, 0)
    parts = [nearest(codes, codes[:8], 5, -1), nearest(codes, codes[4:], 5, -1)]
    parts[1][0][parts[1][0] >= 0] += 4
    ids, dists = (np.concatenate([a, b], axis=1) for a, b in zip(*parts, strict=True))
    ids[ids == np.arange(12)[:, None]] = -1
    found = compare_merge(ids.astype(np.int32), dists, 3)
    assert_equal(found, (whole[0][:, :3], whole[1][:, :3]))


def compare_propagate(*arguments: Any) -> tuple[Any, ...]:
    rows, k = len(arguments[4]), arguments[1].shape[1]
    found = (*outputs(rows, k), np.full((rows, k), 77, np.uint8))
    lists_cuda.propagate(*arguments, *found)
    assert_equal(found, lists_reference.propagate(*arguments))
    return found


@pytest.mark.parametrize("width", [1, 3, 9])
@pytest.mark.parametrize("seed", [1, 2])
def test_propagate(seed: int, width: int) -> None:
    """Lists of every length, hops with holes and repetitions, edges old and fresh, rows in any order."""
    rng = np.random.default_rng(seed)
    codes = make_codes(seed, 16, words=seed)
    ids, dists = make_lists(seed, codes, 5, filled=0.5)
    fresh = rng.integers(0, 2, ids.shape).astype(np.uint8)
    rows = rng.permutation(16)[:6].astype(np.int32)
    hops = rng.integers(-1, 16, (6, 7)).astype(np.int32)
    hop_fresh = (rng.random(hops.shape) < 0.3).astype(np.uint8)
    compare_propagate(codes, ids, dists, fresh, rows, hops, hop_fresh, width)


def test_only_a_fresh_edge_is_followed() -> None:
    codes = np.array([[0], [1], [3], [7]], np.uint64)
    ids, dists = np.array([[1], [2], [3], [2]], np.int32), np.array([[1], [1], [1], [1]], np.uint16)
    rows, hops = np.array([0], np.int32), np.array([[1]], np.int32)
    for hop, entry in ((0, 0), (0, 1), (1, 0), (1, 1)):
        fresh = np.array([[0], [entry], [0], [0]], np.uint8)
        wide = np.concatenate([ids, -np.ones_like(ids)], axis=1), np.concatenate([dists, dists * 0 + 65535], axis=1)
        arguments = codes, *wide, np.repeat(fresh, 2, axis=1), rows, hops, np.array([[hop]], np.uint8), 2
        new_ids, _, new_fresh = compare_propagate(*arguments)
        assert new_ids.tolist() == [[1, 2 if hop or entry else -1]]
        assert new_fresh.tolist() == [[0, hop | entry]]


def test_exact_lists_stay_and_a_round_makes_others_better() -> None:
    codes = make_codes(5, 8, ones=0.3)
    exact, rows = nearest(codes, codes, 3, 0), np.arange(8, dtype=np.int32)
    flags = np.ones((8, 3), np.uint8)
    assert_equal(compare_propagate(codes, *exact, flags, rows, exact[0], flags, 3), (*exact, flags * 0))
    ids, dists = make_lists(5, codes, 3)
    _, new_dists, fresh = compare_propagate(codes, ids, dists, flags, rows, ids, flags, 3)
    assert (new_dists <= dists).all()
    assert fresh.any()


def test_propagate_without_hops_and_without_rows() -> None:
    codes = make_codes(6, 5)
    ids, dists = make_lists(6, codes, 3)
    fresh, rows = np.ones(ids.shape, np.uint8), np.array([3, 1], np.int32)
    nothing = np.zeros((2, 0), np.int32), np.zeros((2, 0), np.uint8)
    assert_equal(
        compare_propagate(codes, ids, dists, fresh, rows, *nothing, 3), (ids[rows], dists[rows], fresh[:2] * 0)
    )
    compare_propagate(codes, ids, dists, fresh, rows[:0], nothing[0][:0], nothing[1][:0], 3)
    some = np.array([[0], [2]], np.int32), np.ones((2, 1), np.uint8)
    compare_propagate(codes, ids, dists, fresh, rows, *some, 0)


def test_ids_out_of_range_are_passed_over() -> None:
    codes = make_codes(7, 4)
    ids, dists = make_lists(7, codes, 2)
    ids[0, 0], ids[1, 1] = 4, 2**31 - 1
    rows = np.array([0, -1, 4, 2**31 - 1], np.int32)
    hops = np.tile(np.array([1, 2, 4, -(2**31)], np.int32), (4, 1))
    found = (*outputs(4, 2), np.full((4, 2), 77, np.uint8))
    lists_cuda.propagate(codes, ids, dists, np.ones_like(ids, np.uint8), rows, hops, hops.astype(np.uint8), 2, *found)
    assert found[0][1:].tolist() == [[-1, -1]] * 3
    assert found[2][1:].tolist() == [[0, 0]] * 3

    found = outputs(2, 2)
    beyond = np.array([[1, 4], [2**31 - 1, 1]], np.int32)
    lists_cuda.diversify(codes, rows[:2], beyond, dists[:2], 2, 1, 1, 1, *found)
    assert found[0].tolist() == [[1, -1], [-1, -1]]

    found, work = outputs(4, 2), np.full(17, 77, np.int32)
    lists_cuda.reverse_lists(ids, dists, 4, 2, 2, 0, work, *found)
    inside = np.where((ids >= 0) & (ids < 4), ids, -1)
    assert_equal(found, lists_reference.reverse_lists(inside, dists, 4, 2, 2))


@pytest.mark.parametrize("keep", [2, 9])
@pytest.mark.parametrize(("width", "first_node"), [(1, 0), (3, 4), (8, 9)])
def test_reverse(width: int, first_node: int, keep: int) -> None:
    """Lists of a part of the nodes, and half of all edges into node 0."""
    codes = make_codes(width, 14)
    ids, dists = make_lists(width, codes, 5, filled=0.7)
    ids[::2, 0] = np.where(ids[::2, 0] >= 0, 0, -1)
    ids[:, 1:][ids[:, 1:] == 0] = -1
    part = slice(first_node, first_node + 5 if first_node else 14)
    work = np.full(lists_cuda.reverse_work(len(ids[part]), 5, 14, width) + 1, 77, np.int32)
    found = outputs(14, keep)
    lists_cuda.reverse_lists(ids[part], dists[part], 14, width, keep, first_node, work, *found)
    assert_equal(found, lists_reference.reverse_lists(ids[part], dists[part], 14, width, keep, first_node))
    assert work[-1] == 77


def test_reverse_of_nothing_and_the_last_nodes() -> None:
    for rows, columns, nodes, width in ((0, 3, 2, 3), (2, 0, 3, 4), (2, 2, 2, 0), (2, 2, 0, 2), (1, 2, 2, 2)):
        ids, dists = np.full((rows, columns), nodes - 1, np.int32), np.ones((rows, columns), np.uint16)
        ids[:, :1] = 0 if nodes else -1
        found = outputs(nodes, 2)
        work = np.full(lists_cuda.reverse_work(rows, columns, nodes, width), 77, np.int32)
        first_node = 2**31 - rows
        lists_cuda.reverse_lists(ids, dists, nodes, width, 2, first_node, work, *found)
        assert_equal(found, lists_reference.reverse_lists(ids, dists, nodes, width, 2, first_node))


def compare_diversify(codes: NDArray[np.uint64], ids: Any, dists: Any, *limits: int) -> Lists:
    rows = np.arange(len(ids), dtype=np.int32)
    found = outputs(len(ids), limits[0])
    lists_cuda.diversify(codes, rows, ids, dists, *limits, *found)
    assert_equal(found, lists_reference.diversify(codes, rows, ids, dists, *limits))
    return found


@pytest.mark.parametrize("limits", [(3, 1, 1, 1), (9, 6, 5, 0), (256, 2, 1, 3), (5, 1, 2, 12)])
@pytest.mark.parametrize("ones", [0.5, 0.1])
def test_diversify(ones: float, limits: tuple[int, int, int, int]) -> None:
    """Codes in pairs: some entries go and some stay, but where all are to stay; one list is empty."""
    codes = make_codes(8, 9, 1, ones)
    codes[5:] = codes[:4] ^ np.uint64(1)
    ids, dists = nearest(codes, codes, 8, 0)
    ids[3:, 6:], dists[3:, 6:] = -1, 65535
    ids[5], dists[5] = -1, 65535
    found, _ = compare_diversify(codes, ids, dists, *limits)
    room = (ids >= 0).sum(axis=1).clip(0, limits[0]).sum()
    assert 0 < (found >= 0).sum() <= room
    if limits[0] >= 9:
        assert (found >= 0).sum() < room
    if limits[3] == 12:
        assert (found >= 0).sum() == room


def test_of_codes_equally_far_from_one_another_one_stays() -> None:
    """The rule for ties: they are as near to the first of them as to the node. A farther one stays where it is as far
    from that as from the node, since the two are not equally far from the node.
    """
    codes = np.array([[3 << 2 * bit] for bit in range(6)] + [[3 << 20 | 3 << 30]], np.uint64)
    ids, dists = nearest(codes, codes, 6, 0)
    found, _ = compare_diversify(codes, ids, dists, 6, 1, 1, 1)
    assert found[:6].tolist() == [[1, 6] + [-1] * 4] + [[0, 6] + [-1] * 4] * 5


def test_blocks_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    set_sizes(monkeypatch, threads=128, queue=256, seen=1024)
    monkeypatch.setattr(lists_cuda, "NARROW", 32)
    codes = make_codes(9, 40, 4)
    ids, dists = make_lists(9, codes, 30)
    fresh, rows = np.ones(ids.shape, np.uint8), np.array([17], np.int32)
    compare_propagate(codes, ids, dists, fresh, rows, ids[rows], fresh[rows], 30)
    compare_merge(np.tile(ids[:1], 9), np.tile(dists[:1], 9) + np.arange(270, dtype=np.uint16) // 9, 256)
    compare_diversify(codes, ids[:1], dists[:1], 20, 3, 2, 2)


def test_wrong_arguments_are_told() -> None:
    codes = make_codes(1, 4)
    ids, dists = make_lists(1, codes, 2)
    rows, flags = np.arange(4, dtype=np.int32), np.ones((4, 2), np.uint8)
    out, work = outputs(4, 2), np.zeros(20, np.int32)
    for arguments, message in (
        ((ids, dists, 0, *out), "k must be from 1 to 256 on the device, got 0"),
        ((ids, dists[:3], 2, *out), r"dists must be uint16 of shape \(4, 2\), got uint16 of shape \(3, 2\)"),
        ((ids, dists, 1, *out), r"new_ids must be int32 of shape \(4, 1\)"),
        ((ids.astype(np.int64), dists, 2, *out), "ids must be int32"),
    ):
        with pytest.raises(ValueError, match=message):
            lists_cuda.merge_lists(*arguments)
    good: list[Any] = [codes, ids, dists, flags, rows, ids, flags, 2, *out, flags.copy()]
    for place, value, message in (
        (0, codes[:3], r"ids must be int32 of shape \(3, any\)"),
        (3, flags[:, :1], "fresh must be uint8"),
        (5, ids[:2], r"hops must be int32 of shape \(4, any\)"),
        (6, flags.astype(bool), "hop_fresh must be uint8"),
        (7, -1, "width must be from 0"),
        (10, flags[:2], "new_fresh must be uint8"),
    ):
        with pytest.raises(ValueError, match=message):
            lists_cuda.propagate(*good[:place], value, *good[place + 1 :])
    for arguments, message in (
        ((ids, dists, 4, 2, 257, 0, work, *out), "keep must be from 1 to 256"),
        ((ids, dists, 4, 2, 2, 0, work[:16], *out), "work must have at least 17 elements, got 16"),
        ((ids, dists, 4, 2, 2, 2**31 - 3, work, *out), "nodes must be from 0 to"),
        ((ids, dists, 5, 2, 2, 0, work, *out), r"new_ids must be int32 of shape \(5, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            lists_cuda.reverse_lists(*arguments)
    with pytest.raises(ValueError, match="max_degree must be from 1 to 256"):
        lists_cuda.diversify(codes, rows, ids, dists, 300, 1, 1, 1, *out)
    with pytest.raises(ValueError, match="alpha_den must be from 0"):
        lists_cuda.diversify(codes, rows, ids, dists, 2, 1, -1, 1, *out)
