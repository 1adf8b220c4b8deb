"""The best classes of each sample over all ranks, without the scores of all classes in one place.

Equal scores are ordered by class id, so the answer does not depend on the number of ranks or the size of a block.
"""

from __future__ import annotations

import torch

from alimm.distributed.collectives import all_gather_uneven
from alimm.distributed.permutation import ClassPermutation
from alimm.distributed.shards import Sharding
from alimm.losses.class_blocks import Classes

PADDING = -1


def sharded_topk(
    x_BD: torch.Tensor, classes: Classes, k: int, sharding: Sharding, permutation: ClassPermutation
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The k largest logits of each sample of the global batch. Every rank must call it with the same features.

    Args:
        x_BD: features of the global batch.
        classes: all rows of this rank (no active set).
        k: how many, at least 1.
        sharding: whose rows these are.
        permutation: between rows and class ids.

    Returns:
        Logits (B, k), best first; class ids (B, k), padded with -1 (and minus infinity) where there are fewer than k
        classes; and the log of the softmax normaliser over all classes, (B,).
    """
    batch = len(x_BD)
    best = x_BD.new_full((batch, k), -torch.inf)
    ids = torch.full((batch, k), PADDING, dtype=torch.int64, device=x_BD.device)
    high, total = x_BD.new_full((batch,), -torch.inf), x_BD.new_zeros(batch)
    for a, b, first, last in classes.blocks():
        z = x_BD.new_empty((batch, b - a))
        classes.logits(x_BD, classes.rows(a, b)[0], a, b, first, last, z)
        higher = torch.maximum(high, z.amax(1))
        total = total * torch.exp(high - higher) + torch.exp(z - higher[:, None]).sum(1)
        high = higher
        found = permutation.classes(torch.arange(a, b, device=x_BD.device) + sharding.start)
        best, ids = merge(best, ids, *_block_topk(z, found, k))
    parts = [
        torch.stack(all_gather_uneven(part[None], sharding.group)) if sharding.world_size > 1 else part[None, None]
        for part in (best, ids, high, total)
    ]
    bests, idss, highs, totals = (part[:, 0] for part in parts)
    best, ids = bests[0], idss[0]
    for other, other_ids in zip(bests[1:], idss[1:], strict=True):
        best, ids = merge(best, ids, other, other_ids)
    top = highs.amax(0)
    lost = highs == -torch.inf
    share = torch.exp(torch.where(lost, highs, highs - top))
    return best, ids, top + (totals * share).sum(0).log()


def _block_topk(z: torch.Tensor, ids: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of a block; where more are tied with the last than there is room, those with the least ids."""
    k = min(k, z.shape[1])
    values, places = z.topk(k, dim=1)
    chosen = ids[places]
    crowded = ((z >= values[:, -1:]).sum(1) > k).nonzero()[:, 0]
    for row in crowded.tolist():
        tied = (z[row] >= values[row, -1]).nonzero()[:, 0]
        order = torch.argsort(ids[tied])
        order = order[torch.argsort(z[row, tied[order]], descending=True, stable=True)][:k]
        values[row], chosen[row] = z[row, tied[order]], ids[tied[order]]
    return values, chosen


def merge(
    values: torch.Tensor, ids: torch.Tensor, more: torch.Tensor, more_ids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best of two lists of each sample, as long as the first, by (value descending, id ascending).

    Args:
        values: (B, k).
        ids: their ids, (B, k).
        more: (B, any).
        more_ids: their ids.
    """
    k = values.shape[1]
    joined, names = torch.cat([values, more], 1), torch.cat([ids, more_ids], 1)
    # Padding has the id -1 and must come after a class whose logit is minus infinity.
    order = torch.argsort(torch.where(names < 0, torch.iinfo(torch.int64).max, names), dim=1, stable=True)
    joined, names = joined.gather(1, order), names.gather(1, order)
    order = torch.argsort(joined, dim=1, descending=True, stable=True)[:, :k]
    return joined.gather(1, order), names.gather(1, order)
