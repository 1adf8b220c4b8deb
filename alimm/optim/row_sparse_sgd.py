"""SGD with momentum on row-sparse gradients, in three meanings of "a row without a gradient".

Training a classifier on a few rows a step leaves open what the other rows do: with momentum and weight decay, a row
whose gradient is zero still moves. ::

    dense        it moves: every step passes over all rows           = torch.optim.SGD with zeros in place of nothing
    lazy_exact   it moves, but only when it is next needed           = dense, after flush_rows
    frozen       neither the row nor its momentum moves, bit for bit   (as torch.optim.SparseAdam does it)

For g = 0 a step is linear in (w, u), so a row that slept for n steps is brought up to date by one 2x2 matrix, the
product of the n steps' own (``alimm_ops.rows.products``): any schedule of the learning rate, momentum or decay is met
exactly. Parametric instance classification (Cao et al., NeurIPS 2020) describes such a correction of the weights of
unsampled classes; the formulas here are derived from torch's update, not taken from there. We keep one product for each
step since all rows were last up to date, multiplied on from the left, and bring all rows up to date after
``flush_every`` steps. A range of steps is never had by dividing prefixes: they are singular to rounding.

Rows of a parameter are read up to date after `alimm.optim.row_state.catch_up_rows` or `flush_rows`. Saving a state does
not flush: the table and the rows' own steps are in the state dict.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim.sgd import sgd

from alimm.optim import row_kernels
from alimm.optim.row_optimizer import RowSparseOptimizer
from alimm.optim.row_state import ATTRIBUTE, LAST_STEP, PRODUCTS, coalesced_rows
from alimm.registry import OPTIMIZERS
from alimm_ops.rows.products import extend_products, step_matrix

BUFFER = "momentum_buffer"


class Recipe(NamedTuple):
    """One step of a parameter: ``u = m u + (scale g + wd w)``, ``w -= lr u``."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    scale: float = 1.0


@OPTIMIZERS.register_module()
class RowSparseSGD(RowSparseOptimizer):
    """``torch.optim.SGD`` that takes row-sparse gradients with momentum and weight decay.

    Parameters with dense gradients are updated by torch's own function.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: factor of the momentum.
        weight_decay: factor of the weight that is added to the gradient.
        nesterov: whether the gradient is seen one step ahead; needs momentum.
        rows: what rows without a gradient do, ``'lazy_exact'``, ``'dense'`` or ``'frozen'``; see the module.
        dampening: must be 0.
        flush_every: steps after which ``lazy_exact`` brings all rows up to date, which bounds its table.

    Raises:
        ValueError: a setting is out of range.
    """

    row_modes: ClassVar[dict[str, str]] = {"lazy_exact": "", "dense": "", "frozen": ""}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        rows: str = "lazy_exact",
        dampening: float = 0.0,
        flush_every: int = 4096,
        **defaults: Any,
    ) -> None:
        if not (lr >= 0 and momentum >= 0 and weight_decay >= 0):
            raise ValueError(
                f"lr, momentum and weight_decay must be at least 0, got {lr}, {momentum} and {weight_decay}"
            )
        if dampening:
            raise ValueError(
                f"dampening must be 0, got {dampening}: torch damps every gradient but the first of a parameter, which "
                "has no meaning for rows that get theirs at different times"
            )
        if nesterov and not momentum:
            raise ValueError("nesterov=True needs a momentum above 0: set momentum, or leave nesterov out")
        if not 1 <= flush_every < 2**31:
            raise ValueError(f"flush_every must be in [1, 2**31), got {flush_every}")
        defaults |= dict(lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov, rows=rows)
        super().__init__(params, defaults | dict(flush_every=flush_every))

    def _row_array_names(self) -> tuple[str, ...]:
        return (BUFFER,)

    def _recipe(self, group: dict[str, Any], parameter: Tensor) -> Recipe:
        """How to step a parameter."""
        return Recipe(
            float(group["lr"]), float(group["momentum"]), float(group["weight_decay"]), bool(group["nesterov"])
        )

    def _step_rows(self, group: dict[str, Any], parameter: Tensor) -> None:
        recipe = self._recipe(group, parameter)
        state = self._row_state(group, parameter, recipe.momentum != 0)
        rows, values = coalesced_rows(parameter)
        weight = row_kernels.as_matrix(parameter)
        buffer = None if state.get(BUFFER) is None else row_kernels.as_matrix(state[BUFFER])
        values = values.reshape(len(rows), weight.shape[1])
        lazy = group["rows"] == "lazy_exact"
        if lazy:
            row_kernels.coast_rows(weight, buffer, rows, state[LAST_STEP], state[PRODUCTS], state["step"])
        update = row_kernels.sgd_all_rows if group["rows"] == "dense" else row_kernels.sgd_rows
        update(weight, buffer, rows, values, **recipe._asdict())
        state["step"] += 1
        if lazy:
            state[LAST_STEP].index_fill_(0, rows, state["step"])
            matrix = step_matrix(recipe.lr, recipe.momentum, recipe.weight_decay, recipe.nesterov)
            state[PRODUCTS] = torch.from_numpy(extend_products(state[PRODUCTS].numpy(), matrix))
            if state[PRODUCTS].shape[1] >= group["flush_every"]:
                self._flush(parameter)

    def _step_dense(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._torch_step(parameters, gradients, self._recipe(group, parameters[0]))

    def _torch_step(self, parameters: list[Tensor], gradients: list[Tensor], recipe: Recipe) -> None:
        """Take torch's step on dense gradients; all rows are up to date after it."""
        buffers: list[Tensor | None] = [
            self.state[parameter].get(BUFFER) if recipe.momentum else None for parameter in parameters
        ]
        sgd(
            parameters,
            gradients,
            buffers,
            weight_decay=recipe.weight_decay,
            momentum=recipe.momentum,
            lr=recipe.lr,
            dampening=0.0,
            nesterov=recipe.nesterov,
            maximize=False,
        )
        for parameter, buffer in zip(parameters, buffers, strict=True):
            state = self.state[parameter]
            if recipe.momentum:
                state[BUFFER] = buffer
            if LAST_STEP in state:
                state["step"] += 1
                state[LAST_STEP].fill_(state["step"])

    def _row_state(self, group: dict[str, Any], parameter: Tensor, has_momentum: bool) -> dict[str, Any]:
        """The state of a parameter with row-sparse gradients, made where it is missing."""
        state: dict[str, Any] = self.state[parameter]
        state.setdefault("step", 0)
        # Zeros do as torch does, which starts from the first gradient: m * 0 + g.
        if has_momentum and state.get(BUFFER) is None:
            state[BUFFER] = row_kernels.zeros_like_rows(parameter.detach())
        if group["rows"] == "lazy_exact" and LAST_STEP not in state:
            size = (parameter.shape[0],)
            state[LAST_STEP] = torch.full(size, state["step"], dtype=torch.int32, device=parameter.device)
            state[PRODUCTS] = torch.zeros(4, 0, dtype=torch.float64)
        if LAST_STEP in state and getattr(parameter, ATTRIBUTE, None) is None:
            setattr(parameter, ATTRIBUTE, LazyRows(self, parameter))
        return state

    def _catch_up(self, parameter: Tensor, rows: Tensor | None) -> None:
        state = self.state.get(parameter, {})
        if PRODUCTS not in state or not state[PRODUCTS].numel():
            return
        weight = row_kernels.as_matrix(parameter)
        buffer = None if state.get(BUFFER) is None else row_kernels.as_matrix(state[BUFFER])
        row_kernels.coast_rows(weight, buffer, rows, state[LAST_STEP], state[PRODUCTS], state["step"])

    def _flush(self, parameter: Tensor) -> None:
        self._catch_up(parameter, None)
        if PRODUCTS in self.state.get(parameter, {}):
            self.state[parameter][PRODUCTS] = torch.zeros(4, 0, dtype=torch.float64)

    def _restore(self, entry: dict[str, Any], parameter: Tensor) -> None:
        if LAST_STEP in entry:
            state = self.state[parameter]
            state[LAST_STEP] = entry[LAST_STEP].to(parameter.device, torch.int32, copy=True)
            state[PRODUCTS] = entry[PRODUCTS].to("cpu", torch.float64, copy=True)
            setattr(parameter, ATTRIBUTE, LazyRows(self, parameter))


class LazyRows:
    """What hangs on a parameter whose rows may be behind, see `alimm.optim.row_state`."""

    def __init__(self, optimizer: RowSparseSGD, parameter: Tensor) -> None:
        self.optimizer = optimizer
        self.parameter = parameter

    @torch.no_grad()
    def catch_up_rows(self, local_rows: Tensor) -> None:
        """Bring some rows up to date."""
        self.optimizer._catch_up(self.parameter, local_rows)

    @torch.no_grad()
    def flush_rows(self) -> None:
        """Bring all rows up to date."""
        self.optimizer._flush(self.parameter)

    def __reduce__(self) -> tuple[Any, ...]:
        # A pickled parameter takes its attributes along; the optimizer does not belong into the file of a model.
        return type(None), ()
