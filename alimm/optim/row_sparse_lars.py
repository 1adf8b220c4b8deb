"""LARS on row-sparse gradients and sharded parameters.

You, Gitman, Ginsburg, Large Batch Training of Convolutional Networks, 2017, arXiv 1708.03888. Each parameter gets a
rate of its own from the norms of its weight and gradient::

    rho = lr * kappa ||w|| / (||g|| + wd ||w|| + eps)
    u   = m u + rho (g + wd w)
    w   = w - u

As in the paper, the rate is part of the momentum. Ours: vectors (biases, normalisation) take ``rho = lr`` and do not
decay; a weight of zeros takes ``rho = lr`` too, since the formula would never let it leave zero; and what the norms of
a sharded, row-sparse parameter are. They are sums of squares over all ranks, added in the order of the ranks in
float64, so that the rate is the same on every rank and, to rounding, for every number of ranks. ``active`` takes the
rows of the gradient, ``all`` takes all rows, which have to be up to date in every step: with ``rows='dense'`` only.

The rate is one number a step, so rows coast as in SGD with lr = 1 and wd = rho wd: ``lazy_exact`` is exact here too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from alimm.distributed.collectives import sum_over_ranks
from alimm.distributed.shards import sharding_of
from alimm.optim.row_kernels import as_matrix, gather_rows
from alimm.optim.row_sparse_sgd import Recipe, RowSparseSGD
from alimm.optim.row_state import catch_up_rows, coalesced_rows, flush_rows
from alimm.registry import OPTIMIZERS


@OPTIMIZERS.register_module()
class RowSparseLARS(RowSparseSGD):
    """SGD with momentum and a rate for each parameter, for dense, row-sparse and sharded parameters.

    Every rank must call ``step`` where a parameter is sharded: the norms are summed over its process group.

    Args:
        params: parameters or groups of them.
        lr: learning rate; the trust coefficient makes it small, so that values of 1 to 30 are usual.
        momentum: factor of the momentum.
        weight_decay: factor of the weight that is added to the gradient.
        trust_coefficient: kappa above.
        eps: added to the denominator.
        rows: what rows without a gradient do, see `RowSparseSGD`.
        norm: rows that count for the norms of a row-sparse gradient, ``'active'`` or ``'all'``.
        flush_every: as in `RowSparseSGD`.

    Raises:
        ValueError: a setting is out of range, or ``norm='all'`` without ``rows='dense'``.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
        eps: float = 1e-8,
        rows: str = "lazy_exact",
        norm: str = "active",
        flush_every: int = 4096,
    ) -> None:
        if not (trust_coefficient > 0 and eps >= 0):
            raise ValueError(f"trust_coefficient must be above 0 and eps at least 0, got {trust_coefficient} and {eps}")
        self._rates: dict[Tensor, float] = {}
        super().__init__(
            params,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            rows=rows,
            flush_every=flush_every,
            trust_coefficient=trust_coefficient,
            eps=eps,
            norm=norm,
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, see ``torch.optim.Optimizer``.

        Raises:
            ValueError: the group's ``rows`` or ``norm`` is no choice.
        """
        norm = param_group.get("norm", self.defaults["norm"])
        rows = param_group.get("rows", self.defaults["rows"])
        if norm not in ("active", "all"):
            raise ValueError(f"norm must be 'active' or 'all', got {norm!r}")
        if norm == "all" and rows != "dense":
            raise ValueError(
                f"norm='all' needs rows='dense', got rows={rows!r}: the norm of all rows takes a pass over all of them "
                "and finds them up to date only where every step moves them; use norm='active' otherwise"
            )
        super().add_param_group(param_group)

    def _prepare(self) -> None:
        """The rates of all parameters: one exchange for each process group."""
        found: dict[Any, list[tuple[dict[str, Any], Tensor, Tensor]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                sharding = sharding_of(parameter)
                # All ranks of a group have to take part, also one that has no gradient this time.
                if parameter.ndim < 2 or (parameter.grad is None and sharding is None):
                    continue
                key = (False, None) if sharding is None else (True, sharding.group)
                found[key].append((group, parameter, self._squares(group, parameter)))
        self._rates = {}
        for (sharded, process_group), entries in found.items():
            squares = torch.stack([square.to(entries[0][2].device) for _, _, square in entries])
            if sharded:
                squares = sum_over_ranks(squares, process_group)
            for (group, parameter, _), (weight, gradient) in zip(entries, squares.sqrt().tolist(), strict=True):
                rate = 1.0
                if weight != 0:
                    below = gradient + float(group["weight_decay"]) * weight + float(group["eps"])
                    rate = float(group["trust_coefficient"]) * weight / below if below != 0 else 0.0
                self._rates[parameter] = float(group["lr"]) * rate

    def _squares(self, group: dict[str, Any], parameter: Tensor) -> Tensor:
        """Sums of squares of the weight and of the gradient on this rank, float64 (2,)."""
        if parameter.grad is None:
            weight, gradient = parameter.new_zeros(0), parameter.new_zeros(0)
        elif parameter.grad.is_sparse:
            self._take_over(parameter)
            rows, gradient = coalesced_rows(parameter)
            catch_up_rows(parameter, rows)
            weight = as_matrix(parameter)
            if group["norm"] == "active":
                weight = gather_rows(weight, rows)
        else:
            flush_rows(parameter)
            weight, gradient = parameter.detach(), parameter.grad
        norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in (weight, gradient)]
        return torch.stack(norms).square()

    def _recipe(self, group: dict[str, Any], parameter: Tensor) -> Recipe:
        decay = float(group["weight_decay"])
        if parameter.ndim < 2:
            return Recipe(1.0, float(group["momentum"]), 0.0, False, float(group["lr"]))
        rho = self._rates[parameter]
        return Recipe(1.0, float(group["momentum"]), rho * decay, False, rho)

    def _step_dense(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            recipe = self._recipe(group, parameter)
            self._torch_step([parameter], [parameter.grad * recipe.scale], recipe)
