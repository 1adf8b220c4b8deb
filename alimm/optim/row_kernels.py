"""The row kernels on torch tensors: Numba on the CPU for float32 and float64, torch's operators for all else.

Both paths follow ``alimm_ops.rows.reference`` to rounding. Matrices are (N, D) and contiguous, row numbers int64,
strictly increasing and on the device of the matrix; everything works in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import torch
from torch import Tensor
from torch.optim.sgd import sgd

CHUNK = 1 << 16
"""Rows that the torch path works on at a time where a kernel passes over all of them."""

THREAD = 1 << 15
"""Elements that are worth one more thread."""


def as_matrix(tensor: Tensor) -> Tensor:
    """See a tensor as (N, D): its first dimension, and all others.

    Raises:
        ValueError: the tensor is not contiguous, so that a row is not one piece of memory.
    """
    if not tensor.is_contiguous() or not tensor.ndim:
        raise ValueError(
            f"rows need a contiguous tensor of at least one dimension, got shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()}: make the parameter of tensor.contiguous()"
        )
    return tensor.detach().view(tensor.shape[0], math.prod(tensor.shape[1:]))


def zeros_like_rows(tensor: Tensor) -> Tensor:
    """Zeros of the same shape, type and device. On the CPU memory is taken up only by rows that are written to."""
    if tensor.device.type != "cpu" or tensor.dtype not in (torch.float32, torch.float64):
        return torch.zeros_like(tensor, memory_format=torch.contiguous_format)
    import numpy as np

    # NumPy asks the system for zeroed pages, torch writes them.
    return torch.from_numpy(np.zeros(tensor.shape, np.float32 if tensor.dtype == torch.float32 else np.float64))


def gather_rows(weight: Tensor, rows: Tensor) -> Tensor:
    """Copy rows of a matrix into a new one (M, D)."""
    if _in_numba(weight):
        return torch.from_numpy(
            _kernels(rows.numel() * weight.shape[1]).gather_rows(weight.detach().numpy(), rows.numpy())
        )
    _check(weight, rows)
    return weight.detach().index_select(0, rows)


def sgd_rows(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor,
    values: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scale: float = 1.0,
) -> None:
    """One step of SGD on some rows; the others do not move.

    Args:
        weight: (N, D).
        momentum_buffer: (N, D), may be None where ``momentum`` is 0.
        rows: (M,).
        values: gradients of the rows (M, D).
        lr: learning rate.
        momentum: factor of the momentum.
        weight_decay: factor of the weight that is added to the gradient.
        nesterov: whether the gradient is seen one step ahead.
        scale: factor of the gradient.
    """
    values = values.to(weight.dtype).contiguous()
    if _in_numba(weight):
        u = None if momentum_buffer is None else momentum_buffer.numpy()
        _kernels(values.numel()).sgd_rows(
            weight.numpy(), u, rows.numpy(), values.numpy(), lr, momentum, weight_decay, nesterov, scale
        )
        return
    _check(weight, rows)
    part = weight.index_select(0, rows)
    buffer = momentum_buffer.index_select(0, rows) if momentum_buffer is not None and momentum else None
    _torch_sgd(part, buffer, values, lr, momentum, weight_decay, nesterov, scale)
    weight.index_copy_(0, rows, part)
    if buffer is not None and momentum_buffer is not None:
        momentum_buffer.index_copy_(0, rows, buffer)


def sgd_all_rows(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor,
    values: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scale: float = 1.0,
) -> None:
    """One step of SGD on all rows, with a gradient of zero in those that are not listed; arguments as above."""
    values = values.to(weight.dtype).contiguous()
    if _in_numba(weight):
        u = None if momentum_buffer is None else momentum_buffer.numpy()
        _kernels(weight.numel()).sgd_all_rows(
            weight.numpy(), u, rows.numpy(), values.numpy(), lr, momentum, weight_decay, nesterov, scale
        )
        return
    _check(weight, rows)
    for part, dense in dense_chunks(weight, rows, values):
        buffer = None if momentum_buffer is None or not momentum else momentum_buffer[part]
        _torch_sgd(weight[part], buffer, dense, lr, momentum, weight_decay, nesterov, scale)


def coast_rows(
    weight: Tensor,
    momentum_buffer: Tensor | None,
    rows: Tensor | None,
    last_step: Tensor,
    products: Tensor,
    step: int,
) -> None:
    """Bring rows that were left alone to the present.

    Args:
        weight: (N, D).
        momentum_buffer: (N, D) or None.
        rows: (M,); all rows if None.
        last_step: the step that each row stands at, int32 (N,).
        products: the table of ``alimm_ops.rows.products`` for the last L steps, float64 (4, L), on the CPU.
        step: the present.
    """
    if _in_numba(weight):
        velocity = None if momentum_buffer is None else momentum_buffer.numpy()
        listed = None if rows is None else rows.numpy()
        elements = weight.numel() if rows is None else rows.numel() * weight.shape[1]
        _kernels(elements).coast_rows(weight.numpy(), velocity, listed, last_step.numpy(), products.numpy(), step)
        return
    if rows is None:
        for start in range(0, len(weight), CHUNK):
            part = torch.arange(start, min(start + CHUNK, len(weight)), device=weight.device)
            coast_rows(weight, momentum_buffer, part, last_step, products, step)
        return
    _check(weight, rows)
    length = products.shape[1]
    at = last_step.index_select(0, rows).long() - (step - length)
    stale = at < length
    rows, at = rows[stale], at[stale]
    wide = weight.dtype if weight.dtype == torch.float64 else torch.float32
    a, b, c, d = products.to(weight.device, wide)[:, at].unsqueeze(-1)
    w = weight.index_select(0, rows).to(wide)
    if momentum_buffer is None:
        weight.index_copy_(0, rows, (a * w).to(weight.dtype))
    else:
        u = momentum_buffer.index_select(0, rows).to(wide)
        weight.index_copy_(0, rows, (a * w + b * u).to(weight.dtype))
        momentum_buffer.index_copy_(0, rows, (c * w + d * u).to(weight.dtype))
    last_step.index_fill_(0, rows, step)


def dense_chunks(weight: Tensor, rows: Tensor, values: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """A row-sparse gradient made dense, `CHUNK` rows at a time: which rows of the weight, and their gradient."""
    for start in range(0, len(weight), CHUNK):
        stop = min(start + CHUNK, len(weight))
        bounds = torch.tensor([start, stop], device=rows.device)
        first, last = torch.searchsorted(rows, bounds).tolist()
        dense = weight.new_zeros((stop - start, *weight.shape[1:]))
        dense.index_copy_(0, rows[first:last] - start, values[first:last])
        yield slice(start, stop), dense


def _torch_sgd(
    weight: Tensor,
    buffer: Tensor | None,
    values: Tensor,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool,
    scale: float,
) -> None:
    sgd(
        [weight],
        [values if scale == 1 else values * scale],
        [buffer],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=nesterov,
        maximize=False,
    )


def _in_numba(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.float64)


def _check(weight: Tensor, rows: Tensor) -> None:
    # On other devices torch's own kernels refuse rows beyond the end; a look at them here would wait for the device.
    if rows.device.type == "cpu":
        _kernels().check_rows(rows.numpy(), len(weight))


@cache
def _module() -> ModuleType:
    """Import Numba when it is first needed, and start its threads.

    It shares torch's libgomp, so that the start changes torch's number of threads too; put it back.
    """
    import numba

    from alimm_ops.rows import cpu

    threads = torch.get_num_threads()
    numba.get_num_threads()
    torch.set_num_threads(threads)
    return cpu


def _kernels(elements: int = 0) -> ModuleType:
    """The kernels, with as many threads as torch has (ranks that share a machine divide it so); few for little work."""
    import numba

    module = _module()
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS, 1 + elements // THREAD)
    if numba.get_num_threads() != threads:
        numba.set_num_threads(threads)
    return module
