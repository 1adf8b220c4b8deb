"""The active classes of a step: chosen from the labels alone, in a thread beside the backbone.

`alimm_ops.graph` has the rules: the labels, their neighbours by rank as far as the budget goes, then classes drawn at
random. Each rank fills a budget of its own, so that all have the same work; which classes are drawn depends on the
seed, the step and the shard, and on nothing else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from alimm.distributed.collectives import sum_over_ranks
from alimm.distributed.shards import Sharding
from alimm.losses.class_blocks import Classes
from alimm.seeding import stream_seed
from alimm_ops.graph.select_cpu import select_active

_threads: list[ThreadPoolExecutor] = []
if hasattr(os, "register_at_fork"):
    # A forked child has the executor, but not its thread.
    os.register_at_fork(after_in_child=_threads.clear)


def _worker() -> ThreadPoolExecutor:
    """One thread a process, started when first needed; a head stays free of it and can be copied."""
    if not _threads:
        _threads.append(ThreadPoolExecutor(1, "alimm-select"))
    return _threads[0]


@dataclass(frozen=True)
class ActiveSet:
    """What was chosen on this rank.

    Attributes:
        rows: local rows, int64 (A,), sorted.
        filled: which of them were drawn at random, bool (A,).
        own: rows of this rank.
        overflow: labels beyond the budget.
    """

    rows: torch.Tensor
    filled: torch.Tensor
    own: int
    overflow: int

    def correction(self, like: torch.Tensor) -> torch.Tensor:
        """-log of the chance with which each row was drawn, 0 for labels and neighbours, (A,)."""
        drawn = int(self.filled.sum())
        free = self.own - (len(self.rows) - drawn)
        value = math.log(free / drawn) if drawn else 0.0
        return self.filled.to(like) * value

    def telemetry(self, sharding: Sharding, like: torch.Tensor, watch: bool) -> dict[str, torch.Tensor]:
        """Counts of this rank for the log; on ``watch`` also the imbalance over the ranks, a collective."""
        drawn = int(self.filled.sum())
        counts = like.detach().new_tensor([len(self.rows), drawn, self.overflow, len(self.rows) - drawn])
        result = dict(active=counts[0], active_random=counts[1], overflow=counts[2])
        if watch:
            named = torch.zeros(sharding.world_size, dtype=counts.dtype, device=counts.device)
            named[sharding.rank] = counts[3]
            named = sum_over_ranks(named, sharding.group)
            result["imbalance"] = named.max() / named.mean().clamp(min=1)
        return result


class Selector:
    """Starts the selection of a step and hands out its result.

    Args:
        sharding: the rows of the ranks.
        active: a share of the classes in (0, 1], or a number of classes above 1, over all ranks.
        seed: of the draws.
        random_share: share of the budget that neighbours do not get, in [0, 1].
    """

    def __init__(self, sharding: Sharding, active: float | int, seed: int, random_share: float = 0.0) -> None:
        total = sharding.shards.num_rows
        if not 0 < active <= max(1, total) or (active > 1 and active != int(active)):
            raise ValueError(
                f"active must be a share in (0, 1] or a whole number of classes up to {total}, got {active}"
            )
        if not 0 <= random_share <= 1:
            raise ValueError(f"random_share must be in [0, 1], got {random_share}")
        share = float(active) if active <= 1 else active / total
        self.sharding, self.seed, self.random_share = sharding, seed, random_share
        self.budget = min(sharding.size, math.ceil(share * sharding.size - 1e-9))

    def start(
        self,
        distinct: torch.Tensor,
        neighbours: Any,
        step: int,
        device: torch.device,
        prepare: Callable[[torch.Tensor], None] | None = None,
    ) -> Callable[[], ActiveSet]:
        """Select for the labels of a batch; the result is there when the returned function is called.

        Args:
            distinct: global rows of the labels, int64, each once, the same on every rank.
            neighbours: ``(indptr, local rows, ranks)`` of those labels' neighbours in this shard, or None.
            step: number of the step.
            device: where the rows go.
            prepare: called in the thread with the local rows that were chosen.
        """
        low, high = self.sharding.start, self.sharding.stop
        labels = distinct[(distinct >= low) & (distinct < high)].sort().values - low
        key = stream_seed(self.seed, "active_classes", step, low)

        def work() -> ActiveSet:
            rows, filled, overflow = self._select(labels.cpu().numpy().astype(np.int32), neighbours, key)
            chosen = torch.from_numpy(rows.astype(np.int64)).to(device)
            if prepare is not None:
                prepare(chosen)
            return ActiveSet(chosen, torch.from_numpy(filled).to(device), self.sharding.size, overflow)

        return _worker().submit(work).result

    def _select(self, labels: np.ndarray, neighbours: Any, key: int) -> tuple[np.ndarray, np.ndarray, int]:
        size, empty = self.sharding.size, np.zeros(0, np.int32)
        none = np.zeros(1, np.int64), empty, empty.astype(np.uint16)
        near = self.budget - math.floor(self.random_share * self.budget)
        indptr, local, ranks = none if neighbours is None else neighbours
        chosen = select_active(indptr, local, ranks, labels, size, near, key)
        if near == self.budget:
            return chosen.active, chosen.filled.astype(bool), chosen.stats.overflow
        # What the graph gave is kept as labels are; the rest is drawn for the whole budget at once.
        kept = chosen.active[~chosen.filled]
        every = select_active(*none, kept, size, self.budget, key)
        return every.active, every.filled.astype(bool), max(0, len(labels) - self.budget)


@torch.no_grad()
def softmax_coverage(
    x_SD: torch.Tensor, rows_S: torch.Tensor, classes: Classes, active: torch.Tensor, sharding: Sharding
) -> torch.Tensor:
    """Share of the non-target softmax mass that the active classes hold, averaged over samples; equal on all ranks.

    Args:
        x_SD: features, the same on every rank.
        rows_S: global row of each sample's class; ignored samples (below 0) are left out.
        classes: all rows of this rank.
        active: the active local rows, sorted.
        sharding: whose rows these are.
    """
    logits = x_SD.new_empty((len(x_SD), len(classes)))
    for a, b, first, last in classes.blocks():
        classes.logits(x_SD, classes.rows(a, b)[0], a, b, first, last, logits[:, a:b])
    local = rows_S - sharding.start
    here = ((local >= 0) & (local < sharding.size)).nonzero()[:, 0]
    logits[here, local[here]] = -torch.inf
    # One constant for all ranks: cosine logits have a bound, others are shifted by their largest.
    high = torch.full((len(x_SD), sharding.world_size), -torch.inf, dtype=torch.float64, device=x_SD.device)
    if len(classes):
        high[:, sharding.rank] = logits.amax(1).double()
    high[:, torch.arange(sharding.world_size) != sharding.rank] = 0
    high = sum_over_ranks(high, sharding.group).amax(1)
    mass = torch.exp(logits.double() - high[:, None])
    both = sum_over_ranks(torch.stack([mass[:, active].sum(1), mass.sum(1)]), sharding.group)
    share = (both[0] / both[1].clamp(min=1e-300))[rows_S >= 0]
    return share.mean().to(x_SD.dtype) if len(share) else x_SD.new_tensor(float("nan"))
