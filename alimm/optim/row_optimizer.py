"""What the row-sparse optimizers share: parameter groups that name a mode, and one way for each kind of gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from alimm.optim.row_state import ATTRIBUTE, LAST_STEP, flush_rows


class RowSparseOptimizer(Optimizer):
    """Steps parameters with dense gradients as torch does, and those with row-sparse gradients row by row.

    A parameter whose gradient is None is skipped, as in torch: it neither decays nor coasts in that step. A gradient
    of no rows is one.
    """

    row_modes: ClassVar[dict[str, str]]
    """The modes, and of those that do not exist, why."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, see ``torch.optim.Optimizer``.

        Raises:
            ValueError: the group's ``rows`` is no mode of this optimizer.
        """
        mode = param_group.get("rows", self.defaults["rows"])
        if self.row_modes.get(mode, "unknown"):
            known = ", ".join(repr(name) for name, reason in self.row_modes.items() if not reason)
            reason = f": {self.row_modes[mode]}" if mode in self.row_modes else ""
            raise ValueError(f"rows of {type(self).__name__} must be one of {known}, got {mode!r}{reason}")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A state dict of torch's optimizer has no modes in its groups.
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient.

        Args:
            closure: computes the loss anew and returns it.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._prepare()
        for group in self.param_groups:
            dense = []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                self._take_over(parameter)
                if parameter.grad.is_sparse:
                    self._step_rows(group, parameter)
                else:
                    flush_rows(parameter)
                    dense.append(parameter)
            if dense:
                self._step_dense(group, dense)
        return loss

    def flush(self) -> None:
        """Bring all rows of all parameters up to date."""
        for group in self.param_groups:
            for parameter in group["params"]:
                flush_rows(parameter)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict`` gave, whole or without row arrays (`row_state.without_row_arrays`).

        Raises:
            ValueError: an array does not have the shape of its parameter.
        """
        pairs = [
            (state_dict["state"].get(number, {}), parameter)
            for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False)
            for number, parameter in zip(saved["params"], group["params"], strict=False)
        ]
        for entry, parameter in pairs:
            moved = entry.get(LAST_STEP)
            if moved is not None and tuple(moved.shape) != (len(parameter),):
                raise ValueError(
                    f"the optimizer's state is of {len(moved)} rows, its parameter has {len(parameter)}: a state of "
                    "other shards is loaded from a sharded checkpoint only"
                )
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.ndim == parameter.ndim > 1 and name in self._row_array_names():
                    if value.shape == parameter.shape:
                        continue
                    raise ValueError(
                        f"the optimizer's {name!r} must have the shape {tuple(parameter.shape)} of its parameter, got "
                        f"{tuple(value.shape)}: a state of other shards is loaded from a sharded checkpoint only"
                    )
        super().load_state_dict(state_dict)
        for entry, parameter in pairs:
            self._restore(entry, parameter)

    def _take_over(self, parameter: Tensor) -> None:
        """End what another lazy optimizer has left open."""
        previous = getattr(parameter, ATTRIBUTE, None)
        if previous is not None and getattr(previous, "optimizer", None) is not self:
            previous.flush_rows()
            delattr(parameter, ATTRIBUTE)

    def _row_array_names(self) -> tuple[str, ...]:
        """Names of the row arrays in the state."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """What must be known of all parameters before the first one moves."""

    def _step_rows(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Update a parameter with a row-sparse gradient."""
        raise NotImplementedError

    def _step_dense(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Update parameters with dense gradients, whose rows are all up to date."""
        raise NotImplementedError

    def _restore(self, entry: dict[str, Any], parameter: Tensor) -> None:
        """Put into the state what torch would have cast to the parameter's type."""
