"""What SGD with momentum does to a row without a gradient: one 2x2 matrix a step, and the products over many steps.

Without a gradient, a step maps each element of a weight w and of its momentum u linearly::

    plain       u' = m u + wd w        w' = w - lr u'              A = | 1 - lr wd          -lr m   |
                                                                       | wd                  m      |
    nesterov    u' = m u + wd w        w' = w - lr (wd w + m u')   A = | 1 - lr wd (1 + m)  -lr m m |
                                                                       | wd                  m      |
    m = 0       u' = u                 w' = w - lr wd w            A = | 1 - lr wd           0      |
                                                                       | 0                   1      |

Without momentum the buffer stands still, as in ``torch.optim.SGD``, so that a schedule may pass through 0. A row that
was last touched at step s stands at step t after one product, P_s = A_t ... A_(s+1). The table of P_s for every s since
all rows were up to date takes one multiplication from the left a step, :func:`extend_products`. It needs no inverse:
det A = m, so that prefix products cannot be divided (300 steps with m = 0.9 have a condition number of 8e13).

A matrix (a b; c d) is stored as the column (a, b, c, d) of an array (4, L).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def step_matrix(lr: float, momentum: float, weight_decay: float, nesterov: bool = False) -> NDArray[np.float64]:
    """The matrix of one step without a gradient.

    Returns:
        (a, b, c, d): ``w' = a w + b u``, ``u' = c w + d u``.
    """
    if momentum == 0:
        return np.array([1 - lr * weight_decay, 0.0, 0.0, 1.0])
    if nesterov:
        a, b = 1 - lr * weight_decay * (1 + momentum), -lr * momentum * momentum
    else:
        a, b = 1 - lr * weight_decay, -lr * momentum
    return np.array([a, b, weight_decay, momentum])


def extend_products(products_4L: NDArray[np.float64], matrix_4: NDArray[np.float64]) -> NDArray[np.float64]:
    """Take one more step: multiply every product with the step's matrix from the left, and append the matrix itself.

    Args:
        products_4L: P_s for the L steps s since all rows were up to date, oldest first.
        matrix_4: the matrix of :func:`step_matrix`.

    Returns:
        The table (4, L + 1), a new array.
    """
    a, b, c, d = matrix_4
    length = products_4L.shape[1]
    out = np.empty((4, length + 1))
    out[0, :length] = a * products_4L[0] + b * products_4L[2]
    out[1, :length] = a * products_4L[1] + b * products_4L[3]
    out[2, :length] = c * products_4L[0] + d * products_4L[2]
    out[3, :length] = c * products_4L[1] + d * products_4L[3]
    out[:, length] = matrix_4
    return out
