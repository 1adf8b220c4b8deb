"""Row kernels in NumPy: the oracle that the Numba kernels follow to rounding.

All of them work in place. ``rows`` are row numbers, int64, strictly increasing; ``u`` is the momentum, None without
one. Scalars are rounded to the type of ``w`` first, and all arithmetic is done in that type.

Shapes: N rows of a matrix, M rows of them that are touched, D columns, L steps of a table of products.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating[Any]]


def gather_rows(w_ND: Matrix, rows_M: NDArray[np.int64]) -> Matrix:
    """Copy rows into a new (M, D) matrix."""
    return w_ND[rows_M]


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
    """One step of ``torch.optim.SGD`` on some rows; the others do not move.

    Args:
        w_ND: weights.
        u_ND: momentum, not touched where ``momentum`` is 0.
        rows_M: the rows of the gradient.
        g_MD: their gradients.
        lr: learning rate.
        momentum: factor of the momentum.
        weight_decay: factor of the weight that is added to the gradient.
        nesterov: whether the gradient is seen one step ahead.
        scale: factor of the gradient.
    """
    real = w_ND.dtype.type
    w_MD = w_ND[rows_M]
    step_MD = real(scale) * g_MD + real(weight_decay) * w_MD
    if momentum != 0:
        assert u_ND is not None
        u_MD = real(momentum) * u_ND[rows_M] + step_MD
        u_ND[rows_M] = u_MD
        step_MD = step_MD + real(momentum) * u_MD if nesterov else u_MD
    w_ND[rows_M] = w_MD - real(lr) * step_MD


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
    """One step of ``torch.optim.SGD`` on all rows, with a gradient of zero in those that are not listed."""
    g_ND = np.zeros_like(w_ND)
    g_ND[rows_M] = g_MD
    sgd_rows(w_ND, u_ND, np.arange(len(w_ND)), g_ND, lr, momentum, weight_decay, nesterov, scale)


def coast_rows(
    w_ND: Matrix,
    u_ND: Matrix | None,
    rows_M: NDArray[np.int64] | None,
    last_step_N: NDArray[np.int32],
    products_4L: NDArray[np.float64],
    step: int,
) -> None:
    """Bring rows to the present by one product of matrices each, and note that they are there.

    Args:
        w_ND: weights.
        u_ND: momentum.
        rows_M: which rows; all if None.
        last_step_N: the step that each row stands at, between ``step - L`` and ``step``.
        products_4L: the table of `products`, for the steps from ``step - L`` on.
        step: the present.
    """
    length = products_4L.shape[1]
    for row in range(len(w_ND)) if rows_M is None else rows_M:
        at = int(last_step_N[row]) - (step - length)
        if at == length:
            continue
        a, b, c, d = products_4L[:, at].astype(w_ND.dtype)
        if u_ND is None:
            w_ND[row] = a * w_ND[row]
        else:
            w_D, u_D = w_ND[row].copy(), u_ND[row].copy()
            w_ND[row] = a * w_D + b * u_D
            u_ND[row] = c * w_D + d * u_D
        last_step_N[row] = step
