"""The Numba row kernels equal the NumPy oracle to rounding, and the oracle equals the formulas written out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alimm_ops.rows import cpu, reference
from alimm_ops.rows.products import extend_products, step_matrix

SHAPES = [(0, 4), (1, 1), (5, 3), (40, 17), (2500, 2)]
"""Rows and columns: none, one, odd, and of several blocks."""

SETTINGS = [
    dict(lr=0.1, momentum=0.0, weight_decay=0.0, nesterov=False),
    dict(lr=0.1, momentum=0.0, weight_decay=0.2, nesterov=False, scale=0.5),
    dict(lr=0.1, momentum=0.9, weight_decay=0.2, nesterov=False),
    dict(lr=0.1, momentum=0.9, weight_decay=0.2, nesterov=True, scale=2.0),
]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    if request.param > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("this machine has one core")
    before = numba.get_num_threads()
    numba.set_num_threads(request.param)
    yield request.param
    numba.set_num_threads(before)


def matrices(shape: tuple[int, int], dtype: Any, count: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.normal(size=shape).astype(dtype) for _ in range(count)]


def some_rows(size: int, seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    half = np.sort(generator.permutation(size)[: (size + 1) // 2])
    return [np.empty(0, np.int64), np.arange(size), half.astype(np.int64)]


def tolerance(dtype: Any) -> dict[str, float]:
    return dict(rtol=2e-6, atol=1e-6) if dtype == np.float32 else dict(rtol=1e-14, atol=1e-14)


def one_row_slowly(
    w: np.ndarray, u: np.ndarray, g: np.ndarray, lr: float, momentum: float, weight_decay: float, nesterov: bool,
    scale: float = 1.0,
) -> None:  # fmt: skip
    """The lines of torch's documentation, element by element."""
    for column in range(len(w)):
        step = scale * g[column] + weight_decay * w[column]
        if momentum:
            u[column] = momentum * u[column] + step
            step = step + momentum * u[column] if nesterov else u[column]
        w[column] -= lr * step


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_oracle_equals_the_formula(settings: dict[str, Any]) -> None:
    w, u, g = matrices((6, 3), np.float64, 3)
    rows = np.array([0, 2, 5])
    slow_w, slow_u = w.copy(), u.copy()
    for index, row in enumerate(rows):
        one_row_slowly(slow_w[row], slow_u[row], g[index], **settings)
    reference.sgd_rows(w, u, rows, g[:3], **settings)
    np.testing.assert_allclose(w, slow_w, rtol=1e-14)
    np.testing.assert_allclose(u, slow_u, rtol=1e-14)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_equal_the_oracle(settings: dict[str, Any], shape: tuple[int, int], dtype: Any, threads: int) -> None:
    for rows in some_rows(shape[0]):
        for name in ("sgd_rows", "sgd_all_rows"):
            w, u, g = matrices(shape, dtype, 3)
            true_w, true_u, g = w.copy(), u.copy(), g[: len(rows)]
            getattr(reference, name)(true_w, true_u, rows, g, **settings)
            bare = w.copy()
            getattr(cpu, name)(w, u, rows, g, **settings)
            np.testing.assert_allclose(w, true_w, **tolerance(dtype))
            np.testing.assert_allclose(u, true_u, **tolerance(dtype))
            if not settings["momentum"]:
                getattr(cpu, name)(bare, None, rows, g, **settings)
                assert np.array_equal(bare, w)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("moves", [True, False])
def test_coasting_and_gathering_equal_the_oracle(shape: tuple[int, int], dtype: Any, moves: bool, threads: int) -> None:
    generator = np.random.default_rng(5)
    products = np.zeros((4, 0))
    for _ in range(6):
        products = extend_products(products, step_matrix(generator.uniform(0, 1), 0.9, 0.1))
    for rows in [None, *some_rows(shape[0])]:
        w, u = matrices(shape, dtype, 2)
        last = generator.integers(4, 11, shape[0]).astype(np.int32)
        true_w, true_u, true_last = w.copy(), u.copy(), last.copy()
        reference.coast_rows(true_w, true_u if moves else None, rows, true_last, products, 10)
        cpu.coast_rows(w, u if moves else None, rows, last, products, 10)
        np.testing.assert_allclose(w, true_w, **tolerance(dtype))
        np.testing.assert_allclose(u, true_u, **tolerance(dtype))
        assert np.array_equal(last, true_last)
        if rows is not None:
            assert np.array_equal(cpu.gather_rows(w, rows), reference.gather_rows(w, rows))
            assert (last[rows] == 10).all()


@given(
    steps=st.lists(
        st.tuples(st.floats(0, 1), st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.floats(0, 0.5), st.booleans()),
        max_size=12,
    ),
    seed=st.integers(0, 1000),
)
def test_one_product_takes_a_row_through_many_steps(steps: list[tuple[float, float, float, bool]], seed: int) -> None:
    w, u = np.random.default_rng(seed).normal(size=(2, len(steps) + 1, 3))
    true_w, true_u = w.copy(), u.copy()
    products = np.zeros((4, 0))
    for number, (lr, momentum, decay, nesterov) in enumerate(steps):
        products = extend_products(products, step_matrix(lr, momentum, decay, nesterov))
        for row in range(number + 1):  # row r was last touched at step r
            one_row_slowly(true_w[row], true_u[row], np.zeros(3), lr, momentum, decay, nesterov)
    last = np.arange(len(steps) + 1, dtype=np.int32)
    reference.coast_rows(w, u, None, last, products, len(steps))
    np.testing.assert_allclose(w, true_w, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(u, true_u, rtol=1e-12, atol=1e-12)
    assert (last == len(steps)).all()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.array([2, 2]), "strictly increasing"),
        (np.array([3, 1]), "strictly increasing"),
        (np.array([-1, 0]), r"in \[0, 5\), got -1"),
        (np.array([1, 5]), r"in \[0, 5\), got 1 to 5"),
        (np.array([1, 2], np.int32), "int64"),
        (np.array([[1, 2]]), "vector"),
    ],
)
def test_rows_that_would_write_elsewhere_are_refused(rows: np.ndarray, message: str) -> None:
    w, u = matrices((5, 3), np.float32, 2)
    before = w.copy()
    g = np.ones((rows.size, 3), np.float32)
    with pytest.raises(ValueError, match=message):
        cpu.gather_rows(w, rows)
    with pytest.raises(ValueError, match=message):
        cpu.sgd_rows(w, u, rows, g, 0.1, 0.9, 0.0, False)
    with pytest.raises(ValueError, match=message):
        cpu.sgd_all_rows(w, u, rows, g, 0.1, 0.9, 0.0, False)
    with pytest.raises(ValueError, match=message):
        cpu.coast_rows(w, u, rows, np.zeros(5, np.int32), np.ones((4, 1)), 1)
    assert np.array_equal(w, before)


@pytest.mark.slow
def test_rows_beyond_two_billion_elements() -> None:
    w = np.zeros((2**31 // 64 + 3, 64), np.float32)  # pages that nobody writes to take no memory
    last_row = np.array([len(w) - 1])
    cpu.sgd_rows(w, None, last_row, np.ones((1, 64), np.float32), 0.5, 0.0, 0.0, False)
    assert (cpu.gather_rows(w, last_row) == -0.5).all()
    assert not w[:4].any()
