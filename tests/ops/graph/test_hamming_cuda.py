"""The CUDA kernels of the distances in Numba's simulator: exactly what the oracle gives."""

from __future__ import annotations

import numpy as np
import pytest
from numba import cuda
from numpy.typing import NDArray

from alimm_ops.graph import hamming_cuda, hamming_cuda_kernels, hamming_reference

pytestmark = pytest.mark.cudasim


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each simulated thread is one of the system: small blocks are quick, and small arrays span several of them."""
    monkeypatch.setattr(hamming_cuda_kernels, "THREADS", 4)
    monkeypatch.setattr(hamming_cuda_kernels, "TILE", 4)
    monkeypatch.setattr(hamming_cuda_kernels, "QUEUE", 8)


def make_codes(seed: int, num: int, words: int, ones: float = 0.5) -> NDArray[np.uint64]:
    """With all bits of a word in use; few ``ones`` give many equal distances and equal codes."""
    bits = np.random.default_rng(seed).random((num, words * 64)) < ones
    return np.packbits(bits, axis=1).view(np.uint64)


def nearest(
    queries: NDArray[np.uint64], base: NDArray[np.uint64], k: int, first_own: int, work_size: int
) -> tuple[NDArray[np.int32], NDArray[np.uint16]]:
    """With rubbish in scratch memory and outputs, and one more element of scratch memory that is not to be touched."""
    work = np.full(work_size + 1, 777, np.uint16)
    ids, dists = np.full((len(queries), k), 77, np.int32), np.full((len(queries), k), 77, np.uint16)
    hamming_cuda.nearest(queries, base, k, first_own, work[:-1], ids, dists)
    assert work[-1] == 777
    return ids, dists


def compare_nearest(
    queries: NDArray[np.uint64], base: NDArray[np.uint64], k: int, first_own: int = -1, queries_at_a_time: int = 99
) -> None:
    found = nearest(queries, base, k, first_own, max(len(base), 1) * queries_at_a_time)
    expected = hamming_reference.nearest(queries, base, k, first_own)
    assert np.array_equal(found[0], expected[0])
    assert np.array_equal(found[1], expected[1])


def test_this_process_simulates() -> None:
    assert "simulator" in cuda.jit.__module__


@pytest.mark.parametrize(("num_queries", "num_base", "words"), [(5, 9, 1), (1, 4, 2), (4, 1, 3), (8, 8, 16), (3, 5, 7)])
def test_matrix(num_queries: int, num_base: int, words: int) -> None:
    queries, base = make_codes(1, num_queries, words), make_codes(2, num_base, words)
    base[0] = ~queries[0]  # the largest distance
    distances = np.full((num_queries, num_base), 777, np.uint16)
    hamming_cuda.hamming_matrix(queries, base, distances)
    assert np.array_equal(distances, hamming_reference.hamming_matrix(queries, base))
    assert distances[0, 0] == 64 * words


def test_matrix_of_nothing_and_of_few_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer blocks than tiles each takes several."""
    hamming_cuda.hamming_matrix(make_codes(1, 0, 1), make_codes(1, 3, 1), np.zeros((0, 3), np.uint16))
    hamming_cuda.hamming_matrix(make_codes(1, 3, 1), make_codes(1, 0, 1), np.zeros((3, 0), np.uint16))
    monkeypatch.setattr(hamming_cuda, "MAX_BLOCKS", 2)
    queries, base = make_codes(3, 6, 2), make_codes(4, 11, 2)
    distances = np.full((6, 11), 777, np.uint16)
    hamming_cuda.hamming_matrix(queries, base, distances)
    assert np.array_equal(distances, hamming_reference.hamming_matrix(queries, base))


@pytest.mark.parametrize(("k", "first_own"), [(1, -1), (3, 2), (7, -1), (14, 0), (20, 3)])
@pytest.mark.parametrize("ones", [0.5, 0.02])
def test_nearest(k: int, first_own: int, ones: float) -> None:
    base = make_codes(5, 14, 2, ones)
    queries = base[first_own : first_own + 4] if first_own >= 0 else make_codes(6, 4, 2, ones)
    compare_nearest(queries, base, k, first_own)


def test_what_the_cases_cover() -> None:
    """Few ones give rows in which the last that is taken and the first that is left are equally far."""
    ids, dists = hamming_reference.nearest(make_codes(6, 4, 2, 0.02), make_codes(5, 14, 2, 0.02), 8)
    assert (dists[:, 6] == dists[:, 7]).any()
    assert (ids[:, 6] >= 0).all()


def test_nearest_of_equal_codes_and_codes_in_falling_order() -> None:
    """All wait in the queue at first; in falling order each step empties it."""
    compare_nearest(np.zeros((2, 1), np.uint64), np.zeros((11, 1), np.uint64), 5, 0)
    falling = np.array([[2**bits - 1] for bits in range(24, 0, -1)], np.uint64)
    compare_nearest(np.zeros((1, 1), np.uint64), falling, 6)


def test_nearest_of_nothing() -> None:
    compare_nearest(make_codes(1, 2, 1), make_codes(1, 0, 1), 3)
    compare_nearest(make_codes(1, 0, 1), make_codes(1, 5, 1), 3)
    compare_nearest(make_codes(1, 1, 1), make_codes(1, 1, 1), 2, 0)


@pytest.mark.parametrize("queries_at_a_time", [1, 2, 3])
def test_the_size_of_scratch_memory_changes_nothing(queries_at_a_time: int) -> None:
    base = make_codes(7, 9, 1, 0.1)
    compare_nearest(base[1:6], base, 4, 1, queries_at_a_time)


def test_one_block_takes_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming_cuda, "MAX_BLOCKS", 1)
    compare_nearest(make_codes(8, 3, 1, 0.1), make_codes(9, 7, 1, 0.1), 3)


def test_blocks_of_the_real_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hamming_cuda_kernels, "THREADS", 128)
    monkeypatch.setattr(hamming_cuda_kernels, "TILE", 64)
    monkeypatch.setattr(hamming_cuda_kernels, "QUEUE", 256)
    compare_nearest(make_codes(8, 1, 16), make_codes(9, 300, 16), 256)


@pytest.mark.parametrize(("num", "num_centres", "words"), [(23, 3, 1), (12, 5, 2), (1, 1, 3), (0, 2, 1), (3, 0, 1)])
def test_majority(num: int, num_centres: int, words: int) -> None:
    """Centre 0 has two equal halves, whose bits tie; centre 1 is empty; some codes belong to none."""
    codes, old = make_codes(1, num, words), make_codes(2, num_centres, words)
    labels = np.random.default_rng(3).integers(-1, num_centres, num).astype(np.int32)
    labels[labels == 1] = -1
    labels[:3] = -1
    labels[1:3] = min(0, num_centres - 1)
    labels[labels == 0] = np.where(np.arange((labels == 0).sum()) < 2, 0, -1)
    work = np.full(hamming_cuda.majority_work(num_centres, words) + 1, 77, np.int32)
    new, counts = np.full((num_centres, words), 77, np.uint64), np.full(num_centres, 77, np.int64)
    hamming_cuda.majority(codes, labels, old, work, new, counts)
    expected = hamming_reference.majority(codes, labels, old)
    assert np.array_equal(new, expected[0])
    assert np.array_equal(counts, expected[1])
    assert work[-1] == 77
    if num > 3:
        assert counts[:2].tolist() == [2, 0]

    hamming_cuda.majority(codes, labels, old, work, old, counts)  # in place
    assert np.array_equal(old, expected[0])


def test_labels_out_of_range_touch_no_memory() -> None:
    codes, old = make_codes(1, 3, 1), make_codes(2, 2, 1)
    work, new, counts = np.zeros(130, np.int32), np.zeros((2, 1), np.uint64), np.zeros(2, np.int64)
    hamming_cuda.majority(codes, np.array([-(2**31), 2, 2**31 - 1], np.int32), old, work, new, counts)
    assert counts.tolist() == [0, 0]
    assert np.array_equal(new, old)


def test_wrong_arguments_are_told() -> None:
    codes, ids, dists = make_codes(1, 4, 1), np.zeros((4, 2), np.int32), np.zeros((4, 2), np.uint16)
    work = np.zeros(16, np.uint16)
    for arguments, message in (
        ((codes, codes, 0, -1, work, ids, dists), "k must be from 1 to 256 on the device, got 0"),
        ((codes, codes, 257, -1, work, ids, dists), "k must be from 1 to 256"),
        ((codes, make_codes(1, 4, 2), 2, -1, work, ids, dists), "queries have 1 words, base has 2"),
        ((codes.view(np.int64), codes, 2, -1, work, ids, dists), r"queries must be uint64 of shape \(any, any\)"),
        ((codes, codes[0], 2, -1, work, ids, dists), "base must be uint64"),
        ((codes, codes, 2, -1, work[:3], ids, dists), "work must have at least 4 elements, got 3"),
        ((codes, codes, 2, -1, work, ids[:3], dists), r"ids must be int32 of shape \(4, 2\), got int32 of shape"),
        ((codes, codes, 2, -1, work, ids, dists.view(np.int16)), "dists must be uint16"),
    ):
        with pytest.raises(ValueError, match=message):
            hamming_cuda.nearest(*arguments)
    with pytest.raises(ValueError, match="must have 1 to 16 words of 64 bits, got 17"):
        hamming_cuda.hamming_matrix(make_codes(1, 1, 17), make_codes(1, 1, 17), np.zeros((1, 1), np.uint16))
    labels, counts = np.zeros(4, np.int32), np.zeros(4, np.int64)
    with pytest.raises(ValueError, match="work must have at least 260 elements, got 259"):
        hamming_cuda.majority(codes, labels, codes, np.zeros(259, np.int32), codes, counts)
    with pytest.raises(ValueError, match="labels must be int32"):
        hamming_cuda.majority(codes, labels[:3], codes, np.zeros(260, np.int32), codes, counts)
