"""Collectives of sharded heads: tensors of uneven length, exact gradients, errors that reach every rank.

All of them are the identity where torch.distributed is not running. They use all-gather and all-reduce only, which gloo
and NCCL both have, and add in an order that does not depend on the rank, so that every rank gets the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def rank_and_size(group: Any = None) -> tuple[int, int]:
    """Rank in the group and its size; (0, 1) where there is no process group."""
    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def all_gather_uneven(tensor: torch.Tensor, group: Any = None) -> list[torch.Tensor]:
    """The tensors of all ranks, by rank. Only the first dimension may differ; it may be 0.

    Args:
        tensor: of the same dtype and number of dimensions on every rank.
        group: the process group.
    """
    _, size = rank_and_size(group)
    if size == 1:
        return [tensor]
    counts = gather_counts(len(tensor), tensor.device, group)
    return gather_known(tensor, counts, group)


def gather_counts(count: int, device: torch.device, group: Any = None) -> list[int]:
    """One number of each rank, by rank."""
    _, size = rank_and_size(group)
    if size == 1:
        return [count]
    own = torch.tensor([count], device=device)
    counts = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(counts, own, group=group)
    return [int(value) for value in torch.cat(counts)]


def gather_known(tensor: torch.Tensor, counts: list[int], group: Any = None) -> list[torch.Tensor]:
    """`all_gather_uneven` where the first dimensions are known on every rank."""
    if len(counts) == 1:
        return [tensor]
    longest = max(counts)
    padded = tensor.contiguous()
    if len(tensor) < longest:
        padded = torch.cat([padded, padded.new_zeros((longest - len(tensor), *tensor.shape[1:]))])
    parts = [torch.empty_like(padded) for _ in counts]
    if longest:
        dist.all_gather(parts, padded, group=group)
    return [part[:count] for part, count in zip(parts, counts, strict=True)]


def sum_over_ranks(tensor: torch.Tensor, group: Any = None) -> torch.Tensor:
    """The sum over all ranks, the same bits on each. Meant for small tensors: it gathers and adds in rank order."""
    _, size = rank_and_size(group)
    if size == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


def raise_together(message: str | None, group: Any = None, device: torch.device | None = None) -> None:
    """Raise on every rank if any rank has something to say, so that none is left waiting in a collective.

    Args:
        message: what is wrong on this rank, or None. Every rank must call.
        group: the process group.
        device: where the group communicates; the CPU for gloo.

    Raises:
        ValueError: with the message of the first rank that has one.
    """
    rank, size = rank_and_size(group)
    if size == 1:
        if message is not None:
            raise ValueError(message)
        return
    text = b"" if message is None else message.encode()
    own = torch.tensor(list(text), dtype=torch.uint8, device=device)
    for number, part in enumerate(all_gather_uneven(own, group)):
        if len(part):
            told = bytes(part.tolist()).decode()
            raise ValueError(told if number == rank else f"{told} (on rank {number} of {size})")


class _GatherRows(torch.autograd.Function):
    """All-gather along the first dimension; backward adds the gradients of all ranks and hands back the own slice."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, counts: list[int], group: Any, factor: float) -> torch.Tensor:
        rank, _ = rank_and_size(group)
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        ctx.group, ctx.factor = group, factor
        return torch.cat(gather_known(tensor, counts, group))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        # gloo's reduce-scatter is an all-reduce for each rank; one all-reduce and a slice are never slower there.
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        own = total[ctx.start : ctx.start + ctx.count]
        return own * ctx.factor if ctx.factor != 1 else own.clone(), None, None, None


def gather_features(
    features_BD: torch.Tensor, counts: list[int], group: Any = None, ddp_average: bool = True
) -> torch.Tensor:
    """The features of the global batch, (sum of counts, D), with an exact gradient.

    Every rank computes a share of one loss over the global batch, so the gradient of a rank's features is the sum of
    what all ranks have to say about them. DDP divides the gradients of the backbone by the number of ranks P, as if
    each rank had a loss of its own; with ``ddp_average`` the gradient is therefore handed back P times, and what the
    optimizer sees is the gradient of the one loss, whatever P.

    Args:
        features_BD: this rank's features; B may differ by rank and may be 0.
        counts: B of every rank, as `gather_counts` gives it.
        group: the process group.
        ddp_average: whether gradients are averaged over the ranks behind the features, as DDP does.
    """
    if len(counts) == 1:
        return features_BD
    gathered: torch.Tensor = _GatherRows.apply(features_BD, counts, group, float(len(counts)) if ddp_average else 1.0)
    return gathered
