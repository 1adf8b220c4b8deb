"""AdamW on row-sparse gradients.

    m = b1 m + (1 - b1) g    v = b2 v + (1 - b2) g g
    w = w - lr wd w - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

``frozen`` applies this to the rows of the gradient and leaves the others alone, averages included, as
``torch.optim.SparseAdam`` does; the decoupled decay too acts on touched rows only. t counts the steps of the parameter,
not of the row: the averages of a row first touched late start from zero uncorrected, and its first step is about
``lr (1 - b1) / sqrt(1 - b2)``, 3.2 times ``lr`` with the defaults.

``dense`` is ``torch.optim.AdamW`` with zeros in place of nothing. The step divides by a square root of v, so it is not
linear in (w, m, v), and many steps have no closed form: there is no ``lazy_exact``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from alimm.optim.row_kernels import as_matrix, dense_chunks, gather_rows, zeros_like_rows
from alimm.optim.row_optimizer import RowSparseOptimizer
from alimm.optim.row_state import coalesced_rows
from alimm.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class RowSparseAdamW(RowSparseOptimizer):
    """``torch.optim.AdamW`` that takes row-sparse gradients.

    Parameters with dense gradients are updated by torch's own function.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: factors of the averages of the gradient and of its square.
        eps: added to the denominator.
        weight_decay: share of the weight taken off a step, times ``lr``.
        rows: what rows without a gradient do, ``'frozen'`` or ``'dense'``; see the module.

    Raises:
        ValueError: a setting is out of range.
    """

    row_modes: ClassVar[dict[str, str]] = {
        "frozen": "",
        "dense": "",
        "lazy_exact": "the steps of Adam without a gradient have no closed form, RowSparseSGD's do",
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        rows: str = "frozen",
    ) -> None:
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0):
            raise ValueError(f"lr, eps and weight_decay must be at least 0, got {lr}, {eps} and {weight_decay}")
        if not (len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rows=rows))

    def _row_array_names(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def _averages(self, parameter: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0, dtype=torch.float32)
        for name in self._row_array_names():
            if name not in state:
                state[name] = zeros_like_rows(parameter.detach())
        return state

    def _step_rows(self, group: dict[str, Any], parameter: Tensor) -> None:
        state = self._averages(parameter)
        rows, values = coalesced_rows(parameter)
        tensors = [as_matrix(tensor) for tensor in (parameter, state["exp_avg"], state["exp_avg_sq"])]
        values = values.to(parameter.dtype).reshape(len(rows), tensors[0].shape[1])
        if group["rows"] == "frozen":
            parts = [gather_rows(tensor, rows) for tensor in tensors]
            self._update(group, [parts[0]], [values], [parts[1]], [parts[2]], [state["step"]])
            for tensor, part in zip(tensors, parts, strict=True):
                tensor.index_copy_(0, rows, part)
            return
        for chunk, dense in dense_chunks(tensors[0], rows, values):
            weight, average, square = (tensor[chunk] for tensor in tensors)
            self._update(group, [weight], [dense], [average], [square], [state["step"].clone()])
        state["step"] += 1

    def _step_dense(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self._averages(parameter) for parameter in parameters]
        self._update(
            group,
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["step"] for state in states],
        )

    def _update(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        gradients: list[Tensor],
        averages: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
    ) -> None:
        """Take torch's step, which counts ``steps`` on."""
        adamw(
            weights,
            gradients,
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]),
            weight_decay=float(group["weight_decay"]),
            eps=float(group["eps"]),
            maximize=False,
        )
