"""What a row-sparse optimizer and the others have to agree on: heads, graph builders, checkpoints.

**Rows that are behind.** A lazy optimizer leaves rows without a gradient as they are and moves them when they are next
needed. It hangs an object on the parameter (attribute ``alimm_row_state``); who reads rows calls `catch_up_rows` first,
who reads all of them `flush_rows`. Both do nothing where no lazy optimizer is at work.

**Gradients** are torch's sparse tensors (in coordinates) of one sparse dimension, as ``nn.Embedding(sparse=True)``
makes them; `coalesced_rows` gives their rows and values.

**Checkpoints.** The state of an optimizer holds arrays of the parameter's own shape, one row for each row (momentum,
averages). Where the parameter is a shard they belong into the sharded checkpoint:

    save    flush_rows(p)
            write p and row_arrays(optimizer, p)               row_scalars(optimizer, p) for the record
            small = without_row_arrays(optimizer, optimizer.state_dict())
    load    optimizer.load_state_dict(small)                   the step counts are in it
            fill p, then load_row_arrays(optimizer, p, arrays)

These work for torch's own optimizers as well.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from alimm.distributed.shards import sharding_of

ATTRIBUTE = "alimm_row_state"
LAST_STEP = "last_step"
PRODUCTS = "products"


class RowState(Protocol):
    """What a lazy optimizer hangs on a parameter."""

    def catch_up_rows(self, local_rows: Tensor) -> None:
        """Bring some rows up to date."""

    def flush_rows(self) -> None:
        """Bring all rows up to date."""


def catch_up_rows(parameter: Tensor, local_rows: Tensor) -> None:
    """Bring some rows of a parameter up to date, in place, before they are read.

    Args:
        parameter: (N, ...).
        local_rows: row numbers within this parameter, int64 (M,), strictly increasing.

    Raises:
        ValueError: a row number is out of range, or they are not strictly increasing.
    """
    state: RowState | None = getattr(parameter, ATTRIBUTE, None)
    if state is not None:
        state.catch_up_rows(local_rows)


def flush_rows(parameter: Tensor) -> None:
    """Bring all rows of a parameter up to date, in place. A second call finds nothing to do."""
    state: RowState | None = getattr(parameter, ATTRIBUTE, None)
    if state is not None:
        state.flush_rows()


def coalesce_gradient(parameter: Tensor) -> Tensor:
    """Sort the rows of a sparse gradient and add up those listed twice, in ``parameter.grad`` itself.

    Rows that are strictly increasing already are only marked so.

    Returns:
        The gradient.

    Raises:
        ValueError: the gradient has more than one sparse dimension.
    """
    grad = parameter.grad
    assert grad is not None
    assert grad.is_sparse
    if grad.sparse_dim() != 1:
        raise ValueError(
            f"a row-sparse gradient has 1 sparse dimension, got {grad.sparse_dim()}: make it of a vector of row "
            "numbers and values of shape (rows, ...)"
        )
    if not grad.is_coalesced():
        rows = grad._indices()[0]
        if bool((rows[1:] > rows[:-1]).all()):
            grad._coalesced_(True)
        else:
            parameter.grad = grad = grad.coalesce()
    return grad


def coalesced_rows(parameter: Tensor) -> tuple[Tensor, Tensor]:
    """The sparse gradient of a parameter as rows and values; `coalesce_gradient` first.

    Returns:
        Row numbers, int64 (M,), strictly increasing, and the gradients themselves (M, ...), not a copy.
    """
    grad = coalesce_gradient(parameter)
    return grad._indices()[0].contiguous(), grad._values()


def row_arrays(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The arrays of an optimizer's state that have one row for each row of the parameter; brings all rows up to date.

    Returns:
        By name in the state, for example ``momentum_buffer``, each of the parameter's shape, not copied. Empty before
        the first step.
    """
    flush_rows(parameter)
    state = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if _is_row_array(name, value, parameter)}


def row_scalars(optimizer: Optimizer, parameter: Tensor) -> dict[str, int]:
    """How many steps a parameter has taken, ``{'step': ...}``; empty where the optimizer does not count."""
    step = optimizer.state.get(parameter, {}).get("step")
    return {} if step is None else {"step": int(step)}


def load_row_arrays(optimizer: Optimizer, parameter: Tensor, arrays: dict[str, Tensor]) -> None:
    """Put arrays of `row_arrays` into an optimizer's state, after its ``load_state_dict`` and the parameter's own rows.

    Rows count as up to date, as they were when the arrays were taken.

    Args:
        optimizer: of the same type as the one they come from.
        parameter: (N, ...).
        arrays: by name, each of the parameter's shape; copied, to its type and device.

    Raises:
        ValueError: the parameter is not one of the optimizer's, or a shape differs; nothing is loaded then.
    """
    if not any(parameter is known for group in optimizer.param_groups for known in group["params"]):
        raise ValueError("the parameter is not among those of the optimizer: build the optimizer on this very model")
    for name, value in arrays.items():
        if value.shape != parameter.shape:
            raise ValueError(
                f"the array {name!r} must have the shape {tuple(parameter.shape)} of the parameter, got "
                f"{tuple(value.shape)}: cut it into the same rows"
            )
    state = optimizer.state[parameter]
    for name in [name for name, value in state.items() if _is_row_array(name, value, parameter)]:
        del state[name]
    state.pop(LAST_STEP, None)
    state.pop(PRODUCTS, None)
    for name, value in arrays.items():
        state[name] = torch.empty_like(parameter.detach()).copy_(value)


def without_row_arrays(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state dict of an optimizer without what has one row for each row of a sharded parameter.

    Args:
        optimizer: the one that made it.
        state_dict: of the optimizer, or of its wrapper; not changed.

    Raises:
        ValueError: rows are behind, so that the arrays alone do not say where they stand.
    """
    small = dict(state_dict)
    small["state"] = dict(state_dict["state"])
    for saved, group in zip(state_dict["param_groups"], optimizer.param_groups, strict=True):
        for number, parameter in zip(saved["params"], group["params"], strict=True):
            entry = small["state"].get(number)
            if entry is None or sharding_of(parameter) is None:
                continue
            if PRODUCTS in entry and entry[PRODUCTS].numel():
                raise ValueError("rows of a sharded parameter are behind: call flush_rows before optimizer.state_dict")
            small["state"][number] = {
                name: value
                for name, value in entry.items()
                if name not in (LAST_STEP, PRODUCTS) and not _is_row_array(name, value, parameter)
            }
    return small


def _is_row_array(name: str, value: Any, parameter: Tensor) -> bool:
    # A step count is a tensor too in torch's optimizers; a vector of one element must not take it for a row.
    return isinstance(value, Tensor) and name not in ("step", LAST_STEP) and value.shape == parameter.shape
