"""Distances and lists on a GPU, on a stream of their own: what the oracle gives, with blocks of the real size."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from alimm_ops.graph import hamming_reference, lists_reference

pytestmark = pytest.mark.gpu

NUM, K = 3_000, 24


@pytest.fixture
def stream() -> Any:
    from numba import cuda

    return cuda.stream()


@pytest.fixture(scope="module")
def codes() -> NDArray[np.uint64]:
    """Few ones give many equal distances."""
    bits = np.random.default_rng(0).random((NUM, 128)) < 0.1
    return np.packbits(bits, axis=1).view(np.uint64)


@pytest.fixture(scope="module")
def lists(codes: NDArray[np.uint64]) -> tuple[Any, ...]:
    """The nearest of a tenth of the codes, as lists of all of them."""
    ids, dists = hamming_reference.nearest(codes, codes[::10], K)
    ids = (ids * 10).astype(np.int32)
    ids[ids == np.arange(NUM)[:, None]] = -1
    return lists_reference.merge_lists(ids, dists, K)


def run(function: Any, stream: Any, inputs: tuple[Any, ...], outputs: tuple[Any, ...]) -> list[NDArray[Any]]:
    """Call with arrays sent to the device; outputs, and scratch memory among inputs, hold rubbish."""
    from numba import cuda

    sent = [cuda.to_device(x) if isinstance(x, np.ndarray) else x for x in inputs]
    results = [cuda.to_device(np.full(shape, 77, dtype)) for shape, dtype in outputs]
    cuda.synchronize()
    function(*sent, *results, stream=int(stream))
    stream.synchronize()
    return [result.copy_to_host() for result in results]


def assert_equal(found: list[Any], expected: tuple[Any, ...]) -> None:
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def pair(rows: int, columns: int) -> tuple[Any, ...]:
    return ((rows, columns), np.int32), ((rows, columns), np.uint16)


@pytest.mark.parametrize(("k", "first_own"), [(1, -1), (50, 100), (256, -1)])
def test_nearest(codes: NDArray[np.uint64], stream: Any, k: int, first_own: int) -> None:
    from alimm_ops.graph import hamming_cuda

    queries, work = codes[100:160], np.full(NUM * 7 + 5, 77, np.uint16)
    found = run(hamming_cuda.nearest, stream, (queries, codes, k, first_own, work), pair(60, k))
    assert_equal(found, hamming_reference.nearest(queries, codes, k, first_own))


def test_majority(codes: NDArray[np.uint64], stream: Any) -> None:
    from alimm_ops.graph import hamming_cuda

    labels = np.random.default_rng(1).integers(-1, 300, NUM).astype(np.int32)
    work = np.full(hamming_cuda.majority_work(300, 2), 77, np.int32)
    outputs = ((300, 2), np.uint64), ((300,), np.int64)
    found = run(hamming_cuda.majority, stream, (codes, labels, codes[:300], work), outputs)
    assert_equal(found, hamming_reference.majority(codes, labels, codes[:300]))


def test_lists(codes: NDArray[np.uint64], lists: tuple[Any, ...], stream: Any) -> None:
    from alimm_ops.graph import lists_cuda

    rng = np.random.default_rng(2)
    doubled = np.tile(lists[0], 4), np.tile(lists[1], 4)
    found = run(lists_cuda.merge_lists, stream, (*doubled, 40), pair(NUM, 40))
    assert_equal(found, lists_reference.merge_lists(*doubled, 40))

    work = np.full(lists_cuda.reverse_work(NUM, K, NUM, 20), 77, np.int32)
    back = lists_reference.reverse_lists(*lists, NUM, 20, K)
    assert_equal(run(lists_cuda.reverse_lists, stream, (*lists, NUM, 20, K, 0, work), pair(NUM, K)), back)

    rows = rng.permutation(NUM)[:500].astype(np.int32)
    hops = np.concatenate([lists[0], back[0]], axis=1)[rows]
    flags = [(rng.random(shape) < 0.5).astype(np.uint8) for shape in (lists[0].shape, hops.shape)]
    arguments = codes, *lists, flags[0], rows, hops, flags[1], 20
    outputs = (*pair(500, K), ((500, K), np.uint8))
    assert_equal(run(lists_cuda.propagate, stream, arguments, outputs), lists_reference.propagate(*arguments))

    arguments = codes, rows, lists[0][rows], lists[1][rows], 16, 6, 5, 2
    assert_equal(run(lists_cuda.diversify, stream, arguments, pair(500, 16)), lists_reference.diversify(*arguments))
