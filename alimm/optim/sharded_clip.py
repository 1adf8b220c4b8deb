"""Clipping of gradients where some parameters are replicas and others are shards.

    ||g||^p = sum over replicated parameters, once, of |g|^p  +  sum over ranks of their shards' |g|^p

``torch.nn.utils.clip_grad_norm_`` knows neither: on each rank it would take the norm of the own shard, scale the
replicas by a factor of its own, and let them drift apart; and it refuses sparse gradients. Sums are taken in float64
and added in the order of the ranks, so that every rank gets the same bits and every number of ranks the same norm to
rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from alimm.distributed.collectives import gather_known, rank_and_size
from alimm.distributed.shards import sharding_of
from alimm.optim.row_state import coalesce_gradient

EPS = 1e-6
"""Added to the norm before it divides, as in torch."""


def global_grad_norm(parameters: Iterable[Tensor], norm_type: float | str = 2.0) -> float:
    """The norm of all gradients of all ranks. Every rank must call where a parameter is sharded.

    Args:
        parameters: replicated and sharded ones, in the same order on every rank; those without a gradient count
            nothing. Sparse gradients are coalesced in place.
        norm_type: above 0, ``'inf'`` for the largest magnitude.

    Raises:
        ValueError: ``norm_type`` is not above 0.
    """
    order = float(norm_type)
    if not order > 0:
        raise ValueError(f"norm_type must be above 0 or 'inf', got {norm_type!r}")
    parts: dict[Any, list[Tensor]] = {}
    devices: dict[Any, torch.device] = {}
    for parameter in parameters:
        sharding = sharding_of(parameter)
        if parameter.grad is None and sharding is None:
            continue
        # A rank without a gradient takes part in the exchange all the same.
        key = ("replicas",) if sharding is None else ("shards", sharding.group)
        devices.setdefault(key, parameter.device)
        terms = parts.setdefault(key, [])
        if parameter.grad is not None:
            terms.append(_power(gradient_values(parameter), order))
    totals = []
    for key, terms in parts.items():
        own = [term.to(devices[key]) for term in terms]
        total = _combine(torch.stack(own), order) if own else torch.zeros((), dtype=torch.float64, device=devices[key])
        if key[0] == "shards":
            _, size = rank_and_size(key[1])
            total = _combine(torch.cat(gather_known(total.reshape(1), [1] * size, key[1])), order)
        totals.append(float(total))
    whole = _combine(torch.tensor(totals, dtype=torch.float64), order) if totals else torch.zeros(())
    return float(whole) if math.isinf(order) else float(whole) ** (1 / order)


def clip_grad_norm(
    parameters: Iterable[Tensor],
    max_norm: float,
    norm_type: float | str = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> float:
    """Scale all gradients in place so that their common norm is at most ``max_norm``; as torch's function of that name.

    Args:
        parameters: see `global_grad_norm`.
        max_norm: the largest norm.
        norm_type: above 0, ``'inf'`` for the largest magnitude.
        error_if_nonfinite: raise where the norm is NaN or infinite, on every rank.
        foreach: accepted for torch's sake, without effect.

    Returns:
        The norm before clipping.

    Raises:
        RuntimeError: the norm is not finite and ``error_if_nonfinite`` is set.
        ValueError: ``norm_type`` is not above 0.
    """
    parameters = list(parameters)
    norm = global_grad_norm(parameters, norm_type)
    if error_if_nonfinite and not math.isfinite(norm):
        raise RuntimeError(
            f"the norm of order {float(norm_type)} of all gradients is {norm}, so they cannot be clipped: lower the "
            "learning rate or look for NaN in the data, or set error_if_nonfinite=False"
        )
    factor = float(max_norm) / (norm + EPS)
    if not factor >= 1:  # NaN as well, which torch hands on to every gradient
        for parameter in parameters:
            if parameter.grad is not None:
                gradient_values(parameter).mul_(factor)
    return norm


def clip_grad_value(parameters: Iterable[Tensor], clip_value: float, foreach: bool | None = None) -> None:
    """Clamp each element of each gradient in place, sparse ones too.

    Args:
        parameters: those without a gradient are left out.
        clip_value: the largest magnitude.
        foreach: accepted for torch's sake, without effect.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            gradient_values(parameter).clamp_(-float(clip_value), float(clip_value))


def gradient_values(parameter: Tensor) -> Tensor:
    """The numbers of a gradient, whole or row-sparse; writing to them changes it."""
    assert parameter.grad is not None
    if parameter.grad.is_sparse:
        return coalesce_gradient(parameter)._values()
    return parameter.grad.detach()


def _power(values: Tensor, order: float) -> Tensor:
    """Sum of ``|g|^order``, or the largest magnitude, in float64."""
    if not values.numel():
        return torch.zeros((), dtype=torch.float64, device=values.device)
    norm: Tensor = torch.linalg.vector_norm(values, order, dtype=torch.float64)
    return norm if math.isinf(order) else norm**order


def _combine(parts: Tensor, order: float) -> Tensor:
    return parts.max() if math.isinf(order) else parts.sum()
