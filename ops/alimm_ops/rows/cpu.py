# mypy: allow-untyped-defs
"""Row kernels on the CPU, in Numba: one pass over the memory of the rows, in parallel over rows.

Arguments are those of ``reference.py``; results equal it to rounding. Matrices are float32 or float64 and
C-contiguous. Row numbers are checked before the kernel runs: a row listed twice would be a race, one beyond the end a
write into foreign memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import int64, njit, prange
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]

BLOCK = 1 << 10
"""Rows a block of the pass over all rows."""

_options = dict(nogil=True, cache=True, error_model="numpy")


def check_rows(rows_M: NDArray[np.int64], num_rows: int) -> None:
    """Raise unless the row numbers are int64, strictly increasing and within the matrix.

    Raises:
        ValueError: they are not.
    """
    if rows_M.ndim != 1 or rows_M.dtype != np.int64:
        raise ValueError(f"row numbers must be a vector of int64, got {rows_M.ndim} dimensions of {rows_M.dtype}")
    if not rows_M.size:
        return
    if not _increasing(rows_M):
        raise ValueError("row numbers must be strictly increasing: sort them and drop what is listed twice")
    if rows_M[0] < 0 or rows_M[-1] >= num_rows:
        raise ValueError(f"row numbers must be in [0, {num_rows}), got {rows_M[0]} to {rows_M[-1]}")


def gather_rows(w_ND: Matrix, rows_M: NDArray[np.int64]) -> Matrix:
    """Copy rows into a new (M, D) matrix.

    Raises:
        ValueError: a row number is out of range, or they are not strictly increasing.
    """
    check_rows(rows_M, len(w_ND))
    out_MD = np.empty((rows_M.size, w_ND.shape[1]), w_ND.dtype)
    _gather_rows(w_ND, rows_M, out_MD)
    return out_MD


def sgd_rows(
    w_ND: Matrix,
    u_ND: Matrix | None,
    rows_M: NDArray[np.int64],
    g_MD: Matrix,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scale: float = 1.0,
) -> None:
    """One step of SGD on some rows, see ``reference.sgd_rows``.

    Raises:
        ValueError: a row number is out of range, or they are not strictly increasing.
    """
    check_rows(rows_M, len(w_ND))
    assert momentum == 0 or u_ND is not None
    assert g_MD.shape == (rows_M.size, w_ND.shape[1])
    real = w_ND.dtype.type
    u = w_ND[:0] if u_ND is None else u_ND
    _sgd_rows(w_ND, u, rows_M, g_MD, real(lr), real(momentum), real(weight_decay), nesterov, real(scale))


def sgd_all_rows(
    w_ND: Matrix,
    u_ND: Matrix | None,
    rows_M: NDArray[np.int64],
    g_MD: Matrix,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scale: float = 1.0,
) -> None:
    """One step of SGD on all rows, with a gradient of zero in those that are not listed.

    Raises:
        ValueError: a row number is out of range, or they are not strictly increasing.
    """
    check_rows(rows_M, len(w_ND))
    assert momentum == 0 or u_ND is not None
    assert g_MD.shape == (rows_M.size, w_ND.shape[1])
    real = w_ND.dtype.type
    u = w_ND[:0] if u_ND is None else u_ND
    _sgd_all_rows(w_ND, u, rows_M, g_MD, real(lr), real(momentum), real(weight_decay), nesterov, real(scale))


def coast_rows(
    w_ND: Matrix,
    u_ND: Matrix | None,
    rows_M: NDArray[np.int64] | None,
    last_step_N: NDArray[np.int32],
    products_4L: NDArray[np.float64],
    step: int,
) -> None:
    """Bring rows to the present, see ``reference.coast_rows``.

    Raises:
        ValueError: a row number is out of range, or they are not strictly increasing.
    """
    every = rows_M is None
    rows = np.empty(0, np.int64) if rows_M is None else rows_M
    check_rows(rows, len(w_ND))
    u = w_ND[:0] if u_ND is None else u_ND
    _coast_rows(w_ND, u, u_ND is not None, rows, every, last_step_N, products_4L.astype(w_ND.dtype), step)


@njit(**_options)
def _increasing(rows):
    wrong = 0  # counted to the end rather than left at once, so that it runs in vectors
    for index in range(1, rows.size):
        wrong += rows[index] <= rows[index - 1]
    return wrong == 0


@njit(parallel=True, **_options)
def _gather_rows(w, rows, out):
    for index in prange(rows.size):
        out[index] = w[rows[index]]


@njit(**_options)
def _update(w, u, g, lr, momentum, decay, nesterov, scale):
    """One row. Three loops, so that none has a branch inside."""
    if momentum == 0:
        for column in range(w.size):
            w[column] -= lr * (scale * g[column] + decay * w[column])
    elif nesterov:
        for column in range(w.size):
            step = scale * g[column] + decay * w[column]
            u[column] = momentum * u[column] + step
            w[column] -= lr * (step + momentum * u[column])
    else:
        for column in range(w.size):
            u[column] = momentum * u[column] + (scale * g[column] + decay * w[column])
            w[column] -= lr * u[column]


@njit(parallel=True, **_options)
def _sgd_rows(w, u, rows, g, lr, momentum, decay, nesterov, scale):
    for index in prange(rows.size):
        row = rows[index]
        # Without momentum there may be no matrix of it; the branch that runs then never looks at it.
        u_row = u[row] if u.size else w[row]
        _update(w[row], u_row, g[index], lr, momentum, decay, nesterov, scale)


@njit(parallel=True, **_options)
def _sgd_all_rows(w, u, rows, g, lr, momentum, decay, nesterov, scale):
    zero = np.zeros(w.shape[1], w.dtype)
    for block in prange((w.shape[0] + BLOCK - 1) // BLOCK):
        start = int64(block) * BLOCK
        at = np.searchsorted(rows, start)
        for row in range(start, min(start + BLOCK, w.shape[0])):
            u_row = u[row] if u.size else w[row]
            if at < rows.size and rows[at] == row:
                _update(w[row], u_row, g[at], lr, momentum, decay, nesterov, scale)
                at += 1
            else:
                _update(w[row], u_row, zero, lr, momentum, decay, nesterov, scale)


@njit(parallel=True, **_options)
def _coast_rows(w, u, moves, rows, every, last_step, products, step):
    length = products.shape[1]
    count = w.shape[0] if every else rows.size
    for index in prange(count):
        # The index of a parallel loop is unsigned, and a difference with a signed number would be a float.
        row = int64(index) if every else rows[index]
        at = last_step[row] - (step - length)
        if at < length:
            a = products[0, at]
            b = products[1, at]
            c = products[2, at]
            d = products[3, at]
            if moves:
                for column in range(w.shape[1]):
                    weight = w[row, column]
                    velocity = u[row, column]
                    w[row, column] = a * weight + b * velocity
                    u[row, column] = c * weight + d * velocity
            else:
                for column in range(w.shape[1]):
                    w[row, column] *= a
            last_step[row] = step
